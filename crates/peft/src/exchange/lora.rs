//! Plain LoRAs as PEFT's folders hold them, apart from any model: `A` and `B` per layer and one
//! scale.

use super::shapes_in;
use crate::error::{Error, Result};
use crate::io::{self, Metadata};
use crate::low_rank::Sizes;
use crate::merge::{Factors, Gates, Merge, MergePlan};
use crate::methods;
use crate::options;
use crate::targets::module_names;
use crate::trainable::TensorMap;
use crate::tuned::{Beside, Tuned};
use hydralora_kernels::{DType, Tensor};
use hydralora_model::ModelConfig;
use hydralora_model::adapter::{Site, SiteShape};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The two matrices of a layer.
#[derive(Clone, Debug)]
pub struct Pair {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
}

impl Pair {
    /// Adds rows and columns of zeros up to `rank`.
    pub(crate) fn widen(&mut self, rank: usize) {
        let (own, inputs, outputs) = (self.a.rows(), self.a.cols(), self.b.rows());
        if own >= rank {
            return;
        }
        let mut a = self.a.to_f64();
        a.resize(rank * inputs, 0.0);
        let values = self.b.to_f64();
        let mut b = Vec::with_capacity(outputs * rank);
        for row in 0..outputs {
            b.extend_from_slice(&values[row * own..(row + 1) * own]);
            b.resize((row + 1) * rank, 0.0);
        }
        self.a = Tensor::from_f64(self.a.dtype(), &a, [rank, inputs]);
        self.b = Tensor::from_f64(self.b.dtype(), &b, [outputs, rank]);
    }
}

/// A LoRA: `y = W0 x + scale · B A x` at some layers, tensors in `f32`.
#[derive(Clone, Debug)]
pub struct Lora {
    /// Where it was read from, for messages.
    pub path: PathBuf,
    /// Rank `r` of every pair.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Whether the scale is `alpha / √r` instead of `alpha / r`.
    pub use_rslora: bool,
    /// The pairs by layer.
    pub sites: BTreeMap<Site, Pair>,
    /// What is trained beside them: rows of tokens, whole tensors.
    pub beside: Beside,
    /// The layers' names in the configuration.
    pub target_modules: Value,
    /// The base's name in the configuration.
    pub base_model: String,
    /// What it was trained with, if that is recorded.
    pub metadata: Option<Metadata>,
}

impl Lora {
    /// Reads a LoRA's folder. Layers of several ranks or scales are brought to one.
    ///
    /// # Errors
    /// If it is not a plain LoRA, or something in it is malformed or not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        let config = io::read_config(folder)?;
        let method = io::read_options(folder)?;
        let options = method.to_peft();
        let kind = options.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        let decomposed = options.get("use_dora") == Some(&json!(true));
        if kind != "LORA" || config.contains_key("lora_nums") || decomposed {
            let found = if decomposed {
                "use_dora: its magnitudes are in no LoRA".to_owned()
            } else {
                format!("peft_type {kind}")
            };
            return Err(Error::Malformed {
                path: folder.join(io::CONFIG_FILE),
                message: format!("is no plain LoRA ({found}); expected one"),
            });
        }
        let keys = options::LoraConfigKeys::read(&options, &["use_dora"], true)
            .map_err(|faults| Error::Options { faults })?;
        let sizes = Sizes::of(&keys);
        let path = io::stored_tensors(folder);
        let mut tensors = io::decode(&path, DType::F32)?;
        let shapes = shapes_in(&tensors);
        let mut rest = tensors.clone();
        let mut live = method.build(&shapes, DType::F32, 0);
        let mut mismatches = live.load_file(&mut rest).err().unwrap_or_default();
        mismatches.extend(rest.keys().map(|name| format!("`{name}` is not LoRA's")));
        let beside = live.beside();
        if beside.is_none() {
            let more = live.beside_layers().unwrap_or_default();
            mismatches.push(format!("trains {more} beside its layers"));
        }
        let (mut sites, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for SiteShape { site, .. } in shapes {
            // Their shapes are those that the live adapter took.
            let mut take = |part: &str| tensors.remove(&format!("{site}.{part}.weight"));
            if let (Some(a), Some(b)) = (take("lora_A"), take("lora_B")) {
                sites.insert(site, Pair { a, b });
                scales.insert(site, sizes.at(site).scale);
            }
        }
        if sites.is_empty() && mismatches.is_empty() {
            mismatches.push("holds no tensor of a layer".to_owned());
        }
        if !mismatches.is_empty() {
            mismatches.truncate(8);
            return Err(Error::Tensors { path, mismatches });
        }
        let base = config.get("base_model_name_or_path").and_then(Value::as_str);
        let one_size = sites.keys().all(|&site| sizes.at(site) == sizes.general());
        let (rank, alpha, use_rslora) = match one_size {
            true => (keys.rank, keys.alpha, keys.use_rslora),
            false => {
                let (rank, scale) = even_out(&mut sites, &scales);
                (rank, scale * rank as f64, false)
            }
        };
        Ok(Self {
            path: folder.to_path_buf(),
            rank,
            alpha,
            use_rslora,
            sites,
            beside: beside.unwrap_or_default(),
            target_modules: config.get("target_modules").cloned().unwrap_or(Value::Null),
            base_model: base.unwrap_or_default().to_owned(),
            metadata: io::read_metadata(folder)?,
        })
    }

