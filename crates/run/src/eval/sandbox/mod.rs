//! Running programs that a model wrote, where they can reach nothing.
//!
//! Each program runs in Python inside `bwrap` (bubblewrap), with
//!
//! * its own user, process, network, mount, IPC, UTS and cgroup namespaces, no capabilities, and
//!   no further user namespaces;
//! * an empty read-only root that holds the interpreter, its standard library and the system's
//!   shared libraries, and nothing else: no `/proc`, `/dev`, `/tmp`, home or configuration;
//! * an empty environment, an empty session keyring, no descriptor but the pipes it is spoken to
//!   through;
//! * a filter of system calls that lets it compute and little else (`filter.rs`): no sockets, no
//!   tracing, no other process' memory, no shared memory, no keyrings;
//! * limits on address space, processor time, open files, and the size of files (nothing can be
//!   written), set before bubblewrap starts, so that the first process of the sandbox is under them
//!   too; on wall time; and no process or thread but its own, so that the address spaces bound its
//!   memory. Where a control group can be made (`cgroup.rs`) it bounds the sandbox as a whole.
//!
//! When the caller is root, the sandbox runs under another, unused user id: the limit on processes
//! does not hold for root. The walls are tried from inside before the first program (`walls.py`);
//! where one does not stand, nothing is run.
//!
//! # Who says that the tests passed
//!
//! Inside there are two processes (`driver.py`). The judge runs the tests and holds the pipe of the
//! verdict; the program runs in the other one, which is made before the judge reads the tests, and
//! answers calls with plain values. So a program that ends its process, writes to every descriptor
//! it finds or looks through its memory gets nothing: neither the tests nor the pipe are there. What
//! remains is to give the right answers. This holds for [`Sandbox::check`]; for [`Sandbox::run`], a
//! program without tests, that it ended well is its own word.

mod cgroup;
mod filter;
mod ids;

use super::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What becomes bubblewrap, outside.
const LAUNCH: &str = include_str!("launch.py");
/// What runs inside: judge and program.
const DRIVER: &str = include_str!("driver.py");
/// A program that tries the walls.
const WALLS: &str = include_str!("walls.py");

/// Asks an interpreter where its parts are.
const WHERE: &str = "\
import json, os, sys, sysconfig
paths = sysconfig.get_paths()
library = os.path.join(sysconfig.get_config_var('LIBDIR') or '', sysconfig.get_config_var('LDLIBRARY') or '')
print(json.dumps({'executable': os.path.realpath(sys.executable),
                  'parts': [paths['stdlib'], paths['platstdlib'], library]}))
";

/// Answer bytes that are read at most.
const MOST_OUTPUT: u64 = 64 << 10;
/// Wall time beyond the program's own, for starting and stopping.
const GRACE: Duration = Duration::from_secs(5);
/// Open files: bubblewrap's and the pipes.
const MOST_FILES: u64 = 32;

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

/// A program and the tests it has to pass.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    /// What program and tests both have: the text that the model was to go on with.
    pub shared: &'a str,
    /// The whole program: defines `entry_point`.
    pub program: &'a str,
    /// The function that the tests call.
    pub entry_point: &'a str,
    /// Code that raises where the function is wrong. It sees what `shared` defines, and the
    /// program's function under its name; arguments and results are plain values (numbers, texts,
    /// lists, tuples, maps, sets, iterators).
    pub tests: &'a str,
}

/// A sandbox known to work on this machine.
#[derive(Clone, Debug)]
pub struct Sandbox {
    bwrap: PathBuf,
    arguments: Vec<String>,
    /// What lies in the sandbox's root.
    root: Vec<String>,
    python: PathBuf,
    filter: String,
    limits: Limits,
    /// The user id to change to.
    user: Option<u32>,
    /// Where groups are made.
    groups: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Interpreter {
    executable: PathBuf,
    parts: Vec<PathBuf>,
}

impl Sandbox {
    /// Finds bubblewrap and Python, and tries the walls. The system's own bubblewrap goes before
    /// what else is on the search path.
    ///
    /// # Errors
    /// [`Error::Sandbox`] with what is missing or not permitted.
    pub fn new(limits: Limits) -> Result<Self> {
        let system = PathBuf::from("/usr/bin/bwrap");
        let bwrap = Some(system).filter(|path| path.exists()).or_else(|| find("bwrap"));
        let bwrap = bwrap.ok_or_else(|| {
            refused("bubblewrap (`bwrap`) is not installed; on Debian: apt-get install bubblewrap")
        })?;
        Self::with_bubblewrap(&bwrap, limits)
    }

