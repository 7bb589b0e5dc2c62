//! FlyLoRA: a frozen sparse `A`, of whose outputs a token uses the largest:
//!
//! ```text
//! z = A x        M = the k largest of |z + d|        y = W0 x + (alpha / r) B (M ⊙ z)
//! d_i += u · sign(c̄ − c_i)    after every step, c_i: how many tokens used i
//! ```
//!
//! arXiv 2510.08396. Every row of `A: [r, in]` has `max(1, ⌊density · in⌋)` entries from `N(0, 1/r²)` and
//! zeros elsewhere; it is drawn once and never trained. Which ranks a token uses follows from `z`, so there
//! is no router to train; `d` evens out the load, without a gradient. `B` starts at zero. The published code
//! moves `d` after every forward pass of a layer; here it is after every optimizer step, so that
//! micro-batches and layers computed twice change nothing.
//!
//! Computed as a mixture of `r` experts of rank 1 with gates 0 and 1.

use crate::described::{Described, read_lora_like};
use crate::error::{Fault, Result};
use crate::low_rank_options::check_weight;
use crate::merge::{Gates, Merge};
use crate::method::{MethodOptions, product};
use crate::options::{LoraConfigKeys, check_common, scale, to_map};
use crate::random::{layer_dropout, normal, random_stream};
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, export_by_name, load_by_name, take_tensor};
use crate::tuned::{Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::low_rank::{Gate, LowRank, Mask, adapted_linear, router_scores};
use hydralora_kernels::{DType, Gradients, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, CustomLinear, Pass, Site, SiteShape, Update};
use rand::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 3] = ["active_rank", "density", "bias_rate"];

/// Options of FlyLoRA in a recipe; the defaults are the published code's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Rank `r`.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of `A`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// How many ranks `k` a token uses.
    active_rank: usize,
    /// Share of the entries of `A` that are not zero; `active_rank / rank` if not given.
    density: Option<f64>,
    /// How far `d` moves in a step.
    bias_rate: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 32,
            alpha: 64.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("ffn".to_owned()),
            active_rank: 8,
            density: None,
            bias_rate: 1e-3,
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "flylora";
    const SUMMARY: &'static str = "a frozen sparse A, of whose outputs each token uses the largest";
    const PEFT_TYPE: &'static str = "FLYLORA";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        if !(1..=self.rank.max(1)).contains(&self.active_rank) {
            let message =
                format!("is {}; expected 1 to rank, which is {}", self.active_rank, self.rank);
            faults.push(Fault::new("method.active_rank", message));
        }
        if let Some(density) = self.density.filter(|density| !(*density > 0.0 && *density <= 1.0)) {
            let message = format!("is {density}; expected a share of A, above 0 and at most 1");
            faults.push(Fault::new("method.density", message));
        }
        faults.extend(check_weight("bias_rate", self.bias_rate));
        faults
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        read_lora_like(config, &OWN_KEYS)
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let keys = LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: self.targets.clone(),
            ..LoraConfigKeys::default()
        };
        let mut config = keys.write(Self::PEFT_TYPE);
        let own = self.to_recipe();
        config.extend(OWN_KEYS.map(|key| (key.to_owned(), own[key].clone())));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let of_site = |shape: &SiteShape| {
            product(&[self.rank, shape.in_features.max(1).saturating_add(shape.out_features)])
        };
        sites.iter().map(of_site).fold(0, usize::saturating_add)
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let rank = self.rank;
        let layer = |&shape: &SiteShape| {
            let SiteShape { site, in_features, out_features } = shape;
            let b = Tensor::zeros(dtype, [out_features, rank]);
            let layer = Layer {
                shape,
                a: Var::constant(self.sparse(seed, &a_name(site), in_features, dtype)),
                b: Trainable::new(format!("{site}.lora_B.weight"), Role::B, b),
                bias: vec![0.0; rank],
                used: Mutex::new(vec![0; rank]),
            };
            (site, layer)
        };
        let layers = sites.iter().map(layer).collect();
        Box::new(FlyLora { options: self.clone(), layers })
    }
}

