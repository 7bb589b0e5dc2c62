//! A template's source, brought to the form that the engine reads as jinja reads the original.
//!
//! Line ends become `\n`; `{% generation %}` marks become blocks that always apply, for answers are
//! found otherwise here; string literals lose the escapes that the engine does not know, and
//! neighbouring ones become one; `text % values` becomes a filter. Lines keep their numbers where
//! no literal spans several.

use std::ops::Range;

/// The filter that stands for `%` behind a text.
pub(super) const PERCENT: &str = "percent_";
/// The filter around what a loop goes over.
pub(super) const ITERATED: &str = "iterated_";

/// Operands of `%` within each other.
const MOST_OPERANDS: usize = 50;

pub(super) fn translate(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |at| at + 2),
            Some(b'{') => expression(tag, "}}", &mut out),
            Some(b'%') => match raw_block(tag) {
                Some(end) => end,
                None => match mark(tag) {
                    Some((end, replacement)) => {
                        out.push_str(&replacement);
                        rest = &tag[end..];
                        continue;
                    }
                    None => expression(tag, "%}", &mut out),
                },
            },
            _ => 1,
        };
        if !matches!(tag.as_bytes().get(1), Some(b'{' | b'%')) || raw_block(tag).is_some() {
            out.push_str(&tag[..end]);
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// The words of a tag that begins here and where it ends: without the signs of white space.
fn words(tag: &str) -> Option<(&str, usize)> {
    // Not the `%` that opens it: `{%}` is no tag.
    let len = tag.get(2..)?.find("%}")?;
    Some((&tag[2..2 + len], len + 4))
}

/// Where a raw block that begins here ends, if one does.
fn raw_block(tag: &str) -> Option<usize> {
    let (inside, start) = words(tag)?;
    if inside.trim_matches(['-', '+']).trim() != "raw" {
        return None;
    }
    let mut at = start;
    while let Some(next) = tag[at..].find("{%") {
        let (inside, len) = words(&tag[at + next..])?;
        at += next;
        if inside.trim_matches(['-', '+']).trim() == "endraw" {
            return Some(at + len);
        }
        at += 2;
    }
    Some(tag.len())
}

/// The end of a mark of `transformers` that begins here, and what takes its place; its control of
/// white space is kept.
fn mark(tag: &str) -> Option<(usize, String)> {
    let (inside, end) = words(tag)?;
    let block = match inside.trim_matches(['-', '+']).trim() {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return None,
    };
    let sign = |found: Option<char>| match found {
        Some('-') => "-",
        Some('+') => "+",
        _ => "",
    };
    let (open, close) = (sign(inside.chars().next()), sign(inside.chars().last()));
    Some((end, ["{%", open, " ", block, " ", close, "%}"].concat()))
}

/// Writes the tag that begins `tag` to `out` and says where it ends.
fn expression(tag: &str, close: &str, out: &mut String) -> usize {
    out.push_str(&tag[..2]);
    let start = out.len();
    let end = code(tag, 2, close, 0, out);
    if close == "%}"
        && let Some(range) = iterated(&out[start..])
    {
        let whole = ["(", &out[start..][range.clone()], ")|", ITERATED].concat();
        out.replace_range(start + range.start..start + range.end, &whole);
    }
    let closed = tag[end..].starts_with(close);
    if closed {
        out.push_str(close);
    }
    end + if closed { close.len() } else { 0 }
}

/// Writes the code from byte `at` on to `out`, up to `close` or the end, and says where that is. It
/// lies in `depth` operands of `%`.
fn code(tag: &str, mut at: usize, close: &str, depth: usize, out: &mut String) -> usize {
    let mut open = 0_usize;
    // Where in `out` the literal stands that came last, if nothing but space came since.
    let mut literal: Option<Range<usize>> = None;
    while at < tag.len() {
        let rest = &tag[at..];
        if open == 0 && rest.starts_with(close) {
            return at;
        }
        let Some(c) = rest.chars().next() else { break };
        match c {
            '\'' | '"' => {
                let Some(len) = literal_len(rest) else { break };
                let text = plain_literal(&rest[1..len - 1], c);
                match &mut literal {
                    // The neighbour's closing quote gives way.
                    Some(before) if out[..before.end].ends_with(c) => {
                        out.truncate(before.end - 1);
                        out.push_str(&text[1..]);
                        before.end = out.len();
                    }
                    // The newcomer takes the neighbour's quotes: the neighbour may be long already.
                    Some(before) => {
                        let quote = out[before.start..].chars().next().unwrap_or(c);
                        let joined = requoted(&text[1..text.len() - 1], quote);
                        out.truncate(before.end - 1);
                        out.push_str(&joined);
                        out.push(quote);
                        before.end = out.len();
                    }
                    None => {
                        let start = out.len();
                        out.push_str(&text);
                        literal = Some(start..out.len());
                    }
                }
                at += len;
                continue;
            }
            // Deeper than the engine follows parentheses nothing has to be right.
            '%' if literal.is_some() && !rest.starts_with("%}") && depth < MOST_OPERANDS => {
                let operand = at + 1 + operand_len(&tag[at + 1..]);
                out.push_str(&["|", PERCENT, "("].concat());
                let mut inner = String::new();
                code(&tag[..operand], at + 1, "\0", depth + 1, &mut inner);
                out.push_str(inner.trim());
                out.push(')');
                at = operand;
                literal = None;
                continue;
            }
            c if c.is_whitespace() => {
                out.push(c);
                at += c.len_utf8();
                continue;
            }
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        literal = None;
        out.push(c);
        at += c.len_utf8();
    }
    out.push_str(&tag[at..]);
    tag.len()
}

/// Where the code of a `for` tag names what it goes over.
fn iterated(code: &str) -> Option<Range<usize>> {
    let bare = code.trim_start_matches(['-', '+']).trim_start();
    if !bare.strip_prefix("for")?.starts_with(char::is_whitespace) {
        return None;
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut at, mut depth, mut start) = (0, 0_usize, None);
    let mut end = code.len();
    while let Some(c) = code[at..].chars().next() {
        let mut len = c.len_utf8();
        match c {
            '\'' | '"' => len = literal_len(&code[at..])?,
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            c if is_word(c) => {
                len = code[at..].find(|c| !is_word(c)).unwrap_or(code.len() - at);
                match (&code[at..at + len], start) {
                    ("in", None) if depth == 0 => start = Some(at + len),
                    ("if" | "recursive", Some(_)) if depth == 0 => {
                        end = at;
                        break;
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        at += len;
    }
    let start = start?;
    let part = &code[start..end];
    let first = start + (part.len() - part.trim_start().len());
    let mut last = part.trim_end();
    if end == code.len() {
        // The sign of white space before the tag's end.
        last = last.strip_suffix(['-', '+']).unwrap_or(last).trim_end();
    }
    let last = start + last.len();
    (first < last).then_some(first..last)
}

/// The bytes of the string literal that begins here, with its quotes.
fn literal_len(text: &str) -> Option<usize> {
    let quote = text.as_bytes().first()?;
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == *quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// A literal with Python's escapes in those that the engine has too.
fn plain_literal(inside: &str, quote: char) -> String {
    let mut out = String::with_capacity(inside.len() + 2);
    out.push(quote);
    let mut characters = inside.chars();
    while let Some(c) = characters.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match characters.next() {
            // A line that goes on in the next one.
            Some('\n') => {}
            Some('a') => out.push_str("\\u0007"),
            Some('v') => out.push_str("\\u000b"),
            Some('/') => out.push_str("\\\\/"),
            Some('U') => {
                let digits: String = characters.by_ref().take(8).collect();
                let found = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
                match found {
                    Some('\\') => out.push_str("\\\\"),
                    Some(found) if found != quote => out.push(found),
                    Some(_) => out.push_str(&["\\", &quote.to_string()].concat()),
                    None => out.push_str(&["\\\\U", &digits].concat()),
                }
            }
            Some(other) => {
                out.push('\\');
                out.push(other);
            }
            None => out.push('\\'),
        }
    }
    out.push(quote);
    out
}

/// What stands inside a literal, fit to stand between other quotes.
fn requoted(inside: &str, quote: char) -> String {
    let mut out = String::with_capacity(inside.len());
    let mut escaped = false;
    for c in inside.chars() {
        if c == quote && !escaped {
            out.push('\\');
        }
        escaped = c == '\\' && !escaped;
        out.push(c);
    }
    out
}

/// The bytes of the value behind an operator: a sign, one value, and what hangs on it.
fn operand_len(text: &str) -> usize {
    let mut at =
        text.len() - text.trim_start_matches(|c: char| c.is_whitespace() || c == '-').len();
    let bracket = |at: usize| {
        let mut depth = 0_usize;
        let mut at = at;
        while let Some(c) = text[at..].chars().next() {
            match c {
                '\'' | '"' => {
                    at += literal_len(&text[at..]).unwrap_or(1);
                    continue;
                }
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            at += c.len_utf8();
            if depth == 0 {
                break;
            }
        }
        at
    };
    let name = |at: usize| {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        text[at..].find(|c| !word(c)).map_or(text.len(), |len| at + len)
    };
    match text[at..].chars().next() {
        Some('\'' | '"') => at += literal_len(&text[at..]).unwrap_or(1),
        Some('(' | '[' | '{') => at = bracket(at),
        _ => at = name(at),
    }
    loop {
        let next = at + (text[at..].len() - text[at..].trim_start().len());
        match text[next..].chars().next() {
            Some('(' | '[') => at = bracket(next),
            Some('.' | '|') => {
                let word = next + 1;
                at = name(word + (text[word..].len() - text[word..].trim_start().len()));
            }
            _ => return at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_needs_more_than_one_percent_sign() {
        assert_eq!(translate("a{%}b{%- generation %}c"), "a{%}b{%- generation %}c");
        assert_eq!(translate("a{%- generation %}b{%"), "a{%- if true %}b{%");
    }

    #[test]
    fn generation_marks_keep_their_whitespace_control() {
        assert_eq!(
            translate("a {%- generation %}b{% endgeneration -%} {% if x %}"),
            "a {%- if true %}b{% endif -%} {% if x %}"
        );
        assert_eq!(translate("{% generation"), "{% generation");
        let kept = "{# {% generation %} #}{% raw %}{% generation %}{{ 'a' 'b' }}{% endraw %}{";
        assert_eq!(translate(kept), kept);
    }

    #[test]
    fn lines_end_one_way() {
        assert_eq!(translate("a\r\n{{ 'b\r\n' }}\rc\n"), "a\n{{ 'b\n' }}\nc\n");
    }

    #[test]
    fn literals_are_read_as_in_python() {
        assert_eq!(translate(r"{{ 'a' 'b' + 'c' }}"), "{{ 'ab' + 'c' }}");
        assert_eq!(translate(r#"{{ "it's" 'x"' }}"#), r#"{{ "it'sx\"" }}"#);
        assert_eq!(translate("{{ 'a\\\nb\\U0001f600\\a' }}"), "{{ 'ab😀\\u0007' }}");
        assert_eq!(translate(r"{{ '\'}}' }}x{{ a }}"), r"{{ '\'}}' }}x{{ a }}");
        assert_eq!(translate("{{ 'open }}"), "{{ 'open }}");
    }

    #[test]
    fn what_a_loop_goes_over_is_marked() {
        for (source, marked) in [
            ("{% for a in b %}", "{% for a in (b)|iterated_ %}"),
            (
                "{%- for a, b in c.d('in if') if a -%}",
                "{%- for a, b in (c.d('in if'))|iterated_ if a -%}",
            ),
            (
                "{% for a in (b if c else d) + [e]-%}",
                "{% for a in ((b if c else d) + [e])|iterated_-%}",
            ),
            ("{% for a in b recursive %}", "{% for a in (b)|iterated_ recursive %}"),
            ("{% set for_a = 'x in y' %}", "{% set for_a = 'x in y' %}"),
            ("{% for %}", "{% for %}"),
        ] {
            assert_eq!(translate(source), marked);
        }
    }

    #[test]
    fn a_percent_sign_behind_a_text_formats() {
        assert_eq!(
            translate("{{ '%s-%d' % (m.role, 1) + 'x' }}"),
            "{{ '%s-%d' |percent_((m.role, 1)) + 'x' }}"
        );
        assert_eq!(
            translate("{{ '%s' % a.b[0] | upper ~ c }}"),
            "{{ '%s' |percent_(a.b[0] | upper) ~ c }}"
        );
        assert_eq!(translate("{% if 'x' %}a{% endif %}"), "{% if 'x' %}a{% endif %}");
        assert_eq!(translate("{{ a % 2 }}"), "{{ a % 2 }}");
    }
}
