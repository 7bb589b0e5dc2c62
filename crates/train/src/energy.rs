//! The energy of a run, over pauses.

use crate::checkpoint::Progress;
use hydralora_energy::{Mark, Meter, Reading};

/// What a run used: before it was resumed, and since.
pub(crate) struct Used<'a> {
    meter: Option<(&'a Meter, Mark)>,
    /// Joules of the steps before; none where they are not known.
    before: Option<f64>,
    source: Option<String>,
    steps: usize,
    elapsed_s: f64,
}

impl<'a> Used<'a> {
    /// Begins to count, for a run that stands at `progress`.
    pub(crate) fn from(meter: Option<&'a Meter>, progress: &Progress) -> Self {
        Self {
            meter: meter.map(|meter| (meter, meter.mark())),
            before: if progress.step == 0 { Some(0.0) } else { progress.energy_j },
            source: progress.energy_source.clone(),
            steps: progress.step,
            elapsed_s: progress.elapsed_s,
        }
    }

    /// What was used so far. A part that was not measured leaves the whole unknown.
    pub(crate) fn now(&self) -> Reading {
        let Some((meter, mark)) = &self.meter else {
            return Reading::none("nothing was to be measured");
        };
        let now = meter.since(mark);
        let seconds = self.elapsed_s + now.seconds;
        let (Some(joules), Some(before)) = (now.joules, self.before) else {
            let unknown = format!("the first {} steps were not measured", self.steps);
            let reason = now.reason.filter(|_| now.joules.is_none()).unwrap_or(unknown);
            return Reading { seconds, ..Reading::none(reason) };
        };
        Reading {
            joules: Some(before + joules),
            source: now.source.map(|source| join(self.source.as_deref(), &source)),
            seconds,
            ..now
        }
    }

    /// Notes it for whoever goes on from here.
    pub(crate) fn note(&self, progress: &mut Progress) {
        let now = self.now();
        progress.energy_j = now.joules;
        progress.energy_source = now.source;
    }
}

/// The sources of a run's parts, in their order.
fn join(before: Option<&str>, now: &str) -> String {
    match before {
        None => now.to_owned(),
        Some(before) if before == now || before.ends_with(&format!(", then {now}")) => {
            before.to_owned()
        }
        Some(before) => format!("{before}, then {now}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_energy::Options;

    fn progress(step: usize, energy_j: Option<f64>, source: Option<&str>) -> Progress {
        Progress {
            step,
            elapsed_s: 10.0 * step as f64,
            energy_j,
            energy_source: source.map(str::to_owned),
            ..Progress::start("")
        }
    }

    #[test]
    fn a_run_that_goes_on_adds_to_what_it_used() {
        let meter = Meter::start(&Options { watts: Some(100.0), ..Options::default() });
        let measured = "rapl:package-0";
        let guess = "estimate: 100 W x wall time";
        let of = |step, joules, source| Used::from(Some(&meter), &progress(step, joules, source));
        let now = of(3, Some(50.0), Some(measured)).now();
        assert!(now.joules.unwrap() >= 50.0 && now.seconds >= 30.0 && now.estimated);
        let both = format!("{measured}, then {guess}");
        assert_eq!(now.source.as_ref(), Some(&both));
        assert_eq!(of(3, Some(50.0), Some(&both)).now().source.as_ref(), Some(&both));
        assert_eq!(of(3, Some(1.0), Some(guess)).now().source.as_deref(), Some(guess));
        let mut noted = progress(0, None, None);
        of(0, None, None).note(&mut noted);
        assert!(noted.energy_j.is_some_and(|joules| joules >= 0.0));
        assert_eq!(noted.energy_source.as_deref(), Some(guess));
        let unknown = of(3, None, None).now();
        assert_eq!((unknown.joules, unknown.source), (None, None));
        assert_eq!(unknown.reason.as_deref(), Some("the first 3 steps were not measured"));
        assert_eq!(Used::from(None, &progress(0, None, None)).now().joules, None);
    }
}