impl Options {
    /// Draws the frozen `A: [r, in]`.
    fn sparse(&self, seed: u64, name: &str, inputs: usize, dtype: DType) -> Tensor {
        let rank = self.rank;
        let density = self.density.unwrap_or(self.active_rank as f64 / rank as f64);
        let filled = ((density * inputs as f64) as usize).clamp(1, inputs.max(1));
        let values = normal(seed, name, 1.0 / rank as f64, DType::F64, [rank, filled]).to_f64();
        let mut random = random_stream(seed, &format!("{name}.places"));
        let mut a = vec![0.0; rank * inputs];
        for (row, values) in a.chunks_exact_mut(inputs.max(1)).zip(values.chunks_exact(filled)) {
            // The first of a shuffled list, as far as they are needed.
            let mut places: Vec<usize> = (0..inputs).collect();
            for (at, value) in values.iter().enumerate() {
                let left = (inputs - at) as u64;
                let drawn = at + ((u64::from(random.next_u32()) * left) >> 32) as usize;
                places.swap(at, drawn);
                row[places[at]] = *value;
            }
        }
        Tensor::from_f64(dtype, &a, [rank, inputs])
    }
}

fn a_name(site: Site) -> String {
    format!("{site}.lora_A.weight")
}

fn bias_name(site: Site) -> String {
    format!("{site}.lora_d.weight")
}

struct Layer {
    shape: SiteShape,
    /// `[r, in]`, never trained.
    a: Var,
    /// `[out, r]`.
    b: Trainable,
    /// `d`.
    bias: Vec<f64>,
    /// How many tokens used each rank since the last step.
    used: Mutex<Vec<u64>>,
}

impl Layer {
    /// Gates `[T, r]`, 1 for the ranks that each row of `x` uses and 0 for others.
    fn gates(&self, x: &Var, most: usize, counted: bool) -> Var {
        let _guard = no_grad();
        // In training many rows at once; elsewhere so that a row's choice is its own.
        let z = if counted { linear(x, &self.a, None) } else { router_scores(x, &self.a, None) };
        let (rows, rank) = (z.value().rows(), z.value().cols());
        let mut gates = vec![0.0; rows * rank];
        let mut used = vec![0; rank];
        for (row, gates) in z.value().to_f64().chunks_exact(rank).zip(gates.chunks_exact_mut(rank))
        {
            let size = |at: usize| (row[at] + self.bias[at]).abs();
            let mut order: Vec<usize> = (0..rank).collect();
            order.sort_by(|&i, &j| size(j).total_cmp(&size(i)).then(i.cmp(&j)));
            for &at in order.iter().take(most) {
                gates[at] = 1.0;
                used[at] += 1;
            }
        }
        if counted {
            let mut sums = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            sums.iter_mut().zip(used).for_each(|(sum, used)| *sum += used);
        }
        Var::constant(Tensor::from_f64(z.value().dtype(), &gates, [rows, rank]))
    }

    fn bias_tensor(&self) -> Tensor {
        Tensor::from_f64(self.a.value().dtype(), &self.bias, [self.bias.len()])
    }
}

/// A live FlyLoRA adapter.
struct FlyLora {
    options: Options,
    layers: BTreeMap<Site, Layer>,
}

impl Adapter for FlyLora {
    // The load is counted over all tokens.
    fn rows_stand_alone(&self) -> bool {
        self.options.bias_rate == 0.0
    }

