//! Energy of a command's work: how it is asked for, measured, and said.

use crate::args::Global;
use crate::device;
use crate::ui::say;
use clap::Args;
use hydralora_energy::{Mark, Options, Reading};
use serde::Serialize;
use std::time::Duration;

/// Names the folder of the processor's counters, where it is not the system's.
const POWERCAP: &str = "HYDRALORA_POWERCAP";
/// Joules in a kilowatt-hour.
pub(crate) const JOULES_PER_KWH: f64 = 3.6e6;
/// Longest idle window, in seconds.
const LONGEST: f64 = 3600.0;

/// How energy is measured.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Energy")]
pub(crate) struct EnergyArguments {
    /// Estimate the energy as this power times the time, in place of reading the machine's counters.
    #[arg(long, value_name = "W", value_parser = watts, allow_hyphen_values = true)]
    pub(crate) power_watts: Option<f64>,
    /// Measure the idle machine for so long before the work, and report its power beside the energy.
    #[arg(long, value_name = "S", value_parser = seconds, allow_hyphen_values = true, conflicts_with = "power_watts")]
    pub(crate) idle_seconds: Option<f64>,
    /// Grams of CO2 equivalent of a kilowatt-hour where this runs; without it no emissions are given.
    #[arg(long, value_name = "G", value_parser = grams, allow_hyphen_values = true)]
    pub(crate) grid_intensity: Option<f64>,
}

fn watts(text: &str) -> Result<f64, String> {
    let watts = text.parse().ok().filter(|watts: &f64| watts.is_finite() && *watts > 0.0);
    watts.ok_or_else(|| "expected a power in watts above 0".to_owned())
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=LONGEST).contains(seconds));
    seconds.ok_or_else(|| format!("expected seconds, 0 to {LONGEST}"))
}

fn grams(text: &str) -> Result<f64, String> {
    let grams = text.parse().ok().filter(|grams: &f64| grams.is_finite() && *grams >= 0.0);
    grams.ok_or_else(|| "expected grams for a kilowatt-hour, 0 or more".to_owned())
}

impl EnergyArguments {
    /// The arguments as another command of this program takes them.
    pub(crate) fn spelt(&self) -> Vec<String> {
        let options = [
            ("--power-watts", self.power_watts),
            ("--idle-seconds", self.idle_seconds),
            ("--grid-intensity", self.grid_intensity),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some((name, value?)));
        given.flat_map(|(name, value)| [name.to_owned(), value.to_string()]).collect()
    }
}

/// What was done with the energy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Tokens trained on, or written.
    pub(crate) tokens: Option<usize>,
    /// Answers given.
    pub(crate) answers: Option<usize>,
}

impl Work {
    pub(crate) fn tokens(tokens: usize) -> Self {
        Self { tokens: Some(tokens), answers: None }
    }

    pub(crate) fn answers(answers: usize) -> Self {
        Self { tokens: None, answers: Some(answers) }
    }
}

/// Energy as commands print it. The names of the fields are documented in `docs/energy.md` and stay.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Energy {
    /// Joules; none where nothing was measured.
    pub(crate) energy_j: Option<f64>,
    /// What they come from.
    pub(crate) source: Option<String>,
    /// Why there are none, or what is not counted.
    pub(crate) reason: Option<String>,
    /// Whether they are a guess and no measurement.
    pub(crate) estimated: bool,
    /// Seconds of the work.
    pub(crate) seconds: f64,
    /// The same in kilowatt-hours.
    pub(crate) kwh: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) j_per_1000_tokens: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) answers: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) j_per_answer: Option<f64>,
    /// Power of the idle machine before the work, where it was measured.
    pub(crate) idle_watts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) idle_seconds: Option<f64>,
    /// Grams of CO2 equivalent, where the grid's intensity was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) g_co2eq: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grid_g_per_kwh: Option<f64>,
}

impl Energy {
    /// Tells people a figure, where there is one.
    pub(crate) fn say_if_known(&self, global: &Global) {
        if self.energy_j.is_some() {
            say(global, format!("[energy {}]", self.in_words()));
        }
    }

    /// In a line, with where it comes from, or why there is none.
    pub(crate) fn in_words(&self) -> String {
        let reason = self.reason.as_deref();
        let Some(joules) = self.energy_j else {
            return format!("not measured: {}", reason.unwrap_or("nothing was read"));
        };
        let mut parts = vec![format!("{} J", figure(joules))];
        parts.extend(self.kwh.map(|kwh| format!("{} kWh", figure(kwh))));
        let each = self.j_per_1000_tokens;
        parts.extend(each.map(|each| format!("{} J for 1,000 tokens", figure(each))));
        let each = self.j_per_answer.filter(|_| self.answers != Some(1));
        parts.extend(each.map(|each| format!("{} J an answer", figure(each))));
        parts.extend(self.g_co2eq.map(|grams| format!("{} g CO2eq", figure(grams))));
        parts.extend(self.idle_watts.map(|watts| format!("idle {} W", figure(watts))));
        let source = self.source.as_deref().unwrap_or_default();
        let more = reason.map_or(String::new(), |reason| format!("; {reason}"));
        format!("{} ({source}{more})", parts.join(", "))
    }
}

/// Four digits, or the thousands of a large number.
fn figure(value: f64) -> String {
    let size = value.abs();
    match size {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        10.0.. => format!("{value:.2}"),
        0.001.. => format!("{value:.4}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.3e}"),
    }
}

