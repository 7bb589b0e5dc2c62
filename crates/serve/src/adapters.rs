//! The adapters that requests may name: loaded, replaced and forgotten while others are answered.
//!
//! An adapter is immutable. Replacing one puts another behind the same name with the next generation;
//! a request keeps the one that it began with until it ends.

use crate::error::ApiError;
use hydralora_data::ChatTemplate;
use hydralora_kernels::{Tensor, dispatch};
use hydralora_peft::Tuned;
use hydralora_run::engine::ServedAdapter;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// An adapter as whoever opens it gives it.
pub struct OpenedAdapter {
    /// The adapter, its domain chosen where it has several.
    pub tuned: Box<dyn Tuned>,
    /// The chat template that it is asked with.
    pub template: Option<ChatTemplate>,
    /// The tokens at which its answers end.
    pub end_ids: Vec<u32>,
}

/// Opens an adapter's folder for the served base, answering for a domain where one is named. What it
/// says of a fault may name the folder.
pub type OpenAdapter =
    Box<dyn Fn(&Path, Option<&str>) -> Result<OpenedAdapter, String> + Send + Sync>;

/// What adapters may take.
#[derive(Clone, Debug)]
pub struct AdapterLimits {
    /// Most adapters at a time.
    pub count: usize,
    /// Largest rank of one.
    pub rank: usize,
    /// Most bytes of all together.
    pub bytes: usize,
    /// The folder from which they may be loaded by requests; none if they may not.
    pub root: Option<PathBuf>,
}

impl Default for AdapterLimits {
    fn default() -> Self {
        Self { count: 32, rank: 256, bytes: 4 << 30, root: None }
    }
}

/// An adapter that can be asked.
pub(crate) struct Ready {
    pub(crate) name: String,
    pub(crate) generation: u64,
    pub(crate) created: u64,
    pub(crate) served: Arc<ServedAdapter<'static>>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) end_ids: Arc<[u32]>,
    /// Where it came from, as far as callers are told.
    root: String,
    method: String,
    rank: Option<usize>,
    bytes: usize,
    routed: bool,
}

impl Ready {
    /// What lists say of it.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "lora_name": self.name,
            "adapter_generation": self.generation,
            "root": self.root,
            "method": self.method,
            "rank": self.rank,
            "bytes": self.bytes,
            "routed": self.routed,
            "created": self.created,
        })
    }

    /// Where it came from.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }

    /// Whether its layers choose among experts.
    pub(crate) fn routed(&self) -> bool {
        self.routed
    }

    /// What it is called as a method.
    pub(crate) fn method(&self) -> &str {
        &self.method
    }
}

#[derive(Default)]
struct State {
    by_name: BTreeMap<String, Arc<Ready>>,
    last_generation: u64,
}

/// All adapters.
pub(crate) struct Adapters {
    open: OpenAdapter,
    pub(crate) limits: AdapterLimits,
    /// The base's name, which no adapter may take.
    base: String,
    state: Mutex<State>,
    /// Held while one is read, so that two do not take the same room.
    loading: Mutex<()>,
}

/// What is asked of a name's present adapter before it is changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Expected {
    /// Whether one of that name may be replaced.
    pub(crate) replace: bool,
    /// The generation that it must have.
    pub(crate) generation: Option<u64>,
}

