//! Where a computation's time goes.
//!
//! Operations announce themselves with [`part`]; between [`start`] and [`finish`] the time of the
//! calling thread is charged to the innermost announced part, so that the parts add up to the whole.
//! Without a running profile an announcement is one look at a thread-local flag.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What one part took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Wall time.
    pub time: Duration,
    /// Floating-point operations of its matrix products, two per multiplication.
    pub flops: f64,
    /// How often it ran.
    pub calls: usize,
}

/// Time charged to no part.
pub const REST: &str = "rest";

struct Running {
    costs: BTreeMap<&'static str, Cost>,
    /// Announced parts, innermost last.
    open: Vec<&'static str>,
    /// Until when time has been charged.
    charged: Instant,
}

impl Running {
    fn charge(&mut self) {
        let now = Instant::now();
        let part = self.open.last().copied().unwrap_or(REST);
        self.costs.entry(part).or_default().time += now - self.charged;
        self.charged = now;
    }
}

thread_local! {
    static RUNNING: RefCell<Option<Running>> = const { RefCell::new(None) };
}

/// Starts a profile of this thread, dropping one that runs.
pub fn start() {
    let fresh = Running { costs: BTreeMap::new(), open: Vec::new(), charged: Instant::now() };
    RUNNING.set(Some(fresh));
}

/// Ends the profile and gives the cost of every part; nothing if none was running.
pub fn finish() -> BTreeMap<&'static str, Cost> {
    RUNNING.take().map_or_else(BTreeMap::new, |mut running| {
        running.charge();
        running.costs
    })
}

/// An announced part; ends when dropped.
pub struct Part(bool);

/// Charges this thread's time to `name` until the guard is dropped.
pub fn part(name: &'static str) -> Part {
    RUNNING.with_borrow_mut(|running| match running {
        Some(running) => {
            running.charge();
            running.open.push(name);
            running.costs.entry(name).or_default().calls += 1;
            Part(true)
        }
        None => Part(false),
    })
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.0 {
            return;
        }
        RUNNING.with_borrow_mut(|running| {
            // The profile may have ended in between.
            if let Some(running) = running {
                running.charge();
                running.open.pop();
            }
        });
    }
}

/// Notes a product of `rows × inner` by `inner × cols` in the innermost part.
pub(crate) fn product(rows: usize, inner: usize, cols: usize) {
    RUNNING.with_borrow_mut(|running| {
        if let Some(running) = running {
            let part = running.open.last().copied().unwrap_or(REST);
            running.costs.entry(part).or_default().flops +=
                2.0 * rows as f64 * inner as f64 * cols as f64;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_the_innermost_part() {
        drop(part("unseen"));
        start();
        {
            let _outer = part("outer");
            std::thread::sleep(Duration::from_millis(5));
            let _inner = part("inner");
            product(2, 3, 4);
            std::thread::sleep(Duration::from_millis(5));
        }
        let costs = finish();
        assert!(costs["outer"].time >= Duration::from_millis(5));
        assert!(costs["inner"].time >= Duration::from_millis(5));
        assert_eq!(costs["inner"].flops, 48.0);
        assert_eq!(costs["outer"].flops, 0.0);
        assert!(!costs.contains_key("unseen"));
        assert!(finish().is_empty());
    }
}
