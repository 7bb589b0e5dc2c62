//! Files of a folder that hold parts of one data set for training, validation and tests, by their names.

use std::path::{Path, PathBuf};

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Train,
    Valid,
    Test,
}

const NAMES: [(&str, Purpose); 9] = [
    ("train", Purpose::Train),
    ("training", Purpose::Train),
    ("valid", Purpose::Valid),
    ("validation", Purpose::Valid),
    ("val", Purpose::Valid),
    ("dev", Purpose::Valid),
    ("eval", Purpose::Valid),
    ("test", Purpose::Test),
    ("testing", Purpose::Test),
];

/// What the name of a file says it is for: `train.jsonl`, `train-00000-of-00004.parquet`,
/// `law_test.json`. A word of it counts, not a part of a word; of several the last.
fn purpose(path: &Path) -> Option<Purpose> {
    let stem = crate::input::stem(path).to_lowercase();
    let words: Vec<&str> = stem.split(|c: char| !c.is_alphabetic()).collect();
    words.iter().rev().find_map(|word| NAMES.iter().find(|(name, _)| name == word)).map(|(_, p)| *p)
}

/// The files that are meant where a folder is named: all, but where its files' names say that some are
/// for training and some not, those for training, with the ones that say nothing; or with `held_out` those for
/// validation, else for tests. Beside them the others.
pub(crate) fn meant(files: Vec<PathBuf>, held_out: bool) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let purposes: Vec<Option<Purpose>> = files.iter().map(|path| purpose(path)).collect();
    let has = |purpose| purposes.contains(&Some(purpose));
    let several = has(Purpose::Train) && (has(Purpose::Valid) || has(Purpose::Test))
        || has(Purpose::Valid) && has(Purpose::Test);
    if !several {
        return (files, Vec::new());
    }
    let wanted = match held_out {
        true if has(Purpose::Valid) => Some(Purpose::Valid),
        true => Some(Purpose::Test),
        false if has(Purpose::Train) => Some(Purpose::Train),
        // Nothing is said to be for training, so all that is there is taken.
        false => return (files, Vec::new()),
    };
    let mut purposes = purposes.into_iter();
    let own = |_: &PathBuf| match purposes.next().flatten() {
        None => !held_out,
        found => found == wanted,
    };
    files.into_iter().partition(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], held_out: bool) -> Vec<String> {
        let files = names.iter().map(PathBuf::from).collect();
        let (own, others) = meant(files, held_out);
        assert_eq!(own.len() + others.len(), names.len());
        own.iter().map(|path| path.display().to_string()).collect()
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
