//! Charts as SVG: every mark has a tooltip, series differ in colour and in shape, colours are those of
//! Okabe and Ito, which people with any colour vision tell apart.
//!
//! Marks carry their colours both as attributes, for programs that know no style sheets, and as classes, by
//! which a page or a file gives them the colours of a dark screen or of paper.

use std::fmt::Write;

/// Series after which colours come round again, with other shapes and dashes.
pub(crate) const COLOURS: [&str; 7] =
    ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58400", "#56B4E9", "#444444"];
const DARK: [&str; 7] =
    ["#5AB4E8", "#FF8A3D", "#2FCF9F", "#E79CC6", "#F0C24B", "#9AD7FF", "#C8C8C8"];
const INK: [&str; 3] = ["#1C2230", "#5A6577", "#D9DEE7"];
const DARK_INK: [&str; 3] = ["#E8EBF1", "#A3ADBD", "#363E4C"];
const WIDTH: f64 = 720.0;
const FONT: &str = "system-ui, 'DejaVu Sans', sans-serif";
const DASHES: [&str; 3] = ["", "6 3", "2 3"];

/// The style sheet of charts, for a page or for a file of its own; `root` selects what holds them.
pub(crate) fn style(root: &str) -> String {
    let variables = |colours: &[&str; 7], ink: &[&str; 3]| {
        let mut text = String::new();
        for (index, colour) in colours.iter().enumerate() {
            let _ = write!(text, "--s{index}:{colour};");
        }
        let _ = write!(text, "--ink:{};--soft:{};--line:{}", ink[0], ink[1], ink[2]);
        text
    };
    let (light, dark) = (variables(&COLOURS, &INK), variables(&DARK, &DARK_INK));
    let mut text = format!(
        "{root}{{{light}}}@media (prefers-color-scheme:dark){{{root}{{{dark}}}}}@media \
         print{{{root}{{{light}}}}}.ink{{fill:var(--ink)}}.soft-text{{fill:var(--soft)}}.rule{{stroke:var(--line)}}\
         .axis{{stroke:var(--soft)}}"
    );
    for index in 0..COLOURS.len() {
        let _ =
            write!(text, ".s{index}{{stroke:var(--s{index})}}.f{index}{{fill:var(--s{index})}}");
    }
    text
}

/// A chart's drawing, without the element around it.
#[derive(Clone, Debug)]
pub(crate) struct Drawing {
    pub(crate) height: f64,
    pub(crate) body: String,
}

impl Drawing {
    /// For a page that has the style sheet.
    pub(crate) fn inline(&self, title: &str) -> String {
        let Self { height, body } = self;
        let title = escape(title);
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\" font-family=\"{FONT}\">\
             {body}</svg>"
        )
    }

    /// For a file of its own.
    pub(crate) fn file(&self, title: &str) -> String {
        let style = format!(
            "<style>svg{{background:#fff}}@media (prefers-color-scheme:dark){{svg{{background:#14181f}}}}{}</style>",
            style("svg")
        );
        self.document(title, &style)
    }

    /// For programs that know no style sheets: on white, in the colours of the attributes.
    pub(crate) fn plain(&self, title: &str) -> String {
        self.document(
            title,
            &format!("<rect width=\"{WIDTH}\" height=\"{}\" fill=\"#fff\"/>", self.height),
        )
    }

    fn document(&self, title: &str, head: &str) -> String {
        let Self { height, body } = self;
        let title = escape(title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 \
             {WIDTH} {height}\" font-family=\"{FONT}\"><title>{title}</title>{head}{body}</svg>\n"
        )
    }
}

/// Text as it may stand in HTML and SVG.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A point of a series.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// The interval of `y`.
    pub(crate) interval: Option<[f64; 2]>,
    /// Shown when the mark is pointed at.
    pub(crate) tip: String,
}

/// Marks of one name.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) marks: Vec<Mark>,
    /// Whether a line joins them.
    pub(crate) joined: bool,
}

/// An axis.
#[derive(Clone, Debug)]
pub(crate) struct Axis<'a> {
    pub(crate) title: &'a str,
    pub(crate) logarithmic: bool,
    /// Places of the labels; round numbers if there are none.
    pub(crate) ticks: Vec<f64>,
}

