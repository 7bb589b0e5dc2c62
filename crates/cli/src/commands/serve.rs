//! `hydralora serve`: answer requests over HTTP.

use crate::adapter::{self, base_of};
use crate::args::Global;
use crate::domain;
use crate::failure::bad_input;
use crate::grown::check_added;
use crate::in_force::{InForce, idle_note};
use crate::plan::{Base, load_on, open_base_of};
use crate::recipe::ModelDtype;
use crate::stop;
use crate::ui::{result, say, tell};
use anyhow::Context;
use clap::Args;
use hydralora_model::{CacheDType, Decoder, ModelSource, Tokenizer};
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{AdapterLimits, ApiKey, Log, Model, OpenedAdapter, Options, Server};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often it is looked whether the server is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Shortest key that is taken; a shorter one is a slip rather than a secret.
const SHORTEST_KEY: usize = 8;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hydralora serve --model smollm2-135m
  hydralora serve --model smollm2-135m --adapter law=runs/law --adapter math=runs/math --port 9000
  hydralora serve --model smollm2-135m --adapter-root adapters --api-key-file keys.txt --host 0.0.0.0")]
pub(crate) struct ServeArguments {
    /// Base model: a folder, a .gguf file, a known name or a hub id [default: the first adapter's].
    #[arg(long, required_unless_present = "adapters")]
    model: Option<String>,
    /// An adapter's folder, or its run's, and the name to ask it by; may be given several times.
    #[arg(long = "adapter", value_name = "NAME=DIR", value_parser = named_folder)]
    adapters: Vec<(String, PathBuf)>,
    /// The domain that an adapter answers for which has an update for each.
    #[arg(long = "adapter-domain", value_name = "NAME=DOMAIN", value_parser = named)]
    domains: Vec<(String, String)>,
    /// The name to ask the base by [default: as the model was given].
    #[arg(long)]
    served_model_name: Option<String>,
    /// Address to listen at.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 for any that is free.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Type or packing to hold the weights in; `stored` is what the file has.
    #[arg(long, default_value = "f32")]
    dtype: ModelDtype,
    /// File of keys, one a line, of which every request has to show one.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Site whose pages may ask, as `https://example.org`, or * for all; may be given several times.
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    cors_origin: Vec<String>,
    /// Folder from which requests may load adapters; without it they may not.
    #[arg(long, value_name = "DIR")]
    adapter_root: Option<PathBuf>,
    /// Most adapters at a time.
    #[arg(long, default_value_t = 32)]
    max_adapters: usize,
    /// Largest rank of an adapter.
    #[arg(long, default_value_t = 256)]
    max_adapter_rank: usize,
    /// Most MiB of all adapters together.
    #[arg(long, default_value_t = 4096)]
    max_adapter_mib: usize,
    /// MiB of keys and values that may be held.
    #[arg(long, default_value_t = 2048)]
    cache_mib: usize,
    /// How keys and values are stored: f32, f16 (half the memory) or q8 (a good quarter).
    #[arg(long, default_value = "f32", value_parser = cache_dtype)]
    cache_dtype: CacheDType,
    /// Read every prompt whole, also what an earlier one began with.
    #[arg(long)]
    no_prefix_reuse: bool,
    /// Put all texts through one pass: faster with many at once, and an answer may depend on the others
    /// where two tokens are as likely as each other but for rounding
    #[arg(long)]
    no_batch_invariance: bool,
    /// Requests that share a pass over the model.
    #[arg(long, default_value_t = 32)]
    max_batch: usize,
    /// Tokens of a pass.
    #[arg(long, default_value_t = 512)]
    max_step_tokens: usize,
    /// Requests that may wait; further ones are told to come again.
    #[arg(long, default_value_t = 256)]
    max_waiting: usize,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 16 << 20)]
    max_body_bytes: usize,
    /// Most seconds for an answer.
    #[arg(long, default_value_t = 600)]
    request_seconds: u64,
    /// Most seconds for the answers in work when the server is told to end.
    #[arg(long, default_value_t = 60)]
    drain_seconds: u64,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("expected a name, `=`, and what it names".to_owned()),
    }
}

fn named_folder(text: &str) -> Result<(String, PathBuf), String> {
    let (name, folder) = named(text)?;
    Ok((name, adapter::folder(&folder)?))
}

fn cache_dtype(text: &str) -> Result<CacheDType, String> {
    let all = [CacheDType::F32, CacheDType::F16, CacheDType::Q8];
    let found = all.into_iter().find(|dtype| dtype.name() == text);
    found.ok_or_else(|| "expected f32, f16 or q8".to_owned())
}

