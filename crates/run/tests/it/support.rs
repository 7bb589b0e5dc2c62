//! The trained model of 260,032 parameters, and the bundled sample of the benchmarks.

use hydralora_kernels::{DType, no_grad};
use hydralora_model::adapter::{Adapter, Pass};
use hydralora_model::{Decoder, ModelSource, Packed};
use hydralora_peft::methods::find;
use hydralora_peft::{TensorMap, Tuned};
use hydralora_run::eval::{Scored, Scoring};
use std::path::{Path, PathBuf};

pub(crate) struct Model {
    pub(crate) source: ModelSource,
    pub(crate) decoder: Decoder,
}

pub(crate) fn model() -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/stories260K");
    let source = ModelSource::open(&folder).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    Model { source, decoder }
}

pub(crate) fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/eval-sample")
}

/// `log p` of the continuation from one whole pass, without any sharing.
pub(crate) fn plainly(model: &Model, adapter: &dyn Adapter, request: &Scoring) -> Scored {
    let _guard = no_grad();
    let Scoring { tokens, from } = request;
    let offsets = [0, tokens.len()];
    let packed = Packed { tokens, offsets: &offsets };
    let hidden = model.decoder.hidden(packed, adapter, &Pass::inference()).unwrap();
    let mut scored = Scored { log_likelihood: 0.0, greedy: true, tokens: 0 };
    for at in *from..tokens.len() {
        let logits = model.decoder.logits(hidden.value(), &[at - 1]).to_f64();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let token = tokens[at] as usize;
        scored.log_likelihood += logits[token] - sum.ln();
        scored.greedy &= logits.iter().all(|logit| *logit <= logits[token]);
        scored.tokens += 1;
    }
    scored
}

/// HydraLoRA whose gates depend on all tokens so far.
pub(crate) const SEQUENCE: &str = "hydralora of sequences";

/// HydraLoRA with one router a block and its two largest gates.
pub(crate) const BLOCK_ROUTERS: &str = "hydralora of blocks";

/// An adapter of `method` whose effect is not nothing; another one for another `seed`.
pub(crate) fn tuned(model: &Model, method: &str, seed: usize) -> Box<dyn Tuned> {
    let mut section = serde_json::Map::new();
    let name = if [SEQUENCE, BLOCK_ROUTERS].contains(&method) { "hydralora" } else { method };
    if method == SEQUENCE {
        section.insert("route_on".to_owned(), "sequence".into());
        section.insert("router_gain".to_owned(), 10.0.into());
    }
    if method == BLOCK_ROUTERS {
        section.insert("router_scope".to_owned(), "block".into());
        section.insert("router_top_k".to_owned(), 2.into());
    }
    let options = find(name).unwrap().read_recipe(&section);
    let options = options.unwrap_or_else(|faults| panic!("{method}: {faults:?}"));
    let mut tuned = options.build(&model.decoder.sites(), model.decoder.dtype(), 3);
    let mut values: TensorMap = tuned.file_tensors();
    for (index, tensor) in values.values_mut().enumerate() {
        for (at, value) in tensor.data_mut::<f32>().iter_mut().enumerate() {
            *value += 0.02 * ((index * 7 + at * 3 + seed * 11) as f32).sin();
        }
    }
    tuned.load_file(&mut values).unwrap_or_else(|faults| panic!("{method}: {faults:?}"));
    tuned
}
