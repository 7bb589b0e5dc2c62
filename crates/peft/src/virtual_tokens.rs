//! The adapter that the prompt methods share: a learned table of virtual tokens `[p, width]`, either
//! trained itself or made by a small network from a table that is trained with it, and used as
//! embeddings before every sequence or as keys and values before those of every layer.
//!
//! ```text
//! table        V = E
//! mlp          V = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃
//! lstm         V = W₂ relu(W₁ LSTM(E) + b₁) + b₂          the LSTM bidirectional
//! projection   V = W₂ tanh(W₁ E + b₁) + b₂
//! ```
//!
//! A file holds `V` alone, as `prompt_embeddings`; an adapter read from one trains `V` directly.

use crate::described::{Described, from_own};
use crate::error::{Error, Fault, Result};
use crate::merge::{Gates, Merge};
use crate::method::MethodOptions;
use crate::random::{kaiming_bound, normal, random_stream, uniform};
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, export_by_name, load_by_name, take_tensor};
use crate::tuned::{Base, Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned};
use hydralora_kernels::ops::activation::{relu, tanh};
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::lstm::{Lstm, lstm};
use hydralora_kernels::ops::rows::{columns, join_columns};
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, KeyValue, Kind, Pass, Site, SiteShape};
use rand::Rng;
use serde_json::{Map, Value};

/// Name of the virtual tokens in a file.
const FILE_NAME: &str = "prompt_embeddings";
/// Name of the trained table.
const TABLE_NAME: &str = "prompt_encoder.embedding.weight";

/// Widths of the model that virtual tokens depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Widths {
    pub(crate) hidden: usize,
    pub(crate) key_value: usize,
    pub(crate) layers: usize,
}

impl Widths {
    /// Those of the model whose layers are `sites`.
    pub(crate) fn of(sites: &[SiteShape]) -> Self {
        let find = |kind: Kind| sites.iter().find(|shape| shape.site.kind().overlaps(kind));
        let query = find(Kind::QUERY);
        let key_value = find(Kind::KEY).map_or(0, |shape| match shape.site.kind() {
            Kind::KEY => shape.out_features,
            // Queries, keys and values in one; queries are as wide as what the output layer reads.
            _ => {
                let queries = find(Kind::OUTPUT).map_or(0, |output| output.in_features);
                shape.out_features.saturating_sub(queries) / 2
            }
        });
        Self {
            hidden: query.map_or(0, |shape| shape.in_features),
            key_value,
            layers: sites.iter().map(|shape| shape.site.layer + 1).max().unwrap_or(0),
        }
    }
}

/// Where the virtual tokens go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before the embeddings.
    Prompt,
    /// Before the keys and values: row by row, key then value of each layer, of this width.
    Prefix(usize),
}

/// How the virtual tokens are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoder {
    Table,
    Mlp { hidden: usize },
    Lstm { hidden: usize, num_layers: usize },
    Projection { hidden: usize },
}

/// What the table starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Normally distributed numbers of standard deviation 1.
    Normal,
    /// Zeros.
    Zero,
    /// The embeddings of random tokens of the base model.
    Vocabulary,
    /// The embeddings of a text's tokens, repeated or cut to length.
    Text(String),
}

/// Everything that decides the shape and the computation of [`VirtualTokens`].
#[derive(Clone, Debug)]
pub(crate) struct VirtualSpec {
    pub(crate) num_virtual_tokens: usize,
    pub(crate) place: Place,
    pub(crate) encoder: Encoder,
    /// Width of the trained table.
    pub(crate) table_width: usize,
    /// Width of the result.
    pub(crate) width: usize,
    pub(crate) start: Start,
}

/// Live virtual tokens.
pub(crate) struct VirtualTokens {
    options: Box<dyn MethodOptions>,
    /// The options of the same tokens once only the result is left.
    without_encoder: Option<Box<dyn MethodOptions>>,
    spec: VirtualSpec,
    seed: u64,
    dtype: DType,
    /// The table, then the network's tensors in the order they are used.
    tensors: Vec<Trainable>,
    /// Whether the start values from the base model are still to come.
    waiting: bool,
}