/// Points over two axes.
pub(crate) fn plane(series: &[Series], x: &Axis<'_>, y: &Axis<'_>) -> Option<Drawing> {
    const LEFT: f64 = 64.0;
    const RIGHT: f64 = 14.0;
    const TOP: f64 = 14.0;
    const HEIGHT: f64 = 300.0;
    let marks = || series.iter().flat_map(|series| &series.marks);
    let usable =
        |value: f64, axis: &Axis<'_>| value.is_finite() && (!axis.logarithmic || value > 0.0);
    if !marks().any(|mark| usable(mark.x, x) && usable(mark.y, y)) {
        return None;
    }
    let along = |value: f64, axis: &Axis<'_>| if axis.logarithmic { value.log10() } else { value };
    let xs: Vec<f64> =
        marks().map(|mark| mark.x).filter(|v| usable(*v, x)).map(|v| along(v, x)).collect();
    let mut ys: Vec<f64> = marks()
        .flat_map(|mark| mark.interval.into_iter().flatten().chain([mark.y]))
        .filter(|value| usable(*value, y))
        .map(|value| along(value, y))
        .collect();
    ys.sort_by(f64::total_cmp);
    let centre: Vec<f64> = {
        let mut all: Vec<f64> =
            marks().map(|mark| mark.y).filter(|v| usable(*v, y)).map(|v| along(v, y)).collect();
        all.sort_by(f64::total_cmp);
        all
    };
    let (x0, x1) = padded(&xs, 0.04);
    // One run that diverged must not flatten the others: what lies far above is drawn at the edge.
    let (low, middle) = (centre[0], centre[centre.len() / 2]);
    let reach = (middle - low).max(1e-9 + 0.02 * low.abs());
    let top = ys.last().copied().unwrap_or(low).min(low + 6.0 * reach);
    let shown: Vec<f64> = ys.iter().copied().filter(|value| *value <= top).chain([top]).collect();
    let (y0, y1) = padded(&shown, 0.06);
    let px = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * (along(value, x) - x0) / (x1 - x0);
    let py = |value: f64| {
        let at = along(value, y).clamp(y0, y1);
        TOP + HEIGHT * (1.0 - (at - y0) / (y1 - y0))
    };
    let mut body = String::new();
    let ticks = |axis: &Axis<'_>, from: f64, to: f64| -> Vec<f64> {
        if !axis.ticks.is_empty() {
            return axis.ticks.clone();
        }
        if axis.logarithmic {
            return decades(from, to);
        }
        round_ticks(from, to)
    };
    for tick in ticks(y, y0, y1) {
        let at = py(tick);
        let _ = write!(
            body,
            "<line class=\"rule\" stroke=\"{}\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text \
             class=\"soft-text\" fill=\"{}\" font-size=\"12\" text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{}</text>",
            INK[2],
            WIDTH - RIGHT,
            INK[1],
            LEFT - 7.0,
            at + 4.0,
            number(tick)
        );
    }
    let mut last_label = f64::NEG_INFINITY;
    for tick in ticks(x, x0, x1) {
        let at = px(tick);
        let _ = write!(
            body,
            "<line class=\"axis\" stroke=\"{}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{}\"/>",
            INK[1],
            TOP + HEIGHT,
            TOP + HEIGHT + 4.0
        );
        let label = number(tick);
        let width = 7.0 * label.len() as f64;
        if at - width / 2.0 > last_label {
            last_label = at + width / 2.0;
            let _ = write!(
                body,
                "<text class=\"soft-text\" fill=\"{}\" font-size=\"12\" text-anchor=\"middle\" x=\"{at:.1}\" \
                 y=\"{}\">{label}</text>",
                INK[1],
                TOP + HEIGHT + 18.0
            );
        }
    }
    let _ = write!(
        body,
        "<line class=\"axis\" stroke=\"{0}\" x1=\"{LEFT}\" x2=\"{1}\" y1=\"{2}\" y2=\"{2}\"/><text class=\"ink\" \
         fill=\"{3}\" font-size=\"13\" text-anchor=\"middle\" x=\"{4}\" y=\"{5}\">{6}</text><text class=\"ink\" \
         fill=\"{3}\" font-size=\"13\" text-anchor=\"middle\" transform=\"translate(14 {7}) \
         rotate(-90)\">{8}</text>",
        INK[1],
        WIDTH - RIGHT,
        TOP + HEIGHT,
        INK[0],
        LEFT + (WIDTH - LEFT - RIGHT) / 2.0,
        TOP + HEIGHT + 38.0,
        escape(x.title),
        TOP + HEIGHT / 2.0,
        escape(y.title)
    );
    for (index, series) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let class = index % COLOURS.len();
        let drawn: Vec<&Mark> =
            series.marks.iter().filter(|m| usable(m.x, x) && usable(m.y, y)).collect();
        if series.joined && drawn.len() > 1 {
            let points: Vec<String> =
                drawn.iter().map(|mark| format!("{:.1},{:.1}", px(mark.x), py(mark.y))).collect();
            let _ = write!(
                body,
                "<polyline class=\"s{class}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" \
                 stroke-dasharray=\"{}\" points=\"{}\"/>",
                DASHES[index / COLOURS.len() % DASHES.len()],
                points.join(" ")
            );
        }
        for mark in drawn {
            let (cx, cy) = (px(mark.x), py(mark.y));
            let above = along(mark.y, y) > y1;
            let tip =
                if above { format!("{} (above the picture)", mark.tip) } else { mark.tip.clone() };
            let _ = write!(body, "<g><title>{}</title>", escape(&tip));
            if let Some([low, high]) = mark.interval.filter(|[low, _]| !y.logarithmic || *low > 0.0)
            {
                let _ = write!(
                    body,
                    "<line class=\"s{class}\" stroke=\"{colour}\" stroke-width=\"1.4\" opacity=\"0.65\" \
                     x1=\"{cx:.1}\" x2=\"{cx:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                    py(low),
                    py(high)
                );
            }
            shape(&mut body, index, cx, cy);
            // A larger place to point at.
            let _ = write!(
                body,
                "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"11\" fill=\"#000\" fill-opacity=\"0\"/></g>"
            );
        }
    }
    let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
    let below = TOP + HEIGHT + 58.0;
    let height = legend(&mut body, &names, below);
    Some(Drawing { height, body })
}

