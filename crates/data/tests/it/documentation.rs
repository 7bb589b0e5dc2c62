//! The guide's examples are read by the code they describe.

use hydralora_data::{DataConfig, builtin_template_names, format_names};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    data: DataConfig,
}

fn guide() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/data.md");
    fs_err::read_to_string(path).unwrap()
}

#[test]
fn every_recipe_of_the_guide_is_valid() {
    let guide = guide();
    let blocks: Vec<&str> =
        guide.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 4, "{}", blocks.len());
    for block in blocks {
        let recipe: Recipe =
            serde_saphyr::from_str(block).unwrap_or_else(|e| panic!("{e}\n{block}"));
        // Only the files are missing.
        let faults = recipe.data.validate(std::path::Path::new("/nonexistent"));
        let others: Vec<_> = faults
            .iter()
            .filter(|fault| {
                !fault.path.ends_with(".path")
                    && !fault.path.starts_with("data.overlap_check[")
                    && fault.path != "data.template"
            })
            .collect();
        assert!(others.is_empty(), "{others:?}\n{block}");
    }
}

#[test]
fn every_key_format_and_template_is_in_the_guide() {
    let guide = guide();
    let config =
        DataConfig { train: vec![hydralora_data::SourceConfig::new("x")], ..DataConfig::default() };
    let json = serde_json::to_value(&config).unwrap();
    let mut words: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
    words.extend(json["train"][0].as_object().unwrap().keys().cloned());
    words.extend(format_names().into_iter().chain(builtin_template_names()).map(str::to_owned));
    for word in words {
        assert!(guide.contains(&format!("`{word}`")), "`{word}` is not in docs/data.md");
    }
}
