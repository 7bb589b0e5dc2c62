//! What pictures and pages are made of: plain SVG with its own colours, and a page's style.

use crate::shown::escape_markup as escape;

/// Colours that stay apart from one another, also for people who see few; where they repeat, the
/// marks differ.
pub const COLORS: [&str; 10] = [
    "#3b6fb6", "#d95f02", "#1b9e77", "#c23b75", "#b58a00", "#6a51a3", "#5b5b5b", "#66a61e",
    "#a0522d", "#17a2b8",
];
/// Text.
pub const INK: &str = "#1c2230";
/// Text beside what matters.
pub const SOFT: &str = "#5f6b7f";
/// Thin lines.
pub const LINE: &str = "#dfe4ec";

/// On a dark page the same drawing in other colours. Who does not know the query sees the light one.
const DARK: &str = "\
@media(prefers-color-scheme:dark){\
.back{fill:#14181f}[fill=\"#1c2230\"]{fill:#e8ebf1}[fill=\"#5f6b7f\"]{fill:#9aa5b8}[stroke=\"#dfe4ec\"]{stroke:#333b49}\
[fill=\"#3b6fb6\"]{fill:#6f9ee0}[stroke=\"#3b6fb6\"]{stroke:#6f9ee0}[fill=\"#6a51a3\"]{fill:#a28be0}\
[stroke=\"#6a51a3\"]{stroke:#a28be0}[fill=\"#5b5b5b\"]{fill:#a8a8a8}[stroke=\"#5b5b5b\"]{stroke:#a8a8a8}\
[fill=\"#a0522d\"]{fill:#cd7f57}[stroke=\"#a0522d\"]{stroke:#cd7f57}}";

/// The colour of cluster, domain or adapter number `number`.
pub fn color(number: usize) -> &'static str {
    COLORS[number % COLORS.len()]
}

/// The mark of a cluster or domain: dots first, then rings, squares, and hollow squares.
pub fn mark(x: f64, y: f64, radius: f64, number: usize) -> String {
    shaped(x, y, radius, number, number / COLORS.len())
}

/// A mark in the colour of `number` and in one of four shapes: dot, ring, square, hollow square.
pub fn shaped(x: f64, y: f64, radius: f64, number: usize, shape: usize) -> String {
    let (color, shape) = (color(number), shape % 4);
    let paint = match shape {
        0 | 2 => format!("fill=\"{color}\" fill-opacity=\".75\""),
        _ => format!("fill=\"none\" stroke=\"{color}\" stroke-width=\"{:.1}\"", 0.5 * radius),
    };
    let side = 2.0 * radius;
    match shape {
        0 | 1 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" {paint}/>"),
        _ => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{side}\" height=\"{side}\" {paint}/>",
            x - radius,
            y - radius,
        ),
    }
}

/// Escaped text in which words between backticks are set as code.
pub fn code(text: &str) -> String {
    let escaped = escape(text);
    let mut parts = escaped.split('`');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for (at, part) in parts.enumerate() {
        out.push_str(if at % 2 == 0 { "<code>" } else { "</code>" });
        out.push_str(part);
    }
    if escaped.matches('`').count() % 2 == 1 {
        out.push_str("</code>");
    }
    out
}

/// Text of at most `most` characters, with an ellipsis where it is cut.
pub fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Begins a picture: its element, title, style and ground.
pub fn open(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" role=\"img\" aria-label=\"{0}\" font-family=\"system-ui,sans-serif\" font-size=\"12\">\
         <title>{0}</title><style>{DARK}</style><rect class=\"back\" width=\"100%\" height=\"100%\" fill=\"#fff\"/>",
        escape(title)
    )
}

/// Escaped text at a place; `anchor` is SVG's.
pub fn text(x: f64, y: f64, anchor: &str, fill: &str, text: &str) -> String {
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{}</text>",
        escape(text)
    )
}

/// The style sheet of a page: light or dark as the reader's system is, tables that scroll on narrow screens.
const STYLE: &str = "\
:root{--ink:#1c2230;--soft:#5f6b7f;--line:#dfe4ec;--back:#fff}\
@media(prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#9aa5b8;--line:#333b49;--back:#14181f}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:56rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}\
td.n,th.n{text-align:right;white-space:nowrap}td.k{white-space:nowrap}.soft{color:var(--soft)}b.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}\
.scroll{overflow-x:auto}.scroll svg{display:block;height:auto;width:100%;min-width:34rem}";

/// The beginning of a page with a title and the style sheet, up to its first heading.
pub fn page_start(title: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{}</title><style>{STYLE}</style>",
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forty_domains_have_marks_of_their_own() {
        let marks: std::collections::BTreeSet<String> =
            (0..40).map(|number| mark(1.0, 2.0, 3.0, number)).collect();
        assert_eq!(marks.len(), 40);
    }
}
