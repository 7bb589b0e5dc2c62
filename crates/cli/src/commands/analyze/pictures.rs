//! The report's pictures.

use super::report::{AdapterReport, Report, SiteReport, mean};
use hydralora_data::escape_markup as escape;
use hydralora_data::picture::{COLORS, INK, LINE, SOFT, color, open, shaped, shortened, text};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Rows and columns that a picture of pairs shows.
const MOST_ADAPTERS: usize = 24;
/// Series of a picture of curves.
const MOST_CURVES: usize = 12;
const WIDTH: f64 = 720.0;

/// A picture, the name of its file, and what it shows.
pub(super) struct Picture {
    pub(super) name: &'static str,
    pub(super) caption: &'static str,
    pub(super) svg: String,
}

/// Every picture that there is something to draw for.
pub(super) fn pictures(report: &Report) -> Vec<Picture> {
    let curves = |name, caption, title: &str, pick: fn(&SiteReport) -> Option<f64>| {
        let svg = by_layer(report, title, pick)?;
        Some(Picture { name, caption, svg })
    };
    let similarity = Picture {
        name: "similarity",
        caption: "Mean cosine of the principal angles between the row spaces of two adapters' A and the \
                  column spaces of their B, over the layers that both have: 1 for the same space. A dot: \
                  these A began equal.",
        svg: similarity(report).unwrap_or_default(),
    };
    let map = Picture {
        name: "map",
        caption: "t-SNE of all A (dots) and B (hollow squares) of the layers: each matrix flattened and \
                  scaled to length 1. Matrices of different shapes have no distance of their own and all \
                  lie equally far from each other. What lies together covers each other.",
        svg: map(report).unwrap_or_default(),
    };
    let rank = curves(
        "rank",
        "Effective rank of the update in a decoder layer, the mean over its projections.",
        "Effective rank of the update",
        |site| site.update.as_ref()?.effective_rank,
    );
    let heads = curves(
        "heads",
        "Share of the heads' energy in which they differ, the mean over a decoder layer's projections: \
         0 for heads that are all the same.",
        "Share of the differences between heads",
        |site| site.heads.as_ref()?.difference_share,
    );
    let gates = curves(
        "gates",
        "Mean distance (total variation) between two domains' mean gates, within each layer, then over \
         a decoder layer's projections: 0 where all domains are routed alike.",
        "Distance of the domains' gates",
        |site| site.gates.as_ref()?.distance,
    );
    let all = [Some(similarity), Some(map), rank, heads, gates];
    all.into_iter().flatten().filter(|picture| !picture.svg.is_empty()).collect()
}

