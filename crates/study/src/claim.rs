//! Who works on a cell.
//!
//! Claims of a cell are numbered files, `claims/000001.json` and so on; the highest number holds the cell.
//! A claim is made by making the file of the next number, which the file system lets one of several do. It
//! is made when there is none, when the last was given back, or when the last one is dead: its process is
//! gone (on the same machine), or its heartbeat, the file's time of change, has not moved for a while by
//! the observer's own clock. So nobody trusts another machine's clock, and two that find the same dead
//! claim cannot both take it over. Who was taken over sees a higher number than his own and stops.

use crate::disk::{make_folder, names_in, to_json, write_new};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

const CLAIMS: &str = "claims";
/// Heartbeats in the time after which a claim without one is dead.
const BEATS: u32 = 6;
/// How often a claim is tried that somebody else's end of work gets in the way of.
const TRIES: usize = 5;
/// Beginning of the name of claims that have been put away.
const SPENT: &str = ".claims-";

/// Who holds a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Holder {
    /// The machine's name, for people.
    host: String,
    /// What tells this run of this machine from others, where process numbers mean the same.
    machine: String,
    /// Process number.
    pid: u32,
    /// When the process began, in the system's ticks: numbers are used again.
    started: Option<u64>,
    /// What tells this claim from all others.
    token: String,
    /// Whether it was given back.
    released: bool,
}

impl Holder {
    fn this(token: String) -> Self {
        let read = |path: &str| {
            fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let pid = std::process::id();
        Self {
            host: read("/proc/sys/kernel/hostname"),
            machine: format!("{} {}", read("/proc/sys/kernel/random/boot_id"), namespace.display()),
            pid,
            started: start_of(pid),
            token,
            released: false,
        }
    }

    /// Whether its process is known to be gone.
    fn is_gone(&self) -> bool {
        let here = Self::this(String::new());
        let comparable = !here.machine.trim().is_empty() && here.started.is_some();
        comparable && self.machine == here.machine && start_of(self.pid) != self.started
    }
}

/// When a process began, in ticks since the machine did (field 22 of `/proc/PID/stat`, after the name
/// in parentheses); none if there is no such process.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    // A process that has ended and that nobody has asked about yet does nothing any more.
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Looks at claims over time.
#[derive(Debug)]
pub struct Observer {
    stale_after: Duration,
    /// Claim file → its heartbeat when it was last seen to move, and when that was.
    seen: HashMap<PathBuf, (SystemTime, Instant)>,
}

/// What there is to be said of a cell's claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nobody holds it.
    Free,
    /// This machine and process.
    By(String),
}

impl Observer {
    /// An observer that takes a claim for dead after so long without a heartbeat.
    pub fn new(stale_after: Duration) -> Self {
        Self { stale_after, seen: HashMap::new() }
    }

    /// Who holds the cell in `folder`, as far as is known by now.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn look(&mut self, folder: &Path) -> Result<Held> {
        match highest(folder)? {
            Some((_, path)) => Ok(self.judge(&path)?.unwrap_or(Held::Free)),
            None => Ok(Held::Free),
        }
    }

    /// What a claim says; none if it has gone meanwhile.
    fn judge(&mut self, path: &Path) -> Result<Option<Held>> {
        let text = match hydralora_files::bytes_of(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path, error)),
        };
        // Half of a claim holds nothing.
        let Ok(holder) = serde_json::from_slice::<Holder>(&text) else {
            return Ok(Some(Held::Free));
        };
        if holder.released || holder.is_gone() {
            return Ok(Some(Held::Free));
        }
        let Ok(beat) = fs::metadata(path).and_then(|metadata| metadata.modified()) else {
            return Ok(None);
        };
        let now = Instant::now();
        let seen = self.seen.entry(path.to_path_buf()).or_insert((beat, now));
        if seen.0 != beat {
            *seen = (beat, now);
        }
        if now.duration_since(seen.1) >= self.stale_after {
            return Ok(Some(Held::Free));
        }
        Ok(Some(Held::By(format!("{} (process {})", holder.host, holder.pid))))
    }

    /// Claims the cell in `folder`; none if somebody else holds it or was faster.
    ///
    /// # Errors
    /// If the claim cannot be written.
    pub fn claim(&mut self, folder: &Path) -> Result<Option<Claim>> {
        // Whoever was done with the cell has put the claims away between two steps here: what was just made
        // is gone, or what was just there could not be made and is gone too.
        let passing = |error: &io::Error| match error.kind() {
            io::ErrorKind::NotFound => true,
            io::ErrorKind::AlreadyExists => !folder.join(CLAIMS).is_file(),
            _ => false,
        };
        for _ in 0..TRIES {
            match self.try_claim(folder) {
                Err(Error::Io { source, .. }) if passing(&source) => {}
                tried => return tried,
            }
        }
        // So busy are others with it.
        Ok(None)
    }

    fn try_claim(&mut self, folder: &Path) -> Result<Option<Claim>> {
        let next = match highest(folder)? {
            None => 1,
            Some((number, path)) => match self.judge(&path)? {
                Some(Held::Free) => number + 1,
                Some(Held::By(_)) => return Ok(None),
                // The next number would stand beside the first of whoever claims the cell now.
                None => return Err(Error::io(&path, io::ErrorKind::NotFound.into())),
            },
        };
        make_folder(&folder.join(CLAIMS))?;
        let path = folder.join(CLAIMS).join(format!("{next:06}.json"));
        let holder = Holder::this(token());
        if !write_new(&path, &to_json(&holder)?)? {
            return Ok(None);
        }
        Claim::hold(folder, next, path, holder, self.stale_after / BEATS).map(Some)
    }
}