    fn update(&self, site: Site, _rows: usize, _pass: &Pass<'_>) -> Update<'_> {
        if self.layers.contains_key(&site) { Update::Custom(self) } else { Update::None }
    }
}

impl CustomLinear for FlyLora {
    fn forward(
        &self,
        site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        _block_gates: Option<&Var>,
        pass: &Pass<'_>,
    ) -> Var {
        let Some(layer) = self.layers.get(&site) else { return frozen.forward(x) };
        let options = &self.options;
        let gates = layer.gates(x, options.active_rank, pass.dropout_seed().is_some());
        let dropout = layer_dropout(site, options.dropout, pass);
        let update = LowRank {
            a: &layer.a,
            b: layer.b.var(),
            num_experts: options.rank,
            gate: Gate::Given(&gates),
            scale: scale(options.alpha, options.rank, options.use_rslora),
            mask: dropout.map_or(Mask::None, Mask::Shared),
        };
        adapted_linear(x, frozen, &update).y
    }
}

impl Parameters for FlyLora {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.layers.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.layers.values().map(|layer| &layer.b).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.layers.values_mut().map(|layer| &mut layer.b).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        export_by_name(self.trainables(), pick)
    }
}

impl FlyLora {
    /// `A` and `d` of every layer, by name.
    fn fixed(&self) -> TensorMap {
        let each = |(&site, layer): (&Site, &Layer)| {
            [(a_name(site), layer.a.value().clone()), (bias_name(site), layer.bias_tensor())]
        };
        self.layers.iter().flat_map(each).collect()
    }

    fn load_fixed(&mut self, tensors: &mut TensorMap) -> Vec<String> {
        let mut faults = Vec::new();
        let rank = self.options.rank;
        for (&site, layer) in &mut self.layers {
            let shape = [rank, layer.shape.in_features];
            if let Some(a) = take_tensor(tensors, &a_name(site), &shape, &mut faults) {
                layer.a = Var::constant(a.to_dtype(layer.a.value().dtype()));
            }
            if let Some(bias) = take_tensor(tensors, &bias_name(site), &[rank], &mut faults) {
                layer.bias = bias.to_f64();
            }
        }
        faults
    }
}

impl Persist for FlyLora {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        load_by_name(self.trainables_mut(), tensors)
    }

    fn file_tensors(&self) -> TensorMap {
        let mut map = self.tensors();
        map.extend(self.fixed());
        map
    }

    fn load_file(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = self.load(tensors).err().unwrap_or_default();
        faults.extend(self.load_fixed(tensors));
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn state(&self) -> TensorMap {
        self.fixed()
    }

    fn load_state(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let faults = self.load_fixed(tensors);
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

impl TrainHooks for FlyLora {
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        if self.options.dropout > 0.0 { vec!["method.dropout"] } else { Vec::new() }
    }

    fn begin(&mut self, _plan: &TrainingPlan<'_>) -> Result<()> {
        // What was computed before the run counts for nothing.
        for layer in self.layers.values_mut() {
            layer.used.get_mut().unwrap_or_else(PoisonError::into_inner).fill(0);
        }
        Ok(())
    }

    fn tallies(&mut self) -> Vec<&mut [u64]> {
        let layers = self.layers.values_mut();
        let used = layers.map(|layer| {
            layer.used.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut_slice()
        });
        used.collect()
    }

    fn after_step(&mut self, _step: usize, _gradients: &Gradients) {
        let rate = self.options.bias_rate;
        for layer in self.layers.values_mut() {
            let used = layer.used.get_mut().unwrap_or_else(PoisonError::into_inner);
            let mean = used.iter().sum::<u64>() as f64 / used.len().max(1) as f64;
            for (bias, used) in layer.bias.iter_mut().zip(used.iter_mut()) {
                let short = mean - *used as f64;
                // As a file holds it, so that a run that goes on from one is the same.
                let moved = *bias + if short == 0.0 { 0.0 } else { rate * short.signum() };
                *bias = match layer.a.value().dtype() {
                    DType::F32 => f64::from(moved as f32),
                    DType::F64 => moved,
                };
                *used = 0;
            }
        }
    }
}

impl Mergeable for FlyLora {
    fn merge(&self, site: Site, _gates: &Gates) -> Merge<'_> {
        if !self.layers.contains_key(&site) {
            return Merge::Unchanged;
        }
        Merge::Refused(
            "it uses other ranks for each token, which no weight of the base can hold".to_owned(),
        )
    }
}

impl Tuned for FlyLora {}