/// Two triangles of shaded numbers: A and B.
fn similarity(report: &Report) -> Option<String> {
    let adapters = &report.adapters[..report.adapters.len().min(MOST_ADAPTERS)];
    if adapters.len() < 2 {
        return None;
    }
    let names: Vec<String> = adapters.iter().map(|adapter| shortened(&adapter.name, 20)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as f64;
    let left = 16.0 + 6.6 * longest;
    let side = ((WIDTH - 2.0 * left - 20.0) / (2.0 * adapters.len() as f64)).clamp(14.0, 62.0);
    let panel = left + side * adapters.len() as f64;
    let top = 34.0;
    let below = 14.0 + 4.8 * longest;
    let height = top + side.min(40.0) * adapters.len() as f64 + below;
    let row = side.min(40.0);
    let mut svg = open(2.0 * panel + 20.0, height, "Likeness of A and of B");
    for (at, part) in ["A", "B"].into_iter().enumerate() {
        let x0 = at as f64 * (panel + 20.0);
        svg.push_str(&text(x0 + left, 20.0, "start", INK, part));
        for (i, first) in names.iter().enumerate() {
            let y = top + row * i as f64;
            svg.push_str(&text(x0 + left - 8.0, y + row / 2.0 + 4.0, "end", INK, first));
            let x = x0 + left + side * (i as f64 + 0.5);
            let foot = top + row * names.len() as f64 + 12.0;
            let _ = write!(
                svg,
                "<g transform=\"translate({x:.1} {foot:.1}) rotate(-40)\">{}</g>",
                text(0.0, 0.0, "end", INK, first)
            );
            for (j, second) in names.iter().enumerate() {
                let x = x0 + left + side * j as f64;
                let pair = report.pairs.iter().find(|pair| {
                    let ends = [pair.first.as_str(), pair.second.as_str()];
                    let here = [adapters[i].name.as_str(), adapters[j].name.as_str()];
                    ends == here || ends == [here[1], here[0]]
                });
                let value = pair.and_then(|pair| match part {
                    "A" => pair.overall.a.angle_cosine,
                    _ => pair.overall.b.angle_cosine,
                });
                let Some(value) = value else {
                    let _ = write!(
                        svg,
                        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"none\" \
                         stroke=\"{LINE}\"/>",
                        side - 2.0,
                        row - 2.0
                    );
                    continue;
                };
                let _ = write!(
                    svg,
                    "<g><title>{} – {}, {part}: {value:.4}</title><rect x=\"{x:.1}\" y=\"{y:.1}\" \
                     width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\" fill-opacity=\"{:.2}\"/>",
                    escape(first),
                    escape(second),
                    side - 2.0,
                    row - 2.0,
                    COLORS[0],
                    0.06 + 0.5 * value.clamp(0.0, 1.0)
                );
                if side >= 34.0 {
                    let shown = format!("{value:.2}");
                    svg.push_str(&text(
                        x + side / 2.0 - 1.0,
                        y + row / 2.0 + 4.0,
                        "middle",
                        INK,
                        &shown,
                    ));
                }
                if part == "A" && pair.is_some_and(|pair| pair.began_equal == Some(true)) {
                    let _ = write!(
                        svg,
                        "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{}\"/>",
                        x + side - 8.0,
                        y + 6.0,
                        COLORS[1]
                    );
                }
                svg.push_str("</g>");
            }
        }
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// The matrices as points: the colour of their adapter, or of their head where there is one adapter.
fn map(report: &Report) -> Option<String> {
    const SIDE: f64 = 420.0;
    if report.map.len() < 3 {
        return None;
    }
    let alone = report.adapters.len() == 1;
    let names: Vec<(String, usize, usize)> = if alone {
        let heads = report.adapters[0].num_b;
        let number = |n: usize, of: usize| if of > 1 { format!(" {n}") } else { String::new() };
        let a = (0..report.adapters[0].num_a.max(1))
            .map(|n| (format!("A{}", number(n, report.adapters[0].num_a)), n, 0));
        let b = (0..heads).map(|n| (format!("B{}", number(n, heads)), n, 3));
        a.chain(b).collect()
    } else {
        let adapters = report.adapters.iter().enumerate();
        adapters.map(|(at, adapter)| (shortened(&adapter.name, 40), at, 0)).collect()
    };
    let columns = 2;
    let rows = names.len().div_ceil(columns) + usize::from(!alone);
    let height = 24.0 + SIDE + 20.0 + 18.0 * rows as f64;
    let mut svg = open(WIDTH, height, "Map of A and B");
    // A few points far off must not flatten the rest: they are drawn at the edge.
    let bounds = |pick: fn(&super::report::Point) -> f32| {
        let mut values: Vec<f32> = report.map.iter().map(pick).collect();
        values.sort_by(f32::total_cmp);
        let cut = values.len() / 50;
        let (low, high) = (values[cut], values[values.len() - 1 - cut]);
        let margin = 0.25 * (high - low);
        (values[0].max(low - margin), values[values.len() - 1].min(high + margin))
    };
    let ((left, right), (low, high)) = (bounds(|p| p.x), bounds(|p| p.y));
    let at = |value: f32, from: f32, to: f32, length: f64| {
        16.0 + (length - 32.0) * f64::from(((value - from) / (to - from).max(1e-9)).clamp(0.0, 1.0))
    };
    for point in &report.map {
        let (x, y) = (at(point.x, left, right, WIDTH), at(point.y, low, high, SIDE));
        let shape = if point.part == "A" { 0 } else { 3 };
        let number = if alone { point.number } else { point.adapter };
        let _ = write!(
            svg,
            "<g><title>{}, {} {}, {}</title>{}</g>",
            escape(&report.adapters[point.adapter].name),
            point.part,
            point.number,
            escape(&point.site),
            shaped(x, 16.0 + y, 3.4, number, shape)
        );
    }
    let mut line = 24.0 + SIDE + 18.0;
    if !alone {
        svg.push_str(&shaped(16.0, line - 4.0, 4.0, 6, 0));
        svg.push_str(&text(28.0, line, "start", SOFT, "A"));
        svg.push_str(&shaped(60.0, line - 4.0, 4.0, 6, 3));
        svg.push_str(&text(72.0, line, "start", SOFT, "B"));
        line += 18.0;
    }
    for (index, (name, number, shape)) in names.iter().enumerate() {
        let x = 16.0 + (index % columns) as f64 * WIDTH / columns as f64;
        let y = line + 18.0 * (index / columns) as f64;
        svg.push_str(&shaped(x, y - 4.0, 4.5, *number, *shape));
        svg.push_str(&text(x + 12.0, y, "start", INK, name));
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// A measure by decoder layer, a curve an adapter; none if no layer has it.
fn by_layer(report: &Report, title: &str, pick: fn(&SiteReport) -> Option<f64>) -> Option<String> {
    const HEIGHT: f64 = 220.0;
    const LEFT: f64 = 56.0;
    let curve = |adapter: &AdapterReport| -> Vec<(usize, f64)> {
        let mut layers: BTreeMap<usize, Vec<Option<f64>>> = BTreeMap::new();
        for site in &adapter.sites {
            layers.entry(site.layer).or_default().push(pick(site));
        }
        let mean = |(layer, values)| Some((layer, mean(values)?));
        layers.into_iter().filter_map(mean).collect()
    };
    let curves: Vec<_> = report
        .adapters
        .iter()
        .enumerate()
        .map(|(at, adapter)| (at, adapter, curve(adapter)))
        .filter(|(_, _, curve)| !curve.is_empty())
        .take(MOST_CURVES)
        .collect();
    let all = || curves.iter().flat_map(|(_, _, curve)| curve);
    let last = all().map(|(layer, _)| *layer).max()?;
    let high = all().map(|(_, value)| *value).fold(0.0, f64::max);
    let high = if high > 0.0 { 1.08 * high } else { 1.0 };
    let height = HEIGHT + 44.0 + 18.0 * curves.len().div_ceil(2) as f64;
    let mut svg = open(WIDTH, height, title);
    svg.push_str(&text(8.0, 18.0, "start", INK, title));
    let x = |layer: usize| LEFT + 8.0 + (WIDTH - LEFT - 28.0) * layer as f64 / last.max(1) as f64;
    let y = |value: f64| HEIGHT - (HEIGHT - 36.0) * value / high;
    let step = round_step(high);
    for part in (0..).map(|part| step * f64::from(part)).take_while(|value| *value <= high) {
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"{LINE}\"/>{2}",
            WIDTH - 12.0,
            y(part),
            text(LEFT - 6.0, y(part) + 4.0, "end", SOFT, &round(part, step))
        );
    }
    for layer in (0..=last).step_by(last / 12 + 1) {
        svg.push_str(&text(x(layer), HEIGHT + 16.0, "middle", SOFT, &layer.to_string()));
    }
    svg.push_str(&text(WIDTH - 12.0, HEIGHT + 32.0, "end", SOFT, "decoder layer"));
    for (index, (at, adapter, curve)) in curves.iter().enumerate() {
        let dashes = ["", " stroke-dasharray=\"6 3\"", " stroke-dasharray=\"2 3\""][at % 3];
        let points: Vec<String> = curve
            .iter()
            .map(|(layer, value)| format!("{:.1},{:.1}", x(*layer), y(*value)))
            .collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"{dashes} points=\"{}\"/>",
            color(*at),
            points.join(" ")
        );
        for (layer, value) in curve {
            let _ = write!(
                svg,
                "<g><title>{}, layer {layer}: {value:.4}</title>{}</g>",
                escape(&adapter.name),
                shaped(x(*layer), y(*value), 3.0, *at, at % 4)
            );
        }
        let left = 16.0 + (index % 2) as f64 * WIDTH / 2.0;
        let line = HEIGHT + 52.0 + 18.0 * (index / 2) as f64;
        svg.push_str(&shaped(left, line - 4.0, 4.5, *at, at % 4));
        svg.push_str(&text(left + 12.0, line, "start", INK, &shortened(&adapter.name, 44)));
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// A round distance of lines, of which some four fit below `high`.
fn round_step(high: f64) -> f64 {
    let rough = high / 4.0;
    let power = 10.0_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|n| n * power)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough)
}

/// A value with as many digits as its step has.
fn round(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{value:.digits$}")
}
