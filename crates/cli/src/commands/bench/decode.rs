//! `hydralora bench decode`: prefill, and decoding one token at a time, against the rate at which
//! this machine reads memory.

use super::{median, numbers};
use crate::args::{BenchDecodeArguments, Global, spelling};
use crate::failure::bad_input;
use crate::plan::{Base, open_base};
use crate::recipe::{ModelDtype, read_method};
use crate::ui::{result, say, table};
use hydralora_kernels::simd::{sum_map, vectorize};
use hydralora_model::Packed;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_peft::Tuned;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::Instant;

/// Tokens before the first decoded one.
const PROMPT: usize = 64;
/// Runs of each measurement; the median counts.
const RUNS: usize = 3;

#[derive(Serialize)]
struct Figures {
    dtype: String,
    weight_mb: f64,
    open_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    /// Of the rate at which memory is read, counting the weights once a token.
    share_of_bandwidth: f64,
}

/// The best rate in bytes per second at which all threads together read memory.
fn bandwidth() -> f64 {
    let data = numbers(1 << 27);
    let bytes = (data.len() * size_of::<f32>()) as f64;
    (0..5)
        .map(|_| {
            let started = Instant::now();
            let sum: f32 = data
                .par_chunks(1 << 16)
                .map(|part| {
                    vectorize(
                        #[inline(always)]
                        || sum_map(part, |x| x),
                    )
                })
                .sum();
            std::hint::black_box(sum);
            bytes / started.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}

/// HydraLoRA with four heads of rank four on the feed-forward layers, none of its tensors zero.
fn adapter(base: &Base) -> anyhow::Result<Box<dyn Tuned>> {
    let section = json!({
        "name": "hydralora", "rank": 4, "num_experts": 4, "dropout": 0.0,
        "targets": ["gate_proj", "up_proj", "down_proj"],
    });
    let mut faults = Vec::new();
    let Some((_, method)) = read_method(Some(&section), &mut faults) else {
        return Err(bad_input(format!("hydralora: {faults:?}")));
    };
    let sites = method.targets().select(&base.decoder.sites())?;
    let mut tuned = method.build(&sites, base.decoder.dtype(), 41);
    for trainable in tuned.trainables_mut() {
        let value = trainable.parameter.value_mut();
        for (index, value) in value.data_mut::<f32>().iter_mut().enumerate() {
            *value += ((index * 7919 + 13) % 1009) as f32 / 1e6;
        }
    }
    Ok(tuned)
}

fn measure(
    base: &Base,
    adapter: &dyn Adapter,
    arguments: &BenchDecodeArguments,
) -> anyhow::Result<(f64, f64)> {
    let vocabulary = base.decoder.config().vocab_size;
    let ids = |count: usize| -> Vec<u32> {
        (0..count).map(|i| ((i * 7919 + 17) % (vocabulary - 1) + 1) as u32).collect()
    };
    let pass = Pass::inference();
    let feed = |tokens: &[u32], cache: &mut hydralora_model::Cache| -> anyhow::Result<u32> {
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens, offsets: &offsets };
        let caches = std::slice::from_mut(cache);
        let hidden = base.decoder.extend(batch, caches, adapter, &pass)?;
        let logits = base.decoder.logits(&hidden, &[tokens.len() - 1]);
        let best = logits.data::<f32>().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        Ok(best.map_or(0, |(id, _)| id as u32))
    };
    let prompt = ids(arguments.prompt);
    let mut prefill = Vec::new();
    for _ in 0..=RUNS {
        let started = Instant::now();
        feed(&prompt, &mut base.decoder.new_cache())?;
        prefill.push(prompt.len() as f64 / started.elapsed().as_secs_f64());
    }
    let mut decode = Vec::new();
    for _ in 0..=RUNS {
        let mut cache = base.decoder.new_cache();
        let mut next = feed(&ids(PROMPT), &mut cache)?;
        let started = Instant::now();
        for _ in 0..arguments.new_tokens {
            next = feed(&[next], &mut cache)?;
        }
        decode.push(arguments.new_tokens as f64 / started.elapsed().as_secs_f64());
    }
    // The first run of each touches pages and fills caches.
    Ok((median(&mut prefill[1..]), median(&mut decode[1..])))
}

pub(crate) fn run(global: &Global, arguments: &BenchDecodeArguments) -> anyhow::Result<ExitCode> {
    if arguments.prompt == 0 || arguments.new_tokens == 0 {
        return Err(bad_input("--prompt and --new-tokens: expected at least 1"));
    }
    let bandwidth = bandwidth();
    let mut all = Vec::new();
    for &dtype in &arguments.dtype {
        let name = spelling(&dtype);
        if dtype == ModelDtype::F64 {
            return Err(bad_input("--dtype: f64 is for checks of numbers; expected another"));
        }
        say(global, format!("weights in {name}"));
        let started = Instant::now();
        let base = open_base(&arguments.model, dtype)?;
        let open_s = started.elapsed().as_secs_f64();
        let tuned = (!arguments.no_adapter).then(|| adapter(&base)).transpose()?;
        let adapter = tuned.as_ref().map_or(&NoAdapter as &dyn Adapter, |t| t.as_adapter());
        let (prefill, decode) = measure(&base, adapter, arguments)?;
        let bytes = base.decoder.weight_bytes() as f64;
        all.push(Figures {
            dtype: name,
            weight_mb: bytes / 1e6,
            open_s,
            prefill_tokens_per_s: prefill,
            decode_tokens_per_s: decode,
            share_of_bandwidth: decode * bytes / bandwidth,
        });
    }
    let mut rows = vec![
        ["weights", "MB", "open, s", "prefill, tokens/s", "decode, tokens/s", "of the bandwidth"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for one in &all {
        rows.push(vec![
            one.dtype.clone(),
            format!("{:.0}", one.weight_mb),
            format!("{:.2}", one.open_s),
            format!("{:.0}", one.prefill_tokens_per_s),
            format!("{:.1}", one.decode_tokens_per_s),
            format!("{:.1} %", 100.0 * one.share_of_bandwidth),
        ]);
    }
    let text = format!(
        "{}\n\nmemory is read at {:.1} GB/s; {}",
        table(&rows),
        bandwidth / 1e9,
        if arguments.no_adapter {
            "no adapter"
        } else {
            "HydraLoRA adapter on (r = 4, N = 4, feed-forward layers)"
        }
    );
    let json = json!({
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "threads": rayon::current_num_threads(),
        "adapter": !arguments.no_adapter,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "runs": all,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}
