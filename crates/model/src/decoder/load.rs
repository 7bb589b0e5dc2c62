//! Reading a decoder's weights.

use super::layers::{Layer, ReadOrder, Rotation};
use super::modules::{FrozenTensor, Modules};
use super::{Decoder, Held};
use crate::config::{ModelConfig, unknown_model_type};
use crate::error::{Error, Result};
use crate::family::kit::{LayerPlan, LinearPlan, ModulesPlan, TensorPlan};
use crate::family::{self, Family};
use crate::site::{Site, TensorSite};
use crate::weights::Weights;
use hydralora_kernels::block::{self, BlockFormat};
use hydralora_kernels::buffer::release_kept;
use hydralora_kernels::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_runtime::{chunks, map};

impl Decoder {
    /// Builds the decoder of `config` from `weights`, computing in `dtype`.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, holds a number that is not finite, or is left
    /// unused.
    pub fn load(config: &ModelConfig, weights: &Weights, dtype: DType) -> Result<Self> {
        Self::load_held(config, weights, dtype, Held::Wide)
    }

    /// [`load`](Self::load) with the matrices held as `held` says.
    ///
    /// # Errors
    /// As [`load`](Self::load), and if a matrix has rows that are no whole number of blocks.
    pub fn load_held(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        held: Held,
    ) -> Result<Self> {
        let family = family::find(&config.model_type)
            .ok_or_else(|| unknown_model_type(&config.model_type, weights.path()))?;
        let read = Reader { weights, dtype, held, family };
        let hidden = config.hidden_size;
        let embedding = read.linear("model.embed_tokens", config.vocab_size, hidden, false)?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            read.linear("lm_head", config.vocab_size, hidden, false)?
        };
        let mut rotations = Vec::new();
        let layers = (0..config.num_hidden_layers)
            .map(|index| read.layer(family.layer(config, index), index, &mut rotations))
            .collect::<Result<_>>()?;
        let mut layers: Vec<Layer> = layers;
        let owners: Vec<usize> = layers.iter().filter_map(|layer| layer.keys_of).collect();
        owners.into_iter().for_each(|owner| layers[owner].shares_keys = true);
        let outside = read.modules(&family.outside(config), None)?;
        let norm = read.frozen_tensor(TensorSite::FINAL_NORM, &[hidden])?;
        let unused: Vec<String> = weights
            .unused()
            .into_iter()
            .filter(|name| !(config.tie_word_embeddings && name == "lm_head.weight"))
            .filter(|name| !family.ignores(config, name))
            .collect();
        if !unused.is_empty() {
            return Err(Error::UnusedTensors { path: weights.path().to_path_buf(), names: unused });
        }
        weights.check_unchanged()?;
        // What reading the files took, and each packed weight while it was wide.
        release_kept();
        Ok(Self {
            config: config.clone(),
            family,
            dtype,
            rotations,
            embedding,
            layers,
            outside,
            norm,
            head,
            read_order: ReadOrder::new(),
        })
    }
}

/// Reads named tensors in one element type.
struct Reader<'a> {
    weights: &'a Weights,
    dtype: DType,
    held: Held,
    family: &'static dyn Family,
}