/// A token that no other claim has.
fn token() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hash = RandomState::new().build_hasher();
    hash.write_u32(std::process::id());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{:016x}-{:x}", hash.finish(), now.as_nanos())
}

fn highest(folder: &Path) -> Result<Option<(u64, PathBuf)>> {
    let claims = folder.join(CLAIMS);
    let number =
        |name: &String| Some((name.strip_suffix(".json")?.parse().ok()?, claims.join(name)));
    Ok(names_in(&claims)?.iter().filter_map(number).max())
}

/// A cell that this process holds. Dropped, it is given back.
#[derive(Debug)]
pub struct Claim {
    folder: PathBuf,
    path: PathBuf,
    number: u64,
    holder: Holder,
    shared: Arc<Shared>,
    heart: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    lost: AtomicBool,
    over: Mutex<bool>,
    wake: Condvar,
}

impl Claim {
    fn hold(
        folder: &Path,
        number: u64,
        path: PathBuf,
        holder: Holder,
        every: Duration,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let file = File::options().write(true).open(&path);
        let file = file.map_err(|source| Error::io(&path, source))?;
        let heart = {
            let (shared, folder, token) =
                (shared.clone(), folder.to_path_buf(), holder.token.clone());
            std::thread::spawn(move || beat(&shared, &file, &folder, &token, every))
        };
        let folder = folder.to_path_buf();
        Ok(Self { folder, path, number, holder, shared, heart: Some(heart) })
    }

    /// Whether a file or folder of that name in a cell is of claims.
    pub(crate) fn is_of(name: &str) -> bool {
        name == CLAIMS || name.starts_with(SPENT)
    }

    /// How many claims there have been, this one included.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether somebody else has taken the cell over, as far as the heartbeat has noticed.
    pub fn is_lost(&self) -> bool {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// Looks whether the cell is still this claim's.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn is_held(&self) -> Result<bool> {
        Ok(!self.is_lost() && holds(&self.folder, &self.holder.token)?)
    }

