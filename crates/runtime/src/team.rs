//! The protocol by which a leader and its workers share out one loop after the other.
//!
//! The epoch is odd while a loop is open. A worker first says that it is `inside`, then looks at the
//! epoch; the leader first closes the epoch, then looks at who is inside. A sequentially consistent fence
//! between the two steps of either side means that at least one sees the other: nobody reads a loop that
//! is over, and no loop ends while somebody works on it. Falling asleep follows the same pattern with
//! `asleep` in place of `inside`. `.ci/run` checks both with loom and Miri.

use crate::prefetch::{Announced, Lookahead};
use crate::sync::{self, AtomicBool, AtomicUsize, Mutex, Thread, UnsafeCell, fence, lock};
use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

#[cfg(all(test, loom))]
mod model;

/// How the indices of a loop are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Every thread owns a run of neighbours and helps the others when it is done: what a thread reads is
    /// contiguous, so that prefetching pays.
    Runs,
    /// In order, one at a time, for whoever asks: for tasks sorted by length.
    Queue,
}

/// A loop: its body, with the borrow's lifetime erased, its number of indices and how they are shared.
#[derive(Clone, Copy)]
struct Work {
    body: *const (dyn Fn(usize) + Sync),
    count: usize,
    share: Share,
}

/// Keeps a value away from its neighbours' cache lines.
#[repr(align(128))]
struct Padded<T>(T);

impl<T> std::ops::Deref for Padded<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// What the leader knows of a worker.
struct Worker {
    /// Whether it may be looking at the work.
    inside: AtomicBool,
    /// Whether it is parked, or about to be.
    asleep: AtomicBool,
    /// Set by the worker before it first falls asleep.
    thread: Mutex<Option<Thread>>,
}

/// A leader and its workers.
pub(crate) struct Team {
    /// Whether somebody leads.
    leading: Padded<AtomicBool>,
    /// Odd while a loop is open.
    epoch: Padded<AtomicUsize>,
    /// Written only by the leader while no loop is open and nobody is inside.
    work: UnsafeCell<Option<Work>>,
    /// For every thread, how many indices of its run have been taken.
    taken: Vec<Padded<AtomicUsize>>,
    workers: Vec<Padded<Worker>>,
    /// Workers that are asleep: one look tells the leader that nobody is.
    sleepers: Padded<AtomicUsize>,
    over: AtomicBool,
    /// The first panic of a worker in the current loop.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    pub(crate) announced: Announced,
}

// SAFETY: `work` is written by the leader alone, when the epoch is even and nobody is `inside`; workers
// read it only after they said that they are inside and then saw an odd epoch. The pointer in it is
// followed only while the loop is open, and the leader waits for everyone inside before it lets go of what
// the pointer borrows. The module's head says why these conditions exclude each other.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

/// The indices, of `count`, that thread `own` of `threads` owns.
pub(crate) fn run_of(own: usize, threads: usize, count: usize) -> Range<usize> {
    own * count / threads..(own + 1) * count / threads
}

/// Leadership of a team; given up on drop.
pub(crate) struct Lead<'a>(&'a Team);

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // An exchange, as in `lead`, so that either comes before the other.
        self.0.leading.swap(false, Release);
    }
}

impl Team {
    /// A team of `threads`, the leader among them.
    pub(crate) fn new(threads: usize) -> Self {
        let worker = || {
            Padded(Worker {
                inside: AtomicBool::new(false),
                asleep: AtomicBool::new(false),
                thread: Mutex::new(None),
            })
        };
        Self {
            leading: Padded(AtomicBool::new(false)),
            epoch: Padded(AtomicUsize::new(0)),
            work: UnsafeCell::new(None),
            taken: (0..threads).map(|_| Padded(AtomicUsize::new(0))).collect(),
            workers: (1..threads).map(|_| worker()).collect(),
            sleepers: Padded(AtomicUsize::new(0)),
            over: AtomicBool::new(false),
            panic: Mutex::new(None),
            announced: Announced::default(),
        }
    }

