//! Tensors in PyTorch's zip files: `data.pkl`, a pickle of a dictionary from names to tensors, and
//! one entry `data/KEY` per storage.
//!
//! A pickle is a program; a general reader would run whatever it names. This one knows the opcodes
//! that PyTorch writes for a dictionary of tensors and the names below, and refuses all others.

use crate::error::{Error, Result};
use crate::trainable::TensorMap;
use hydralora_kernels::{DType, Tensor, dispatch};
use std::collections::HashMap;
use std::io::{BufReader, Cursor, Read, Write};
use std::path::Path;
use std::rc::Rc;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Most bytes of the program that are read; one for a million tensors is smaller.
const MAX_PROGRAM: u64 = 1 << 28;
/// How deep tuples and dictionaries may go; a dictionary of tensors needs four.
const MAX_DEPTH: usize = 16;
/// Most dimensions of a tensor, as in PyTorch.
const MAX_DIMENSIONS: usize = 64;
/// How many times as large as the file its entries may be unpacked: `torch.save` packs none, but
/// another program may, and zeros pack well.
const MAX_UNPACKED: usize = 64;
/// How many times as many numbers as the storages the tensors may hold: some share one.
const MAX_SHARED: usize = 16;

/// Element types of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F64,
    F32,
    F16,
    BF16,
}

impl Kind {
    fn of(class: &str) -> Option<Self> {
        Some(match class {
            "torch.DoubleStorage" => Kind::F64,
            "torch.FloatStorage" => Kind::F32,
            "torch.HalfStorage" => Kind::F16,
            "torch.BFloat16Storage" => Kind::BF16,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Kind::F64 => 8,
            Kind::F32 => 4,
            Kind::F16 | Kind::BF16 => 2,
        }
    }

    fn widen(self, bytes: &[u8]) -> Vec<f64> {
        fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
            bytes.as_chunks::<N>().0.iter().copied()
        }
        match self {
            Kind::F64 => chunks(bytes).map(f64::from_le_bytes).collect(),
            Kind::F32 => chunks(bytes).map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            Kind::F16 => chunks(bytes).map(|b| half::f16::from_le_bytes(b).to_f64()).collect(),
            Kind::BF16 => chunks(bytes).map(|b| half::bf16::from_le_bytes(b).to_f64()).collect(),
        }
    }
}

/// Numbers in an entry of the file.
#[derive(Clone, Debug, PartialEq)]
struct Storage {
    key: Rc<str>,
    kind: Kind,
    len: usize,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq)]
struct View {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// What is on the stack. Copies are cheap, for a program can ask for one with two bytes.
#[derive(Clone, Debug, PartialEq)]
enum Item {
    Mark,
    None,
    Bool,
    Int(i64),
    Float,
    Text(Rc<str>),
    Tuple { items: Rc<[Item]>, depth: usize },
    List,
    Dict { entries: Vec<(Item, Item)>, depth: usize },
    Global(Rc<str>),
    Storage(Storage),
    Tensor(Rc<View>),
}

impl Item {
    fn tuple(items: Vec<Item>) -> Step<Self> {
        let depth = Self::depth_around(&items)?;
        Ok(Item::Tuple { items: items.into(), depth })
    }

    fn empty_dict() -> Self {
        Item::Dict { entries: Vec::new(), depth: 1 }
    }

    fn depth(&self) -> usize {
        match self {
            Item::Tuple { depth, .. } | Item::Dict { depth, .. } => *depth,
            _ => 0,
        }
    }

    /// The depth of what holds `items`; dropping one without a limit would overflow the stack.
    fn depth_around(items: &[Item]) -> Step<usize> {
        let depth = 1 + items.iter().map(Item::depth).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(format!("nests values more than {MAX_DEPTH} deep"));
        }
        Ok(depth)
    }
}

/// What a program may name.
const ALLOWED: &[&str] = &[
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.DoubleStorage",
    "torch.FloatStorage",
    "torch.HalfStorage",
    "torch.BFloat16Storage",
];

