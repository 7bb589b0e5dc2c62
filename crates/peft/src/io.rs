//! Adapter folders: PEFT's `adapter_config.json` and `adapter_model.safetensors`, and beside them
//! `hydralora.json` with what is needed to notice that an adapter is used with another base model,
//! chat template or end token than it was trained with.

use crate::error::{Error, Fault, Result};
use crate::low_rank::{TokenIndices, vocabulary_axis};
use crate::method::{Method, MethodOptions};
use crate::methods::METHODS;
use crate::options::refuse_unknown;
use crate::trainable::TensorMap;
use crate::tuned::Tuned;
use hydralora_files::{Kind, Proof, replace_folder};
use hydralora_kernels::{DType, Tensor, dispatch};
use hydralora_model::adapter::{Site, SiteShape};
use hydralora_model::{ModelConfig, lfs_pointer};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

mod metadata;

use metadata::write_metadata;
pub use metadata::{METADATA_FILE, Metadata, TEMPLATE_FILE, read_metadata};

/// PEFT's configuration file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// PEFT's tensor file.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// The weights of a model that was trained whole.
pub const MODEL_FILE: &str = "model.safetensors";
/// The tensor file of older programs, a pickle.
pub const PICKLED_FILE: &str = "adapter_model.bin";
/// How builds that left no list of a folder's files are known to have written an adapter.
const PROOF: Proof = Proof {
    file: METADATA_FILE,
    fields: &["version", "base_model", "base_fingerprint"],
    files: &[
        CONFIG_FILE,
        TENSOR_FILE,
        PICKLED_FILE,
        METADATA_FILE,
        TEMPLATE_FILE,
        MODEL_FILE,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
};

/// The folder of an adapter, or of a model, that was trained.
pub const TRAINED: Kind = Kind { name: "trained adapter", earlier: Some(PROOF) };
/// The folder of an adapter made of others.
pub const MADE: Kind = Kind { name: "exported adapter", earlier: Some(PROOF) };

/// Numbers that an adapter's options may ask for whatever the file holds; up to here every tensor
/// that is missing or misshapen is listed by name.
const ALWAYS_BUILT: usize = 1 << 22;

/// The prefix PEFT puts before a base model's names.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// An adapter read from a folder.
pub struct LoadedAdapter {
    /// The live adapter.
    pub tuned: Box<dyn Tuned>,
    /// What it was trained with, if the folder says so.
    pub metadata: Option<Metadata>,
}

/// Writes an adapter folder, whole or not at all.
///
/// # Errors
/// If the file system refuses, or a tensor holds a number that is not finite.
pub fn save(
    folder: &Path,
    tuned: &dyn Tuned,
    metadata: &Metadata,
    all: &[SiteShape],
) -> Result<()> {
    replace_folder(folder, &TRAINED, |folder| write_into(folder, tuned, metadata, all))
}

/// The same into an existing empty folder.
///
/// # Errors
/// As [`save`].
pub fn write_into(
    folder: &Path,
    tuned: &dyn Tuned,
    metadata: &Metadata,
    all: &[SiteShape],
) -> Result<()> {
    let tensors = tuned.file_tensors();
    check_finite(folder, &tensors)?;
    if let Some(model) = tuned.as_whole_model() {
        write_metadata(folder, metadata)?;
        model.write_model_files(folder)?;
        return write_tensors(&folder.join(MODEL_FILE), &tensors);
    }
    let mut config = tuned.peft_config(all);
    name_base(&mut config, &metadata.base_model);
    write_parts(folder, &config, tensors, Some(metadata))
}

/// Writes the folder of an adapter whose base may not be at hand: `target_modules` are its layers'
/// names if they are known, and without `metadata` nothing ties it to a base but the name.
///
/// # Errors
/// As [`save`].
pub fn save_unbound(
    folder: &Path,
    tuned: &dyn Tuned,
    all: &[SiteShape],
    target_modules: Option<Value>,
    base_model: &str,
    metadata: Option<&Metadata>,
) -> Result<()> {
    let mut config = tuned.peft_config(all);
    if let Some(names) = target_modules.filter(|names| !names.is_null()) {
        config.insert("target_modules".to_owned(), names);
    }
    name_base(&mut config, base_model);
    save_parts(folder, config, tuned.file_tensors(), metadata)
}

/// Names the base model as PEFT and the hub do: of a hub id `owner/name@revision:file` the revision
/// stands apart, and the file has no place.
fn name_base(config: &mut Map<String, Value>, base_model: &str) {
    let id = base_model.split(['@', ':']).next().unwrap_or_default();
    let of_hub = id.split('/').count() == 2 && !id.starts_with(['/', '.', '~']);
    let name = if of_hub { id } else { base_model };
    config.insert("base_model_name_or_path".to_owned(), json!(name));
    let rest = if of_hub { &base_model[id.len()..] } else { "" };
    if let Some(revision) = rest.strip_prefix('@').and_then(|rest| rest.split(':').next()) {
        config.insert("revision".to_owned(), json!(revision));
    }
}

/// Writes a folder of these parts, whole or not at all.
pub(crate) fn save_parts(
    folder: &Path,
    config: Map<String, Value>,
    tensors: TensorMap,
    metadata: Option<&Metadata>,
) -> Result<()> {
    replace_folder(folder, &MADE, |folder| {
        check_finite(folder, &tensors)?;
        write_parts(folder, &config, tensors, metadata)
    })
}

fn check_finite(folder: &Path, tensors: &TensorMap) -> Result<()> {
    match tensors.iter().find(|(_, tensor)| !tensor.is_finite()) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::NonFinite { path: folder.join(TENSOR_FILE), name: name.clone() })
        }
    }
}

