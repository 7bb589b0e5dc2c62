//! Tests of pools and loops.

use crate::team::{Share, Team};
use crate::{Early, Pool, chunks, chunks_mut, each_mut, for_each, for_each_in_order, join, map};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;

/// Fewer rounds where every step is interpreted.
const fn rounds(native: usize, miri: usize) -> usize {
    if cfg!(miri) { miri } else { native }
}

fn fill(len: usize) -> Vec<usize> {
    let mut data = vec![0; len];
    for_each(chunks_mut(&mut data, 7), |index, chunk| {
        for (at, value) in chunk.iter_mut().enumerate() {
            *value += index * 7 + at + 1;
        }
    });
    data
}

/// Runs `body` on a thread of its own and fails if it does not end.
fn within_a_minute(body: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    let ended = ended.recv_timeout(Duration::from_secs(60));
    assert!(!matches!(ended, Err(mpsc::RecvTimeoutError::Timeout)), "hangs");
    thread.join().unwrap();
}

#[test]
fn every_part_is_done_once() {
    for threads in [1, 2, 4] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        pool.enter(|| {
            for len in (0..rounds(200, 20)).chain([rounds(5000, 300)]) {
                assert_eq!(fill(len), (1..=len).collect::<Vec<_>>());
            }
        });
    }
}

#[test]
fn zipped_parts_belong_together() {
    let pool = Pool::new(3);
    let (x, mut y, mut ends) = ((0..100).collect::<Vec<_>>(), vec![0; 100], vec![0; 15]);
    pool.enter(|| {
        let parts = (chunks_mut(&mut y, 7), chunks(&x, 7), each_mut(&mut ends), 3..18, &x[..]);
        for_each(parts, |index, (y, x, end, from, element)| {
            assert_eq!((from, *element), (index + 3, index));
            y.copy_from_slice(x);
            *end = y[y.len() - 1];
        });
        let doubled = map(0..50, |index, part| {
            assert_eq!(index, part);
            part * 2
        });
        assert_eq!(doubled, (0..50).map(|x| x * 2).collect::<Vec<_>>());
        for_each_in_order((chunks_mut(&mut y, 50), 0..1), |_, (y, _)| y.fill(1));
    });
    assert_eq!(ends, (0..15).map(|i| (i * 7 + 6).min(99)).collect::<Vec<_>>());
    assert_eq!(y.iter().filter(|&&y| y == 1).count(), 50, "as many parts as the shortest has");
}

#[test]
fn both_sides_of_a_join_are_run() {
    Pool::new(2).enter(|| {
        for round in 0..rounds(200, 5) {
            assert_eq!(join(|| round + 1, || vec![round]), (round + 1, vec![round]));
        }
        let caught = catch_unwind(AssertUnwindSafe(|| join(|| 1, || panic!("one side"))));
        assert!(caught.is_err());
        assert_eq!(join(|| 1, || 2), (1, 2));
    });
}

#[test]
fn loops_inside_of_loops_run_on_their_own_thread() {
    within_a_minute(|| {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            let other = Pool::new(2);
            pool.enter(|| {
                let sums = map(0..rounds(64, 6), |_, size| {
                    let me = std::thread::current().id();
                    let inner = map(0..size, |_, x| {
                        assert!(threads == 1 || std::thread::current().id() == me);
                        x
                    });
                    // Nor does another pool change that.
                    let again = other.enter(|| fill(size)).len();
                    let (a, b) = join(|| again, || inner.iter().sum::<usize>());
                    a + b
                });
                assert!(sums.iter().enumerate().all(|(n, &sum)| sum == n + n * (n.max(1) - 1) / 2));
            });
        }
    });
}

