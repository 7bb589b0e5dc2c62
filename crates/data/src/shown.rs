//! Texts from elsewhere, fit to be shown to people.

use std::borrow::Cow;

/// A text in which nothing speaks to the terminal or the page instead of the reader: control
/// characters but line feed and tab, and marks that turn the direction of writing round, are written
/// as `\u{1b}`. Names, messages and records come from files that strangers made; this is the one place
/// that makes them harmless, before they are printed or put on a page.
pub fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_hidden(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Whether a character acts instead of being seen.
fn is_hidden(c: char) -> bool {
    let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (c.is_control() && c != '\n' && c != '\t') || turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_but_text() {
        let kept = "plain äöü 日本 👩‍👩‍👧 \n\tb";
        assert!(matches!(shown(kept), Cow::Borrowed(text) if text == kept));
        assert_eq!(shown("\u{1b}]0;title\u{7}"), "\\u{1b}]0;title\\u{7}");
        assert_eq!(shown("a\u{9b}31m\u{7f}\r"), "a\\u{9b}31m\\u{7f}\\u{d}");
        assert_eq!(shown("user\u{202e}nimda\u{2066}"), "user\\u{202e}nimda\\u{2066}");
        for code in (0..0x20).chain(0x7f..0xa0).chain(0x202a..0x202f).chain(0x2066..0x206a) {
            let c = char::from_u32(code).unwrap();
            let seen = shown(c.encode_utf8(&mut [0; 4])).into_owned();
            assert!(!seen.chars().any(is_hidden), "{code:x}");
            assert_eq!(seen.len() == c.len_utf8(), matches!(c, '\n' | '\t'), "{code:x}");
        }
    }
}