    /// The LoRA that does what `tuned` does with the gates of routed layers held at `gates`. Its
    /// rank is `N·r` for `N` heads, each head's columns scaled by its gate; with `compact` the heads
    /// of a shared `A` are added up, which gives the same update in rank `r`.
    ///
    /// # Errors
    /// If some layer's change is no product of thin matrices.
    pub fn from_tuned(
        tuned: &dyn Tuned,
        all: &[SiteShape],
        gates: &Gates,
        compact: bool,
    ) -> Result<Self> {
        let beside = tuned.beside().ok_or_else(|| Error::CannotMerge {
            reason: format!(
                "it trains {} beside its layers, of another size than theirs; merge it into the base \
                 instead",
                tuned.beside_layers().unwrap_or_default()
            ),
        })?;
        let plan = MergePlan::new(tuned, all, gates)?;
        let (mut sites, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for (&site, merge) in plan.sites() {
            let Merge::Delta(factors) = merge else {
                let reason = format!(
                    "what it does to {site} is no product of two thin matrices, as LoRA's is; merge \
                     it into the base instead"
                );
                return Err(Error::CannotMerge { reason });
            };
            let (a, b) = if compact { factors.compact() } else { factors.stacked() };
            scales.insert(site, factors.scale);
            let pair = Pair { a: a.to_dtype(DType::F32), b: b.to_dtype(DType::F32) };
            sites.insert(site, pair);
        }
        let (rank, scale) = even_out(&mut sites, &scales);
        let names = module_names(&sites.keys().copied().collect::<Vec<_>>(), all);
        Ok(Self {
            path: PathBuf::new(),
            rank,
            alpha: scale * rank as f64,
            use_rslora: false,
            sites,
            beside,
            target_modules: json!(names),
            base_model: String::new(),
            metadata: None,
        })
    }

    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        options::scale(self.alpha, self.rank, self.use_rslora)
    }

    /// The tensors under PEFT's names, without its prefix.
    pub fn tensors(&self) -> TensorMap {
        let mut map = TensorMap::new();
        for (site, pair) in &self.sites {
            map.insert(format!("{site}.lora_A.weight"), pair.a.clone());
            map.insert(format!("{site}.lora_B.weight"), pair.b.clone());
        }
        map
    }

    /// The tensors of its folder: those of the layers and what is beside them.
    fn file_tensors(&self) -> TensorMap {
        let mut map = self.tensors();
        map.extend(self.beside.tensors.clone());
        map
    }

    /// The live adapter on a model of these dimensions.
    ///
    /// # Errors
    /// If the model lacks a layer or has another width there.
    pub fn attach(&self, model: &ModelConfig, dtype: DType) -> Result<Box<dyn Tuned>> {
        let config = self.config();
        let options = methods::find("lora")?
            .read_peft(&config)
            .map_err(|faults| Error::Options { faults })?;
        let tensors = self.file_tensors().into_iter().map(|(name, t)| (name, t.to_dtype(dtype)));
        io::attach(&self.path, options.as_ref(), tensors.collect(), model, dtype)
    }