/// Reads the tensors of the file at `path` as `dtype`, under the names it gives them.
///
/// # Errors
/// If it is no such file, names anything but tensors, is cut off, or holds numbers that are not
/// finite.
pub fn read(path: &Path, dtype: DType) -> Result<TensorMap> {
    let fault = |message: String| Error::Malformed { path: path.to_path_buf(), message };
    let file = hydralora_files::open(path).map_err(|error| {
        Error::Io(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    })?;
    let file_len = file.metadata()?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|error| {
        fault(format!(
            "is no zip file as torch.save writes it ({error}); files of PyTorch before 1.6 have to \
             be saved anew, or as safetensors"
        ))
    })?;
    let program_name = archive
        .file_names()
        .filter_map(|name| name.ok().map(std::borrow::Cow::into_owned))
        .find(|name| name.ends_with("/data.pkl") || name == "data.pkl")
        .ok_or_else(|| fault("holds no data.pkl; expected a file of torch.save".to_owned()))?;
    let prefix = program_name.trim_end_matches("data.pkl").to_owned();
    let most_bytes = usize::try_from(file_len).unwrap_or(usize::MAX).saturating_mul(MAX_UNPACKED);
    let mut program = Vec::new();
    archive
        .by_name(&program_name)
        .map_err(|error| fault(error.to_string()))?
        .take(MAX_PROGRAM.min(most_bytes as u64))
        .read_to_end(&mut program)
        .map_err(|error| fault(format!("data.pkl: {error}")))?;
    let views =
        Machine::new(&program).run().map_err(|message| fault(format!("data.pkl: {message}")))?;
    let mut storages: HashMap<Rc<str>, Vec<f64>> = HashMap::new();
    let mut tensors = TensorMap::new();
    let (mut unpacked, mut stored, mut taken) = (0_usize, 0_usize, 0_usize);
    for (name, view) in views {
        let Storage { key, kind, len } = &view.storage;
        if !storages.contains_key(key) {
            let entry = format!("{prefix}data/{key}");
            let size = len
                .checked_mul(kind.size())
                .ok_or_else(|| fault(format!("`{name}`: storage of {len} numbers")))?;
            unpacked = unpacked.saturating_add(size);
            if unpacked > most_bytes {
                let message = format!(
                    "`{name}`: {entry} has {size} bytes, more than a file of {file_len} can hold"
                );
                return Err(fault(message));
            }
            let mut bytes = Vec::new();
            archive
                .by_name(&entry)
                .map_err(|error| fault(format!("`{name}`: {entry}: {error}")))?
                .take(size as u64 + 1)
                .read_to_end(&mut bytes)
                .map_err(|error| fault(format!("`{name}`: {entry}: {error}")))?;
            if bytes.len() != size {
                let found = bytes.len();
                let message = format!("`{name}`: {entry} has {found} bytes, expected {size}");
                return Err(fault(message));
            }
            let numbers = kind.widen(&bytes);
            stored += numbers.len();
            storages.insert(key.clone(), numbers);
        }
        let values = view.gather(&storages[key]).map_err(|m| fault(format!("`{name}`: {m}")))?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(fault(format!(
                "`{name}` holds {} at element {index}; expected finite numbers",
                values[index]
            )));
        }
        taken += values.len();
        if taken > stored.saturating_mul(MAX_SHARED) {
            return Err(fault(format!(
                "its tensors share {stored} numbers more than {MAX_SHARED} times over"
            )));
        }
        tensors.insert(name.to_string(), Tensor::from_f64(dtype, &values, &view.shape));
    }
    Ok(tensors)
}

impl View {
    /// The numbers of the view in row-major order.
    fn gather(&self, storage: &[f64]) -> Result<Vec<f64>, String> {
        let outside = || "reaches beyond its storage".to_owned();
        let len = self.shape.iter().try_fold(1_usize, |len, &n| len.checked_mul(n));
        let len = len.filter(|&len| len <= storage.len().max(1)).ok_or_else(outside)?;
        let mut values = Vec::with_capacity(len);
        let mut index = vec![0_usize; self.shape.len()];
        for _ in 0..len {
            let at = index
                .iter()
                .zip(&self.strides)
                .try_fold(self.offset, |at, (i, stride)| at.checked_add(i.checked_mul(*stride)?));
            values.push(*at.and_then(|at| storage.get(at)).ok_or_else(outside)?);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Ok(values)
    }
}

/// Runs a program.
struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Item>,
    memo: HashMap<u32, Item>,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    fn new(program: &'a [u8]) -> Self {
        Self { rest: program, stack: Vec::new(), memo: HashMap::new() }
    }