fn origin(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let plain = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', ' ']));
    match text == "*" || plain {
        true => Ok(text.to_owned()),
        false => Err("expected http://HOST or https://HOST, without a path, or *".to_owned()),
    }
}

pub(crate) fn run(global: &Global, arguments: &ServeArguments) -> anyhow::Result<ExitCode> {
    let first = arguments.adapters.first().map(|(_, folder)| folder.as_path());
    let spec = match (&arguments.model, first) {
        (given, Some(adapter)) => base_of(given.as_deref(), adapter)?,
        (Some(given), None) => given.clone(),
        (None, None) => return Err(bad_input("expected --model, --adapter or both")),
    };
    for (name, _) in &arguments.domains {
        if !arguments.adapters.iter().any(|(known, _)| known == name) {
            return Err(bad_input(format!("--adapter-domain {name}: no --adapter has this name")));
        }
    }
    let options = options(arguments, &spec)?;
    let name = options.model.clone();
    // Told before a model is opened, which may take a while.
    let ended = stop::flag("ending: answers in work are finished; once more ends at once");
    let (host, port) = (arguments.host.as_str(), arguments.port);
    let server = Server::bind(options, host, port)
        .map_err(|error| bad_input(format!("cannot listen at {host}, port {port}: {error}")))?;
    let address = server.address();
    say(global, format!("loading {name}; http://{address}/health tells when it is there"));
    let folders: Vec<&Path> = arguments.adapters.iter().map(|(_, path)| path.as_path()).collect();
    let base = open_base_of(&spec, arguments.dtype, &folders)?;
    let given: Vec<(String, &Path, Option<&str>)> = arguments
        .adapters
        .iter()
        .map(|(name, folder)| {
            let domain = arguments.domains.iter().find(|(of, _)| of == name);
            (name.clone(), folder.as_path(), domain.map(|(_, domain)| domain.as_str()))
        })
        .collect();
    let engine = EngineOptions {
        cache_bytes: arguments.cache_mib << 20,
        max_batch: arguments.max_batch,
        max_step_tokens: arguments.max_step_tokens,
        max_waiting: arguments.max_waiting,
        cache_dtype: arguments.cache_dtype,
        prefix_reuse: !arguments.no_prefix_reuse,
        same_bits: !arguments.no_batch_invariance,
    };
    server.ready(model(global, base)?, engine, &given).map_err(bad_input)?;
    let line = json!({"url": format!("http://{address}"), "model": name});
    result(global, &line, &format!("serving {name} at http://{address}"))?;
    while !ended.load(Ordering::SeqCst) {
        std::thread::sleep(LOOK);
    }
    if !server.drain() {
        tell("some answers were cut off at the end of --drain-seconds");
    }
    Ok(ExitCode::SUCCESS)
}

fn options(arguments: &ServeArguments, spec: &str) -> anyhow::Result<Options> {
    let model = match &arguments.served_model_name {
        Some(name) if name.is_empty() || name.contains(char::is_whitespace) => {
            return Err(bad_input("--served-model-name: expected a name without spaces"));
        }
        Some(name) => name.clone(),
        None => usual_name(spec),
    };
    let keys = arguments.api_key_file.as_deref().map(keys).transpose()?.unwrap_or_default();
    if let Some(root) = &arguments.adapter_root
        && !root.is_dir()
    {
        let root = root.display();
        return Err(bad_input(format!("--adapter-root: there is no folder {root}")));
    }
    let positive = [
        ("max-batch", arguments.max_batch),
        ("max-step-tokens", arguments.max_step_tokens),
        ("max-waiting", arguments.max_waiting),
        ("cache-mib", arguments.cache_mib),
    ];
    if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
        return Err(bad_input(format!("--{name}: is 0; expected at least 1")));
    }
    Ok(Options {
        model,
        keys,
        max_body_bytes: arguments.max_body_bytes,
        request_time: Duration::from_secs(arguments.request_seconds.max(1)),
        drain_time: Duration::from_secs(arguments.drain_seconds),
        cors_origins: arguments.cors_origin.clone(),
        adapters: AdapterLimits {
            count: arguments.max_adapters,
            rank: arguments.max_adapter_rank,
            bytes: arguments.max_adapter_mib << 20,
            root: arguments.adapter_root.clone(),
        },
        log: Log::new(|line| tell(line)),
        ..Options::default()
    })
}