impl Adapters {
    pub(crate) fn new(open: OpenAdapter, limits: AdapterLimits, base: &str) -> Self {
        let (state, loading) = (Mutex::default(), Mutex::default());
        Self { open, limits, base: base.to_owned(), state, loading }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter of a name.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Ready>> {
        self.state().by_name.get(name).cloned()
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Ready>> {
        self.state().by_name.values().cloned().collect()
    }

    /// The folder that a request means, inside the root and by no way around it.
    fn confined(&self, path: &str) -> Result<(PathBuf, String), ApiError> {
        let Some(root) = &self.limits.root else {
            return Err(off());
        };
        let fault = |message: &str| ApiError::field("lora_path", message);
        let missing = || {
            let message = "there is no such folder in the adapters' root";
            ApiError::field("lora_path", message).coded("adapter_not_found")
        };
        if path.is_empty() || path.contains('\0') {
            return Err(fault("expected a folder, from the adapters' root on"));
        }
        let root = root.canonicalize().map_err(|_| missing())?;
        // An absolute path counts if it lies inside; what does not is treated as if it were not there.
        let folder = root.join(path).canonicalize().map_err(|_| missing())?;
        let Ok(relative) = folder.strip_prefix(&root) else { return Err(missing()) };
        if !folder.is_dir() || relative.as_os_str().is_empty() {
            return Err(missing());
        }
        for entry in folder.read_dir().map_err(|_| missing())? {
            let inside = entry.and_then(|entry| entry.path().canonicalize());
            if !inside.is_ok_and(|inside| inside.starts_with(&root)) {
                return Err(fault("the folder holds a link that leads out of the adapters' root"));
            }
        }
        Ok((folder.clone(), relative.display().to_string()))
    }

    /// Loads what a request names.
    ///
    /// # Errors
    /// If loading is off, the name is taken or no name, the folder is not in the root or holds no
    /// adapter for this base, or there is no room.
    pub(crate) fn load_asked(
        &self,
        name: &str,
        path: &str,
        domain: Option<&str>,
        expected: Expected,
    ) -> Result<Arc<Ready>, ApiError> {
        let (folder, shown) = self.confined(path)?;
        let hide = |text: String| text.replace(&format!("{}", folder.display()), &shown);
        let root = self.limits.root.as_ref().map(|root| root.display().to_string());
        let hide = |text: String| match &root {
            Some(root) => hide(text).replace(root, "").replace("//", "/"),
            None => hide(text),
        };
        self.load(name, &folder, shown.clone(), domain, expected, &hide)
    }

    /// Loads an adapter from a folder that the caller vouches for.
    ///
    /// # Errors
    /// As [`load_asked`](Self::load_asked).
    pub(crate) fn load_given(
        &self,
        name: &str,
        folder: &Path,
        domain: Option<&str>,
    ) -> Result<Arc<Ready>, ApiError> {
        let root = folder.file_name().map_or_else(String::new, |name| name.display().to_string());
        self.load(name, folder, root, domain, Expected::default(), &|text| text)
    }

    fn load(
        &self,
        name: &str,
        folder: &Path,
        root: String,
        domain: Option<&str>,
        expected: Expected,
        hide: &dyn Fn(String) -> String,
    ) -> Result<Arc<Ready>, ApiError> {
        self.check_name(name)?;
        let Ok(_loading) = self.loading.try_lock() else {
            let message = "another adapter is being loaded";
            return Err(ApiError::busy(message, "lora_load_busy", 1));
        };
        self.check_place(name, expected)?;
        // Before a file is read that no adapter fits.
        let stored = hydralora_peft::io::stored_tensors(folder);
        let on_disk = stored.metadata().map_or(0, |file| file.len());
        self.check_bytes(name, usize::try_from(on_disk).unwrap_or(usize::MAX))?;
        let opened = (self.open)(folder, domain);
        let opened = opened.map_err(|error| {
            ApiError::field("lora_path", hide(error)).coded("adapter_unreadable")
        })?;
        let options = opened.tuned.options().to_peft();
        let rank = options.get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
        if let Some(rank) = rank.filter(|rank| *rank > self.limits.rank) {
            let message = format!("its rank is {rank}; expected at most {}", self.limits.rank);
            return Err(ApiError::field("lora_path", message).coded("adapter_rank"));
        }
        let known = hydralora_peft::methods::METHODS.iter().find(|known| known.claims(&options));
        let method = known.map_or("", |known| known.name()).to_owned();
        let (hash, bytes) = content(&method, domain, opened.tuned.as_ref());
        self.check_bytes(name, bytes)?;
        let routed = opened.tuned.as_routed().is_some();
        let served = Arc::new(ServedAdapter::new(opened.tuned, hash));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut state = self.state();
        // It may have been unloaded while this one was read.
        drop_check(&state, name, expected)?;
        state.last_generation += 1;
        let ready = Arc::new(Ready {
            name: name.to_owned(),
            generation: state.last_generation,
            created: now.map_or(0, |since| since.as_secs()),
            served,
            template: opened.template,
            end_ids: opened.end_ids.into(),
            root,
            method,
            rank,
            bytes,
            routed,
        });
        state.by_name.insert(name.to_owned(), Arc::clone(&ready));
        Ok(ready)
    }

    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 96 || !name.chars().all(plain) {
            let message = "expected 1 to 96 letters, digits, `-`, `_` and `.`";
            return Err(ApiError::field("lora_name", message));
        }
        if name == self.base {
            return Err(ApiError::field("lora_name", "is the base model's name"));
        }
        Ok(())
    }

    fn check_place(&self, name: &str, expected: Expected) -> Result<(), ApiError> {
        let state = self.state();
        drop_check(&state, name, expected)?;
        let count = self.limits.count;
        if !state.by_name.contains_key(name) && state.by_name.len() >= count {
            let message = format!("there are {count} adapters already, as many as are allowed");
            return Err(ApiError::field("lora_name", message).coded("adapter_budget"));
        }
        Ok(())
    }

    fn check_bytes(&self, name: &str, bytes: usize) -> Result<(), ApiError> {
        let state = self.state();
        let others = state.by_name.values().filter(|other| other.name != name);
        let taken: usize = others.map(|other| other.bytes).sum();
        let left = self.limits.bytes.saturating_sub(taken);
        if bytes > left {
            let message = format!("it takes {bytes} bytes, and {left} are left for adapters");
            return Err(ApiError::field("lora_path", message).coded("adapter_budget"));
        }
        Ok(())
    }

    /// Forgets an adapter; requests that use it go on.
    ///
    /// # Errors
    /// If changing adapters is off, there is none of that name, or it has another generation.
    pub(crate) fn unload(
        &self,
        name: &str,
        generation: Option<u64>,
    ) -> Result<Arc<Ready>, ApiError> {
        if self.limits.root.is_none() {
            return Err(off());
        }
        let mut state = self.state();
        let Some(present) = state.by_name.get(name) else {
            let message = format!("there is no adapter `{name}`");
            return Err(ApiError::not_found(message).of_field("lora_name"));
        };
        let found = present.generation;
        if generation.is_some_and(|expected| expected != found) {
            return Err(moved(name, found));
        }
        state.by_name.remove(name).ok_or_else(|| ApiError::not_found("it is gone"))
    }
}

/// Whether a name's adapter may be replaced.
fn drop_check(state: &State, name: &str, expected: Expected) -> Result<(), ApiError> {
    match (state.by_name.get(name), expected.generation) {
        (Some(present), Some(generation)) if present.generation != generation => {
            Err(moved(name, present.generation))
        }
        (Some(_), _) if !expected.replace => {
            let message =
                format!("the adapter `{name}` is loaded already; `load_inplace: true` replaces it");
            Err(ApiError::field("lora_name", message).coded("adapter_exists"))
        }
        (None, Some(generation)) => {
            let message = format!(
                "there is no adapter `{name}`, so that none has the expected generation {generation}"
            );
            Err(ApiError::conflict(message, "adapter_generation"))
        }
        _ => Ok(()),
    }
}

fn moved(name: &str, found: u64) -> ApiError {
    let message = format!("the adapter `{name}` has the generation {found} by now");
    ApiError::conflict(message, "adapter_generation")
}

fn off() -> ApiError {
    ApiError::forbidden(
        "adapters cannot be changed by requests; the server was started without --adapter-root",
    )
}

/// The hash of what an adapter computes with, and the bytes that it takes.
fn content(method: &str, domain: Option<&str>, tuned: &dyn Tuned) -> ([u8; 32], usize) {
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let options = Value::Object(tuned.options().to_peft());
    hash.update(json!([method, domain, options]).to_string());
    for (name, tensor) in tuned.file_tensors() {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(&name);
        hash.update(format!("{:?}", tensor.shape()));
        bytes += update(&mut hash, &tensor);
    }
    (hash.finalize().into(), bytes)
}

fn update(hash: &mut Sha256, tensor: &Tensor) -> usize {
    dispatch!(tensor.dtype(), |E| {
        let data = tensor.data::<E>();
        for value in data {
            hash.update(value.to_le_bytes());
        }
        std::mem::size_of_val(data)
    })
}