    fn bytes(&mut self, count: usize) -> Step<&'a [u8]> {
        let (bytes, rest) =
            self.rest.split_at_checked(count).ok_or_else(|| "is cut off".to_owned())?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.bytes(N)?;
        bytes.try_into().map_err(|_| "is cut off".to_owned())
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn text(&mut self, len: usize) -> Step<&'a str> {
        let bytes = self.bytes(len)?;
        std::str::from_utf8(bytes).map_err(|_| "holds a text that is not UTF-8".to_owned())
    }

    fn line(&mut self) -> Step<&'a str> {
        let end = self.rest.iter().position(|&b| b == b'\n').ok_or("is cut off")?;
        let line = self.text(end)?;
        self.bytes(1)?;
        Ok(line)
    }

    fn pop(&mut self) -> Step<Item> {
        self.stack.pop().ok_or_else(|| "takes from an empty stack".to_owned())
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Step<Vec<Item>> {
        let mark = self.stack.iter().rposition(|item| *item == Item::Mark);
        let at = mark.ok_or_else(|| "lacks a mark".to_owned())?;
        let items = self.stack.split_off(at + 1);
        self.stack.pop();
        Ok(items)
    }

    fn set_items(&mut self, items: Vec<Item>) -> Step<()> {
        let Some(Item::Dict { entries, depth }) = self.stack.last_mut() else {
            return Err("sets items of something that is no dictionary".to_owned());
        };
        *depth = (*depth).max(Item::depth_around(&items)?);
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        Ok(())
    }

    fn remember(&mut self, index: u32) -> Step<()> {
        let top = self.stack.last().ok_or_else(|| "remembers nothing".to_owned())?;
        // A dictionary or list grows after it is remembered, so what is kept would be stale.
        if !matches!(top, Item::Dict { .. } | Item::List) {
            self.memo.insert(index, top.clone());
        }
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Step<()> {
        let item = self.memo.get(&index).cloned().ok_or_else(|| {
            format!("recalls item {index}, which is no text, number, tuple or tensor")
        })?;
        self.stack.push(item);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let global = format!("{module}.{name}");
        if !ALLOWED.contains(&global.as_str()) {
            return Err(format!(
                "names `{global}`, which is not needed for a dictionary of floating-point tensors and \
                 is refused"
            ));
        }
        self.stack.push(Item::Global(global.into()));
        Ok(())
    }

    fn run(mut self) -> Step<Vec<(Rc<str>, Rc<View>)>> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                0x80 => {
                    self.byte()?;
                }
                0x95 => {
                    self.bytes(8)?;
                }
                b'(' => self.stack.push(Item::Mark),
                b'}' => self.stack.push(Item::empty_dict()),
                b']' => self.stack.push(Item::List),
                b')' => self.stack.push(Item::tuple(Vec::new())?),
                b'N' => self.stack.push(Item::None),
                0x88 | 0x89 => self.stack.push(Item::Bool),
                b'K' => {
                    let value = self.byte()?;
                    self.stack.push(Item::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.stack.push(Item::Int(value.into()));
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.stack.push(Item::Int(value.into()));
                }
                0x8a => {
                    let count = usize::from(self.byte()?);
                    let bytes = self.bytes(count)?;
                    if count > 8 {
                        return Err("holds a number of more than 64 bits".to_owned());
                    }
                    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
                    let mut wide = [if negative { 0xff } else { 0 }; 8];
                    wide[..count].copy_from_slice(bytes);
                    self.stack.push(Item::Int(i64::from_le_bytes(wide)));
                }
                b'G' => {
                    self.bytes(8)?;
                    self.stack.push(Item::Float);
                }
                b'X' => {
                    let len = u32::from_le_bytes(self.array()?) as usize;
                    let text = self.text(len)?;
                    self.stack.push(Item::Text(text.into()));
                }
                0x8c => {
                    let len = usize::from(self.byte()?);
                    let text = self.text(len)?;
                    self.stack.push(Item::Text(text.into()));
                }
                b'q' => {
                    let index = self.byte()?;
                    self.remember(index.into())?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.array()?);
                    self.remember(index)?;
                }
                b'h' => {
                    let index = self.byte()?;
                    self.recall(index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.array()?);
                    self.recall(index)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                b't' => {
                    let items = self.pop_mark()?;
                    self.stack.push(Item::tuple(items)?);
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let at = self.stack.len().checked_sub(count);
                    let at = at.ok_or_else(|| "takes from an empty stack".to_owned())?;
                    let items = self.stack.split_off(at);
                    self.stack.push(Item::tuple(items)?);
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(items)?;
                }
                b'a' => {
                    self.pop()?;
                }
                b'e' => {
                    self.pop_mark()?;
                }
                // An OrderedDict's attributes: a state dictionary's versions.
                b'b' => {
                    self.pop()?;
                    if !matches!(self.stack.last(), Some(Item::Dict { .. })) {
                        return Err(
                            "gives attributes to something that is no dictionary".to_owned()
                        );
                    }
                }
                b'Q' => {
                    let reference = self.pop()?;
                    self.stack.push(Item::Storage(storage(&reference)?));
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    self.stack.push(call(&function, arguments)?);
                }
                b'.' => return tensors(self.pop()?),
                other => {
                    return Err(format!(
                        "uses opcode {other:#04x}, which torch.save does not for tensors"
                    ));
                }
            }
        }
    }
}

