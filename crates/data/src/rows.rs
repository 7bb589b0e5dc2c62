//! The objects of a data file, whatever its layout, for readers that know the fields themselves.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Location, Result};
use crate::input::Input;
use crate::layout::{self, Asked};

/// Hands out the objects of a file of JSON lines, a JSON array, CSV with a header, or Parquet, in
/// their order and with where each stands; compressed files are read too. `visit` ends the reading
/// by returning `false`.
///
/// # Errors
/// When the file cannot be read, is damaged or laid out in no known way, or a record is no object;
/// and whatever `visit` gives.
pub fn read_rows(
    path: &Path,
    visit: &mut dyn FnMut(Location, Map<String, Value>) -> Result<bool>,
) -> Result<()> {
    let fields = BTreeMap::new();
    layout::read(Input::open(path)?, &Asked { format: None, fields: &fields }, &mut |raw| {
        let location = raw.location;
        let (object, _) = raw.content.object(&location)?;
        visit(location, object)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn layouts_and_compressions_give_the_same_objects() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "{\"a\": \"1\"}\n\n{\"a\": \"2\"}\n";
        let packed = std::fs::File::create(folder.path().join("x.jsonl.gz")).unwrap();
        let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        packed.write_all(lines.as_bytes()).unwrap();
        packed.finish().unwrap();
        std::fs::write(folder.path().join("x.jsonl"), lines).unwrap();
        std::fs::write(folder.path().join("x.json"), "[{\"a\": \"1\"}, {\"a\": \"2\"}]").unwrap();
        std::fs::write(folder.path().join("x.csv"), "a\n1\n2\n").unwrap();
        for name in ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv"] {
            let mut found = Vec::new();
            let mut visit = |_: Location, object: Map<String, Value>| {
                found.push(object["a"].as_str().unwrap().to_owned());
                Ok(found.len() < 2)
            };
            read_rows(&folder.path().join(name), &mut visit).unwrap();
            assert_eq!(found, ["1", "2"], "{name}");
        }
        std::fs::write(folder.path().join("x.jsonl"), "{\"a\": 1}\n7\n").unwrap();
        let error = read_rows(&folder.path().join("x.jsonl"), &mut |_, _| Ok(true)).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
