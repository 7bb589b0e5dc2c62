//! Every interleaving of small teams: `RUSTFLAGS="--cfg loom" cargo test -p hydralora-runtime --lib --release`.

use super::{Share, Team};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// Explores `body`, with at most `preemptions` of them.
fn explore(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// A team with its workers at work.
fn with_workers(threads: usize, lead: impl FnOnce(&Team)) {
    let team = Arc::new(Team::new(threads));
    let workers: Vec<_> = (1..threads)
        .map(|own| {
            let team = team.clone();
            thread::spawn(move || team.serve(own))
        })
        .collect();
    lead(&team);
    team.finish();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

/// Runs a loop that writes `value` to every cell; loom sees overlapping accesses.
fn write_all(team: &Team, cells: &[UnsafeCell<usize>], value: usize, share: Share) {
    struct Shared<'a>(&'a [UnsafeCell<usize>]);
    // SAFETY: every index is given to one thread; loom checks just this.
    unsafe impl Sync for Shared<'_> {}
    let shared = Shared(cells);
    let shared = &shared;
    let mut lead = team.lead().unwrap();
    // SAFETY: as above.
    let body = move |index: usize| shared.0[index].with_mut(|cell| unsafe { *cell += value });
    team.run(&mut lead, cells.len(), share, &body);
    drop(lead);
    for cell in cells {
        // SAFETY: the loop is over.
        cell.with(|cell| assert_eq!(unsafe { *cell } % value, 0));
    }
}

fn cells(count: usize) -> Vec<UnsafeCell<usize>> {
    (0..count).map(|_| UnsafeCell::new(0)).collect()
}

fn total(cells: &[UnsafeCell<usize>]) -> usize {
    // SAFETY: no loop is open.
    cells.iter().map(|cell| cell.with(|cell| unsafe { *cell })).sum()
}

#[test]
fn one_worker_and_two_loops() {
    explore(3, || {
        let cells = cells(2);
        with_workers(2, |team| {
            write_all(team, &cells, 1, Share::Runs);
            write_all(team, &cells, 1, Share::Queue);
        });
        assert_eq!(total(&cells), 4);
    });
}

#[test]
fn two_workers_and_a_loop() {
    // With two preemptions there are too many interleavings for minutes.
    explore(1, || {
        let cells = cells(3);
        with_workers(3, |team| write_all(team, &cells, 1, Share::Runs));
        assert_eq!(total(&cells), 3);
    });
}

#[test]
fn a_team_that_never_works_ends() {
    explore(3, || with_workers(2, |_| {}));
}

#[test]
fn of_two_who_want_to_lead_one_does_and_nobody_waits() {
    struct Shared(Team, UnsafeCell<usize>);
    // SAFETY: only a leader reaches into the cell; loom checks just this.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}
    let try_twice = |shared: &Shared| {
        let lead_once = || {
            // SAFETY: as above.
            shared.0.lead().map(|_lead| shared.1.with_mut(|led| unsafe { *led += 1 })).is_some()
        };
        usize::from(lead_once()) + usize::from(lead_once())
    };
    explore(3, move || {
        let shared = Arc::new(Shared(Team::new(1), UnsafeCell::new(0)));
        let other = shared.clone();
        let second = thread::spawn(move || try_twice(&other));
        let first = try_twice(&shared);
        let second = second.join().unwrap();
        // SAFETY: the other thread has ended.
        assert_eq!(shared.1.with(|led| unsafe { *led }), first + second);
        assert!(first + second >= 2);
    });
}

#[test]
fn a_panic_of_a_worker_reaches_the_leader() {
    explore(2, || {
        with_workers(2, |team| {
            let mut lead = team.lead().unwrap();
            let body = |index: usize| {
                if index == 1 {
                    // Not `panic!`: its hook would print thousands of times.
                    std::panic::resume_unwind(Box::new("index one"));
                }
            };
            let run = || team.run(&mut lead, 2, Share::Runs, &body);
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
            drop(lead);
            assert!(team.lead().is_some());
        });
    });
}