/// The storage of a persistent reference `("storage", class, key, device, length)`.
fn storage(reference: &Item) -> Step<Storage> {
    let Item::Tuple { items: parts, .. } = reference else {
        return Err("refers to something that is no storage".to_owned());
    };
    match &parts[..] {
        [Item::Text(what), Item::Global(class), Item::Text(key), _, Item::Int(len)]
            if &**what == "storage" =>
        {
            let kind = Kind::of(class).ok_or_else(|| format!("`{class}` is no storage"))?;
            let len = usize::try_from(*len).map_err(|_| format!("a storage of {len} numbers"))?;
            Ok(Storage { key: key.clone(), kind, len })
        }
        _ => Err("refers to something that is no storage".to_owned()),
    }
}

fn call(function: &Item, arguments: Item) -> Step<Item> {
    let (Item::Global(name), Item::Tuple { items: arguments, .. }) = (function, arguments) else {
        return Err("calls something that is no function".to_owned());
    };
    let sizes = |item: &Item| match item {
        Item::Tuple { items, .. } if items.len() <= MAX_DIMENSIONS => items
            .iter()
            .map(|item| match item {
                Item::Int(n) => usize::try_from(*n).ok(),
                _ => None,
            })
            .collect::<Option<Vec<usize>>>(),
        _ => None,
    };
    match (&**name, &arguments[..]) {
        ("collections.OrderedDict", []) => Ok(Item::empty_dict()),
        ("torch._utils._rebuild_parameter", [tensor @ Item::Tensor(_), ..]) => Ok(tensor.clone()),
        (
            "torch._utils._rebuild_tensor_v2",
            [Item::Storage(storage), Item::Int(offset), shape, strides, ..],
        ) => {
            let view = sizes(shape).zip(sizes(strides)).zip(usize::try_from(*offset).ok());
            match view {
                Some(((shape, strides), offset)) if shape.len() == strides.len() => {
                    // A single number has no dimension; here every tensor has one.
                    let scalar = shape.is_empty();
                    let (shape, strides) =
                        if scalar { (vec![1], vec![1]) } else { (shape, strides) };
                    let view = View { storage: storage.clone(), offset, shape, strides };
                    Ok(Item::Tensor(Rc::new(view)))
                }
                _ => Err("rebuilds a tensor of a malformed shape".to_owned()),
            }
        }
        _ => Err(format!("calls `{name}` with other arguments than PyTorch does")),
    }
}

/// The named tensors of the final value.
fn tensors(value: Item) -> Step<Vec<(Rc<str>, Rc<View>)>> {
    let Item::Dict { entries, .. } = value else {
        return Err("ends with something that is no dictionary of tensors".to_owned());
    };
    entries
        .into_iter()
        .map(|entry| match entry {
            (Item::Text(name), Item::Tensor(view)) => Ok((name, view)),
            (Item::Text(name), _) => Err(format!("`{name}` is no tensor")),
            _ => Err("has a key that is no text".to_owned()),
        })
        .collect()
}

