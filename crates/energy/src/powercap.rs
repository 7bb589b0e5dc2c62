//! RAPL, as Linux's powercap shows it: a folder a domain, with the files `name`, `energy_uj` and
//! `max_energy_range_uj` (Documentation/power/powercap/powercap.rst of the kernel).
//!
//! Counted are the packages, which contain their cores and graphics, and the memory beside them
//! (`dram`). `psys` is the whole platform with the packages in it and counts only where there is no
//! package. The same package may be shown twice, by its registers and by memory (`intel-rapl-mmio`).

use crate::counter::Counter;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names of a domain's files.
const ENERGY: &str = "energy_uj";
const RANGE: &str = "max_energy_range_uj";
const NAME: &str = "name";
/// Looks at a file that is empty, and the time between them: one that is being written is, for a moment.
const LOOKS: usize = 5;
const BETWEEN: Duration = Duration::from_millis(2);
/// Folders in folders: packages hold their parts.
const DEPTH: usize = 3;

/// A domain's place: by which driver it is shown, and its number, that of its parent first.
type Place = (String, Vec<u32>);

/// A domain's counter.
struct Domain {
    energy: PathBuf,
    range: Option<u64>,
}

impl Counter for Domain {
    fn read(&self) -> Result<u64, String> {
        let shown = self.energy.display();
        let text = self.text().map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => format!(
                "{shown}: permission denied; newer kernels let root alone read it: run as root, or let \
                 everybody read it until the next start of the machine with \
                 `sudo chmod a+r {}/*rapl:*/{ENERGY}`",
                self.root().display()
            ),
            ErrorKind::NotFound => format!("{shown}: is not there"),
            _ => format!("{shown}: {error}"),
        })?;
        let text = text.trim();
        text.parse().map_err(|_| format!("{shown}: holds `{text}`; expected microjoules"))
    }

    fn name(&self) -> String {
        self.energy.display().to_string()
    }

    fn range(&self) -> Option<u64> {
        self.range
    }
}

impl Domain {
    fn open(folder: &Path) -> Result<Self, String> {
        let range = fs::read_to_string(folder.join(RANGE)).ok();
        let range = range.and_then(|text| text.trim().parse().ok());
        let domain = Self { energy: folder.join(ENERGY), range };
        domain.read().map(|_| domain)
    }

    fn text(&self) -> std::io::Result<String> {
        for _ in 1..LOOKS {
            let text = fs::read_to_string(&self.energy)?;
            if !text.is_empty() {
                return Ok(text);
            }
            std::thread::sleep(BETWEEN);
        }
        fs::read_to_string(&self.energy)
    }

    /// The folder of all domains: that of this one, or of its parent's.
    fn root(&self) -> &Path {
        let above = |path: &Path| place(path).is_some();
        let mut folders = self.energy.ancestors().skip(1);
        folders.find(|path| !above(path)).unwrap_or(&self.energy)
    }
}

/// The place that a folder's name says: `intel-rapl:0:1` is part 1 of package 0; none for others.
fn place(folder: &Path) -> Option<Place> {
    let name = folder.file_name()?.to_str()?;
    let (driver, numbers) = name.split_once(':')?;
    let numbers: Option<Vec<u32>> = numbers.split(':').map(|part| part.parse().ok()).collect();
    driver.contains("rapl").then_some((driver.to_owned(), numbers?))
}

/// The folders of domains in `folder`, which may lie beside one another, in one another, or both.
fn gather(folder: &Path, depth: usize, into: &mut BTreeMap<Place, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let named = path.file_name().is_some_and(|name| name.to_string_lossy().contains("rapl"));
        if !named || !path.is_dir() {
            continue;
        }
        if depth > 1 {
            gather(&path, depth - 1, into)?;
        }
        if let Some(place) = place(&path) {
            into.insert(place, path);
        }
    }
    Ok(())
}

/// The counters under `root`, with what their sum is called: `rapl:package-0+dram`.
///
/// # Errors
/// If there are none, or one of them cannot be read.
pub(crate) fn open(root: &Path) -> Result<(String, Vec<Box<dyn Counter>>), String> {
    let shown = root.display();
    let mut places = BTreeMap::new();
    gather(root, DEPTH, &mut places).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!(
            "{shown}: no such folder; this system, its container or its virtual machine shows no energy \
             counters"
        ),
        _ => format!("{shown}: {error}"),
    })?;
    let name = |path: &Path| {
        let text = fs::read_to_string(path.join(NAME)).unwrap_or_default();
        text.trim().to_owned()
    };
    let named: Vec<(Place, String, PathBuf)> =
        places.into_iter().map(|(place, path)| (place, name(&path), path)).collect();
    let whole = |kind: fn(&str) -> bool| {
        // `intel-rapl` comes before `intel-rapl-mmio`, and what it shows is not shown again.
        let mut drivers: BTreeMap<&str, &str> = BTreeMap::new();
        let found = named.iter().filter(move |((driver, numbers), name, _)| {
            let first = numbers.len() == 1 && kind(name);
            first && *drivers.entry(name).or_insert(driver) == driver
        });
        found.collect::<Vec<_>>()
    };
    let packages = whole(|name| name.starts_with("package"));
    let counted = if packages.is_empty() { whole(|name| name == "psys") } else { packages };
    if counted.is_empty() {
        let names: BTreeSet<&str> = named.iter().map(|(_, name, _)| name.as_str()).collect();
        let names: Vec<&str> = names.into_iter().collect();
        return Err(match names.is_empty() {
            true => format!("{shown}: holds no domain of RAPL"),
            false => format!("{shown}: holds no package, only {}", names.join(", ")),
        });
    }
    let (mut names, mut counters) = (Vec::new(), Vec::<Box<dyn Counter>>::new());
    for ((driver, numbers), name, path) in counted {
        names.push(name.as_str());
        counters.push(Box::new(Domain::open(path)?));
        if name == "psys" {
            continue;
        }
        for ((part_of, part), name, path) in &named {
            if part_of == driver && part.len() == 2 && part[0] == numbers[0] && name == "dram" {
                names.push(name);
                counters.push(Box::new(Domain::open(path)?));
            }
        }
    }
    Ok((format!("rapl:{}", names.join("+")), counters))
}