impl VirtualTokens {
    pub(crate) fn new(
        options: Box<dyn MethodOptions>,
        without_encoder: Option<Box<dyn MethodOptions>>,
        spec: VirtualSpec,
        dtype: DType,
        seed: u64,
    ) -> Self {
        let table = [spec.num_virtual_tokens, spec.table_width];
        let table = match spec.start {
            Start::Zero => Tensor::zeros(dtype, table),
            _ => normal(seed, TABLE_NAME, 1.0, dtype, table),
        };
        let mut tensors = vec![Trainable::new(TABLE_NAME.to_owned(), Role::Prompt, table)];
        let mut draw = |name: String, bound: f64, shape: &[usize]| {
            let name = format!("prompt_encoder.{name}");
            let start = uniform(seed, &name, bound, dtype, shape);
            tensors.push(Trainable::new(name, Role::Prompt, start));
        };
        let (inputs, width) = (spec.table_width, spec.width);
        let mut dense = |layer: &str, inputs: usize, outputs: usize| {
            let bound = kaiming_bound(inputs);
            draw(format!("{layer}.weight"), bound, &[outputs, inputs]);
            draw(format!("{layer}.bias"), bound, &[outputs]);
        };
        match spec.encoder {
            Encoder::Table => {}
            Encoder::Mlp { hidden } => {
                dense("mlp_head.0", inputs, hidden);
                dense("mlp_head.2", hidden, hidden);
                dense("mlp_head.4", hidden, width);
            }
            Encoder::Projection { hidden } => {
                dense("transform.0", inputs, hidden);
                dense("transform.2", hidden, width);
            }
            Encoder::Lstm { hidden, num_layers } => {
                let bound = kaiming_bound(hidden);
                for layer in 0..num_layers {
                    let inputs = if layer == 0 { inputs } else { 2 * hidden };
                    for direction in ["", "_reverse"] {
                        let name = |kind: &str| format!("lstm_head.{kind}_l{layer}{direction}");
                        draw(name("weight_ih"), bound, &[4 * hidden, inputs]);
                        draw(name("weight_hh"), bound, &[4 * hidden, hidden]);
                        draw(name("bias_ih"), bound, &[4 * hidden]);
                        draw(name("bias_hh"), bound, &[4 * hidden]);
                    }
                }
                let mut dense = |layer: &str, inputs: usize, outputs: usize| {
                    let bound = kaiming_bound(inputs);
                    draw(format!("{layer}.weight"), bound, &[outputs, inputs]);
                    draw(format!("{layer}.bias"), bound, &[outputs]);
                };
                dense("mlp_head.0", 2 * hidden, 2 * hidden);
                dense("mlp_head.2", 2 * hidden, width);
            }
        }
        let waiting = matches!(spec.start, Start::Vocabulary | Start::Text(_));
        Self { options, without_encoder, spec, seed, dtype, tensors, waiting }
    }

    /// The virtual tokens `[p, width]`.
    fn encode(&self) -> Var {
        let at = |index: usize| self.tensors[index].var();
        let dense = |x: &Var, index: usize| linear(x, at(index), Some(at(index + 1)));
        let table = at(0);
        match self.spec.encoder {
            Encoder::Table => table.clone(),
            Encoder::Mlp { .. } => dense(&relu(&dense(&relu(&dense(table, 1)), 3)), 5),
            Encoder::Projection { .. } => dense(&tanh(&dense(table, 1)), 3),
            Encoder::Lstm { num_layers, .. } => {
                let mut x = table.clone();
                for layer in 0..num_layers {
                    let [forward, backward] = [0, 1].map(|direction| {
                        let first = 1 + 8 * layer + 4 * direction;
                        let weights = Lstm {
                            input_weight: at(first),
                            hidden_weight: at(first + 1),
                            input_bias: at(first + 2),
                            hidden_bias: at(first + 3),
                        };
                        lstm(&x, &weights, direction == 1)
                    });
                    x = join_columns(&forward, &backward);
                }
                let first = 1 + 8 * num_layers;
                dense(&relu(&dense(&x, first)), first + 2)
            }
        }
    }

    fn encoded(&self, pass: &Pass<'_>) -> Var {
        pass.shared(0, "virtual tokens", || self.encode())
    }
}

impl Adapter for VirtualTokens {
    fn rows_stand_alone(&self) -> bool {
        true
    }

    fn prompt(&self, pass: &Pass<'_>) -> Option<Var> {
        (self.spec.place == Place::Prompt).then(|| self.encoded(pass))
    }

    fn prefix(&self, layer: usize, pass: &Pass<'_>) -> Option<KeyValue> {
        let Place::Prefix(width) = self.spec.place else { return None };
        let all = self.encoded(pass);
        let part = |index: usize| columns(&all, index * width..(index + 1) * width);
        Some(KeyValue { keys: part(2 * layer), values: part(2 * layer + 1) })
    }
}

impl Parameters for VirtualTokens {
    fn options(&self) -> &dyn MethodOptions {
        self.options.as_ref()
    }

    fn sites(&self) -> Vec<Site> {
        Vec::new()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.tensors.iter().collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.tensors.iter_mut().collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        export_by_name(self.trainables(), pick)
    }
}

impl Persist for VirtualTokens {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        if tensors.contains_key(FILE_NAME) {
            let shape = [self.spec.num_virtual_tokens, self.spec.width];
            let mut faults = Vec::new();
            let Some(table) = take_tensor(tensors, FILE_NAME, &shape, &mut faults) else {
                return Err(faults);
            };
            let table = table.to_dtype(self.dtype);
            self.tensors = vec![Trainable::new(TABLE_NAME.to_owned(), Role::Prompt, table)];
            self.spec.encoder = Encoder::Table;
            if let Some(options) = self.without_encoder.take() {
                self.options = options;
            }
        } else {
            load_by_name(&mut self.tensors, tensors)?;
        }
        self.waiting = false;
        Ok(())
    }

    fn file_tensors(&self) -> TensorMap {
        let _guard = no_grad();
        [(FILE_NAME.to_owned(), self.encode().into_value())].into()
    }

    fn peft_config(&self, _all: &[SiteShape]) -> Map<String, Value> {
        self.options.to_peft()
    }
}

