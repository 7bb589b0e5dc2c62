//! What ranks do together: agree on how things stand, and add up what they found.

use super::sum;
use super::{Alone, Ranks};
use crate::error::{Error, Result};
use hydralora_kernels::Element;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::time::Instant;

/// Why a rank cannot go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong.
    pub message: String,
    /// The exit status that it deserves.
    pub code: u8,
}

/// Says what exit status an error deserves.
type CodeOf = fn(&Error) -> u8;

/// What ranks told each other so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Seconds until all ranks were at the same place.
    pub waited_s: f64,
    /// Seconds in which sums travelled.
    pub summed_s: f64,
    /// Bytes that this rank sent and received for them.
    pub bytes: u64,
}

/// The ranks of a run, as one of them sees them.
pub struct Team<'a> {
    ranks: &'a dyn Ranks,
    code: CodeOf,
    /// Whether all ranks know that it is over.
    ended: Cell<bool>,
    traffic: Cell<Traffic>,
}

/// What a rank says where all are to agree.
#[derive(Serialize, Deserialize)]
struct Words<T> {
    /// The place in the run.
    at: String,
    said: std::result::Result<T, Failure>,
}

impl Team<'static> {
    /// That of a run of one process.
    pub fn alone() -> Self {
        Self::new(&Alone, |_| 1)
    }
}

impl<'a> Team<'a> {
    /// The team of these ranks; `code` says what exit status an error deserves.
    pub fn new(ranks: &'a dyn Ranks, code: CodeOf) -> Self {
        Self { ranks, code, ended: Cell::new(false), traffic: Cell::default() }
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.ranks.rank()
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.ranks.size()
    }

    /// Whether this rank is the one that writes files and tells people.
    pub fn writes(&self) -> bool {
        self.rank() == 0
    }

    /// Whether all ranks know that the run is over, so that none waits for another.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// What ranks told each other so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    /// Tells all ranks how this one fared at the place `at`, and gives what all of them say, in their order.
    ///
    /// # Errors
    /// The lowest rank's that could not go on: its own on that rank, [`Error::OfRank`] on the others. Also
    /// if a rank is gone, or at another place.
    pub fn agree<T: Serialize + DeserializeOwned>(
        &self,
        at: &str,
        own: Result<T>,
    ) -> Result<Vec<T>> {
        if self.size() == 1 {
            return own.map(|own| vec![own]);
        }
        let (said, error) = match own {
            Ok(own) => (Ok(own), None),
            Err(error) => {
                let failure = Failure { message: error.to_string(), code: (self.code)(&error) };
                (Err(failure), Some(error))
            }
        };
        self.told(at, said)?.map_err(|(rank, failure)| {
            let own = error.filter(|_| rank == self.rank());
            let Failure { message, code } = failure;
            own.unwrap_or(Error::OfRank { rank, message, code })
        })
    }

    /// The same where this rank's failure is told already in words.
    fn told<T: Serialize + DeserializeOwned>(
        &self,
        at: &str,
        said: std::result::Result<T, Failure>,
    ) -> Result<std::result::Result<Vec<T>, (usize, Failure)>> {
        let started = Instant::now();
        let words = serde_json::to_vec(&Words { at: at.to_owned(), said });
        let words = words.map_err(std::io::Error::other)?;
        let all = self.ranks.gather(&words).inspect_err(|_| self.ended.set(true))?;
        self.note(|traffic| traffic.waited_s += started.elapsed().as_secs_f64());
        let mut found = Vec::with_capacity(all.len());
        let mut astray = None;
        for (rank, bytes) in all.iter().enumerate() {
            match serde_json::from_slice::<Words<T>>(bytes) {
                Ok(Words { said: Err(failure), .. }) => {
                    self.ended.set(true);
                    return Ok(Err((rank, failure)));
                }
                Ok(Words { at: place, said: Ok(said) }) if place == at => found.push(said),
                // Of another place, or words of another build.
                _ => astray = astray.or(Some(rank)),
            }
        }
        if let Some(rank) = astray {
            self.ended.set(true);
            let message = format!(
                "rank {rank} is at another place of the run than rank {} (`{at}`); expected the same program \
                 and files on every rank",
                self.rank()
            );
            return Err(Error::Ranks { message });
        }
        Ok(Ok(found))
    }

    /// Does `work` and tells all ranks how it went, so that none waits for one that gave up.
    ///
    /// # Errors
    /// Those of `work`, on this rank or another.
    pub fn together<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = work();
        if self.size() == 1 || self.ended.get() {
            return done;
        }
        let (told, done) = match done {
            Ok(done) => (Ok(()), Some(done)),
            Err(error) => (Err(error), None),
        };
        self.agree("end", told)?;
        done.ok_or_else(|| Error::Ranks { message: "a failure was lost".to_owned() })
    }

    /// Tells all ranks that this one cannot go on, unless they know that it is over.
    pub fn give_up(&self, failure: Failure) {
        if self.size() > 1 && !self.ended.get() {
            // Whoever cannot be told is gone.
            let _ = self.told::<()>("end", Err(failure));
            self.ended.set(true);
        }
    }

    /// Whether `own` is true on any rank.
    ///
    /// # Errors
    /// If another rank cannot go on.
    pub fn any(&self, at: &str, own: bool) -> Result<bool> {
        Ok(self.agree(at, Ok(own))?.contains(&true))
    }

    /// Makes sure that all ranks say the same of `what`.
    ///
    /// # Errors
    /// The first rank that says something else than rank 0, with both.
    pub fn same(&self, what: &str, own: String) -> Result<()> {
        let all = self.agree(what, Ok(own))?;
        let Some(rank) = all.iter().position(|said| *said != all[0]) else { return Ok(()) };
        // Every rank finds it, so nobody waits.
        self.ended.set(true);
        let (first, other) = (all[0].clone(), all[rank].clone());
        Err(Error::Disagree { rank, what: what.to_owned(), first, other })
    }

    /// Replaces `values` by their sums over all ranks, in the order of ranks: the same bits on all. Ranks
    /// have agreed just before, so that each of them comes here.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn sum<E: Element>(&self, values: &mut [E]) -> Result<()> {
        let size = self.size();
        if size == 1 || values.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        sum::sum(self.ranks, values).inspect_err(|_| self.ended.set(true))?;
        let others = (size - 1) as f64 / size as f64;
        // A slice to and from every other rank, twice.
        let bytes = 4.0 * others * size_of_val(values) as f64;
        self.note(|traffic| {
            traffic.summed_s += started.elapsed().as_secs_f64();
            traffic.bytes += bytes as u64;
        });
        Ok(())
    }

    fn note(&self, change: impl FnOnce(&mut Traffic)) {
        let mut traffic = self.traffic.get();
        change(&mut traffic);
        self.traffic.set(traffic);
    }
}
