//! The bundled sample loads and is what its page says.

use std::path::Path;

use hydralora_data::{DataConfig, SourceConfig};

use crate::load;

#[test]
fn the_bundled_sample_loads_without_loss() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/sample"));
    let domains = ["general", "language", "law", "math", "translation"];
    let config = DataConfig {
        train: domains.iter().map(|d| SourceConfig::new(format!("{d}.jsonl"))).collect(),
        template: Some("chatml".to_owned()),
        max_seq_len: 4096,
        ..DataConfig::default()
    };
    let dataset = load(&config, folder).unwrap();
    assert_eq!(dataset.domains, domains);
    let page = fs_err::read_to_string(folder.join("README.md")).unwrap();
    for source in &dataset.report.sources {
        assert_eq!(source.dropped.total() + source.truncated, 0, "{source:?}");
        assert!(source.records >= 100, "{source:?}");
        let row = format!("| {} | {} |", source.path.display(), source.records);
        assert!(page.contains(&row), "README.md lacks {row}");
    }
    assert_eq!(dataset.report.duplicates, 0);
}
