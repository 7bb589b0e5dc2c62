//! Running programs that a model wrote, where they can reach nothing.
//!
//! Each program runs in a Python interpreter of its own inside `bwrap` (bubblewrap), with
//!
//! * its own user, process, network, mount, IPC, UTS and cgroup namespaces, no capabilities, and
//!   no further user namespaces;
//! * an empty read-only root that holds the interpreter, its standard library and the system's
//!   shared libraries, and nothing else: no `/proc`, `/dev`, `/tmp`, home or configuration;
//! * an empty environment, no descriptor but the pipes it is spoken to through;
//! * limits on address space, processor time, wall time, processes and threads (none but its own),
//!   open files, and the size of files (nothing can be written). They are set by the first lines
//!   the interpreter runs, before it sees the program, and cannot be raised again.
//!
//! When the caller is root, the sandbox runs under another, unused user id: the limit on processes
//! does not hold for root. Where any of this is missing, nothing is run.

use super::error::{Error, Result};
use super::task::hex;
use serde::Deserialize;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the interpreter runs first. The verdict is only believed behind the token, which the
/// program is not told.
const DRIVER: &str = "\
import io, json, os, resource, signal, sys
def run():
    request = json.loads(sys.stdin.buffer.read())
    os.closerange(3, 65536)
    os.close(0)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    for name, value in request['limits'].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    def late(*_):
        raise TimeoutError('timed out')
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, request['seconds'])
    verdict = 'passed'
    try:
        exec(request['program'], {})
    except BaseException as error:
        verdict = 'failed: ' + type(error).__name__ + ': ' + str(error)[:300]
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(1, (request['token'] + verdict).encode('utf-8', 'replace'))
    os._exit(0)
run()
";

/// Asks an interpreter where its parts are.
const WHERE: &str = "\
import json, os, sys, sysconfig
paths = sysconfig.get_paths()
library = os.path.join(sysconfig.get_config_var('LIBDIR') or '', sysconfig.get_config_var('LDLIBRARY') or '')
print(json.dumps({'executable': os.path.realpath(sys.executable), 'prefix': sys.base_prefix,
                  'parts': [paths['stdlib'], paths['platstdlib'], library]}))
";

/// Answer bytes that are read at most.
const MOST_OUTPUT: u64 = 64 << 10;
/// Wall time beyond the program's own, for starting and stopping.
const GRACE: Duration = Duration::from_secs(5);
/// First of the user ids that root gives the sandbox.
const UNUSED_IDS: u32 = 1 << 20;

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ran to its end without an exception.
    Passed,
    /// It raised, ran out of time or memory, or ended the interpreter.
    Failed(String),
}

/// What a program may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Wall time in seconds; processor time is a second more.
    pub seconds: f64,
    /// Address space in bytes.
    pub memory: u64,
}

impl Default for Limits {
    /// 3 s, as the field's `code_eval` gives, and 1 GiB.
    fn default() -> Self {
        Self { seconds: 3.0, memory: 1 << 30 }
    }
}

/// A sandbox known to work on this machine.
#[derive(Clone, Debug)]
pub struct Sandbox {
    bwrap: PathBuf,
    arguments: Vec<String>,
    python: PathBuf,
    prefix: String,
    limits: Limits,
    root: bool,
}

#[derive(Deserialize)]
struct Interpreter {
    executable: PathBuf,
    prefix: String,
    parts: Vec<PathBuf>,
}

impl Sandbox {
    /// Finds bubblewrap and Python, and tries them.
    ///
    /// # Errors
    /// [`Error::Sandbox`] with what is missing or not permitted.
    pub fn new(limits: Limits) -> Result<Self> {
        let bwrap = find("bwrap").ok_or_else(|| {
            refused("bubblewrap (`bwrap`) is not installed; on Debian: apt-get install bubblewrap")
        })?;
        // The system's own Python first: one below a home folder may not be readable to the
        // sandbox's user.
        let system = PathBuf::from("/usr/bin/python3");
        let python = Some(system).filter(|path| path.exists()).or_else(|| find("python3"));
        let python = python.ok_or_else(|| refused("Python (`python3`) is not installed"))?;
        let asked = Command::new(&python).args(["-I", "-S", "-c", WHERE]).output()?;
        let interpreter: Interpreter = serde_json::from_slice(&asked.stdout)
            .map_err(|_| refused(&format!("{} does not work", python.display())))?;
        let root = fs_err::metadata("/proc/self")?.uid() == 0;
        let sandbox = Self {
            bwrap,
            arguments: arguments(&interpreter),
            python: interpreter.executable,
            prefix: interpreter.prefix,
            limits,
            root,
        };
        match sandbox.run("assert 1 + 1 == 2")? {
            Verdict::Passed => Ok(sandbox),
            Verdict::Failed(why) => Err(refused(&format!(
                "bubblewrap cannot make its namespaces here ({why}); unprivileged user namespaces \
                 have to be permitted"
            ))),
        }
    }

