//! What was found and what was not, in sentences made from the numbers.

use super::analysis::{Analysis, Comparison};
use super::chart::number;
use crate::result::Energy;
use crate::stats::{POWER, SIGNIFICANCE};

/// A metric's name for people.
pub(crate) fn metric_name(key: &str) -> String {
    let plain = |key: &str| key.trim_end_matches(",none").replace('/', " ");
    match key.split_once('/') {
        None => match key {
            "loss" => "test loss".to_owned(),
            "macro_loss" => "mean test loss of the domains".to_owned(),
            "test_wall_s" => "seconds of scoring".to_owned(),
            "valid_loss" => "validation loss".to_owned(),
            "base_loss" => "validation loss of the base model".to_owned(),
            "parameters" => "trainable parameters".to_owned(),
            "wall_s" => "seconds of training".to_owned(),
            "cpu_s" => "processor seconds".to_owned(),
            "peak_rss_mb" => "peak memory (MB)".to_owned(),
            "energy_j" => "energy (J)".to_owned(),
            "test_energy_j" => "energy of scoring (J)".to_owned(),
            other => plain(other),
        },
        Some(("loss", domain)) => format!("test loss on {domain}"),
        Some(("valid_loss", domain)) => format!("validation loss on {domain}"),
        Some(_) => plain(key),
    }
}

/// [`metric_name`], and whether its values are guesses.
pub(crate) fn name_in(analysis: &Analysis, key: &str) -> String {
    let name = metric_name(key);
    let guessed = energies(analysis, key).any(Energy::is_estimate);
    if guessed { name.replace("(J)", "(J, estimated)") } else { name }
}

/// What is known of the energy that a metric is of; nothing for metrics of something else.
fn energies<'a>(analysis: &'a Analysis, key: &'a str) -> impl Iterator<Item = &'a Energy> {
    analysis.results.values().filter_map(move |result| match key {
        "energy_j" => result.trained.as_ref().map(|trained| &trained.energy),
        "test_energy_j" => result.test.as_ref().map(|test| &test.energy),
        _ => None,
    })
}

/// Where energies come from, what they leave out, and why there are none.
fn of_energies(analysis: &Analysis) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for metric in &analysis.metrics {
        for energy in energies(analysis, metric) {
            let name = metric_name(metric);
            let reason = energy.reason.as_deref();
            let line = match (energy.energy_j, &energy.source) {
                (Some(_), Some(source)) => {
                    let more = reason.map_or(String::new(), |reason| format!("; {reason}"));
                    format!("{name}: {source}{more}.")
                }
                _ => format!("{name} is not known: {}.", reason.unwrap_or("nothing was read")),
            };
            if !found.contains(&line) {
                found.push(line);
            }
        }
    }
    found
}