/// The shape and colour of series number `index`.
fn shape(body: &mut String, index: usize, x: f64, y: f64) {
    let class = index % COLOURS.len();
    let attributes = format!("class=\"f{class}\" fill=\"{}\"", COLOURS[class]);
    let corners = |corners: &[(f64, f64)]| {
        let points: Vec<String> =
            corners.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
        points.join(" ")
    };
    let _ = match (index + index / COLOURS.len()) % 6 {
        0 => write!(body, "<circle {attributes} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>"),
        1 => write!(
            body,
            "<rect {attributes} x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"/>",
            x - 4.0,
            y - 4.0
        ),
        2 => {
            let points = corners(&[(0.0, -5.5), (5.2, 4.0), (-5.2, 4.0)]);
            write!(body, "<polygon {attributes} points=\"{points}\"/>")
        }
        3 => {
            let points = corners(&[(0.0, -6.0), (6.0, 0.0), (0.0, 6.0), (-6.0, 0.0)]);
            write!(body, "<polygon {attributes} points=\"{points}\"/>")
        }
        4 => {
            let points = corners(&[(0.0, 5.5), (5.2, -4.0), (-5.2, -4.0)]);
            write!(body, "<polygon {attributes} points=\"{points}\"/>")
        }
        _ => {
            let points = corners(&[
                (-5.0, -1.7),
                (-1.7, -1.7),
                (-1.7, -5.0),
                (1.7, -5.0),
                (1.7, -1.7),
                (5.0, -1.7),
                (5.0, 1.7),
                (1.7, 1.7),
                (1.7, 5.0),
                (-1.7, 5.0),
                (-1.7, 1.7),
                (-5.0, 1.7),
            ]);
            write!(body, "<polygon {attributes} points=\"{points}\"/>")
        }
    };
}

