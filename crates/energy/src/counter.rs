//! Counters that only grow, until they start again from 0.

use std::time::Instant;

/// A counter of energy.
pub(crate) trait Counter: Send {
    /// Microjoules since some moment.
    ///
    /// # Errors
    /// What it is called, and why it cannot be read.
    fn read(&self) -> Result<u64, String>;

    /// What it is called where something is wrong with it.
    fn name(&self) -> String;

    /// The largest value, after which it starts again from 0; none if that is not known.
    fn range(&self) -> Option<u64>;
}

/// More than any machine draws, in microjoules a second.
const TOO_MUCH: f64 = 1e10;

/// A counter and what it was at the last look.
struct Followed {
    counter: Box<dyn Counter>,
    /// None before the first look.
    last: Option<(u64, Instant)>,
    /// Microjoules since the first look.
    total: u64,
}

impl Followed {
    fn look(&mut self) -> Result<u64, String> {
        let now = self.counter.read()?;
        if let Some((before, at)) = self.last {
            self.total += match (now.checked_sub(before), self.counter.range()) {
                (Some(grown), _) => grown,
                (None, Some(range)) => {
                    let grown = range.saturating_sub(before) + now;
                    // One that was set back, as by a machine that slept, looks like one that is full.
                    if grown as f64 > TOO_MUCH * (1.0 + at.elapsed().as_secs_f64()) {
                        return Err(format!("{}: was set back", self.counter.name()));
                    }
                    grown
                }
                (None, None) => {
                    return Err(format!(
                        "{}: started again, and its largest value is not known",
                        self.counter.name()
                    ));
                }
            };
        }
        self.last = Some((now, Instant::now()));
        Ok(self.total)
    }
}

/// Counters that are added up. When one is lost so is the sum, for good.
pub(crate) struct Counters {
    followed: Vec<Followed>,
    lost: Option<String>,
}

impl Counters {
    pub(crate) fn new(counters: Vec<Box<dyn Counter>>) -> Self {
        let followed = |counter| Followed { counter, last: None, total: 0 };
        Self { followed: counters.into_iter().map(followed).collect(), lost: None }
    }

    /// Reads all; gives the microjoules since the first look.
    ///
    /// # Errors
    /// If one cannot be read any more.
    pub(crate) fn look(&mut self) -> Result<u64, String> {
        if let Some(reason) = &self.lost {
            return Err(reason.clone());
        }
        let found = self.followed.iter_mut().map(Followed::look).sum::<Result<u64, String>>();
        found.map_err(|reason| {
            let reason = format!("a counter was lost on the way: {reason}");
            self.lost.insert(reason).clone()
        })
    }
}