fn write_parts(
    folder: &Path,
    config: &Map<String, Value>,
    tensors: TensorMap,
    metadata: Option<&Metadata>,
) -> Result<()> {
    write(&folder.join(CONFIG_FILE), &pretty(config))?;
    if let Some(metadata) = metadata {
        write_metadata(folder, metadata)?;
    }
    // PEFT puts its prefix before the base model's names, and stores virtual tokens without one.
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let of_layer = name.starts_with("model.") || name.starts_with("lm_head.");
            (if of_layer { format!("{PEFT_PREFIX}{name}") } else { name }, tensor)
        })
        .collect();
    write_tensors(&folder.join(TENSOR_FILE), &tensors)
}

/// Where the folder of `tuned` holds its tensors.
pub fn tensor_file(tuned: &dyn Tuned) -> &'static str {
    if tuned.as_whole_model().is_some() { MODEL_FILE } else { TENSOR_FILE }
}

fn pretty(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    text
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| naming(path, &error))
}

fn naming(path: &Path, error: &std::io::Error) -> Error {
    Error::Io(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// Writes tensors as a safetensors file, straight from their memory.
///
/// # Errors
/// If the file system refuses.
pub fn write_tensors(path: &Path, tensors: &TensorMap) -> Result<()> {
    let bytes: BTreeMap<&str, (&Tensor, Cow<'_, [u8]>)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), (tensor, bytes_of(tensor)))).collect();
    let views: Result<Vec<_>, _> = bytes
        .iter()
        .map(|(name, (tensor, bytes))| {
            let dtype = match tensor.dtype() {
                DType::F32 => Dtype::F32,
                DType::F64 => Dtype::F64,
            };
            TensorView::new(dtype, tensor.shape().to_vec(), bytes).map(|view| (*name, view))
        })
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    // The library's file is for its owner alone; ours is as any other file here.
    let usual = fs::File::create(path).and_then(|file| Ok(file.metadata()?.permissions()));
    let usual = usual.map_err(|error| naming(path, &error))?;
    let written =
        views.and_then(|views| safetensors::serialize_to_file(views, Some(metadata), path));
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => naming(path, &error),
        other => Error::Malformed { path: path.to_path_buf(), message: other.to_string() },
    })?;
    fs::set_permissions(path, usual).map_err(|error| naming(path, &error))
}

/// A tensor's numbers as a file has them: little-endian.
fn bytes_of(tensor: &Tensor) -> Cow<'_, [u8]> {
    dispatch!(tensor.dtype(), |E| {
        let data = tensor.data::<E>();
        if cfg!(target_endian = "little") {
            Cow::Borrowed(bytemuck::cast_slice(data))
        } else {
            Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    })
}

/// The file that holds the tensors of an adapter's folder: safetensors, or else the pickle of older
/// programs.
pub fn stored_tensors(folder: &Path) -> PathBuf {
    let (path, pickled) = (folder.join(TENSOR_FILE), folder.join(PICKLED_FILE));
    if !path.exists() && pickled.exists() { pickled } else { path }
}

/// Reads a file of floating-point tensors as `dtype`: safetensors, or a `.bin` of `torch.save`.
///
/// # Errors
/// If the file cannot be read, is malformed, or holds other types or numbers that are not finite.
pub fn decode(path: &Path, dtype: DType) -> Result<TensorMap> {
    if path.extension().is_some_and(|extension| extension == "bin") {
        let tensors = crate::exchange::pickle::read(path, dtype)?;
        return Ok(tensors.into_iter().map(|(name, t)| (plain_name(&name), t)).collect());
    }
    let bytes = hydralora_files::bytes_of(path).map_err(|error| naming(path, &error))?;
    let malformed = |message: String| Error::Malformed { path: path.to_path_buf(), message };
    if let Some(what) = lfs_pointer(&bytes) {
        return Err(malformed(what.to_owned()));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
    let mut tensors = TensorMap::new();
    for (name, view) in file.tensors() {
        let values = dispatch!(dtype, |E| {
            let values: Vec<E> = match view.dtype() {
                Dtype::F64 => chunks(view.data()).map(|b| f64::from_le_bytes(b) as E).collect(),
                Dtype::F32 => chunks(view.data()).map(|b| E::from(f32::from_le_bytes(b))).collect(),
                Dtype::F16 => chunks(view.data())
                    .map(|b| E::from(half::f16::from_le_bytes(b).to_f32()))
                    .collect(),
                Dtype::BF16 => chunks(view.data())
                    .map(|b| E::from(half::bf16::from_le_bytes(b).to_f32()))
                    .collect(),
                other => {
                    let expected = "expected F32, F16, BF16 or F64";
                    return Err(malformed(format!("`{name}` has type {other:?}; {expected}")));
                }
            };
            if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                return Err(malformed(format!(
                    "`{name}` holds {} at element {index}; expected finite numbers",
                    values[index]
                )));
            }
            // A single number has no dimension; here every tensor has one.
            let shape = view.shape();
            Tensor::new(values, if shape.is_empty() { &[1] } else { shape })
        });
        tensors.insert(plain_name(&name), values);
    }
    Ok(tensors)
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// A tensor's name without what PEFT puts around it.
pub(crate) fn plain_name(name: &str) -> String {
    let name = name.strip_prefix(PEFT_PREFIX).unwrap_or(name);
    let name = name.strip_suffix(".default").unwrap_or(name);
    name.replace(".default.", ".")
}

/// The layer a tensor belongs to, by its name.
pub(crate) fn site_of(name: &str) -> Option<Site> {
    // A layer's name has as many parts as its family gives it.
    let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    ends.skip(1).find_map(|end| name[..end].parse().ok())
}

/// The layer that a tensor updates, by its name; none for one that takes the place of the layer's own.
fn updated_site(name: &str) -> Option<Site> {
    let own =
        |site: &Site| [".weight", ".bias"].iter().any(|part| *name == format!("{site}{part}"));
    site_of(name).filter(|site| !own(site))
}

/// Reads an adapter folder for a model of these dimensions.
///
/// # Errors
/// If a file is missing or malformed, the method or one of its options is not supported, or the
/// tensors are not exactly those the adapter needs on this model.
pub fn load(folder: &Path, config: &ModelConfig, dtype: DType) -> Result<LoadedAdapter> {
    load_with(folder, &config.sites(), Some(config), dtype)
}

/// [`load`] for a model of which only the layers are known, so that nothing may be trained beside them.
///
/// # Errors
/// As [`load`].
pub fn load_unbound(folder: &Path, sites: &[SiteShape], dtype: DType) -> Result<LoadedAdapter> {
    load_with(folder, sites, None, dtype)
}

fn load_with(
    folder: &Path,
    sites: &[SiteShape],
    model: Option<&ModelConfig>,
    dtype: DType,
) -> Result<LoadedAdapter> {
    let path = stored_tensors(folder);
    let config = read_config(folder)?;
    let tensors = decode(&path, dtype)?;
    let targets = every_layer_of(&config);
    let options = options_of(folder, config, &tensors)?;
    let options = options.as_stored().unwrap_or(options);
    let tuned = attach_layers(&path, options.as_ref(), tensors, sites, model, dtype)?;
    check_targets(&path, &targets, tuned.as_ref(), sites)?;
    Ok(LoadedAdapter { tuned, metadata: read_metadata(folder)? })
}

/// The names in a configuration's `target_modules`, where nothing says that they are meant for some
/// layers only.
fn every_layer_of(config: &Map<String, Value>) -> Vec<String> {
    let limited = ["layers_to_transform", "layers_pattern", "exclude_modules"]
        .iter()
        .any(|key| config.get(*key).is_some_and(|value| !value.is_null() && *value != json!([])));
    let names = config.get("target_modules").and_then(Value::as_array).filter(|_| !limited);
    names.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Refuses an adapter that leaves out a layer of the model that its targets mean, as one does that was
/// made for a model of fewer layers.
fn check_targets(
    path: &Path,
    targets: &[String],
    tuned: &dyn Tuned,
    sites: &[SiteShape],
) -> Result<()> {
    let own: BTreeSet<Site> = tuned.sites().into_iter().collect();
    let meant = |name: &str| {
        let of = |target: &String| name == target || name.ends_with(&format!(".{target}"));
        targets.iter().any(of)
    };
    let left_out: Vec<Site> = sites
        .iter()
        .map(|shape| shape.site)
        .filter(|site| !own.contains(site) && meant(&site.to_string()))
        .collect();
    let Some(first) = left_out.first() else { return Ok(()) };
    let message = format!(
        "holds no tensor for {first}, nor for {} more of the model's layers that its target_modules \
         ({}) mean; it was made for another model",
        left_out.len() - 1,
        targets.join(", ")
    );
    Err(Error::Tensors { path: path.to_path_buf(), mismatches: vec![message] })
}

/// How many rows the embedding has that a folder's tensors are for, as far as one of them says it; 0
/// where none does.
///
/// # Errors
/// If the tensors cannot be read.
pub fn vocabulary_of(folder: &Path) -> Result<usize> {
    let path = stored_tensors(folder);
    let shapes = shapes_of(&path)?;
    // No file holds a row in less than a byte.
    let bytes = fs::metadata(&path).map_err(|error| naming(&path, &error))?.len();
    let rows = shapes.iter().filter_map(|(name, shape)| {
        let at = vocabulary_axis(name)?;
        shape.get(at).copied().filter(|&rows| rows as u64 <= bytes)
    });
    Ok(rows.max().unwrap_or(0))
}

/// The tokens whose rows a folder trains on their own.
///
/// # Errors
/// If its configuration is missing or malformed.
pub fn trained_tokens(folder: &Path) -> Result<Vec<u32>> {
    let config = read_config(folder)?;
    let listed = config.get("trainable_token_indices").cloned().unwrap_or_default();
    let tokens: Option<TokenIndices> = serde_json::from_value(listed).ok();
    let ids = tokens.map(|tokens| {
        let ends = tokens.ends();
        ends.into_iter().flat_map(|end| tokens.of(end).to_vec()).collect()
    });
    Ok(ids.unwrap_or_default())
}

/// Names and shapes of the tensors in a file, without their numbers where it is one of safetensors.
fn shapes_of(path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
    if path.extension().is_none_or(|extension| extension != "safetensors") {
        let tensors = decode(path, DType::F32)?;
        return Ok(tensors.into_iter().map(|(name, t)| (name, t.shape().to_vec())).collect());
    }
    let open = || -> std::io::Result<Vec<u8>> {
        let mut file = hydralora_files::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let mut header = Vec::new();
        // No more is read than there is.
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = open().map_err(|error| naming(path, &error))?;
    let header: Map<String, Value> = serde_json::from_slice(&header).map_err(|error| {
        Error::Malformed { path: path.to_path_buf(), message: error.to_string() }
    })?;
    let shape = |tensor: &Value| -> Option<Vec<usize>> {
        let extents = tensor["shape"].as_array()?.iter();
        extents.map(|extent| usize::try_from(extent.as_u64()?).ok()).collect()
    };
    let named = header.iter().filter_map(|(name, t)| Some((plain_name(name), shape(t)?)));
    Ok(named.collect())
}

/// The options in a folder's `adapter_config.json`.
///
/// # Errors
/// If it is missing, malformed, or asks for something not supported.
pub fn read_options(folder: &Path) -> Result<Box<dyn MethodOptions>> {
    let config = read_config(folder)?;
    if is_published(&config) {
        let tensors = decode(&stored_tensors(folder), DType::F32)?;
        return options_of(folder, config, &tensors);
    }
    options_of(folder, config, &TensorMap::new())
}

/// The name of the method whose adapter a folder holds.
///
/// # Errors
/// As [`read_options`], as far as the method is concerned.
pub fn method_of(folder: &Path) -> Result<&'static str> {
    let mut config = read_config(folder)?;
    if is_published(&config) {
        let tensors = decode(&stored_tensors(folder), DType::F32)?;
        name_published(&mut config, &tensors);
    }
    claiming(folder, &config).map(|method| method.name())
}

/// The `adapter_config.json` of a folder.
///
/// # Errors
/// If it is missing or malformed.
pub fn read_config(folder: &Path) -> Result<Map<String, Value>> {
    let path = folder.join(CONFIG_FILE);
    if !path.exists() && folder.join("config.json").exists() {
        let message =
            "this folder holds a whole model and no adapter; give it as the model".to_owned();
        return Err(Error::Malformed { path: folder.to_path_buf(), message });
    }
    read_json(&path)
}

/// Whether a configuration is of the published codes of HydraLoRA and LoRAMoE, which say the same of
/// either.
fn is_published(config: &Map<String, Value>) -> bool {
    config.get("peft_type") == Some(&json!("LORA")) && config.contains_key("lora_nums")
}

/// Says of the published LoRAMoE's configuration, by its tensors, that it is one.
fn name_published(config: &mut Map<String, Value>, tensors: &TensorMap) {
    if is_published(config) && tensors.keys().any(|name| name.contains(".lora_A0.")) {
        config.insert("peft_type".to_owned(), json!("LORAMOE"));
        for (key, own) in [("blc_alpha", "balance_delta"), ("blc_weight", "balance_weight")] {
            let value = config.remove(key).filter(|value| !value.is_null()).unwrap_or(json!(0.0));
            config.insert(own.to_owned(), value);
        }
    }
}

/// The method that a folder's configuration describes.
fn claiming(folder: &Path, config: &Map<String, Value>) -> Result<&'static dyn Method> {
    METHODS.iter().copied().find(|method| method.claims(config)).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
        let found = config.get("peft_type").map_or("missing".to_owned(), Value::to_string);
        Error::Malformed {
            path: folder.join(CONFIG_FILE),
            message: format!("peft_type is {found}; supported methods are {}", known.join(", ")),
        }
    })
}

