//! Line charts as inline SVG, drawn twice: for wide pages and for phones, so that words stay readable.

use super::escape;
use std::fmt::Write;

/// A chart over steps, layers or whatever `x_title` says.
pub(super) struct Chart<'a> {
    /// What it shows, for those who hear the page.
    pub(super) name: &'a str,
    pub(super) x_title: &'a str,
    pub(super) y_title: &'a str,
    /// Whether the vertical axis begins at zero.
    pub(super) from_zero: bool,
    pub(super) series: Vec<Series>,
}

pub(super) struct Series {
    pub(super) name: String,
    pub(super) color: &'static str,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) style: Style,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// A thin, pale line: single values behind their mean.
    Faint,
    Line,
    /// With a dot at every point.
    Dots,
}

/// Extents of a drawing, in pixels of its own.
struct Size {
    width: f64,
    height: f64,
    /// About so many numbers on each axis.
    ticks: (f64, f64),
}

const WIDE: Size = Size { width: 900.0, height: 290.0, ticks: (8.0, 5.0) };
const NARROW: Size = Size { width: 380.0, height: 250.0, ticks: (4.0, 4.0) };
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const BOTTOM: f64 = 42.0;
const TOP: f64 = 22.0;

impl Chart<'_> {
    /// Draws it with its legend.
    pub(super) fn draw(&self) -> String {
        if self.series.iter().all(|series| series.points.is_empty()) {
            return "<p class=\"soft\">No steps were recorded.</p>".to_owned();
        }
        let mut out = String::from("<p class=\"legend\">");
        for series in self.series.iter().filter(|series| !series.points.is_empty()) {
            let (faint, dot) = match series.style {
                Style::Faint => (";opacity:.45", ""),
                Style::Line => ("", ""),
                Style::Dots => ("", " class=\"dot\""),
            };
            let _ = write!(
                out,
                "<span><i{dot} style=\"background:{}{faint}\"></i>{}</span>",
                series.color,
                escape(&series.name)
            );
        }
        let (wide, narrow) = (self.svg(&WIDE), self.svg(&NARROW));
        let _ =
            write!(out, "</p><div class=\"wide\">{wide}</div><div class=\"narrow\">{narrow}</div>");
        out
    }

    fn svg(&self, size: &Size) -> String {
        let all = || self.series.iter().flat_map(|series| series.points.iter());
        let mut low = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
        if self.from_zero {
            low = low.min(0.0);
        }
        let high = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let last = all().map(|p| p.0).fold(1.0, f64::max);
        let step = nice_step((high - low).max(high.abs() * 1e-3).max(1e-9) / size.ticks.1);
        let (bottom, top) =
            ((low / step).floor() * step, ((high / step).ceil() * step).max(low + step));
        let (floor, width) = (size.height - BOTTOM, size.width);
        let x = |v: f64| LEFT + (width - LEFT - RIGHT) * v / last;
        let y = |v: f64| floor - (floor - TOP) * (v - bottom) / (top - bottom);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {width} {}\" width=\"100%\" role=\"img\" aria-label=\"{}\">\
             <text x=\"4\" y=\"12\">{}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            size.height,
            escape(self.name),
            escape(self.y_title),
            width - RIGHT,
            size.height - 6.0,
            escape(self.x_title)
        );
        let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
        let lines = ((top - bottom) / step).round() as usize;
        for line in 0..=lines {
            let tick = bottom + line as f64 * step;
            let at = y(tick);
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"var(--line)\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick:.decimals$}</text>",
                width - RIGHT,
                LEFT - 6.0,
                at + 4.0
            );
        }
        let every = nice_step(last / size.ticks.0).max(1.0);
        for tick in 0..=(last / every) as usize {
            let tick = tick as f64 * every;
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick:.0}</text>",
                x(tick),
                size.height - 24.0
            );
        }
        for series in &self.series {
            series.draw(&mut svg, &x, &y);
        }
        svg.push_str("</svg>");
        svg
    }
}

impl Series {
    fn draw(&self, svg: &mut String, x: &impl Fn(f64) -> f64, y: &impl Fn(f64) -> f64) {
        let Self { name, color, points, style } = self;
        if points.is_empty() {
            return;
        }
        let line: Vec<String> =
            points.iter().map(|&(a, b)| format!("{:.1},{:.1}", x(a), y(b))).collect();
        let (width, opacity) = if *style == Style::Faint { (1.0, 0.45) } else { (1.8, 1.0) };
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" \
             stroke-opacity=\"{opacity}\" points=\"{}\"/>",
            line.join(" ")
        );
        // A line through one point shows nothing.
        if *style == Style::Dots || points.len() == 1 {
            for &(a, b) in points {
                let _ = write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.4\" fill=\"{color}\"><title>{}, {a}: {b:.4}</title></circle>",
                    x(a),
                    y(b),
                    escape(name)
                );
            }
        }
    }
}

/// The nearest 1, 2 or 5 times a power of ten above `raw`.
fn nice_step(raw: f64) -> f64 {
    let power = 10_f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= raw).unwrap_or(10.0);
    factor * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_numbers() {
        for (raw, nice) in [(0.13, 0.2), (1.0, 1.0), (3.0, 5.0), (70.0, 100.0)] {
            assert!((nice_step(raw) - nice).abs() < 1e-9);
        }
    }

    #[test]
    fn every_point_is_inside() {
        let points = vec![(1.0, 3.0), (40.0, 2.6), (97.0, 2.2)];
        for from_zero in [true, false] {
            let series = Series {
                name: "a <b>".into(),
                color: "var(--a)",
                points: points.clone(),
                style: Style::Dots,
            };
            let chart = Chart {
                name: "n",
                x_title: "step",
                y_title: "loss",
                from_zero,
                series: vec![series],
            };
            for size in [&WIDE, &NARROW] {
                let svg = chart.svg(size);
                assert!(!svg.contains("<b>"));
                let of = |name: &str| -> Vec<f64> {
                    let attribute = format!(" {name}=\"");
                    let parts = svg.split(attribute.as_str()).skip(1);
                    parts.map(|part| part.split('"').next().unwrap().parse().unwrap()).collect()
                };
                assert_eq!(of("cx").len(), 3);
                assert!(of("cx").iter().all(|x| (LEFT..=size.width).contains(x)), "{svg}");
                assert!(
                    of("cy").iter().all(|y| (TOP - 0.1..=size.height - BOTTOM + 0.1).contains(y))
                );
                // Zero is the lowest line, where it was asked for.
                assert_eq!(
                    svg.contains(">0.0</text>") || svg.contains(">0</text><line"),
                    from_zero
                );
            }
        }
    }
}