/// The bytes of a file that `torch.load` reads as a dictionary of these tensors.
///
/// # Errors
/// If the zip format cannot hold them; the message names `path`.
pub fn write(tensors: &[(String, Tensor)], path: &Path) -> Result<Vec<u8>> {
    let mut out = ZipWriter::new(Cursor::new(Vec::new()));
    // PyTorch maps the entries, so they are not compressed.
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let fault = |message: String| Error::Malformed { path: path.to_path_buf(), message };
    let mut entry = |name: &str, bytes: &[u8]| -> Result<()> {
        out.start_file(format!("adapter_model/{name}"), stored)
            .map_err(|error| fault(error.to_string()))?;
        Ok(out.write_all(bytes)?)
    };
    entry("data.pkl", &program(tensors))?;
    entry("byteorder", b"little")?;
    for (key, (_, tensor)) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = dispatch!(tensor.dtype(), |E| {
            tensor.data::<E>().iter().flat_map(|value| value.to_le_bytes()).collect()
        });
        entry(&format!("data/{key}"), &bytes)?;
    }
    entry("version", b"3\n")?;
    Ok(out.finish().map_err(|error| fault(error.to_string()))?.into_inner())
}

fn program(tensors: &[(String, Tensor)]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, value: &str) {
        out.push(b'X');
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    fn number(out: &mut Vec<u8>, value: usize) {
        out.extend_from_slice(&[0x8a, 8]);
        out.extend_from_slice(&(value as u64).to_le_bytes());
    }
    fn numbers(out: &mut Vec<u8>, values: &[usize]) {
        out.push(b'(');
        values.iter().for_each(|&value| number(out, value));
        out.push(b't');
    }
    let mut out = vec![0x80, 2, b'}', b'('];
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        let class = match tensor.dtype() {
            DType::F32 => "FloatStorage",
            DType::F64 => "DoubleStorage",
        };
        let mut strides = vec![1; tensor.shape().len()];
        for axis in (1..strides.len()).rev() {
            strides[axis - 1] = strides[axis] * tensor.shape()[axis];
        }
        text(&mut out, name);
        out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend_from_slice(format!("ctorch\n{class}\n").as_bytes());
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        number(&mut out, tensor.len());
        out.extend_from_slice(b"tQ");
        number(&mut out, 0);
        numbers(&mut out, tensor.shape());
        numbers(&mut out, &strides);
        out.push(0x89);
        out.extend_from_slice(b"ccollections\nOrderedDict\n)RtR");
    }
    out.extend_from_slice(b"u.");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<(String, Tensor)> {
        let values: Vec<f32> = (0..6).map(|i| i as f32 - 2.5).collect();
        vec![
            ("a.lora_A.weight".to_owned(), Tensor::new(values, [2, 3])),
            ("b.lora_B0.weight".to_owned(), Tensor::from_f64(DType::F64, &[1.0, -2.0], [2, 1])),
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        std::fs::write(&path, write(&sample(), &path).unwrap()).unwrap();
        let found = read(&path, DType::F64).unwrap();
        assert_eq!(found.len(), 2);
        for (name, tensor) in sample() {
            assert_eq!(found[&name].shape(), tensor.shape());
            assert_eq!(found[&name].to_f64(), tensor.to_f64());
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        for value in [f32::NAN, f32::INFINITY] {
            let tensors = [("w.lora_A.weight".to_owned(), Tensor::new(vec![0.5, value], [1, 2]))];
            std::fs::write(&path, write(&tensors, &path).unwrap()).unwrap();
            let error = read(&path, DType::F32).unwrap_err().to_string();
            assert!(error.contains("w.lora_A.weight") && error.contains("element 1"), "{error}");
        }
    }

    #[test]
    fn other_names_and_opcodes_are_refused() {
        let run = |program: &[u8]| Machine::new(program).run().unwrap_err();
        let error = run(b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR.");
        assert!(error.contains("posix.system"), "{error}");
        assert!(run(b"\x80\x02}\x93.").contains("0x93"));
        assert!(run(b"\x80\x02)R.").contains("empty stack"));
        assert!(run(b"\x80\x02}(X\x01\x00\x00\x00aK\x01u.").contains("`a` is no tensor"));
        assert!(run(b"\x80\x02X\xff\x00").contains("cut off"));
        assert!(run(b"\x80\x02}q\x00h\x00.").contains("recalls item 0"));
    }

    #[test]
    fn spoiled_programs_never_panic() {
        let whole = program(&sample());
        for cut in 0..whole.len() {
            assert!(Machine::new(&whole[..cut]).run().is_err());
        }
        for at in 0..whole.len() {
            let mut spoiled = whole.clone();
            spoiled[at] ^= 0x55;
            let _ = Machine::new(&spoiled).run();
        }
    }

    #[test]
    fn values_nested_without_end_are_refused() {
        let run = |program: Vec<u8>| Machine::new(&program).run().unwrap_err();
        let tuples = run([vec![b'N'], vec![0x85; 1 << 20]].concat());
        assert!(tuples.contains("more than 16 deep"), "{tuples}");
        let dicts = [b"}K\x01".repeat(1 << 18), b"}".to_vec(), b"s".repeat(1 << 18)].concat();
        assert!(run(dicts).contains("more than 16 deep"));
    }

    #[test]
    fn values_recalled_without_end_take_no_memory() {
        // Each turn makes a pair of what the turn before made.
        let doubled = b"h\x00h\x00\x86q\x00".repeat(14);
        let recalled = b"h\x00".repeat(1 << 16);
        let program = [b"Nq\x00".to_vec(), doubled, recalled, b".".to_vec()].concat();
        let error = Machine::new(&program).run().unwrap_err();
        assert!(error.contains("no dictionary of tensors"), "{error}");
    }

    #[test]
    fn tensors_that_share_a_storage_without_end_are_refused() {
        let file = |views: usize| {
            let mut out = ZipWriter::new(Cursor::new(Vec::new()));
            let packed = SimpleFileOptions::default();
            let tensor = Tensor::new(vec![0.0_f32; 1000], [1000]);
            let one = program(&[("a".to_owned(), tensor)]);
            // From the tensor's name to the end of its construction.
            let entry = &one[4..one.len() - 2];
            let mut all = one[..4].to_vec();
            for index in 0..views {
                all.extend([b'X', 1, 0, 0, 0, b'0' + index as u8]);
                all.extend(&entry[6..]);
            }
            all.extend(b"u.");
            for (name, bytes) in [("m/data.pkl", &all[..]), ("m/data/0", &[0; 4000])] {
                out.start_file(name, packed).unwrap();
                out.write_all(bytes).unwrap();
            }
            out.finish().unwrap().into_inner()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        std::fs::write(&path, file(3)).unwrap();
        assert_eq!(read(&path, DType::F32).unwrap().len(), 3);
        std::fs::write(&path, file(20)).unwrap();
        let error = read(&path, DType::F32).unwrap_err().to_string();
        assert!(error.contains("more than 16 times over"), "{error}");
    }

    #[test]
    fn storages_that_no_file_of_that_size_holds_are_refused() {
        let mut out = ZipWriter::new(Cursor::new(Vec::new()));
        let packed = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        let tensor = Tensor::zeros(DType::F32, [1 << 20]);
        out.start_file("m/data.pkl", packed).unwrap();
        out.write_all(&program(&[("a".to_owned(), tensor)])).unwrap();
        out.start_file("m/data/0", packed).unwrap();
        out.write_all(&vec![0; 4 << 20]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        std::fs::write(&path, out.finish().unwrap().into_inner()).unwrap();
        let error = read(&path, DType::F32).unwrap_err().to_string();
        assert!(error.contains("more than a file of"), "{error}");
    }

    #[test]
    fn a_view_beyond_its_storage_is_refused() {
        let storage = Storage { key: "0".into(), kind: Kind::F32, len: 4 };
        let view = |offset, shape: &[usize], strides: &[usize]| {
            let (shape, strides) = (shape.to_vec(), strides.to_vec());
            View { storage: storage.clone(), offset, shape, strides }.gather(&[1.0, 2.0, 3.0, 4.0])
        };
        assert_eq!(view(0, &[2, 2], &[1, 2]), Ok(vec![1.0, 3.0, 2.0, 4.0]));
        assert!(view(1, &[2, 2], &[2, 1]).is_err());
        assert!(view(0, &[usize::MAX, 2], &[1, 1]).is_err());
        assert!(view(usize::MAX, &[2], &[2]).is_err());
    }
}
