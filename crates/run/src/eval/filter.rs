//! From what a model wrote to what is compared.

use fancy_regex::{Captures, Regex};

/// What a filter gives where it finds nothing.
pub(crate) const INVALID: &str = "[invalid]";

/// A regular expression that is part of a task's definition.
///
/// # Panics
/// If it is malformed, which a test of each task would show.
pub(crate) fn pattern(source: &str) -> Regex {
    Regex::new(source).unwrap_or_else(|error| panic!("the pattern {source:?}: {error}"))
}

/// Which of several matches counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pick {
    First,
    Last,
}

/// The chosen match of `pattern` in `text`: its first group that matched and is not empty, or, of
/// a pattern without groups, all of it; trimmed. [`INVALID`] without a match.
pub(crate) fn extract(pattern: &Regex, pick: Pick, text: &str) -> String {
    let mut matches = pattern.captures_iter(text).filter_map(Result::ok);
    let chosen = match pick {
        Pick::First => matches.next(),
        Pick::Last => matches.last(),
    };
    let of_groups = |captures: &Captures<'_>| match captures.len() {
        1 => captures.get(0).map(|found| found.as_str().to_owned()),
        2 => Some(captures.get(1).map_or(String::new(), |found| found.as_str().to_owned())),
        _ => captures
            .iter()
            .skip(1)
            .flatten()
            .map(|found| found.as_str().to_owned())
            .find(|found| !found.is_empty()),
    };
    match chosen {
        Some(captures) => {
            of_groups(&captures).unwrap_or_else(|| INVALID.to_owned()).trim().to_owned()
        }
        None => INVALID.to_owned(),
    }
}

/// `text` without all that `ignored` match, one pattern after the other, in lower case.
pub(crate) fn normalise(ignored: &[Regex], text: &str) -> String {
    let mut text = text.to_owned();
    for pattern in ignored {
        text = pattern.replace_all(&text, "").into_owned();
    }
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_are_picked_and_groups_preferred() {
        let numbers = pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)");
        assert_eq!(extract(&numbers, Pick::Last, "first 3, then $1,200. So 7"), "7");
        assert_eq!(extract(&numbers, Pick::Last, "It costs $1,200."), "$1,200.");
        assert_eq!(extract(&numbers, Pick::First, "-5 and 12"), "-5");
        assert_eq!(extract(&numbers, Pick::Last, "none"), INVALID);
        let strict = pattern(r"#### (\-?[0-9\.\,]+)");
        assert_eq!(extract(&strict, Pick::First, "so\n#### 72\n\n#### 9"), "72");
    }

    #[test]
    fn ignored_parts_and_case_do_not_count() {
        let ignored = [",", r"\$", r"(?s).*#### ", r"\.$"].map(pattern);
        assert_eq!(normalise(&ignored, "She\nhas #### $1,200."), "1200");
        assert_eq!(normalise(&ignored, "ABC"), "abc");
    }
}