/// p as people write it.
pub(crate) fn p_value(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

fn signed(value: f64) -> String {
    if value >= 0.0 { format!("+{}", number(value)) } else { format!("−{}", number(-value)) }
}

/// Where a comparison was made.
fn place(analysis: &Analysis, comparison: &Comparison) -> String {
    match comparison.slice {
        None => "over all parts together".to_owned(),
        Some(slice) => match analysis.slice_name(slice) {
            name if name.is_empty() => String::new(),
            name => format!("on {name}"),
        },
    }
}

/// One comparison in one or two sentences.
pub(crate) fn sentence(analysis: &Analysis, comparison: &Comparison) -> String {
    let reference = analysis.plan.reference.clone().unwrap_or_default();
    let Comparison { label, paired, .. } = comparison;
    let place = match place(analysis, comparison) {
        place if place.is_empty() => String::new(),
        place => format!(" {place}"),
    };
    let mean = paired.difference.mean;
    let seeds = match comparison.pairs.len() {
        1 => "1 seed".to_owned(),
        n => format!("{n} seeds"),
    };
    let difference = match paired.difference.interval {
        Some([low, high]) => {
            format!("{} (95 % interval {} to {}, {seeds}", signed(mean), signed(low), signed(high))
        }
        None => format!("{} ({seeds}", signed(mean)),
    };
    let test = match (paired.t_p, comparison.corrected_p) {
        (Some(p), Some(corrected)) => {
            format!(", p {}, corrected {})", p_value(p), p_value(corrected))
        }
        _ => ")".to_owned(),
    };
    let better = (mean > 0.0) == analysis.higher_is_better(&comparison.metric);
    if comparison.found() {
        let how = if better { "better" } else { "worse" };
        let effect = paired.effect.map_or(String::new(), |effect| format!("; d_z {effect:.2}"));
        return format!("{label} is {how} than {reference}{place}: {difference}{test}{effect}.");
    }
    if paired.t_p.is_none() {
        let why = if comparison.pairs.len() < 2 {
            "one seed allows no test"
        } else {
            "the differences are all equal, which allows no test"
        };
        return format!("{label} and {reference}{place}: {difference}{test}; {why}.");
    }
    let needed = match paired.pairs_needed {
        Some(needed) if needed > comparison.pairs.len() => format!(
            " A difference of this size would need {needed} seeds to be found with a probability of {:.0} %.",
            100.0 * POWER
        ),
        Some(_) => " It does not hold after the correction for all comparisons.".to_owned(),
        None => " A difference of this size would need more than ten thousand seeds.".to_owned(),
    };
    format!(
        "No difference was found between {label} and {reference}{place}: {difference}{test}.{needed}"
    )
}

/// The paragraphs at the head of a study's report.
pub(crate) fn findings(analysis: &Analysis) -> Vec<String> {
    let mut found = Vec::new();
    let Some(metric) = analysis.metrics.first() else { return found };
    let name = name_in(analysis, metric);
    let Some(reference) = &analysis.plan.reference else {
        found.push("No reference is named, so nothing is tested.".to_owned());
        return found;
    };
    let main: Vec<&Comparison> =
        analysis.comparisons.iter().filter(|comparison| comparison.metric == *metric).collect();
    if main.is_empty() {
        found.push(format!(
            "Nothing can be compared yet: no seed has a {name} of {reference} and of another label."
        ));
        return found;
    }
    let differ = main.iter().filter(|comparison| comparison.found()).count();
    found.push(format!(
        "{name}: of {} comparison{} with {reference}, each at its own best value by the validation split, {} \
         a difference at the level {SIGNIFICANCE} after Holm's correction.",
        main.len(),
        if main.len() == 1 { "" } else { "s" },
        match differ {
            0 => "none shows".to_owned(),
            1 => "1 shows".to_owned(),
            n => format!("{n} show"),
        }
    ));
    found.extend(main.iter().map(|comparison| sentence(analysis, comparison)));
    found
}

/// What a reader has to know before believing any of it.
pub(crate) fn cautions(analysis: &Analysis) -> Vec<String> {
    let mut found = analysis.plan.notes.clone();
    let counts = analysis.counts();
    let missing = counts.open + counts.unscored;
    if missing > 0 {
        found.push(format!(
            "Partial: {missing} of {} cells are not done, so choices and numbers may still change.",
            counts.cells
        ));
    }
    if counts.failed > 0 {
        let mut reasons: Vec<String> = Vec::new();
        for failure in analysis.failures.values() {
            let reason = failure.message.lines().next().unwrap_or_default().to_owned();
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        reasons.sort();
        reasons.truncate(3);
        let cells = if counts.failed == 1 { "1 cell" } else { &format!("{} cells", counts.failed) };
        found.push(format!("{cells} failed: {}.", reasons.join("; ")));
    }
    found.extend(of_energies(analysis));
    let mut edges: Vec<String> = Vec::new();
    for choice in analysis.choices.iter().filter(|choice| choice.at_edge()) {
        let value = choice.chosen().map_or("", |tried| tried.value.as_str());
        let place: Vec<&str> = choice.group.values().map(String::as_str).collect();
        edges.push(format!("{} ({value})", place.join(", ")));
    }
    if let (Some(tune), false) = (&analysis.plan.tune, edges.is_empty()) {
        let shown = edges.len().min(12);
        let more = match edges.len() - shown {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        found.push(format!(
            "The best {tune} lies at the edge of what was tried, so a better one may lie outside: {}{more}.",
            edges[..shown].join("; ")
        ));
    }
    if analysis.metrics.first().is_some_and(|metric| metric.starts_with("valid_loss")) {
        found.push(
            "The numbers are of the validation split, on which the best values were chosen; they flatter \
             whatever was given more values to choose from."
                .to_owned(),
        );
    }
    let unpaired = analysis.comparisons.iter().any(|comparison| comparison.pairs.len() < 3);
    if unpaired {
        found.push(
            "Fewer than three seeds: intervals are wide, and absence of a finding says little."
                .to_owned(),
        );
    }
    if analysis.unplanned > 0 {
        found.push(format!(
            "{} cells of earlier versions of the study lie in the folder and are not counted.",
            analysis.unplanned
        ));
    }
    found
}

/// How the numbers came about.
pub(crate) fn method(analysis: &Analysis) -> String {
    let tuned = match &analysis.plan.tune {
        Some(tune) => format!(
            "For every combination, the {tune} with the least mean {} over seeds is chosen; only then are its \
             cells scored on the test split, so nothing of the test split entered a choice. ",
            name_in(analysis, &analysis.plan.select)
        ),
        None => "Nothing is tuned. ".to_owned(),
    };
    format!(
        "{tuned}Intervals are Student's over seeds. Comparisons are paired by seed (t-test, and Wilcoxon's \
         signed-rank test beside it); where there are several parts, a seed's value over all of them is their \
         mean. p is corrected by Holm over all comparisons of a metric in this study. d_z is the mean \
         difference over the standard deviation of the differences. Seeds needed are those with which a \
         two-sided t-test at {SIGNIFICANCE} finds the observed effect with a probability of {:.0} %; an effect \
         taken from few seeds is itself uncertain.",
        100.0 * POWER
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::analysis::tests::example;

    #[test]
    fn words_follow_the_numbers() {
        let found = findings(&example(0.1));
        assert!(found[0].contains("1 shows a difference"), "{found:?}");
        assert!(found[1].starts_with("hydralora is better than lora: −0.1"), "{found:?}");
        assert!(found[1].contains("5 seeds") && found[1].contains("d_z"), "{found:?}");
        let found = findings(&example(-0.1));
        assert!(found[1].starts_with("hydralora is worse than lora: +"), "{found:?}");
        let found = findings(&example(0.0));
        assert!(found[0].contains("none shows a difference"), "{found:?}");
        assert!(
            found[1].starts_with("No difference was found between hydralora and lora"),
            "{found:?}"
        );
        assert!(found[1].contains("would need"), "{found:?}");
        let edge = cautions(&example(0.1));
        assert!(edge.iter().any(|line| line.contains("lies at the edge")), "{edge:?}");
    }

    #[test]
    fn energies_say_where_they_come_from() {
        let mut analysis = example(0.1);
        analysis.metrics.push("energy_j".to_owned());
        assert_eq!(name_in(&analysis, "energy_j"), "energy (J)");
        let unknown = "energy (J) is not known: nothing was measured.";
        assert!(
            cautions(&analysis).iter().any(|line| line == unknown),
            "{:?}",
            cautions(&analysis)
        );
        for result in analysis.results.values_mut() {
            result.trained.as_mut().unwrap().energy = Energy {
                energy_j: Some(12.0),
                source: Some("estimate: 65 W x wall time".to_owned()),
                reason: Some("counts all of the 2 cells at work at once".to_owned()),
                ..Energy::default()
            };
        }
        assert_eq!(name_in(&analysis, "energy_j"), "energy (J, estimated)");
        assert_eq!(name_in(&analysis, "wall_s"), "seconds of training");
        let said =
            "energy (J): estimate: 65 W x wall time; counts all of the 2 cells at work at once.";
        let lines = cautions(&analysis);
        assert_eq!(lines.iter().filter(|line| line.starts_with("energy")).count(), 1);
        assert!(lines.iter().any(|line| line == said), "{lines:?}");
    }

    #[test]
    fn names_are_for_people() {
        assert_eq!(metric_name("loss/law"), "test loss on law");
        assert_eq!(metric_name("mmlu/acc,none"), "mmlu acc");
        assert_eq!(p_value(0.00012), "< 0.001");
    }
}
