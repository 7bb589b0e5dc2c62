//! The compute threads, owned by whoever computes.

use crate::buffer::Store;
use crate::prefetch::Stream;
use crate::team::{Share, Team};
use std::cell::{Cell, RefCell};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// Compute threads, and the activation memory of what is computed with them. A cheap handle: clones are
/// the same pool, and with the last one its threads end.
///
/// Threads without work spin for a moment, because the next loop is usually close, and then park: an idle
/// pool uses no processor. Any number of threads may run loops on one pool. One of them at a time leads
/// the workers; the others run theirs alone, so nobody waits for anybody.
#[derive(Debug)]
pub struct Pool(Arc<Shared>);

/// What a pool's handles, its workers and the threads that entered it share.
pub(crate) struct Shared {
    team: Team,
    pub(crate) store: Arc<Store>,
    /// [`Pool`]s of this; the workers hold it too.
    handles: AtomicUsize,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("threads", &self.team.threads()).finish_non_exhaustive()
    }
}

thread_local! {
    /// The pool this thread entered, or works for.
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
    /// Whether this thread is inside a loop's body that is shared out.
    static IN_LOOP: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// Starts a pool in which loops run on `threads` threads (at least one), the caller's among them.
    ///
    /// Where the system refuses a thread the others do its share.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            team: Team::new(threads.max(1)),
            store: Arc::new(Store::default()),
            handles: AtomicUsize::new(1),
            workers: Mutex::new(Vec::new()),
        });
        let start = |own: usize| {
            let shared = shared.clone();
            let name = format!("compute-{own}");
            let work = move || {
                IN_LOOP.set(true);
                CURRENT.set(Some(shared.clone()));
                shared.team.serve(own);
            };
            std::thread::Builder::new().name(name).spawn(work).ok()
        };
        let workers = (1..shared.team.threads()).filter_map(start).collect();
        *shared.workers.lock().unwrap_or_else(PoisonError::into_inner) = workers;
        Self(shared)
    }

    /// The process-wide pool of all processors, used by threads that entered no other. Starts it the
    /// first time.
    pub fn global() -> Self {
        Self::of(global())
    }

    /// The pool that loops of this thread run on.
    pub fn current() -> Self {
        Self::of(&current())
    }

    fn of(shared: &Arc<Shared>) -> Self {
        shared.handles.fetch_add(1, Relaxed);
        Self(shared.clone())
    }

    /// Number of threads that loops run on.
    pub fn threads(&self) -> usize {
        self.0.team.threads()
    }

    /// Runs `body` with this as the pool of the calling thread's loops. May be nested.
    pub fn enter<R>(&self, body: impl FnOnce() -> R) -> R {
        /// Goes back to the pool before, also after a panic.
        struct Leave(Option<Arc<Shared>>);
        impl Drop for Leave {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _leave = Leave(CURRENT.replace(Some(self.0.clone())));
        body()
    }

    /// Hands the memory kept for reuse, here or by the allocator, back to the system: after work whose
    /// sizes will not come again.
    pub fn release_kept(&self) {
        self.0.store.release();
    }
}

impl Clone for Pool {
    fn clone(&self) -> Self {
        Self::of(&self.0)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.0.handles.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        self.0.team.finish();
        let mut workers = self.0.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for worker in workers.drain(..) {
            // A worker has caught its panics, and cannot wait for itself.
            if worker.thread().id() != std::thread::current().id() {
                let _ = worker.join();
            }
        }
        self.0.store.close();
    }
}

fn global() -> &'static Arc<Shared> {
    static GLOBAL: OnceLock<Pool> = OnceLock::new();
    let make = || {
        // Miri wants no thread to outlive `main`.
        let all = if cfg!(miri) { 1 } else { available() };
        Pool::new(all)
    };
    &GLOBAL.get_or_init(make).0
}

/// Number of processors that this process may use.
pub fn available() -> usize {
    // Miri interprets every turn of a thread that spins.
    if cfg!(miri) {
        return 1;
    }
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

pub(crate) fn current() -> Arc<Shared> {
    let entered = CURRENT.with_borrow(Clone::clone);
    entered.unwrap_or_else(|| global().clone())
}

/// Number of threads that loops of this thread are cut for: those of its pool, whether or not they are
/// free.
pub fn threads() -> usize {
    current().team.threads()
}

/// Says what the loop after the next one of this thread will read. Threads that wait prefetch it.
pub fn announce(stream: &Stream) {
    if !IN_LOOP.get() {
        let shared = current();
        if shared.team.threads() > 1 {
            shared.team.announced.set(stream);
        }
    }
}

/// [`Pool::release_kept`] of this thread's pool.
pub fn release_kept() {
    current().store.release();
}

/// Runs `body` for every index below `count`: shared out if this thread can lead its pool, alone if it is
/// inside a loop already or somebody else leads.
pub(crate) fn run(count: usize, share: Share, body: &(dyn Fn(usize) + Sync)) {
    /// Says that this thread has left the loop.
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            IN_LOOP.set(false);
        }
    }
    if count > 1 && !IN_LOOP.get() {
        let shared = current();
        if shared.team.threads() > 1
            && let Some(mut lead) = shared.team.lead()
        {
            IN_LOOP.set(true);
            let _leave = Leave;
            return shared.team.run(&mut lead, count, share, body);
        }
    }
    (0..count).for_each(body);
}
