//! Ranks that are threads of one process, for tests.

use super::Ranks;
use crate::error::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A rank among the threads of this process.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank sends, a part for each, until all have taken theirs.
    sent: Vec<Option<Vec<Vec<u8>>>>,
    /// How many have.
    taken: usize,
    /// Which ranks are gone.
    gone: Vec<bool>,
}

impl Threads {
    /// As many ranks, one for each thread.
    pub fn of(size: usize) -> Vec<Self> {
        let state = State { sent: vec![None; size], taken: 0, gone: vec![false; size] };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    /// Leaves the others, as a process that is killed does.
    pub fn leave(&self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.gone[self.rank] = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Ranks for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).sent.len()
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let parts = vec![own; self.size()];
        self.exchange(&parts)
    }

    fn exchange(&self, parts: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = |state| self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        // The round before has not ended for others.
        while state.sent[self.rank].is_some() {
            state = wait(state);
        }
        state.sent[self.rank] = Some(parts.iter().map(|part| part.to_vec()).collect());
        self.shared.changed.notify_all();
        while state.sent.iter().any(Option::is_none) {
            let lost = |rank: &usize| state.gone[*rank] && state.sent[*rank].is_none();
            if let Some(rank) = (0..state.sent.len()).find(lost) {
                return Err(Error::Lost { rank });
            }
            state = wait(state);
        }
        let mut taken = Vec::with_capacity(state.sent.len());
        for sent in state.sent.iter_mut().flatten() {
            taken.push(sent.get_mut(self.rank).map(std::mem::take).unwrap_or_default());
        }
        state.taken += 1;
        if state.taken == state.sent.len() {
            state.taken = 0;
            state.sent.fill_with(|| None);
            self.shared.changed.notify_all();
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use crate::error::Error;
    use crate::ranks::{Ranks, Team, Threads};

    /// What every rank of `size` gives.
    fn each<T: Send>(size: usize, work: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let ranks = Threads::of(size).into_iter();
            let running: Vec<_> = ranks.map(|rank| scope.spawn(move || work(&rank))).collect();
            running.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }

    fn values(rank: usize, len: usize) -> Vec<f32> {
        (0..len).map(|at| ((at * 7 + rank * 13) % 11) as f32 * 0.1 - 0.3).collect()
    }

    #[test]
    fn sums_are_in_the_order_of_ranks_and_the_same_bits_on_all() {
        for size in [1, 2, 3, 5] {
            for len in [0, 1, 2, 4, 5, 1000] {
                let found = each(size, |ranks| {
                    let mut own = values(ranks.rank(), len);
                    Team::new(ranks, |_| 1).sum(&mut own).unwrap();
                    own
                });
                let mut expected = vec![0.0_f64; len];
                for rank in 0..size {
                    for (sum, value) in expected.iter_mut().zip(values(rank, len)) {
                        *sum += f64::from(value);
                    }
                }
                let expected: Vec<f32> = expected.iter().map(|sum| *sum as f32).collect();
                assert!(found.iter().all(|of| *of == expected), "{size} ranks, {len} values");
            }
        }
    }

    #[test]
    fn a_failure_ends_all_ranks_with_its_rank_and_words() {
        let found = each(3, |ranks| {
            let team = Team::new(ranks, |_| 7);
            let own = match ranks.rank() {
                1 => Err(Error::Loader { message: "no disk".to_owned() }),
                rank => Ok(rank),
            };
            let error = team.agree("load", own).unwrap_err();
            assert!(team.has_ended());
            error
        });
        assert!(matches!(&found[1], Error::Loader { message } if message == "no disk"));
        for rank in [0, 2] {
            let Error::OfRank { rank: 1, message, code: 7 } = &found[rank] else {
                panic!("{:?}", found[rank])
            };
            assert_eq!(message, "reading the training data broke down: no disk");
        }
    }

    #[test]
    fn a_rank_that_gives_up_anywhere_is_heard_where_the_others_are() {
        let found = each(4, |ranks| {
            let team = Team::new(ranks, |_| 2);
            team.together(|| {
                if ranks.rank() == 3 {
                    return Err(Error::Nothing { message: "no".to_owned() });
                }
                team.agree("one", Ok(1.5))?;
                team.agree("two", Ok(()))?;
                Ok(())
            })
            .unwrap_err()
            .to_string()
        });
        assert_eq!(found, ["rank 3: no", "rank 3: no", "rank 3: no", "no"]);
    }

    #[test]
    fn ranks_that_say_different_things_are_told_which_and_what() {
        let found = each(3, |ranks| {
            let says = if ranks.rank() == 2 { "b" } else { "a" };
            Team::new(ranks, |_| 2).same("the recipe", says.to_owned()).unwrap_err().to_string()
        });
        let expected = "rank 2 has another value of the recipe than rank 0: b, and there a";
        assert_eq!(found, [expected; 3]);
    }

    #[test]
    fn ranks_at_different_places_do_not_wait_for_each_other() {
        let found = each(2, |ranks| {
            let team = Team::new(ranks, |_| 1);
            let at = ["step", "evaluation"][ranks.rank()];
            team.agree(at, Ok(0)).unwrap_err().to_string()
        });
        assert!(found[0].starts_with("rank 1 is at another place of the run than rank 0"));
        assert!(found[1].starts_with("rank 0 is at another place of the run than rank 1"));
    }

    #[test]
    fn a_rank_that_is_gone_is_named_to_the_others() {
        let found = each(3, |ranks| {
            let team = Team::new(ranks, |_| 1);
            team.agree("first", Ok(())).unwrap();
            if ranks.rank() == 1 {
                return String::new();
            }
            team.agree("second", Ok(())).unwrap_err().to_string()
        });
        let lost = "rank 1 is gone, and the run cannot go on without it";
        assert_eq!(found, [lost, "", lost]);
    }
}