    /// Number of threads, the leader included.
    pub(crate) fn threads(&self) -> usize {
        self.taken.len()
    }

    /// Leads from now on, unless somebody does already. Never waits.
    pub(crate) fn lead(&self) -> Option<Lead<'_>> {
        // Not `then_some`, which would make a `Lead`, and drop it, in either case.
        (!self.leading.swap(true, Acquire)).then(|| Lead(self))
    }

    /// Sends the workers home: [`serve`](Self::serve) returns.
    pub(crate) fn finish(&self) {
        self.over.store(true, Release);
        self.wake();
    }

    /// Wakes everyone who is asleep.
    fn wake(&self) {
        fence(SeqCst);
        if self.sleepers.load(Relaxed) == 0 {
            return;
        }
        for worker in &self.workers {
            if worker.asleep.load(Relaxed) && worker.asleep.swap(false, AcqRel) {
                self.sleepers.fetch_sub(1, Relaxed);
                if let Some(thread) = &*lock(&worker.thread) {
                    thread.unpark();
                }
            }
        }
    }

    /// Helps with loops as thread `own` (1 is the first worker) until [`finish`](Self::finish).
    pub(crate) fn serve(&self, own: usize) {
        *lock(&self.workers[own - 1].thread) = Some(sync::current());
        let mut served = 0;
        let mut patience = Patience::default();
        let mut ahead = Lookahead::default();
        while !self.over.load(Acquire) {
            if self.has_work(served) {
                if let Some(epoch) = self.take_part(own) {
                    served = epoch;
                }
                patience = Patience::default();
            } else if patience.wait() {
                self.announced.look_ahead(own, self.threads(), &mut ahead);
            } else {
                self.sleep(own, served);
                patience = Patience::default();
            }
        }
    }

    /// Whether a loop is open that is not the one of epoch `served`.
    fn has_work(&self, served: usize) -> bool {
        let epoch = self.epoch.load(Acquire);
        epoch % 2 == 1 && epoch != served
    }

    /// Sleeps until there is something to do.
    fn sleep(&self, own: usize, served: usize) {
        let worker = &self.workers[own - 1];
        self.sleepers.fetch_add(1, Relaxed);
        worker.asleep.store(true, Release);
        fence(SeqCst);
        while worker.asleep.load(Acquire) && !self.has_work(served) && !self.over.load(Acquire) {
            sync::park();
        }
        // Whoever takes the mark away counts down.
        if worker.asleep.swap(false, AcqRel) {
            self.sleepers.fetch_sub(1, Relaxed);
        }
    }

    /// Does a share of the open loop, if there still is one, and returns its epoch.
    fn take_part(&self, own: usize) -> Option<usize> {
        let worker = &self.workers[own - 1];
        worker.inside.store(true, Relaxed);
        fence(SeqCst);
        let epoch = self.epoch.load(Acquire);
        let open = epoch % 2 == 1;
        if open {
            // SAFETY: this thread says that it is inside and the epoch is odd, so the leader does not
            // write before this thread leaves.
            let work = self.work.with(|work| unsafe { *work });
            if let Some(work) = work {
                // SAFETY: the leader waits for this thread before the body's borrow ends.
                let body = unsafe { &*work.body };
                let share = || self.take_indices(own, body, work.count, work.share);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(share)) {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
        }
        worker.inside.store(false, Release);
        open.then_some(epoch)
    }

    /// Runs `body` for indices that nobody has taken until none is left.
    fn take_indices(&self, own: usize, body: &(dyn Fn(usize) + Sync), count: usize, share: Share) {
        /// Indices taken at a time: taking ends with waiting for all memory asked for before. The last
        /// ones are taken one by one, so that nobody waits long at the end.
        const MOST: usize = 4;
        let threads = self.threads();
        if share == Share::Queue {
            loop {
                let index = self.taken[0].fetch_add(1, Relaxed);
                if index >= count {
                    return;
                }
                body(index);
            }
        }
        for thread in (own..threads).chain(0..own) {
            let run = run_of(thread, threads, count);
            loop {
                // Seeing that nothing is left costs less than taking an index.
                let left = run.len().saturating_sub(self.taken[thread].load(Relaxed));
                if left == 0 {
                    break;
                }
                let many = (left / 3).clamp(1, MOST);
                let first = run.start + self.taken[thread].fetch_add(many, Relaxed);
                (first..(first + many).min(run.end)).for_each(body);
            }
        }
    }

    /// Runs `body` once for every index below `count`, on all threads; `_lead` shows that the caller
    /// leads. It is borrowed for as long as the loop is open, so `body` cannot open another one with it.
    ///
    /// # Panics
    /// If `body` panics on any thread, once all threads have left the loop; if a loop is open.
    pub(crate) fn run(
        &self,
        _lead: &mut Lead<'_>,
        count: usize,
        share: Share,
        body: &(dyn Fn(usize) + Sync),
    ) {
        /// Closes the loop and waits until everyone has left it, also when the body panics here.
        struct Close<'a>(&'a Team);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.epoch.fetch_add(1, Release);
                fence(SeqCst);
                let mut ahead = Lookahead::default();
                let mut patience = Patience::default();
                for worker in &self.0.workers {
                    while worker.inside.load(Acquire) {
                        self.0.announced.look_ahead(0, self.0.threads(), &mut ahead);
                        patience.wait();
                    }
                }
            }
        }
        // Another lead, of another team, would get here: what is written below would be under a reader.
        assert!(self.epoch.load(Relaxed).is_multiple_of(2), "a loop of this team is open");
        // SAFETY: only the lifetime changes. The pointer is followed only by threads that are inside
        // while this loop is open, and `Close` waits for them before the borrow ends.
        let body_pointer = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(body)
        };
        let work = Work { body: body_pointer, count, share };
        // SAFETY: only the leader is here. No loop is open and nobody was inside when the last one
        // ended; a thread that enters now sees the even epoch and does not look.
        self.work.with_mut(|slot| unsafe { *slot = Some(work) });
        self.taken.iter().for_each(|taken| taken.store(0, Relaxed));
        self.epoch.fetch_add(1, Release);
        let close = Close(self);
        self.wake();
        self.take_indices(0, body, count, share);
        drop(close);
        let panic = lock(&self.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// How long a thread spins before it gives up.
#[derive(Default)]
pub(crate) struct Patience {
    spins: u32,
    #[cfg(not(loom))]
    since: Option<std::time::Instant>,
}

impl Patience {
    /// Longest time that a worker without work spins.
    #[cfg(not(loom))]
    const LONGEST: std::time::Duration = std::time::Duration::from_micros(200);

    /// Spins for a moment; false once it has taken long. Once in a while another thread may have this
    /// processor.
    #[cfg(not(loom))]
    pub(crate) fn wait(&mut self) -> bool {
        /// Spins between two looks at the clock.
        const LOOK: u32 = 64;
        /// Spins between two offers of the processor.
        const YIELD: u32 = 4096;
        self.spins = self.spins.wrapping_add(1);
        if self.spins.is_multiple_of(YIELD) {
            sync::yield_now();
        }
        sync::spin_loop();
        if !self.spins.is_multiple_of(LOOK) {
            return true;
        }
        let now = std::time::Instant::now();
        now.duration_since(*self.since.get_or_insert(now)) < Self::LONGEST
    }

    /// Once, so that loom explores falling asleep.
    #[cfg(loom)]
    pub(crate) fn wait(&mut self) -> bool {
        self.spins += 1;
        sync::yield_now();
        sync::spin_loop();
        self.spins < 2
    }
}
