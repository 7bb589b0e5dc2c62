//! Texts at which an answer ends.

/// Holds back what may be the beginning of a text to stop at, so that none of it is shown.
pub(crate) struct Held {
    stops: Vec<String>,
    text: String,
    stopped: Option<usize>,
}

impl Held {
    /// Holds for `stops`; empty ones stop nothing.
    pub(crate) fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), text: String::new(), stopped: None }
    }

    /// Whether a text to stop at has come.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The text to stop at that came.
    pub(crate) fn stop(&self) -> Option<&str> {
        self.stopped.map(|stop| self.stops[stop].as_str())
    }

    /// Takes the next piece and returns what is certain by now, and whether the text ends there.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.text += piece;
        let stops = || self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let found = stops().filter_map(|(index, stop)| Some((self.text.find(stop)?, index)));
        if let Some((at, stop)) = found.min() {
            self.text.truncate(at);
            self.stopped = Some(stop);
            return (std::mem::take(&mut self.text), true);
        }
        // The longest end of it that a text to stop at begins with.
        let begins = |at: &usize| stops().any(|(_, stop)| stop.starts_with(&self.text[*at..]));
        let from = self.text.char_indices().map(|(at, _)| at).find(begins);
        let kept = self.text.split_off(from.unwrap_or(self.text.len()));
        (std::mem::replace(&mut self.text, kept), false)
    }

    /// Takes out what was held back for nothing.
    pub(crate) fn take_rest(&mut self) -> String {
        if self.stopped() { String::new() } else { std::mem::take(&mut self.text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut held = Held::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (piece, stopped) = held.push(piece);
            shown.push(piece);
            if stopped {
                return (shown, true);
            }
        }
        shown.push(held.take_rest());
        (shown, false)
    }

    #[test]
    fn nothing_of_a_stop_is_shown() {
        let (pieces, stopped) = shown(&["\n\nQ:"], &["one\n", "\n", "two\n\n", "Q", ": three"]);
        assert!(stopped);
        assert_eq!(pieces, ["one", "", "\n\ntwo", "", ""]);
    }

    #[test]
    fn a_false_start_is_given_back() {
        assert_eq!(shown(&["abc"], &["xa", "ab", "d"]).0, ["x", "a", "abd", ""]);
        assert_eq!(shown(&["abc"], &["xab"]), (vec!["x".to_owned(), "ab".to_owned()], false));
    }

    #[test]
    fn the_first_of_several_ends_it() {
        assert_eq!(shown(&["end", "stop"], &["a stop, the end"]).0, ["a "]);
        assert_eq!(shown(&["", "é"], &["caf", "é"]), (vec!["caf".to_owned(), String::new()], true));
        assert_eq!(shown(&[], &["a", "b"]).0, ["a", "b", ""]);
    }

    /// However a text is cut into pieces, the same is shown.
    #[test]
    fn pieces_do_not_matter() {
        let text = "aabaabaaab";
        let whole = shown(&["aaab", "abb"], &[text]).0.concat();
        for first in 1..text.len() {
            for second in first..text.len() {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(shown(&["aaab", "abb"], &pieces).0.concat(), whole);
            }
        }
        assert_eq!(whole, "aabaab");
    }
}