    /// Removes all claims of a cell that is done.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.stop();
        if holds(&self.folder, &self.holder.token)? {
            // Others' that were put away and left by a process that died.
            for name in names_in(&self.folder)?.iter().filter(|name| name.starts_with(SPENT)) {
                let _ = fs::remove_dir_all(self.folder.join(name));
            }
            // Put away in one step: removed one by one, a claim that somebody makes meanwhile would go
            // with them.
            let spent = self.folder.join(format!("{SPENT}{}", self.holder.token));
            if fs::rename(self.folder.join(CLAIMS), &spent).is_ok() {
                // Again, as somebody may just be making a file in there.
                let _ = (0..TRIES).any(|_| fs::remove_dir_all(&spent).is_ok());
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        *self.shared.over.lock().unwrap_or_else(|error| error.into_inner()) = true;
        self.shared.wake.notify_all();
        if let Some(heart) = self.heart.take() {
            let _ = heart.join();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.heart.is_none() {
            return;
        }
        self.stop();
        if holds(&self.folder, &self.holder.token).unwrap_or(false) {
            let released = Holder { released: true, ..self.holder.clone() };
            // If it cannot be written, the process's end gives it back.
            let _ = crate::disk::write_json(&self.path, &released);
        }
    }
}

/// Whether the highest claim of the cell is that of `token`.
fn holds(folder: &Path, token: &str) -> Result<bool> {
    let Some((_, path)) = highest(folder)? else { return Ok(false) };
    let holder = hydralora_files::bytes_of(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Holder>(&text).ok());
    Ok(holder.is_some_and(|holder| holder.token == token && !holder.released))
}

fn beat(shared: &Shared, file: &File, folder: &Path, token: &str, every: Duration) {
    let mut over = shared.over.lock().unwrap_or_else(|error| error.into_inner());
    while !*over {
        // A heartbeat that cannot be written is no reason to stop: who takes over will be noticed.
        let _ = file.set_modified(SystemTime::now());
        if !holds(folder, token).unwrap_or(true) {
            shared.lost.store(true, Ordering::SeqCst);
            return;
        }
        let waited = shared.wake.wait_timeout(over, every);
        over = waited.unwrap_or_else(|error| error.into_inner()).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn of_many_one_gets_the_cell() {
        let folder = tempfile::tempdir().unwrap();
        for round in 1..20 {
            let claims: Vec<Option<Claim>> = std::thread::scope(|scope| {
                let path = folder.path();
                let one = || scope.spawn(move || Observer::new(LONG).claim(path).unwrap());
                let tries: Vec<_> = (0..8).map(|_| one()).collect();
                tries.into_iter().map(|one| one.join().unwrap()).collect()
            });
            let held: Vec<&Claim> = claims.iter().flatten().collect();
            assert_eq!(held.len(), 1, "round {round}");
            assert!(held[0].is_held().unwrap());
            // Dropped at the end of the round, it is free for the next.
        }
    }

    /// The claim of a process elsewhere, which nobody here can ask about.
    fn claim_of_another_machine(folder: &Path, number: u64) -> PathBuf {
        let path = folder.join(CLAIMS).join(format!("{number:06}.json"));
        make_folder(&folder.join(CLAIMS)).unwrap();
        let holder = Holder { machine: "elsewhere".into(), ..Holder::this(token()) };
        assert!(write_new(&path, &to_json(&holder).unwrap()).unwrap());
        path
    }

    #[test]
    fn a_claim_without_heartbeat_is_taken_over_by_one_and_its_holder_notices() {
        let folder = tempfile::tempdir().unwrap();
        let stale = Duration::from_millis(120);
        let mut slow = Observer::new(stale);
        let lost = slow.claim(folder.path()).unwrap().unwrap();
        // Its process is stopped: no heartbeat any more, and seen from elsewhere.
        let path = folder.path().join(CLAIMS).join("000001.json");
        let mut holder: Holder = crate::disk::read_json(&path).unwrap();
        holder.machine = "elsewhere".into();
        *lost.shared.over.lock().unwrap() = true;
        fs::write(&path, to_json(&holder).unwrap()).unwrap();
        let mut observers: Vec<Observer> = (0..6).map(|_| Observer::new(stale)).collect();
        for observer in &mut observers {
            assert!(matches!(observer.look(folder.path()).unwrap(), Held::By(_)));
        }
        std::thread::sleep(2 * stale);
        let claims: Vec<Option<Claim>> = std::thread::scope(|scope| {
            let path = folder.path();
            let tries: Vec<_> = observers
                .iter_mut()
                .map(|observer| scope.spawn(move || observer.claim(path).unwrap()))
                .collect();
            tries.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let taken: Vec<&Claim> = claims.iter().flatten().collect();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].number(), 2);
        assert!(taken[0].is_held().unwrap());
        assert!(!lost.is_held().unwrap());
        drop(lost);
        assert!(taken[0].is_held().unwrap(), "who lost it leaves the new claim alone");
    }

    #[test]
    fn a_heartbeat_keeps_a_claim_and_a_dead_process_loses_it_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let stale = Duration::from_millis(200);
        let path = claim_of_another_machine(folder.path(), 1);
        let mut observer = Observer::new(stale);
        for beat in 0..6 {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(beat)).unwrap();
            assert!(matches!(observer.look(folder.path()).unwrap(), Held::By(_)));
            std::thread::sleep(stale / 3);
        }
        let mut holder: Holder = crate::disk::read_json(&path).unwrap();
        // A process of this machine that has ended.
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        (holder.machine, holder.pid) = (Holder::this(String::new()).machine, ended.id());
        ended.wait().unwrap();
        fs::write(&path, to_json(&holder).unwrap()).unwrap();
        if cfg!(target_os = "linux") {
            let claim = observer.claim(folder.path()).unwrap().unwrap();
            assert_eq!(claim.number(), 2);
            claim.finish().unwrap();
            assert_eq!(highest(folder.path()).unwrap(), None);
        }
    }

    /// Claims come and go as fast as they can: nobody stumbles over another's end of work, and no two
    /// hold the cell at once.
    #[test]
    fn an_end_of_work_is_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let holders = std::sync::atomic::AtomicUsize::new(0);
        let ended: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut ended = 0;
                        for _ in 0..200 {
                            let claim = Observer::new(LONG).claim(folder.path()).unwrap();
                            let Some(claim) = claim else { continue };
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                            holders.fetch_sub(1, Ordering::SeqCst);
                            claim.finish().unwrap();
                            ended += 1;
                        }
                        ended
                    })
                })
                .collect();
            tries.into_iter().map(|one| one.join().unwrap()).sum()
        });
        assert!(ended > 0);
        assert!(names_in(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn a_file_in_the_way_of_claims_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CLAIMS), "mine").unwrap();
        let error = Observer::new(LONG).claim(folder.path()).unwrap_err().to_string();
        assert!(error.contains(CLAIMS), "{error}");
    }

    #[test]
    fn half_a_claim_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        make_folder(&folder.path().join(CLAIMS)).unwrap();
        fs::write(folder.path().join(CLAIMS).join("000004.json"), "{\"host\"").unwrap();
        let claim = Observer::new(LONG).claim(folder.path()).unwrap().unwrap();
        assert_eq!(claim.number(), 5);
    }
}
