//! Files of a folder that hold parts of one data set for training, validation and tests, by their names.

use std::path::{Path, PathBuf};

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Train,
    Valid,
    Test,
}

const NAMES: [(&str, Purpose); 16] = [
    ("train", Purpose::Train),
    ("training", Purpose::Train),
    ("trainset", Purpose::Train),
    ("valid", Purpose::Valid),
    ("validation", Purpose::Valid),
    ("val", Purpose::Valid),
    ("valset", Purpose::Valid),
    ("dev", Purpose::Valid),
    ("devset", Purpose::Valid),
    ("eval", Purpose::Valid),
    ("evaluation", Purpose::Valid),
    ("test", Purpose::Test),
    ("testing", Purpose::Test),
    ("testset", Purpose::Test),
    ("holdout", Purpose::Test),
    ("heldout", Purpose::Test),
];

/// What the name of a file says it is for: `train.jsonl`, `train-00000-of-00004.parquet`,
/// `law_test.json`. A word of it counts, not a part of a word; of several the last. `plainly` tells whether it
/// is the last word of the name: `test-prep.jsonl` may be about tests.
fn purpose(path: &Path) -> Option<(Purpose, bool)> {
    let stem = crate::input::stem(path).to_lowercase().replace("held_out", "heldout");
    let stem = stem.replace("held-out", "heldout").replace("hold_out", "holdout");
    let words = stem.split(|c: char| !c.is_alphabetic());
    // Parts of a file are counted, as `00000-of-00004`.
    let words: Vec<&str> = words.filter(|word| !word.is_empty() && *word != "of").collect();
    let of = |word: &&str| NAMES.iter().find(|(name, _)| name == word).map(|(_, purpose)| *purpose);
    let found = words.iter().enumerate().rev().find_map(|(at, word)| Some((at, of(word)?)));
    found.map(|(at, purpose)| (purpose, at + 1 == words.len()))
}

/// The files of a folder that are read, and the others.
pub(crate) struct Meant {
    /// Those that are read.
    pub(crate) files: Vec<PathBuf>,
    /// Those whose names say that they are of another split.
    pub(crate) others: Vec<PathBuf>,
    /// Whether all of them are trained on although their names say that none is for training.
    pub(crate) held_out_alone: bool,
}

/// The files that are meant where a folder is named: for training those that are for it by their names, with the
/// ones that say nothing; with `held_out` those for validation, else for tests. All of them where the names tell
/// no two kinds apart.
pub(crate) fn meant(files: Vec<PathBuf>, held_out: bool) -> Meant {
    let named: Vec<Option<(Purpose, bool)>> = files.iter().map(|path| purpose(path)).collect();
    let has = |purpose| named.iter().any(|found| found.is_some_and(|(found, _)| found == purpose));
    let several = has(Purpose::Train) && (has(Purpose::Valid) || has(Purpose::Test))
        || has(Purpose::Valid) && has(Purpose::Test);
    // A lone `test.jsonl` beside `data.jsonl` is one; beside `contest.jsonl` a `test-prep.jsonl` is none.
    let kept_apart = |found: &Option<(Purpose, bool)>| match found {
        Some((Purpose::Valid | Purpose::Test, plainly)) => several || *plainly,
        _ => false,
    };
    let apart: Vec<bool> = named.iter().map(kept_apart).collect();
    let whole = |files, held_out_alone| Meant { files, others: Vec::new(), held_out_alone };
    let wanted = match held_out {
        true if !several => return whole(files, false),
        true if has(Purpose::Valid) => Some(Purpose::Valid),
        true => Some(Purpose::Test),
        false if apart.iter().all(|apart| *apart) => return whole(files, true),
        false => None,
    };
    let mut own = named.iter().zip(&apart).map(|(found, apart)| match wanted {
        Some(wanted) => found.is_some_and(|(found, _)| found == wanted),
        None => !apart,
    });
    let (files, others) = files.into_iter().partition(|_| own.next().unwrap_or(true));
    Meant { files, others, held_out_alone: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], held_out: bool) -> Vec<String> {
        let files = names.iter().map(PathBuf::from).collect();
        let meant = meant(files, held_out);
        assert_eq!(meant.files.len() + meant.others.len(), names.len());
        meant.files.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn a_folder_of_splits_is_read_for_what_it_is_named() {
        let splits = ["test.jsonl", "train.jsonl", "valid.jsonl"];
        assert_eq!(chosen(&splits, false), ["train.jsonl"]);
        assert_eq!(chosen(&splits, true), ["valid.jsonl"]);
        let hub = [
            "more.parquet",
            "test-00000-of-00001.parquet",
            "train-00000-of-00002.parquet",
            "train-00001-of-00002.parquet",
        ];
        assert_eq!(chosen(&hub, false), [hub[0], hub[2], hub[3]]);
        assert_eq!(chosen(&hub, true), [hub[1]]);
        let named = ["law_dev.json.gz", "law_train.json.gz"];
        assert_eq!(chosen(&named, false), [named[1]]);
    }

    #[test]
    fn held_out_files_are_left_out_beside_any_others() {
        for held_out in ["test", "law_dev", "holdout", "held-out", "testset", "eval-00000-of-00002"]
        {
            let name = format!("{held_out}.jsonl");
            assert_eq!(chosen(&["data.jsonl", &name], false), ["data.jsonl"], "{name}");
            let alone = meant(vec![PathBuf::from(&name)], false);
            assert!(alone.held_out_alone && alone.files.len() == 1, "{name}");
        }
        let both = ["examples.jsonl", "valid.jsonl", "test.jsonl"];
        assert_eq!(chosen(&both, false), [both[0]]);
        assert!(
            meant(["dev.jsonl", "test.jsonl"].map(PathBuf::from).to_vec(), false).held_out_alone
        );
        assert!(
            !meant(["dev.jsonl", "test.jsonl"].map(PathBuf::from).to_vec(), true).held_out_alone
        );
    }

    #[test]
    fn other_folders_are_read_whole() {
        for names in [
            &["a.jsonl", "b.jsonl"][..],
            &["test-prep.jsonl", "contest.jsonl"],
            &["train.jsonl", "trains.jsonl", "device.jsonl"],
            &["dev.jsonl", "test.jsonl"],
        ] {
            assert_eq!(chosen(names, false), names);
        }
        assert_eq!(chosen(&["train.jsonl", "more.jsonl"], true).len(), 2);
    }
}
