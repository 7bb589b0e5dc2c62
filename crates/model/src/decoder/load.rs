//! Reading a decoder's weights.

use super::layers::{Layer, ReadOrder, Rotation};
use super::{Decoder, Held};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{self, kit::LayerPlan};
use crate::site::{NormSite, Site};
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
        let family = family::find(&config.model_type).ok_or_else(|| Error::UnknownModelType {
            path: weights.path().to_path_buf(),
            found: config.model_type.clone(),
            supported: family::supported().join(", "),
        })?;
        let read = Reader { weights, dtype, held };
        let hidden = config.hidden_size;
        let embedding = read.linear("model.embed_tokens", config.vocab_size, hidden, false)?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            read.linear("lm_head", config.vocab_size, hidden, false)?
        };
        let mut rotations = Vec::new();
        let layers = (0..config.num_hidden_layers)
            .map(|index| read.layer(config, family.layer(config, index), index, &mut rotations))
            .collect::<Result<_>>()?;
        let norm = read.vector(&format!("{}.weight", NormSite::FINAL), hidden)?;
        let unused: Vec<String> = weights
            .unused()
            .into_iter()
            .filter(|name| !(config.tie_word_embeddings && name == "lm_head.weight"))
            .collect();
        if !unused.is_empty() {
            return Err(Error::UnusedTensors { path: weights.path().to_path_buf(), names: unused });
        }
        // What reading the files took, and each packed weight while it was wide.
        release_kept();
        Ok(Self {
            config: config.clone(),
            family,
            dtype,
            rotations,
            embedding,
            layers,
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
}

impl Reader<'_> {
    fn layer(
        &self,
        config: &ModelConfig,
        plan: LayerPlan,
        index: usize,
        rotations: &mut Vec<Rotation>,
    ) -> Result<Layer> {
        let rope = plan.rope.map(|rope| {
            let known = rotations.iter().position(|rotation| rotation.config == rope);
            known.unwrap_or_else(|| {
                let inverse_frequencies = rope.inverse_frequencies(config.head_dim);
                rotations.push(Rotation { config: rope, inverse_frequencies });
                rotations.len() - 1
            })
        });
        let linears = plan
            .linears
            .iter()
            .map(|plan| {
                let site = Site { layer: index, linear: plan.linear };
                let name = site.to_string();
                let read = self.linear(&name, plan.out_features, plan.in_features, plan.bias)?;
                Ok((site, read))
            })
            .collect::<Result<_>>()?;
        let norms = plan
            .norms
            .iter()
            .map(|&(name, width)| {
                let site = NormSite { layer: Some(index), name };
                Ok((site, self.vector(&format!("{site}.weight"), width)?))
            })
            .collect::<Result<_>>()?;
        Ok(Layer { linears, norms, attention: plan.attention, rope })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = Tensor::new(self.weights.take_f32(name, shape)?, shape);
        if !tensor.is_finite() {
            return Err(self.non_finite(name));
        }
        Ok(tensor.to_dtype(self.dtype))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Var> {
        Ok(Var::constant(self.tensor(name, &[len])?))
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