/// The machine's meters for the length of a command.
pub(crate) struct Meter {
    meter: hydralora_energy::Meter,
    idle: Option<(f64, f64)>,
    grid: Option<f64>,
}

impl Meter {
    /// Begins to read, after a look at the idle machine where that is asked for.
    pub(crate) fn start(global: &Global, arguments: &EnergyArguments) -> Self {
        let mut options = Options {
            nvidia: device::nvidia(),
            watts: arguments.power_watts,
            ..Options::default()
        };
        if let Some(folder) = std::env::var_os(POWERCAP).filter(|folder| !folder.is_empty()) {
            options.powercap = folder.into();
        }
        let meter = hydralora_energy::Meter::start(&options);
        let window = arguments.idle_seconds.filter(|window| *window > 0.0);
        let idle = window.and_then(|window| {
            say(global, format!("measuring the idle machine for {window} s"));
            Some((meter.idle(Duration::from_secs_f64(window))?, window))
        });
        Self { meter, idle, grid: arguments.grid_intensity }
    }

    /// What a training run reads.
    pub(crate) fn inner(&self) -> &hydralora_energy::Meter {
        &self.meter
    }

    pub(crate) fn mark(&self) -> Mark {
        self.meter.mark()
    }

    /// What was used since `mark`.
    pub(crate) fn since(&self, mark: &Mark) -> Reading {
        self.meter.since(mark)
    }

    /// A reading as the command prints it.
    pub(crate) fn energy(&self, reading: Reading, work: Work) -> Energy {
        let Reading { joules, source, reason, estimated, seconds } = reading;
        let kwh = joules.map(|joules| joules / JOULES_PER_KWH);
        let each =
            |of: Option<usize>, unit: f64| Some(joules? * unit / of.filter(|of| *of > 0)? as f64);
        Energy {
            energy_j: joules,
            source,
            reason,
            estimated,
            seconds,
            kwh,
            tokens: work.tokens,
            j_per_1000_tokens: each(work.tokens, 1000.0),
            answers: work.answers,
            j_per_answer: each(work.answers, 1.0),
            idle_watts: self.idle.map(|(watts, _)| watts),
            idle_seconds: self.idle.map(|(_, seconds)| seconds),
            g_co2eq: kwh.zip(self.grid).map(|(kwh, grams)| kwh * grams),
            grid_g_per_kwh: self.grid,
        }
    }
}

/// Adds readings of one meter, one after the other; one without a figure leaves none.
pub(crate) fn add(sum: Option<Reading>, more: Reading) -> Reading {
    let Some(sum) = sum else { return more };
    let joules = sum.joules.zip(more.joules).map(|(sum, more)| sum + more);
    Reading {
        source: more.source.filter(|_| joules.is_some()),
        reason: sum.reason.or(more.reason),
        joules,
        estimated: more.estimated && joules.is_some(),
        seconds: sum.seconds + more.seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_digits_that_matter() {
        for (value, shown) in [
            (0.0, "0"),
            (12345.6, "12346"),
            (123.46, "123.5"),
            (12.345, "12.35"),
            (0.0123456, "0.0123"),
            (3.42e-6, "3.420e-6"),
        ] {
            assert_eq!(figure(value), shown);
        }
    }

    #[test]
    fn a_sum_with_an_unknown_part_is_unknown() {
        let known = Reading {
            joules: Some(1.5),
            source: Some("rapl:package-0".to_owned()),
            seconds: 1.0,
            ..Reading::default()
        };
        let twice = add(Some(known.clone()), known.clone());
        assert_eq!((twice.joules, twice.seconds), (Some(3.0), 2.0));
        assert_eq!(twice.source, known.source);
        for sum in [
            add(Some(known.clone()), Reading::none("lost")),
            add(Some(Reading::none("lost")), known),
        ] {
            assert_eq!((sum.joules, sum.source, sum.estimated), (None, None, false));
            assert_eq!(sum.reason.as_deref(), Some("lost"));
        }
    }

    #[test]
    fn derived_figures_follow_from_the_joules() {
        let options = Options { watts: Some(65.0), ..Options::default() };
        let meter = hydralora_energy::Meter::start(&options);
        let meter = Meter { meter, idle: Some((20.0, 5.0)), grid: Some(400.0) };
        let reading = Reading {
            joules: Some(7.2e6),
            source: Some("estimate: 65 W x wall time".to_owned()),
            estimated: true,
            seconds: 100.0,
            reason: None,
        };
        let energy = meter.energy(reading, Work { tokens: Some(1_000_000), answers: Some(8) });
        assert_eq!((energy.kwh, energy.g_co2eq), (Some(2.0), Some(800.0)));
        assert_eq!((energy.j_per_1000_tokens, energy.j_per_answer), (Some(7200.0), Some(9e5)));
        assert_eq!(
            energy.in_words(),
            "7200000 J, 2.0000 kWh, 7200 J for 1,000 tokens, 900000 J an answer, 800.0 g CO2eq, \
             idle 20.00 W (estimate: 65 W x wall time)"
        );
        let none = meter.energy(Reading::none("no such folder"), Work::answers(0));
        assert_eq!((none.kwh, none.j_per_answer, none.g_co2eq), (None, None, None));
        assert_eq!(none.in_words(), "not measured: no such folder");
    }
}