    /// [`Sandbox::new`] with this bubblewrap.
    ///
    /// # Errors
    /// As [`Sandbox::new`].
    pub fn with_bubblewrap(bwrap: &Path, limits: Limits) -> Result<Self> {
        // The system's own Python first: one below a home folder may not be readable to the
        // sandbox's user.
        let system = PathBuf::from("/usr/bin/python3");
        let python = Some(system).filter(|path| path.exists()).or_else(|| find("python3"));
        let python = python.ok_or_else(|| refused("Python (`python3`) is not installed"))?;
        let asked = answer(Command::new(&python).args(["-I", "-S", "-c", WHERE]))?;
        let interpreter: Interpreter = serde_json::from_str(&asked)
            .map_err(|_| refused(&format!("{} does not work", python.display())))?;
        let filter = filter::program()?.ok_or_else(|| {
            let arch = std::env::consts::ARCH;
            refused(&format!("the system calls of {arch} are not known; x86_64 and aarch64 are"))
        })?;
        let own = fs_err::metadata("/proc/self")?.uid();
        let map = fs_err::read_to_string("/proc/self/uid_map")?;
        let (mut arguments, root) = arguments(&interpreter);
        // From bubblewrap 0.8 on; before, the filter alone keeps programs from making them.
        if answer(Command::new(bwrap).arg("--help"))?.contains("--disable-userns") {
            arguments.insert(0, "--disable-userns".to_owned());
        }
        let sandbox = Self {
            bwrap: bwrap.to_path_buf(),
            arguments,
            root,
            python: interpreter.executable,
            filter: filter.iter().map(|byte| format!("{byte:02x}")).collect(),
            limits,
            user: ids::other(own, &map, std::process::id()),
            groups: cgroup::parent(limits.memory),
        };
        sandbox.try_walls()?;
        Ok(sandbox)
    }

    /// Whether a control group bounds the memory of the whole sandbox, beside the limits of its
    /// processes.
    pub fn has_group(&self) -> bool {
        self.groups.is_some()
    }

    fn try_walls(&self) -> Result<()> {
        let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
        let mut limits = self.outer_limits();
        limits["RLIMIT_NPROC"] = json!(0);
        // A home folder that holds the interpreter is partly there.
        let holds = self.arguments.iter().any(|argument| argument.starts_with(&home));
        let walls = json!({
            "root": self.root,
            "home": if holds { "/etc" } else { &home },
            "limits": limits,
            "keyctl": filter::keyctl(),
        });
        // A JSON text of words and numbers is one of Python, too.
        match self.run(&format!("WALLS = {walls}\n{WALLS}"))? {
            Verdict::Passed => Ok(()),
            Verdict::Failed(why) => match why.strip_prefix("AssertionError: ") {
                Some(wall) => Err(refused(&format!(
                    "{} makes a sandbox whose walls do not hold: a program in it could do harm, \
                     for {wall}",
                    self.bwrap.display()
                ))),
                None => Err(refused(&format!(
                    "bubblewrap cannot make its namespaces here ({why}); unprivileged user \
                     namespaces have to be permitted"
                ))),
            },
        }
    }

    /// Runs `program` and says what became of it, by its own word.
    ///
    /// # Errors
    /// If bubblewrap cannot be started at all.
    pub fn run(&self, program: &str) -> Result<Verdict> {
        self.ask(json!({ "program": program, "tests": null }))
    }

    /// Runs a program against its tests, where it can neither see nor answer for them.
    ///
    /// # Errors
    /// If bubblewrap cannot be started at all.
    pub fn check(&self, trial: &Trial<'_>) -> Result<Verdict> {
        self.ask(json!({
            "shared": trial.shared,
            "program": trial.program,
            "entry_point": trial.entry_point,
            "tests": trial.tests,
        }))
    }