impl Reader<'_> {
    fn layer(&self, plan: LayerPlan, index: usize, rotations: &mut Vec<Rotation>) -> Result<Layer> {
        let (head_dim, pairs) = (plan.attention.head_dim, plan.pairs);
        let rope = plan.rope.map(|rope| {
            let same =
                |of: &Rotation| of.config == rope && of.head_dim == head_dim && of.pairs == pairs;
            rotations.iter().position(same).unwrap_or_else(|| {
                let inverse_frequencies = rope.inverse_frequencies(head_dim, 0);
                rotations.push(Rotation { config: rope, head_dim, pairs, inverse_frequencies });
                rotations.len() - 1
            })
        });
        let modules = self.modules(&plan.modules, Some(index))?;
        Ok(Layer {
            modules,
            attention: plan.attention,
            rope,
            keys_of: plan.keys_of,
            shares_keys: false,
            recurrent: plan.recurrent,
        })
    }

    fn modules(&self, plan: &ModulesPlan, layer: Option<usize>) -> Result<Modules> {
        let linear = |plan: &LinearPlan| {
            let site = Site { layer: layer.unwrap_or(0), linear: plan.linear };
            let name = site.to_string();
            Ok((site, self.linear(&name, plan.out_features, plan.in_features, plan.bias)?))
        };
        let tensor = |plan: &TensorPlan| {
            let site = TensorSite { layer, name: plan.name, is_weight: plan.is_weight };
            self.frozen_tensor(site, &plan.shape)
        };
        let table = |&(name, rows, cols): &(&'static str, usize, usize)| {
            Ok((name, self.linear(&format!("model.{name}"), rows, cols, false)?))
        };
        Ok(Modules {
            linears: plan.linears.iter().map(linear).collect::<Result<_>>()?,
            tensors: plan.tensors.iter().map(tensor).collect::<Result<_>>()?,
            tables: plan.tables.iter().map(table).collect::<Result<_>>()?,
        })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = Tensor::new(self.weights.take_f32(name, shape)?, shape);
        if !tensor.is_finite() {
            return Err(self.non_finite(name));
        }
        Ok(tensor.to_dtype(self.dtype))
    }

    fn frozen_tensor(&self, site: TensorSite, shape: &[usize]) -> Result<FrozenTensor> {
        let value = Var::constant(self.tensor(&site.to_string(), shape)?);
        Ok(FrozenTensor { site, value, shift: self.family.norm_shift(site.name) })
    }

    fn linear(&self, name: &str, out: usize, inputs: usize, bias: bool) -> Result<FrozenLinear> {
        let full = format!("{name}.weight");
        let weight = self.weight(&full, [out, inputs])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(FrozenLinear::new(weight, bias))
    }

    fn weight(&self, name: &str, shape: [usize; 2]) -> Result<FrozenWeight> {
        let dtype = self.dtype;
        let stored = self.weights.describe(name).map(|(_, format)| format);
        let plain = stored == Some(BlockFormat::F32) && dtype == DType::F32;
        if self.held == Held::Stored || (self.held == Held::Wide && plain) {
            let (format, bytes) = self.weights.take_packed(name, &shape)?;
            self.check_blocks(name, format, shape[1])?;
            let rows = chunks(&bytes, format.bytes_for(shape[1]).max(1));
            let finite = map(rows, |_, row| block::is_finite(format, row));
            if finite.contains(&false) {
                return Err(self.non_finite(name));
            }
            return Ok(FrozenWeight::Blocks { format, bytes, shape, dtype });
        }
        let tensor = self.tensor(name, &shape)?;
        let Held::Packed(format) = self.held else { return Ok(FrozenWeight::Dense(tensor)) };
        self.check_blocks(name, format, shape[1])?;
        let wide = tensor.to_dtype(DType::F32);
        let rows: Vec<Vec<u8>> =
            map(chunks(wide.data::<f32>(), shape[1].max(1) * 64), |_, rows| {
                let mut out = Vec::new();
                block::quantize(format, rows, &mut out);
                out
            });
        Ok(FrozenWeight::Blocks { format, bytes: rows.concat().into(), shape, dtype })
    }

    fn check_blocks(&self, name: &str, format: BlockFormat, cols: usize) -> Result<()> {
        if cols.is_multiple_of(format.block_len()) {
            return Ok(());
        }
        Err(Error::malformed(
            self.weights.path(),
            format!(
                "`{name}` has rows of {cols} numbers; {format} packs {} at a time, so hold it in another type",
                format.block_len()
            ),
        ))
    }

    fn non_finite(&self, name: &str) -> Error {
        Error::NonFinite { path: self.weights.path().to_path_buf(), name: name.to_owned() }
    }
}