/// What a model is called by its spec: a hub's or known name without a revision, of a path, or of a file
/// that the hub's name goes on to, the last part.
fn usual_name(spec: &str) -> String {
    let path = Path::new(spec);
    let whole = match (path.exists(), spec.split_once(':')) {
        (true, _) => path.canonicalize().unwrap_or_else(|_| path.to_path_buf()),
        (false, Some((_, file))) => PathBuf::from(file),
        (false, None) => return spec.split('@').next().unwrap_or(spec).to_owned(),
    };
    let name = whole.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    name.strip_suffix(".gguf").unwrap_or(&name).replace(char::is_whitespace, "-")
}

/// The keys in a file. What it holds is in no message.
fn keys(path: &Path) -> anyhow::Result<Vec<ApiKey>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| bad_input(format!("--api-key-file: {shown}: {error}")))?;
    let mut keys = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let key = line.trim();
        if key.is_empty() || key.starts_with('#') {
            continue;
        }
        if key.len() < SHORTEST_KEY || key.contains(char::is_whitespace) {
            return Err(bad_input(format!(
                "--api-key-file: {shown}: line {}: expected a key of {SHORTEST_KEY} characters at \
                 least, without spaces",
                number + 1
            )));
        }
        keys.push(ApiKey::new(key));
    }
    if keys.is_empty() {
        return Err(bad_input(format!("--api-key-file: {shown}: holds no key")));
    }
    Ok(keys)
}

/// The base as the server wants it.
fn model(global: &Global, base: Base) -> anyhow::Result<Model> {
    let Base { source, decoder } = base;
    let in_force = InForce::of(&source, None, true)?;
    in_force.notes.iter().for_each(|note| say(global, note));
    let identity = &source.identity;
    // A path is nobody's business but this machine's.
    let of_machine = Path::new(&identity.reference).is_absolute();
    let root = if of_machine { identity.name.clone() } else { identity.reference.clone() };
    let fingerprint = identity.fingerprint.clone();
    let (decoder, tokenizer): (Arc<Decoder>, Arc<Tokenizer>) =
        (Arc::new(decoder), Arc::new(source.tokenizer.clone()));
    let (dtype, quiet) = (decoder.dtype(), global.quiet);
    let added = source.added.iter().map(|token| token.id).collect();
    let open = move |folder: &Path, domain: Option<&str>| {
        open_adapter(&source, folder, domain, dtype, quiet).map_err(|error| format!("{error:#}"))
    };
    Ok(Model {
        root,
        fingerprint,
        decoder,
        tokenizer,
        template: in_force.template,
        end_ids: in_force.end_ids,
        added,
        open_adapter: Box::new(open),
    })
}

fn open_adapter(
    source: &ModelSource,
    folder: &Path,
    domain: Option<&str>,
    dtype: hydralora_kernels::DType,
    quiet: bool,
) -> anyhow::Result<OpenedAdapter> {
    check_added(source, folder)?;
    let mut loaded = load_on(source, folder, dtype)?;
    domain::choose(loaded.tuned.as_mut(), domain).context("the adapter's domain")?;
    let in_force = InForce::of(source, loaded.metadata.as_ref(), false)?;
    let idle = idle_note(loaded.tuned.as_ref());
    for note in in_force.notes.iter().chain(&idle).filter(|_| !quiet) {
        tell(note);
    }
    Ok(OpenedAdapter {
        tuned: loaded.tuned,
        template: in_force.template,
        end_ids: in_force.end_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_by_their_last_name() {
        for (spec, name) in [
            ("smollm2-135m", "smollm2-135m"),
            ("owner/model", "owner/model"),
            ("owner/model@main", "owner/model"),
            ("owner/model@main:some/file.Q4_0.gguf", "file.Q4_0"),
            (env!("CARGO_MANIFEST_DIR"), "cli"),
        ] {
            assert_eq!(usual_name(spec), name);
        }
    }

    #[test]
    fn what_is_named_is_taken_apart() {
        assert_eq!(named("law=runs/a=b"), Ok(("law".to_owned(), "runs/a=b".to_owned())));
        assert!(named("law").is_err() && named("=a").is_err() && named("a=").is_err());
        assert!(origin("https://a.example:80").is_ok() && origin("*").is_ok());
        assert!(origin("a.example").is_err() && origin("https://a.example/x").is_err());
    }

    #[test]
    fn keys_are_read_a_line_each() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            keys(&path).map(|keys| keys.len()).map_err(|error| error.to_string())
        };
        assert_eq!(read("# ours\n\nabcdefgh\nijklmnop\r\n"), Ok(2));
        for wrong in ["", "# none\n", "short\n", "two words here\n"] {
            let message = read(wrong).unwrap_err();
            assert!(!message.contains("short") && !message.contains("words"), "{message}");
        }
    }
}