/// A team's own loop, opened under one that is open: what [`Lead`] keeps code from writing.
#[test]
fn a_loop_under_an_open_one_is_refused() {
    let (team, other) = (Team::new(1), Team::new(1));
    let (mut lead, mut wrong) = (team.lead().unwrap(), other.lead().unwrap());
    let again = std::sync::Mutex::new(&mut wrong);
    let nested = AssertUnwindSafe(|| {
        team.run(&mut lead, 2, Share::Runs, &|_| {
            team.run(&mut again.lock().unwrap(), 2, Share::Runs, &|_| {});
        });
    });
    let panic = catch_unwind(nested).unwrap_err();
    assert!(panic.downcast_ref::<&str>().is_some_and(|text| text.contains("is open")));
    // And the team goes on.
    let count = std::sync::atomic::AtomicUsize::new(0);
    team.run(&mut lead, 5, Share::Runs, &|_| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(count.into_inner(), 5);
}

#[test]
fn any_number_of_threads_may_lead() {
    within_a_minute(|| {
        for (threads, leaders) in [(2, 2), (4, 2), (3, 3), (2, 5)] {
            let pool = Pool::new(threads);
            std::thread::scope(|scope| {
                for _ in 0..leaders {
                    scope.spawn(|| {
                        let pool = pool.clone();
                        pool.enter(|| {
                            for round in 0..rounds(300, 3) {
                                let len = 20 + round % 50;
                                assert_eq!(fill(len), (1..=len).collect::<Vec<_>>());
                            }
                        });
                    });
                }
            });
        }
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_stays_usable() {
    let pool = Pool::new(3);
    for bad in 0..rounds(64, 4) {
        let body = |index, _: &mut [i32]| assert!(index != bad, "part {bad}");
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.enter(|| for_each(chunks_mut(&mut [0; 64], 1), body));
        }));
        assert!(caught.is_err());
        assert_eq!(pool.enter(|| fill(100)), (1..=100).collect::<Vec<_>>());
    }
}

#[test]
fn a_value_needed_early_is_computed_once() {
    let computed = AtomicUsize::new(0);
    Pool::new(4).enter(|| {
        for round in 1..=rounds(50, 3) {
            let early = Early::default();
            let mut seen = [0; 64];
            for_each(chunks_mut(&mut seen, 1), |_, seen| {
                seen[0] = *early.get(|| fill(3).len() - 2 + computed.fetch_add(1, SeqCst));
            });
            assert_eq!(seen, [round; 64]);
            assert_eq!(early.into_inner(|| 0), round);
        }
    });
    assert_eq!(Early::default().into_inner(|| 7), 7);
}

#[test]
fn those_who_wait_learn_of_a_failure() {
    let early = Early::<usize>::default();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        Pool::new(3).enter(|| {
            for_each(chunks_mut(&mut [0; 64], 1), |_, seen| {
                seen[0] = *early.get(|| panic!("none"));
            });
        });
    }));
    assert!(caught.is_err());
}

#[test]
fn entering_nests() {
    let (two, three) = (Pool::new(2), Pool::new(3));
    two.enter(|| {
        three.enter(|| assert_eq!(crate::threads(), 3));
        let _ = catch_unwind(AssertUnwindSafe(|| three.enter(|| panic!("left"))));
        assert_eq!((crate::threads(), Pool::current().threads()), (2, 2));
    });
    let kept = two.enter(Pool::current);
    drop(two);
    assert_eq!(kept.enter(|| fill(10)).len(), 10);
}

/// Processor time of this process.
#[cfg(all(target_os = "linux", not(miri)))]
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is that of a valid timespec.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(done, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// In a process of its own, so that other tests' time is not counted.
#[test]
#[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
fn an_idle_pool_uses_no_processor() {
    const ALONE: &str = "HYDRALORA_TEST_IDLE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["tests::an_idle_pool_uses_no_processor", "--exact"])
            .env(ALONE, "1")
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let pool = Pool::new(4);
    pool.enter(|| (0..100).for_each(|_| drop(fill(5000))));
    let before = processor_time();
    std::thread::sleep(Duration::from_millis(300));
    let used = processor_time() - before;
    assert!(used < Duration::from_millis(20), "{used:?} of 300 ms idle");
    assert_eq!(pool.enter(|| fill(100)).len(), 100);
}