/// Names with their shapes, in rows; the height reached.
fn legend(body: &mut String, names: &[&str], top: f64) -> f64 {
    let (mut x, mut y) = (64.0, top);
    for (index, name) in names.iter().enumerate() {
        let width = 34.0 + 7.4 * name.chars().count() as f64;
        if x + width > WIDTH && x > 64.0 {
            (x, y) = (64.0, y + 21.0);
        }
        shape(body, index, x + 6.0, y);
        let _ = write!(
            body,
            "<text class=\"ink\" fill=\"{}\" font-size=\"13\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            INK[0],
            x + 16.0,
            y + 4.5,
            escape(name)
        );
        x += width;
    }
    y + 18.0
}

/// A row of a picture of differences.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) mean: f64,
    pub(crate) interval: Option<[f64; 2]>,
    /// Whether a difference was found.
    pub(crate) found: bool,
    pub(crate) tip: String,
}

/// Differences with their intervals around a line at 0.
pub(crate) fn forest(bars: &[Bar], title: &str) -> Option<Drawing> {
    const LEFT: f64 = 230.0;
    const ROW: f64 = 25.0;
    let ends: Vec<f64> = bars
        .iter()
        .flat_map(|bar| bar.interval.into_iter().flatten().chain([bar.mean, 0.0]))
        .filter(|value| value.is_finite())
        .collect();
    if bars.is_empty() || ends.is_empty() {
        return None;
    }
    // An interval of two seeds may be wider than everything else together.
    let mut sizes: Vec<f64> = ends.iter().map(|end| end.abs()).filter(|size| *size > 0.0).collect();
    sizes.sort_by(f64::total_cmp);
    let usual = sizes.get(sizes.len() * 3 / 4).copied().unwrap_or(1.0);
    let most = 2.5 * usual.max(bars.iter().map(|bar| bar.mean.abs()).fold(0.0, f64::max) / 2.0);
    let ends: Vec<f64> = ends.iter().map(|end| end.clamp(-most, most)).collect();
    let (from, to) = padded(&ends, 0.05);
    let px =
        |value: f64| LEFT + (WIDTH - LEFT - 16.0) * (value.clamp(from, to) - from) / (to - from);
    let height = 20.0 + ROW * bars.len() as f64;
    let mut body = String::new();
    for tick in round_ticks(from, to) {
        let at = px(tick);
        let class = if tick == 0.0 { "axis" } else { "rule" };
        let colour = if tick == 0.0 { INK[1] } else { INK[2] };
        let _ = write!(
            body,
            "<line class=\"{class}\" stroke=\"{colour}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"10\" \
             y2=\"{height:.1}\"/><text class=\"soft-text\" fill=\"{}\" font-size=\"12\" text-anchor=\"middle\" \
             x=\"{at:.1}\" y=\"{:.1}\">{}</text>",
            INK[1],
            height + 16.0,
            number(tick)
        );
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = 10.0 + ROW * (index as f64 + 0.5);
        let (class, colour) = if bar.found { (1, COLOURS[1]) } else { (0, COLOURS[0]) };
        let _ = write!(
            body,
            "<g><title>{}</title><text class=\"ink\" fill=\"{}\" font-size=\"13\" text-anchor=\"end\" x=\"{}\" \
             y=\"{:.1}\">{}</text>",
            escape(&bar.tip),
            INK[0],
            LEFT - 12.0,
            y + 4.5,
            escape(&shortened(&bar.name, 30))
        );
        if let Some([low, high]) = bar.interval {
            let _ = write!(
                body,
                "<line class=\"s{class}\" stroke=\"{colour}\" stroke-width=\"2\" x1=\"{:.1}\" x2=\"{:.1}\" \
                 y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                px(low),
                px(high)
            );
        }
        shape(&mut body, class, px(bar.mean), y);
        let _ = write!(
            body,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{}\" height=\"{ROW}\" fill=\"#000\" fill-opacity=\"0\"/></g>",
            y - ROW / 2.0,
            WIDTH - LEFT
        );
    }
    let _ = write!(
        body,
        "<text class=\"ink\" fill=\"{}\" font-size=\"13\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        INK[0],
        LEFT + (WIDTH - LEFT) / 2.0,
        height + 38.0,
        escape(title)
    );
    Some(Drawing { height: height + 50.0, body })
}