/// The options of a folder with this configuration and these tensors.
fn options_of(
    folder: &Path,
    mut config: Map<String, Value>,
    tensors: &TensorMap,
) -> Result<Box<dyn MethodOptions>> {
    name_published(&mut config, tensors);
    let method = claiming(folder, &config)?;
    let malformed = |faults: Vec<Fault>| Error::Malformed {
        path: folder.join(CONFIG_FILE),
        message: faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; "),
    };
    let options = method.read_peft(&config).map_err(malformed)?;
    // What is ignored could change what the tensors mean.
    match refuse_unknown(&config, &options.to_peft()) {
        faults if faults.is_empty() => Ok(options),
        faults => Err(malformed(faults)),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = hydralora_files::bytes_of(path).map_err(|error| naming(path, &error))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::Malformed { path: path.to_path_buf(), message: error.to_string() })
}

/// Builds the adapter that `tensors` describe; every one of them has to be used.
///
/// # Errors
/// Listing every tensor that is missing, left over, misshapen, or for a layer the model lacks.
pub fn attach(
    path: &Path,
    options: &dyn MethodOptions,
    tensors: TensorMap,
    config: &ModelConfig,
    dtype: DType,
) -> Result<Box<dyn Tuned>> {
    attach_layers(path, options, tensors, &config.sites(), Some(config), dtype)
}