impl TrainHooks for VirtualTokens {
    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        let config = base.decoder.config();
        if matches!(self.spec.place, Place::Prefix(_)) && !config.has_equal_keys() {
            let message = format!(
                "puts keys and values of one width into every layer, and layers of `{}` differ in \
                 theirs or have none; expected another method",
                config.model_type
            );
            return Err(Error::Options { faults: vec![Fault::new("method", message)] });
        }
        let count = self.spec.num_virtual_tokens;
        let tokens: Vec<u32> = match &self.spec.start {
            Start::Normal | Start::Zero => return Ok(()),
            Start::Vocabulary => {
                let mut random = random_stream(self.seed, TABLE_NAME);
                let size = base.decoder.config().vocab_size as u64;
                let mut draw = || ((u64::from(random.next_u32()) * size) >> 32) as u32;
                (0..count).map(|_| draw()).collect()
            }
            Start::Text(text) => {
                let bos = base.tokenizer.bos().filter(|_| base.tokenizer.add_bos());
                let mut tokens: Vec<u32> = bos.map(|(id, _)| id).into_iter().collect();
                tokens.extend(base.tokenizer.encode(text)?);
                if tokens.is_empty() {
                    let faults = vec![Fault::new("method.init_text", "gives no token")];
                    return Err(Error::Options { faults });
                }
                tokens.iter().copied().cycle().take(count).collect()
            }
        };
        let rows = base.decoder.embeddings(&tokens)?.to_dtype(self.dtype);
        self.tensors[0].parameter.set(rows);
        self.waiting = false;
        Ok(())
    }

    fn begin(&mut self, _plan: &TrainingPlan<'_>) -> Result<()> {
        if self.waiting {
            let message = "asks for embeddings of the base model, which were not given";
            return Err(Error::Options { faults: vec![Fault::new("method.init", message)] });
        }
        Ok(())
    }
}

impl Mergeable for VirtualTokens {
    fn merge(&self, _site: Site, _gates: &Gates) -> Merge<'_> {
        let what = match self.spec.place {
            Place::Prompt => "embeddings put before every text",
            Place::Prefix(_) => "keys and values put before those of every text",
        };
        Merge::Refused(format!("it consists of {what}, which no weight of the base can hold"))
    }
}

impl Tuned for VirtualTokens {}

/// Options of PEFT's prompt methods that change the computation and are not supported.
const REFUSED_UNLESS: &[(&str, &[&str])] =
    &[("num_transformer_submodules", &["1", "null"]), ("modules_to_save", &["null", "[]"])];

/// Virtual tokens belong to no single layer.
pub(crate) fn every_layer() -> Targets {
    Targets::One("all".to_owned())
}

/// Reads the options of a prompt method out of PEFT's file: the number of tokens, and those of
/// `keys` that are there, each with the name a recipe gives it.
///
/// # Errors
/// Every option that is wrong or not supported here.
pub(crate) fn from_file<O: Described>(
    config: &Map<String, Value>,
    keys: &[(&str, &str)],
) -> Result<O, Vec<Fault>> {
    let count = config.get("num_virtual_tokens").cloned().unwrap_or(Value::Null);
    let own = (keys.iter())
        .filter_map(|(key, option)| Some(((*option).to_owned(), config.get(*key)?.clone())))
        .filter(|(_, value)| !value.is_null())
        .chain([("num_virtual_tokens".to_owned(), count)])
        .collect();
    from_own(config, REFUSED_UNLESS, &own)
}

/// Faults of the sizes that the prompt methods share.
pub(crate) fn check_sizes(
    num_virtual_tokens: usize,
    encoder_hidden_size: Option<usize>,
) -> Vec<Fault> {
    let sizes = [
        ("num_virtual_tokens", Some(num_virtual_tokens)),
        ("encoder_hidden_size", encoder_hidden_size),
    ];
    let zero = sizes.into_iter().filter(|(_, size)| *size == Some(0));
    zero.map(|(option, _)| Fault::new(format!("method.{option}"), "is 0; expected at least 1"))
        .collect()
}

/// What every prompt method's `adapter_config.json` holds. The model's widths stay open: PEFT fills
/// them in from the model it loads.
pub(crate) fn common_config(peft_type: &str, num_virtual_tokens: usize) -> Map<String, Value> {
    let config = serde_json::json!({
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": true,
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,
        "token_dim": null,
        "num_attention_heads": null,
        "num_layers": null,
        "modules_to_save": null,
    });
    crate::options::to_map(&config)
}