    /// Runs `program` and says what became of it.
    ///
    /// # Errors
    /// If bubblewrap cannot be started at all.
    pub fn run(&self, program: &str) -> Result<Verdict> {
        let token = token();
        let cpu = self.limits.seconds.ceil() as u64 + 1;
        let request = json!({
            "token": token,
            "program": program,
            "seconds": self.limits.seconds,
            "limits": {
                "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 32, "RLIMIT_NPROC": 0,
                "RLIMIT_CPU": cpu, "RLIMIT_AS": self.limits.memory,
            },
        });
        let mut child = self.spawn()?;
        let deadline = Instant::now() + Duration::from_secs_f64(self.limits.seconds) + GRACE;
        // A request is larger than a pipe holds, and the child may die before it reads.
        let input = child.stdin.take();
        let writer = std::thread::spawn(move || {
            input.map(|mut input| input.write_all(request.to_string().as_bytes()))
        });
        let output = collect(child.stdout.take());
        let errors = collect(child.stderr.take());
        let ended = wait(&mut child, deadline)?;
        if !ended {
            // Its process namespace dies with it, whatever it started.
            child.kill()?;
            child.wait()?;
        }
        let _ = writer.join();
        let output = output.join().unwrap_or_default();
        let errors = errors.join().unwrap_or_default();
        Ok(match output.strip_prefix(token.as_str()) {
            Some("passed") => Verdict::Passed,
            Some(failed) => {
                Verdict::Failed(failed.strip_prefix("failed: ").unwrap_or(failed).to_owned())
            }
            None if !ended => Verdict::Failed("timed out".to_owned()),
            None if errors.trim().is_empty() => Verdict::Failed("ended the interpreter".to_owned()),
            None => Verdict::Failed(errors.trim().chars().take(300).collect()),
        })
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = Command::new(&self.bwrap);
        command.args(&self.arguments).arg("--").arg(&self.python);
        command.args(["-I", "-S", "-B", "-c", DRIVER]).env_clear();
        command.env("PYTHONHOME", &self.prefix).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.root {
            let id = UNUSED_IDS + std::process::id() % UNUSED_IDS;
            command.uid(id).gid(id);
        }
        Ok(command.spawn()?)
    }
}

fn refused(why: &str) -> Error {
    Error::Sandbox(format!("model-written programs are not run: {why}"))
}

/// A program on the search path.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// bubblewrap's arguments: namespaces, and a root with only what the interpreter needs.
fn arguments(interpreter: &Interpreter) -> Vec<String> {
    let mut out: Vec<String> = [
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--chdir",
        "/",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut bind = |path: &Path| {
        if path.exists() {
            let path = path.display().to_string();
            out.extend(["--ro-bind".to_owned(), path.clone(), path]);
        }
    };
    for path in ["/usr/lib", "/usr/lib64"] {
        bind(Path::new(path));
    }
    for path in std::iter::once(&interpreter.executable).chain(&interpreter.parts) {
        if path.is_absolute() && path.parent().is_some_and(|parent| parent != Path::new("/")) {
            bind(path);
        }
    }
    for path in ["/lib", "/lib64"] {
        match std::fs::read_link(path) {
            Ok(target) => {
                out.extend(["--symlink".to_owned(), target.display().to_string(), path.to_owned()]);
            }
            Err(_) if Path::new(path).exists() => {
                out.extend(["--ro-bind", path, path].map(str::to_owned));
            }
            Err(_) => {}
        }
    }
    out.extend(["--remount-ro", "/"].map(str::to_owned));
    out
}

/// A word that a program cannot guess: the kernel's own random numbers.
fn token() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut random = [0_u8; 32];
    let read =
        std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    let unique = format!(
        "{:?} {:?} {} {}",
        random,
        read.is_ok(),
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    hex(unique.as_bytes())
}

/// Reads the beginning of a stream, and the rest to nowhere.
fn collect(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let Some(mut stream) = stream else { return String::new() };
        let mut bytes = Vec::new();
        let _ = stream.by_ref().take(MOST_OUTPUT).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Whether `child` ends before `deadline`.
fn wait(child: &mut Child, deadline: Instant) -> Result<bool> {
    let mut pause = Duration::from_millis(1);
    loop {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