/// Numbers by row and column, as shades.
pub(crate) struct Matrix<'a> {
    pub(crate) rows: &'a [String],
    pub(crate) columns: &'a [String],
    /// `[row][column]`.
    pub(crate) values: &'a [Vec<Option<f64>>],
    /// Whether shades compare within a column rather than over all.
    pub(crate) by_column: bool,
    /// Whether a small number is shaded darkly.
    pub(crate) less_is_more: bool,
    pub(crate) row_title: &'a str,
    pub(crate) column_title: &'a str,
}

/// Shades with their numbers, where there is room for them.
pub(crate) fn matrix(of: &Matrix<'_>) -> Option<Drawing> {
    const LEFT: f64 = 150.0;
    let all = || of.values.iter().flatten().flatten().copied().filter(|value| value.is_finite());
    if of.columns.is_empty() || all().next().is_none() {
        return None;
    }
    let width = (WIDTH - LEFT - 10.0) / of.columns.len() as f64;
    let many = of.rows.len() > 16;
    let row = if many { 13.0 } else { 27.0 };
    let slanted = width < 62.0;
    let top = if slanted { 92.0 } else { 44.0 };
    let range = |column: usize| {
        let mut values: Vec<f64> = match of.by_column {
            true => of.values.iter().filter_map(|row| row[column]).collect(),
            false => all().collect(),
        };
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(1.0))
    };
    let mut body = format!(
        "<text class=\"soft-text\" fill=\"{0}\" font-size=\"12\" x=\"{LEFT}\" y=\"14\">{1}</text><text \
         class=\"soft-text\" fill=\"{0}\" font-size=\"12\" text-anchor=\"end\" x=\"{2}\" y=\"{3}\">{4}</text>",
        INK[1],
        escape(of.column_title),
        LEFT - 8.0,
        top - 8.0,
        escape(of.row_title)
    );
    for (column, name) in of.columns.iter().enumerate() {
        let at = LEFT + width * (column as f64 + 0.5);
        let place = match slanted {
            true => format!("transform=\"translate({:.1} {}) rotate(-50)\"", at + 3.0, top - 8.0),
            false => format!("text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\"", top - 8.0),
        };
        let _ = write!(
            body,
            "<text class=\"ink\" fill=\"{}\" font-size=\"12\" {place}>{}</text>",
            INK[0],
            escape(&shortened(name, 16))
        );
    }
    for (index, name) in of.rows.iter().enumerate() {
        let y = top + row * index as f64;
        if !many || index % 5 == 0 {
            let _ = write!(
                body,
                "<text class=\"ink\" fill=\"{}\" font-size=\"12\" text-anchor=\"end\" x=\"{}\" \
                 y=\"{:.1}\">{}</text>",
                INK[0],
                LEFT - 8.0,
                y + row / 2.0 + 4.0,
                escape(&shortened(name, 19))
            );
        }
        for (column, column_name) in of.columns.iter().enumerate() {
            let x = LEFT + width * column as f64;
            let Some(value) = of.values[index][column].filter(|value| value.is_finite()) else {
                let _ = write!(
                    body,
                    "<g><title>{}, {}: not known</title><rect class=\"rule\" stroke=\"{}\" fill=\"none\" \
                     x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"/></g>",
                    escape(name),
                    escape(column_name),
                    INK[2],
                    width - 1.5,
                    row - 1.5
                );
                continue;
            };
            let (low, high) = range(column);
            let share = if high > low { (value - low) / (high - low) } else { 0.5 };
            let share = if of.less_is_more { 1.0 - share } else { share };
            let (colour, ink) = shade(share);
            let _ = write!(
                body,
                "<g><title>{}, {}: {}</title><rect fill=\"{colour}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" \
                 height=\"{:.1}\"/>",
                escape(name),
                escape(column_name),
                number(value),
                width - 1.5,
                row - 1.5
            );
            if !many && width > 42.0 {
                let _ = write!(
                    body,
                    "<text fill=\"{ink}\" font-size=\"12\" text-anchor=\"middle\" x=\"{:.1}\" \
                     y=\"{:.1}\">{}</text>",
                    x + width / 2.0 - 0.75,
                    y + row / 2.0 + 4.0,
                    number(value)
                );
            }
            body.push_str("</g>");
        }
    }
    Some(Drawing { height: top + row * of.rows.len() as f64 + 8.0, body })
}

