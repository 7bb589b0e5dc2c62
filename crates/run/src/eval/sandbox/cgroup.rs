//! A control group (version 2) around one sandbox, where this process may make one: it bounds the
//! memory of all its processes together, whatever kind of memory it is.
//!
//! The group is made beside this process' own, which takes a parent that hands the memory controller
//! on and that this user may write to: root's, or one delegated by the service manager. Elsewhere
//! there is none, and the limits of the single processes are all there is.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where the kernel's groups are mounted.
const MOUNTED: &str = "/sys/fs/cgroup";
/// What the interpreter and bubblewrap need beside the program, in bytes.
const OVERHEAD: u64 = 128 << 20;
/// bubblewrap's two processes, judge and program, and as many to spare.
const MOST_PROCESSES: &str = "8";

/// One group, gone when it is dropped.
pub(super) struct Group {
    path: PathBuf,
}

/// The group in which sandboxes can have theirs; none where that does not work.
pub(super) fn parent(memory: u64) -> Option<PathBuf> {
    let own = fs_err::read_to_string("/proc/self/cgroup").ok()?;
    let parent = beside(Path::new(MOUNTED), &own)?;
    Group::new(&parent, memory).ok()?;
    Some(parent)
}

/// The parent of this process' group if it hands on the memory controller; `own` is what the kernel
/// says of the process.
fn beside(mounted: &Path, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let parent = Path::new(own).parent().unwrap_or(Path::new(""));
    let parent = mounted.join(parent);
    let handed = fs_err::read_to_string(parent.join("cgroup.subtree_control")).ok()?;
    handed.split_whitespace().any(|name| name == "memory").then_some(parent)
}

impl Group {
    /// Makes a group below `parent` whose processes may use `memory` bytes and a little more.
    pub(super) fn new(parent: &Path, memory: u64) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("hydralora-{}-{count}", std::process::id()));
        fs_err::create_dir(&path)?;
        let group = Self { path };
        group.set("memory.max", &memory.saturating_add(OVERHEAD).to_string())?;
        // Not every kernel has these.
        let _ = group.set("memory.swap.max", "0");
        let _ = group.set("memory.oom.group", "1");
        let _ = group.set("pids.max", MOST_PROCESSES);
        Ok(group)
    }

    /// Puts a process into it.
    pub(super) fn add(&self, process: u32) -> io::Result<()> {
        self.set("cgroup.procs", &process.to_string())
    }

    fn set(&self, name: &str, value: &str) -> io::Result<()> {
        fs_err::write(self.path.join(name), value)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process may still be on its way out.
        for _ in 0..50 {
            if fs_err::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_lies_beside_ones_own_where_memory_is_handed_on() {
        let mounted = tempfile::tempdir().unwrap();
        let parent = mounted.path().join("user.slice");
        fs_err::create_dir(&parent).unwrap();
        let own = "4:memory:/old\n0::/user.slice/session.scope\n";
        assert_eq!(beside(mounted.path(), own), None);
        fs_err::write(parent.join("cgroup.subtree_control"), "cpu pids\n").unwrap();
        assert_eq!(beside(mounted.path(), own), None);
        fs_err::write(parent.join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        assert_eq!(beside(mounted.path(), own), Some(parent.clone()));
        assert_eq!(beside(mounted.path(), "4:memory:/old\n"), None);

        let group = Group::new(&parent, 1 << 30).unwrap();
        group.add(7).unwrap();
        let read = |name: &str| fs_err::read_to_string(group.path.join(name)).unwrap();
        assert_eq!(read("memory.max"), ((1_u64 << 30) + OVERHEAD).to_string());
        assert_eq!(read("cgroup.procs"), "7");
        // The kernel's own files vanish with their folder; these do not.
        for entry in fs_err::read_dir(&group.path).unwrap() {
            fs_err::remove_file(entry.unwrap().path()).unwrap();
        }
        let path = group.path.clone();
        drop(group);
        assert!(!path.exists());
    }
}
