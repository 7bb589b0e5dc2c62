//! `hydralora bench decode`: prefill, and decoding one token at a time, against the rate at which
//! this machine reads memory.

use super::{median, numbers};
use crate::args::{BenchDecodeArguments, Global, spelling};
use crate::energy::{Energy, Meter, Work, add};
use crate::failure::bad_input;
use crate::plan::{Base, open_base};
use crate::recipe::{ModelDtype, read_method};
use crate::ui::{result, say, table};
use hydralora_kernels::buffer::Buffer;
use hydralora_kernels::simd::{sum_map, sum_once, sum_quarters, vectorize};
use hydralora_model::Packed;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_peft::Tuned;
use hydralora_run::likeliest;
use hydralora_runtime::{chunks, map};
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Tokens before the first decoded one.
const PROMPT: usize = 64;
/// Tokens that are decoded between two readings of memory, the rate of which may change any moment.
const STRETCH: usize = 16;
/// Runs of each measurement; the median counts.
const RUNS: usize = 3;

#[derive(Serialize)]
struct Figures {
    dtype: String,
    weight_mb: f64,
    open_s: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    /// The rate at which memory was read in between.
    bandwidth_gb_per_s: f64,
    /// Of that rate, counting the weights and the adapter once a token.
    share_of_bandwidth: f64,
    /// Of decoding alone.
    energy: Energy,
}

/// Memory to read, far larger than any cache, on pages as large as those of the weights.
struct Memory(Buffer<f32>);

impl Memory {
    fn new() -> Self {
        let numbers = numbers(1 << 27);
        let mut data = Buffer::scratch(numbers.len());
        data.copy_from_slice(&numbers);
        Self(data)
    }

    /// Reads it on all threads.
    fn read(&self, way: Way) -> Duration {
        /// Numbers that a thread reads at a time, 64 KB.
        const PIECE: usize = 1 << 14;
        let started = Instant::now();
        let sums = map(chunks(&self.0, PIECE), |_, piece| {
            vectorize(
                #[inline(always)]
                || match way {
                    Way::Foreseen => sum_map(piece, |x| x),
                    Way::Called => sum_once(piece),
                    Way::Quarters => sum_quarters(piece),
                },
            )
        });
        std::hint::black_box(sums);
        started.elapsed()
    }
}

/// A way to read memory.
#[derive(Clone, Copy)]
enum Way {
    /// The processor foresees what comes next.
    Foreseen,
    /// It is told.
    Called,
    /// Four streams at a time, foreseen.
    Quarters,
}

const WAYS: [Way; 3] = [Way::Foreseen, Way::Called, Way::Quarters];

/// Time spent reading [`Memory`], every way.
#[derive(Default)]
struct Reading {
    passes: u32,
    seconds: [f64; WAYS.len()],
}

impl Reading {
    fn add(&mut self, memory: &Memory) {
        for (seconds, way) in self.seconds.iter_mut().zip(WAYS) {
            *seconds += memory.read(way).as_secs_f64();
        }
        self.passes += 1;
    }

    /// Bytes per second, the best way.
    fn rate(&self, memory: &Memory) -> f64 {
        let bytes = size_of_val::<[f32]>(&memory.0) as f64 * f64::from(self.passes);
        bytes / self.seconds.into_iter().fold(f64::INFINITY, f64::min)
    }
}

/// HydraLoRA with four heads of rank four on the feed-forward layers, none of its tensors zero; another one
/// for another seed.
pub(super) fn adapter(base: &Base, seed: usize) -> anyhow::Result<Box<dyn Tuned>> {
    let section = json!({
        "name": "hydralora", "rank": 4, "num_experts": 4, "dropout": 0.0,
        "targets": ["gate_proj", "up_proj", "down_proj"],
    });
    let mut faults = Vec::new();
    let Some((_, method)) = read_method(Some(&section), &mut faults) else {
        return Err(bad_input(format!("hydralora: {faults:?}")));
    };
    let sites = method.select(&base.decoder.sites())?;
    let mut tuned = method.build(&sites, base.decoder.dtype(), 41 + seed as u64);
    for trainable in tuned.trainables_mut() {
        let value = trainable.parameter.value_mut();
        for (index, value) in value.data_mut::<f32>().iter_mut().enumerate() {
            *value += ((index * 7919 + 13) % 1009) as f32 / 1e6;
        }
    }
    Ok(tuned)
}

/// Bytes of the adapter's numbers, each of them read for every token.
fn bytes_of(tuned: &dyn Tuned) -> usize {
    let values = tuned.trainables().into_iter().map(|trainable| trainable.parameter.value().len());
    values.sum::<usize>() * size_of::<f32>()
}