    /// The `adapter_config.json`.
    fn config(&self) -> Map<String, Value> {
        let keys = options::LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            ..options::LoraConfigKeys::default()
        };
        let mut config = keys.write("LORA");
        config.extend(self.beside.config.clone());
        config.insert("target_modules".to_owned(), self.target_modules.clone());
        config.insert("base_model_name_or_path".to_owned(), json!(self.base_model));
        config
    }

    /// Writes the folder, whole or not at all.
    ///
    /// # Errors
    /// If a tensor holds a number that is not finite or the file system refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        io::save_parts(folder, self.config(), self.file_tensors(), self.metadata.as_ref())
    }

    /// The layers with their widths.
    pub fn shapes(&self) -> Vec<SiteShape> {
        shapes_in(&self.tensors())
    }

    /// The update at `site`, if there is one.
    pub fn factors(&self, site: Site) -> Option<Factors> {
        let Pair { a, b } = self.sites.get(&site)?;
        Some(Factors {
            a: a.clone(),
            b: b.clone(),
            scale: self.scale(),
            num_experts: 1,
            beside: None,
        })
    }

    /// Records a common origin: configuration, base and metadata of `others`, as far as they agree.
    pub(crate) fn inherit(&mut self, others: &[Lora]) {
        let Some(first) = others.first() else { return };
        self.base_model.clone_from(&first.base_model);
        let same_targets = others.iter().all(|other| other.target_modules == first.target_modules);
        self.target_modules = if same_targets {
            first.target_modules.clone()
        } else {
            json!(self.sites.keys().map(ToString::to_string).collect::<Vec<_>>())
        };
        self.metadata = first.metadata.clone().map(|mut metadata| {
            let agree = others.iter().filter_map(|other| other.metadata.as_ref()).all(|other| {
                other.chat_template == metadata.chat_template
                    && other.template_arguments == metadata.template_arguments
            });
            if !agree {
                metadata.chat_template = None;
                metadata.template_arguments.clear();
            }
            metadata
        });
    }
}

/// Gives all pairs the largest rank and the first scale, doing what they did: with rows and columns of
/// zeros, and the rest of each scale in `B`.
fn even_out(sites: &mut BTreeMap<Site, Pair>, scales: &BTreeMap<Site, f64>) -> (usize, f64) {
    let rank = sites.values().map(|pair| pair.a.rows()).max().unwrap_or(0);
    let scale = scales.values().next().copied().unwrap_or(1.0);
    for (site, pair) in sites {
        let own = scales.get(site).copied().unwrap_or(scale);
        if own != scale {
            pair.b.scale(own / scale);
        }
        pair.widen(rank);
    }
    (rank, scale)
}

/// The last part of a model's path or id.
fn last_name(name: &str) -> &str {
    name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default()
}

/// Reads several LoRAs that were trained on the same base.
///
/// # Errors
/// If one cannot be read, or their bases, or the widths of a layer, differ.
pub fn read_loras(folders: &[PathBuf]) -> Result<Vec<Lora>> {
    let loras: Vec<Lora> =
        folders.iter().map(|folder| Lora::read(folder)).collect::<Result<_>>()?;
    let Some((first, rest)) = loras.split_first() else { return Ok(loras) };
    let differ = |other: &Lora, what: &str, a: String, b: String| Error::Incompatible {
        first: first.path.clone(),
        second: other.path.clone(),
        message: format!("{what}: {a} and {b}; expected the same"),
    };
    for other in rest {
        match (&first.metadata, &other.metadata) {
            (Some(a), Some(b)) if a.base_fingerprint != b.base_fingerprint => {
                let show = |m: &Metadata| {
                    let start: String = m.base_fingerprint.chars().take(12).collect();
                    format!("`{}` (fingerprint {start}…)", m.base_model)
                };
                return Err(differ(other, "base models", show(a), show(b)));
            }
            (Some(_), Some(_)) => {}
            // A folder may lie elsewhere, and a hub's model in a folder, under the same last name.
            _ if !first.base_model.is_empty()
                && !other.base_model.is_empty()
                && last_name(&first.base_model) != last_name(&other.base_model) =>
            {
                let quoted = |name: &str| format!("`{name}`");
                let (a, b) = (quoted(&first.base_model), quoted(&other.base_model));
                return Err(differ(other, "base models", a, b));
            }
            _ => {}
        }
        for (site, pair) in &other.sites {
            let Some(own) = first.sites.get(site) else { continue };
            let widths = |pair: &Pair| [pair.b.rows(), pair.a.cols()];
            if widths(own) != widths(pair) {
                let show = |pair: &Pair| format!("{:?}", widths(pair));
                return Err(differ(other, &site.to_string(), show(own), show(pair)));
            }
        }
    }
    Ok(loras)
}