/// [`attach`] for a model of these layers; without `model` nothing may be trained beside them.
pub(crate) fn attach_layers(
    path: &Path,
    options: &dyn MethodOptions,
    mut tensors: TensorMap,
    sites: &[SiteShape],
    model: Option<&ModelConfig>,
    dtype: DType,
) -> Result<Box<dyn Tuned>> {
    let of = if options.replaces_weights() { site_of } else { updated_site };
    let named: BTreeSet<Site> = tensors.keys().filter_map(|name| of(name)).collect();
    let whole = options.whole_model();
    let wanted: Vec<SiteShape> =
        sites.iter().copied().filter(|shape| whole || named.contains(&shape.site)).collect();
    let asked = options.stored_numbers(&wanted);
    let held = tensors.values().map(Tensor::len).sum::<usize>();
    if asked > held.max(ALWAYS_BUILT) {
        let message = format!(
            "holds {held} numbers, and {CONFIG_FILE} asks for at least {asked}; the two do not belong \
             together"
        );
        return Err(Error::Malformed { path: path.to_path_buf(), message });
    }
    let mut tuned = options.build(&wanted, dtype, 0);
    let mut mismatches = tuned.load_file(&mut tensors).err().unwrap_or_default();
    mismatches.extend(tensors.iter().map(|(name, tensor)| match site_of(name) {
        Some(site) if !wanted.iter().any(|shape| shape.site == site) => {
            format!("`{name}` is for a layer the model does not have")
        }
        _ => format!("`{name}` {:?} is not used by this method", tensor.shape()),
    }));
    mismatches.extend(match model {
        Some(config) => tuned.belong_to(config).err().unwrap_or_default(),
        None => Vec::from_iter(tuned.beside_layers().map(|more| {
            format!("trains {more} beside its layers, so the base model is needed too")
        })),
    });
    if tuned.trainables().is_empty() && !whole && mismatches.is_empty() {
        mismatches.push("holds no tensor of a layer".to_owned());
    }
    if mismatches.is_empty() {
        return Ok(tuned);
    }
    let more = mismatches.len().saturating_sub(8);
    mismatches.truncate(8);
    if more > 0 {
        mismatches.push(format!("and {more} more"));
    }
    Err(Error::Tensors { path: path.to_path_buf(), mismatches })
}

