//! The trained model of 260,032 parameters, and the bundled sample of the benchmarks.

use hydralora_kernels::DType;
use hydralora_model::{Decoder, ModelSource};
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