/// From light to dark blue, with the colour of text on it.
fn shade(share: f64) -> (String, &'static str) {
    let (light, dark) = ([236.0, 243.0, 250.0], [8.0, 64.0, 120.0]);
    let mixed = |index: usize| (light[index] + share * (dark[index] - light[index])).round() as u8;
    let ink = if share > 0.5 { "#FFFFFF" } else { "#1C2230" };
    (format!("#{:02x}{:02x}{:02x}", mixed(0), mixed(1), mixed(2)), ink)
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most - 1).collect();
    format!("{kept}…")
}

/// The range of values with some room around it.
fn padded(values: &[f64], share: f64) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let room = if high > low { share * (high - low) } else { 0.05 * high.abs().max(1.0) };
    (low - room, high + room)
}

/// A few round numbers between two.
fn round_ticks(from: f64, to: f64) -> Vec<f64> {
    let rough = (to - from) / 5.0;
    let scale = 10.0_f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * scale).find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let first = (from / step).ceil() as i64;
    let last = (to / step).floor() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Powers of ten between two logarithms, or their ends if there are none.
fn decades(from: f64, to: f64) -> Vec<f64> {
    let whole: Vec<f64> =
        (from.ceil() as i32..=to.floor() as i32).map(|power| 10.0_f64.powi(power)).collect();
    if whole.len() >= 2 { whole } else { vec![10.0_f64.powf(from), 10.0_f64.powf(to)] }
}

/// A number as a label: four digits that count.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let size = value.abs();
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}e{power}");
    }
    let decimals = (3 - size.log10().floor() as i32).clamp(0, 5) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(x: f64, y: f64) -> Mark {
        Mark { x, y, interval: Some([y - 0.1, y + 0.1]), tip: "a <b>".to_owned() }
    }

    #[test]
    fn charts_are_well_formed_and_hold_their_tips() {
        let series =
            |name: &str, marks: Vec<Mark>| Series { name: name.to_owned(), marks, joined: true };
        let all: Vec<Series> = (0..9)
            .map(|n| {
                series(
                    &format!("s{n} & co"),
                    vec![mark(1e-4, 2.0), mark(1e-3, 1.0 + 0.1 * n as f64)],
                )
            })
            .chain([series(
                "diverged",
                vec![mark(1e-2, 1e9), mark(0.0, 1.0), mark(1e-3, f64::NAN)],
            )])
            .collect();
        let x = Axis { title: "rate", logarithmic: true, ticks: vec![1e-4, 1e-3, 1e-2] };
        let y = Axis { title: "loss", logarithmic: false, ticks: Vec::new() };
        let drawing = plane(&all, &x, &y).unwrap();
        for text in [drawing.inline("t"), drawing.file("t"), drawing.plain("t & t")] {
            let tree = resvg::usvg::Tree::from_str(&text, &resvg::usvg::Options::default());
            assert!(tree.is_ok(), "{tree:?}");
            assert!(text.contains("a &lt;b&gt;") && !text.contains("NaN") && !text.contains("inf"));
        }
        assert!(drawing.body.contains("above the picture"));
        assert!(plane(&[], &x, &y).is_none());
        let bars = [Bar {
            name: "x".into(),
            mean: 0.1,
            interval: Some([-1e9, 1e9]),
            found: true,
            tip: "t".into(),
        }];
        assert!(!forest(&bars, "difference").unwrap().body.contains("inf"));
        let values = [vec![Some(1.0), None], vec![Some(2.0), Some(f64::NAN)]];
        let names = ["a".to_owned(), "b".to_owned()];
        let of = Matrix {
            rows: &names,
            columns: &names,
            values: &values,
            by_column: true,
            less_is_more: true,
            row_title: "",
            column_title: "",
        };
        assert!(matrix(&of).unwrap().body.contains("not known"));
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (1e-4, "1e-4"),
            (0.5, "0.5"),
            (1.23456, "1.235"),
            (12345.0, "12345"),
            (2.5e7, "2.5e7"),
            (-0.0123456, "-0.01235"),
            (100.0, "100"),
            (0.0, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