/// Refuses an adapter whose recorded base model is not the one at hand; one that records none fits any.
///
/// # Errors
/// If the fingerprints differ.
pub fn check_base(
    folder: &Path,
    metadata: &Metadata,
    base_model: &str,
    fingerprint: &str,
) -> Result<()> {
    if metadata.base_fingerprint == fingerprint || metadata.base_fingerprint.is_empty() {
        return Ok(());
    }
    Err(Error::AnotherBase {
        path: folder.to_path_buf(),
        trained_on: metadata.base_model.clone(),
        expected: metadata.base_fingerprint.clone(),
        given: base_model.to_owned(),
        found: fingerprint.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_model::family::kit::{K_PROJ, Q_PROJ};

    /// A folder with this configuration and these tensors.
    fn folder(config: &Value, tensors: &TensorMap) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join(CONFIG_FILE), &pretty(config)).unwrap();
        write_tensors(&folder.path().join(TENSOR_FILE), tensors).unwrap();
        folder
    }

    fn sites() -> Vec<SiteShape> {
        [(&Q_PROJ, 4, 4), (&K_PROJ, 4, 2)]
            .map(|(linear, in_features, out_features)| SiteShape {
                site: Site { layer: 0, linear },
                in_features,
                out_features,
            })
            .to_vec()
    }

    #[test]
    fn options_that_ask_for_more_than_the_file_holds_are_refused() {
        let name = "model.layers.0.self_attn.q_proj.lora_A.weight".to_owned();
        let lora = TensorMap::from([(name, Tensor::zeros(DType::F32, [2, 4]))]);
        let prompt =
            TensorMap::from([("prompt_embeddings".to_owned(), Tensor::zeros(DType::F32, [2, 4]))]);
        let huge = 1_u64 << 40;
        for (mut config, option, value, tensors) in [
            (json!({"peft_type": "LORA"}), "r", json!(huge), &lora),
            (json!({"peft_type": "LORA"}), "r", json!(1e300), &lora),
            (json!({"peft_type": "LORA", "r": 2}), "lora_nums", json!(huge), &lora),
            (json!({"peft_type": "ADALORA", "target_r": 1}), "init_r", json!(huge), &lora),
            (json!({"peft_type": "MTL_LORA", "domains": ["a"]}), "r", json!(huge), &lora),
            (json!({"peft_type": "PROMPT_TUNING"}), "num_virtual_tokens", json!(huge), &prompt),
            (json!({"peft_type": "P_TUNING"}), "num_virtual_tokens", json!(huge), &prompt),
            (json!({"peft_type": "PREFIX_TUNING"}), "num_virtual_tokens", json!(huge), &prompt),
        ] {
            if tensors.contains_key("prompt_embeddings") {
                config[option] = value;
            } else {
                config["lora_alpha"] = json!(4);
                config["target_modules"] = json!(["q_proj"]);
                config[option] = value;
            }
            let folder = folder(&config, tensors);
            let error =
                load_unbound(folder.path(), &sites(), DType::F32).err().unwrap().to_string();
            assert!(error.contains("holds 8 numbers"), "{config}: {error}");
        }
    }

    #[test]
    fn an_encoder_that_no_file_holds_is_not_built() {
        let tensors =
            TensorMap::from([("prompt_embeddings".to_owned(), Tensor::zeros(DType::F32, [2, 4]))]);
        for config in [
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 2,
                   "encoder_hidden_size": 1_u64 << 40}),
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2,
                   "prefix_projection": true, "encoder_hidden_size": 1_u64 << 40}),
        ] {
            let folder = folder(&config, &tensors);
            let loaded = load_unbound(folder.path(), &sites(), DType::F32).unwrap();
            assert_eq!(loaded.tuned.tensors().len(), 1, "{config}");
        }
    }

    #[test]
    fn a_base_model_is_named_as_peft_names_it() {
        for (base, name, revision) in [
            ("org/model", "org/model", None),
            ("org/model@v1", "org/model", Some("v1")),
            ("org/model@v1:m.gguf", "org/model", Some("v1")),
            ("org/model:m.gguf", "org/model", None),
            ("/models/a@b", "/models/a@b", None),
            ("/models", "/models", None),
            ("./m/x@1", "./m/x@1", None),
            ("stories260K", "stories260K", None),
        ] {
            let mut config = Map::new();
            name_base(&mut config, base);
            assert_eq!(config["base_model_name_or_path"], name, "{base}");
            assert_eq!(config.get("revision").and_then(Value::as_str), revision, "{base}");
        }
    }

    #[test]
    fn a_single_number_has_a_dimension() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TENSOR_FILE);
        let name = "model.layers.0.self_attn.q_proj.lora_A.weight";
        let view = TensorView::new(Dtype::F32, Vec::new(), &[0; 4]).unwrap();
        safetensors::serialize_to_file([(name, view)], None, &path).unwrap();
        let tensors = decode(&path, DType::F32).unwrap();
        assert_eq!(tensors[name].shape(), [1]);
        assert_eq!(crate::exchange::shapes_in(&tensors).len(), 1);
    }
}