    fn ask(&self, mut request: Value) -> Result<Verdict> {
        request["seconds"] = json!(self.limits.seconds);
        let mut child = self.spawn()?;
        let group = match &self.groups {
            Some(parent) => {
                let group = cgroup::Group::new(parent, self.limits.memory)?;
                group.add(child.id())?;
                Some(group)
            }
            None => None,
        };
        let deadline = Instant::now() + Duration::from_secs_f64(self.limits.seconds) + GRACE;
        // A request is larger than a pipe holds, and the child may die before it reads. The first
        // byte says that the child is where it belongs.
        let input = child.stdin.take();
        let writer = std::thread::spawn(move || {
            input.map(|mut input| input.write_all(format!("\n{request}").as_bytes()))
        });
        let output = collect(child.stdout.take());
        let errors = collect(child.stderr.take());
        let ended = wait(&mut child, deadline)?;
        if !ended {
            // Its process namespace dies with it, whatever it started.
            child.kill()?;
            child.wait()?;
        }
        // It ends with the pipe; where no namespace took all processes along, that may stay open.
        drop(writer);
        let [output, errors] = [output, errors].map(|text| said(&text));
        drop(group);
        Ok(match output.as_str() {
            "passed" => Verdict::Passed,
            "" if !ended => Verdict::Failed("timed out".to_owned()),
            "" if errors.trim().is_empty() => Verdict::Failed("ended the interpreter".to_owned()),
            "" => Verdict::Failed(errors.trim().chars().take(300).collect()),
            other => Verdict::Failed(other.strip_prefix("failed: ").unwrap_or(other).to_owned()),
        })
    }

    /// The limits that hold from bubblewrap's first process on.
    fn outer_limits(&self) -> Value {
        json!({
            "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": MOST_FILES,
            "RLIMIT_CPU": self.limits.seconds.ceil() as u64 + 1,
            "RLIMIT_AS": self.limits.memory,
        })
    }

    fn spawn(&self) -> Result<Child> {
        let given = json!({
            "limits": self.outer_limits(),
            "filter": self.filter,
            "keyctl": filter::keyctl(),
        });
        let mut command = Command::new(&self.python);
        command.args(["-I", "-S", "-c", LAUNCH]).arg(given.to_string());
        command.arg(&self.bwrap).args(&self.arguments).arg("--").arg(&self.python);
        command.args(["-I", "-S", "-B", "-c", DRIVER]).env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(id) = self.user {
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

/// bubblewrap's arguments: namespaces, and a root with only what the interpreter needs; and the
/// names in that root.
fn arguments(interpreter: &Interpreter) -> (Vec<String>, Vec<String>) {
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
    let mut root = Vec::new();
    let mut top = |path: &Path| {
        if let Some(first) = path.iter().nth(1) {
            root.push(first.to_string_lossy().into_owned());
        }
    };
    let mut bind = |path: &Path| {
        if path.exists() {
            top(path);
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
                top(Path::new(path));
                out.extend(["--symlink".to_owned(), target.display().to_string(), path.to_owned()]);
            }
            Err(_) if Path::new(path).exists() => {
                top(Path::new(path));
                out.extend(["--ro-bind", path, path].map(str::to_owned));
            }
            Err(_) => {}
        }
    }
    out.extend(["--remount-ro", "/"].map(str::to_owned));
    (out, root)
}

/// What a program that is trusted so far writes to stdout, if it ends in time.
fn answer(command: &mut Command) -> Result<String> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let output = collect(child.stdout.take());
    if !wait(&mut child, Instant::now() + GRACE)? {
        child.kill()?;
        child.wait()?;
    }
    Ok(said(&output))
}

/// Reads the beginning of a stream, and the rest to nowhere.
fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut bytes = Vec::new();
        let _ = stream.by_ref().take(MOST_OUTPUT).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// What was read of a stream whose writer is gone; nothing if somebody else still holds it.
fn said(text: &Receiver<String>) -> String {
    text.recv_timeout(GRACE).unwrap_or_default()
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