/// Medians of prefill and decoding in tokens per second, of the rate in bytes per second at which memory
/// was read in between, and of the tokens decoded for every byte that could have been read: another
/// guest of the machine takes from both.
struct Rates {
    prefill: f64,
    decode: f64,
    bandwidth: f64,
    tokens_per_byte: f64,
    /// Of decoding in the runs that count.
    energy: Energy,
}

fn measure(
    base: &Base,
    adapter: &dyn Adapter,
    arguments: &BenchDecodeArguments,
    memory: &Memory,
    meter: &Meter,
) -> anyhow::Result<Rates> {
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
        Ok(likeliest(&logits))
    };
    let prompt = ids(arguments.prompt);
    let mut prefill = Vec::new();
    for _ in 0..=RUNS {
        let started = Instant::now();
        feed(&prompt, &mut base.decoder.new_cache())?;
        prefill.push(prompt.len() as f64 / started.elapsed().as_secs_f64());
    }
    let (mut decode, mut bandwidth, mut tokens_per_byte) = (Vec::new(), Vec::new(), Vec::new());
    let mut used = None;
    for run in 0..=RUNS {
        let mut cache = base.decoder.new_cache();
        let mut next = feed(&ids(PROMPT), &mut cache)?;
        let (mut seconds, mut reading) = (0.0, Reading::default());
        for first in (0..arguments.new_tokens).step_by(STRETCH) {
            reading.add(memory);
            let (started, mark) = (Instant::now(), meter.mark());
            for _ in first..arguments.new_tokens.min(first + STRETCH) {
                next = feed(&[next], &mut cache)?;
            }
            seconds += started.elapsed().as_secs_f64();
            if run > 0 {
                used = Some(add(used, meter.since(&mark)));
            }
        }
        let (rate, read) = (arguments.new_tokens as f64 / seconds, reading.rate(memory));
        decode.push(rate);
        bandwidth.push(read);
        tokens_per_byte.push(rate / read);
    }
    // The first run of each touches pages and fills caches.
    Ok(Rates {
        prefill: median(&mut prefill[1..]),
        decode: median(&mut decode[1..]),
        bandwidth: median(&mut bandwidth[1..]),
        tokens_per_byte: median(&mut tokens_per_byte[1..]),
        energy: meter.energy(used.unwrap_or_default(), Work::tokens(RUNS * arguments.new_tokens)),
    })
}

pub(crate) fn run(global: &Global, arguments: &BenchDecodeArguments) -> anyhow::Result<ExitCode> {
    if arguments.prompt == 0 || arguments.new_tokens == 0 {
        return Err(bad_input("--prompt and --new-tokens: expected at least 1"));
    }
    let memory = Memory::new();
    let meter = Meter::start(global, &arguments.energy);
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
        let tuned = (!arguments.no_adapter).then(|| adapter(&base, 0)).transpose()?;
        let adapter = tuned.as_ref().map_or(&NoAdapter as &dyn Adapter, |t| t.as_adapter());
        let rates = measure(&base, adapter, arguments, &memory, &meter)?;
        let bytes = base.decoder.weight_bytes();
        let of_adapter = tuned.as_ref().map_or(0, |tuned| bytes_of(tuned.as_ref()));
        all.push(Figures {
            dtype: name,
            weight_mb: bytes as f64 / 1e6,
            open_s,
            prefill_tokens_per_s: rates.prefill,
            decode_tokens_per_s: rates.decode,
            bandwidth_gb_per_s: rates.bandwidth / 1e9,
            share_of_bandwidth: rates.tokens_per_byte * (bytes + of_adapter) as f64,
            energy: rates.energy,
        });
    }
    let mut rows = vec![
        [
            "weights",
            "MB",
            "open, s",
            "prefill, tokens/s",
            "decode, tokens/s",
            "memory, GB/s",
            "of that rate",
        ]
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
            format!("{:.1}", one.bandwidth_gb_per_s),
            format!("{:.1} %", 100.0 * one.share_of_bandwidth),
        ]);
    }
    let mut text = format!(
        "{}\n\n{}",
        table(&rows),
        if arguments.no_adapter {
            "no adapter"
        } else {
            "HydraLoRA adapter on (r = 4, N = 4, feed-forward layers)"
        }
    );
    for one in all.iter().filter(|one| one.energy.energy_j.is_some()) {
        text += &format!("\nenergy of decoding, {}  {}", one.dtype, one.energy.in_words());
    }
    let json = json!({
        "threads": hydralora_runtime::threads(),
        "adapter": !arguments.no_adapter,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "runs": all,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}
