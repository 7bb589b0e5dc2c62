//! Programs that try to get out of the sandbox. Where bubblewrap cannot work, each test says so.

use hydralora_run::eval::Error;
use hydralora_run::eval::sandbox::{Limits, Sandbox, Verdict};
use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

fn sandbox() -> Option<Sandbox> {
    match Sandbox::new(Limits { seconds: 2.0, ..Limits::default() }) {
        Ok(sandbox) => Some(sandbox),
        Err(Error::Sandbox(why)) => {
            hydralora_testing::skip("sandbox", why);
            None
        }
        Err(other) => panic!("{other}"),
    }
}

fn passes(program: &str) {
    let Some(sandbox) = sandbox() else { return };
    assert_eq!(sandbox.run(program).unwrap(), Verdict::Passed, "{program}");
}

fn fails(program: &str, why: &str) {
    let Some(sandbox) = sandbox() else { return };
    match sandbox.run(program).unwrap() {
        Verdict::Failed(found) => assert!(found.contains(why), "{found}"),
        Verdict::Passed => panic!("passed: {program}"),
    }
}

#[test]
fn programs_pass_and_fail() {
    passes("import math, random, collections, itertools, re, typing\nassert math.gcd(4, 6) == 2");
    fails("assert 1 == 2, 'no'", "AssertionError: no");
    fails("def f(:", "SyntaxError");
    fails("raise SystemExit(0)", "SystemExit");
    fails("import os\nos._exit(0)", "ended the interpreter");
    // Whatever it prints is not a verdict.
    fails("import os\nos.write(1, b'passed')\nos._exit(0)", "ended the interpreter");
    let long = format!("x = {:?}\nassert len(x) == 300000", "y".repeat(300_000));
    passes(&long);
}

#[test]
fn there_is_no_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    passes(&format!(
        "import socket\n\
         try:\n    socket.create_connection(('127.0.0.1', {port}), timeout=1)\n\
         except OSError:\n    pass\n\
         else:\n    raise AssertionError('connected')\n\
         try:\n    socket.create_connection(('1.1.1.1', 53), timeout=1)\n\
         except OSError:\n    pass\n\
         else:\n    raise AssertionError('connected')\n"
    ));
    assert!(listener.accept().is_err(), "somebody connected");
}

#[test]
fn a_fork_bomb_does_not_go_off() {
    passes(
        "import os, threading\n\
         for attempt in (os.fork, lambda: threading.Thread(target=print).start()):\n\
         \x20   try:\n        attempt()\n\
         \x20   except (OSError, RuntimeError):\n        continue\n\
         \x20   raise AssertionError('started a process')\n",
    );
    let Some(sandbox) = sandbox() else { return };
    let bomb =
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass";
    assert!(matches!(sandbox.run(bomb).unwrap(), Verdict::Failed(_)));
}

#[test]
fn memory_runs_out_inside() {
    fails("x = []\nwhile True:\n    x.append(bytes(1 << 24))", "MemoryError");
    fails("x = bytearray(1 << 40)", "MemoryError");
}

#[test]
fn endless_loops_are_ended() {
    let started = Instant::now();
    fails("while True: pass", "timed out");
    fails("import time\ntime.sleep(1000)", "timed out");
    // Even one that will not hear of it.
    let stubborn = "import time\n\
                    while True:\n    try:\n        while True: time.sleep(1)\n\
                    \x20   except BaseException: pass";
    fails(stubborn, "timed out");
    assert!(started.elapsed() < Duration::from_secs(40));
}

#[test]
fn nothing_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    passes(&format!(
        "import os\n\
         for path in ({outside:?}, '/x', '/tmp/x', '/dev/shm/x', '/usr/lib/x', '/etc/x'):\n\
         \x20   try:\n        open(path, 'w').write('out')\n\
         \x20   except OSError:\n        continue\n\
         \x20   raise AssertionError('wrote ' + path)\n\
         for make in (lambda: os.mkdir('/y'), lambda: os.rename('/usr', '/z')):\n\
         \x20   try:\n        make()\n\
         \x20   except OSError:\n        continue\n\
         \x20   raise AssertionError('changed the root')\n"
    ));
    assert!(!outside.exists());
}

#[test]
fn home_configuration_and_environment_are_not_there() {
    let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
    passes(&format!(
        "import os\n\
         for path in ({home:?}, '/home', '/root', '/etc', '/proc', '/sys', '/tmp', '/dev', '/var'):\n\
         \x20   try:\n        found = os.listdir(path)\n\
         \x20   except OSError:\n        continue\n\
         \x20   assert not found, (path, found)\n\
         for path in ('/etc/passwd', {home:?} + '/.profile', '/proc/1/environ'):\n\
         \x20   try:\n        open(path).read()\n\
         \x20   except OSError:\n        continue\n\
         \x20   raise AssertionError('read ' + path)\n\
         known = {{'LC_CTYPE', 'PWD', 'PYTHONHOME'}}\n\
         assert set(os.environ) <= known, os.environ\n"
    ));
}

#[test]
fn no_descriptor_is_inherited() {
    let mut file = tempfile::tempfile().unwrap();
    passes(
        "import os\n\
         for descriptor in [0] + list(range(3, 256)):\n\
         \x20   try:\n        os.fstat(descriptor)\n\
         \x20   except OSError:\n        continue\n\
         \x20   raise AssertionError('open: ' + str(descriptor))\n",
    );
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert!(text.is_empty());
}

#[test]
fn the_parent_cannot_be_killed() {
    let Some(sandbox) = sandbox() else { return };
    let own = std::process::id();
    let program = format!(
        "import os, signal\n\
         for pid in (os.getppid(), {own}, 1, -1):\n\
         \x20   try:\n        os.kill(pid, signal.SIGKILL)\n\
         \x20   except OSError:\n        pass\n"
    );
    // Killing everything in its own namespace may end it; this process goes on either way.
    sandbox.run(&program).unwrap();
    assert_eq!(sandbox.run("assert True").unwrap(), Verdict::Passed);
}

#[test]
fn limits_cannot_be_raised_nor_namespaces_made() {
    passes(
        "import resource, os, ctypes\n\
         for name in ('RLIMIT_AS', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_CPU'):\n\
         \x20   try:\n        resource.setrlimit(getattr(resource, name), (1 << 40, 1 << 40))\n\
         \x20   except (ValueError, OSError):\n        continue\n\
         \x20   raise AssertionError('raised ' + name)\n\
         assert os.getuid() == 65534\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         assert libc.mount(b'none', b'/usr', b'tmpfs', 0, None) != 0\n",
    );
}

#[test]
fn the_right_solutions_of_humaneval_pass_and_others_do_not() {
    let Some(sandbox) = sandbox() else { return };
    let file = crate::support::sample().join("humaneval/HumanEval.jsonl");
    for line in std::fs::read_to_string(file).unwrap().lines() {
        let problem: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| problem[key].as_str().unwrap().to_owned();
        let with = |solution: &str| {
            let check = format!("check({})", text("entry_point"));
            format!("{}{solution}\n{}\n{check}", text("prompt"), text("test"))
        };
        let right = sandbox.run(&with(&text("canonical_solution"))).unwrap();
        assert_eq!(right, Verdict::Passed, "{}", text("task_id"));
        assert_ne!(sandbox.run(&with("    return None\n")).unwrap(), Verdict::Passed);
    }
}
