//! Programs that try to get out of the sandbox. Where bubblewrap cannot work, each test says so.

use hydralora_run::eval::sandbox::{Limits, Sandbox, Trial, Verdict};
use hydralora_run::eval::{Answer, Error, Reader, Settings, Work, tasks};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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
         for descriptor in range(2, 256):\n\
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

/// A function, and tests that only the right one passes.
fn trial(program: &str) -> Trial<'_> {
    Trial {
        shared: "def helper(x):\n    return x * 3\n\ndef triple(x):\n    \"\"\"Three of it.\"\"\"\n",
        program,
        entry_point: "triple",
        tests: "def check(candidate):\n\
                \x20   for x in range(5):\n\
                \x20       assert candidate(x) == 3 * x == helper(x), x\n\
                \x20   assert candidate(x=2) == triple(2)\n\
                check(triple)",
    }
}

#[test]
fn tests_are_passed_by_the_right_function_alone() {
    let Some(sandbox) = sandbox() else { return };
    let check = |program: &str| sandbox.check(&trial(program)).unwrap();
    assert_eq!(check("def triple(x):\n    return x + x + x"), Verdict::Passed);
    for (program, why) in [
        ("def triple(x):\n    return x", "AssertionError: 1"),
        ("def triple(x):\n    return undefined", "NameError: name 'undefined' is not defined"),
        ("def other(x):\n    return x", "NameError"),
        ("def triple(x) return x", "SyntaxError"),
        ("def triple(x):\n    raise SystemExit(0)", "SystemExit"),
        ("def triple(x):\n    while True: pass", "timed out"),
        ("def triple(x):\n    return [0] * (1 << 40)", "MemoryError"),
        ("def triple(x):\n    return 'y' * (1 << 23)", "answered too much"),
        ("def triple(x):\n    return iter(int, 1)", ""),
        ("def triple(x):\n    y = []\n    y.append(y)\n    return y", "RecursionError"),
        ("def triple(x):\n    return triple", "cannot be handed over"),
    ] {
        match check(program) {
            Verdict::Failed(found) => assert!(found.contains(why), "{program}: {found}"),
            Verdict::Passed => panic!("passed: {program}"),
        }
    }
}

/// Ways to say "passed" without being right. None has the pipe of the verdict, nor the tests.
#[test]
fn a_program_cannot_answer_for_its_tests() {
    let Some(sandbox) = sandbox() else { return };
    let liars = [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "def triple(x):\n    import os\n    os._exit(0)",
        // To every descriptor, in every form that has a meaning somewhere.
        "import os\n\
         for fd in range(256):\n\
         \x20   for text in (b'passed', b'{\"result\": null, \"arguments\": []}\\n' * 50):\n\
         \x20       try:\n            os.write(fd, text)\n\
         \x20       except OSError:\n            pass\n\
         os._exit(0)",
        // As the driver answers, before it does.
        "def triple(x):\n    import os\n    os.write(1, b'{\"result\": 0, \"arguments\": [0]}\\n' * 9)",
        // Results that are equal to everything, hold everything, or count as true.
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n\
         def triple(x):\n    return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n\
         def triple(x):\n    return Any(0)",
        // The frames below and everything that the collector knows.
        "import sys, gc, os\n\
         frame = sys._getframe()\n\
         while frame:\n\
         \x20   for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n\
         \x20       if isinstance(value, dict) and ('tests' in value or 'token' in value):\n\
         \x20           os.write(1, (str(value.get('token', '')) + 'passed').encode())\n\
         \x20   frame = frame.f_back\n\
         for value in gc.get_objects():\n\
         \x20   if isinstance(value, dict) and 'tests' in value:\n\
         \x20       os.write(1, b'passed')\n",
        // Its parent, and everybody.
        "import os, signal\n\
         for pid in (os.getppid(), 1, 2, -1):\n\
         \x20   for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGKILL):\n\
         \x20       try:\n            os.kill(pid, number)\n\
         \x20       except OSError:\n            pass\n",
        // What the driver itself calls.
        "import json, builtins, os, sys\n\
         builtins.exec = builtins.eval = lambda *a, **k: (lambda *a, **k: 0)\n\
         json.dumps = lambda *a, **k: 'passed'\n\
         sys.exit = os._exit = lambda *a: None\n\
         def triple(x):\n    return 0\n",
    ];
    for program in liars {
        let verdict = sandbox.check(&trial(program)).unwrap();
        assert!(matches!(verdict, Verdict::Failed(_)), "passed: {program}");
    }
    // The tests' text is nowhere in its memory.
    let reader = "import gc\n\
                  def triple(x):\n\
                  \x20   seen = ' '.join(v for v in gc.get_objects() if isinstance(v, str))\n\
                  \x20   seen += repr([v for v in gc.get_objects() if isinstance(v, dict)])\n\
                  \x20   assert 'def ' + 'check' not in seen, 'found'\n\
                  \x20   return 3 * x\n";
    assert_eq!(sandbox.check(&trial(reader)).unwrap(), Verdict::Passed);
}

#[test]
fn values_cross_as_they_are() {
    let Some(sandbox) = sandbox() else { return };
    let kinds = "import collections, fractions, decimal\n\
                 values = [None, True, 0, -1, 1 << 80, -(1 << 80), 0.1, float('inf'), 'a\\n\\ud800', [], [1, [2]],\n\
                 \x20         (), (1, 'x'), {}, {1: 2, 'a': (3,)}, {1, 2}, frozenset([3]), b'\\x00\\xff', 1 + 2j,\n\
                 \x20         range(1, 9, 2), fractions.Fraction(1, 3), decimal.Decimal('0.10')]\n";
    let tests = format!(
        "{kinds}for value in values:\n\
         \x20   found = same(value)\n\
         \x20   assert type(found) is type(value) and found == value, (value, found)\n\
         assert list(same(iter([1, 2]))) == [1, 2]\n\
         assert same(collections.OrderedDict(a=1)) == dict(a=1)\n\
         import math\nassert math.isnan(same(math.nan))\n\
         held = [3, 1]\n\
         assert held is not grown(held) and held == [3, 1, 0]\n\
         try:\n    broken()\nexcept KeyError as error:\n    assert str(error) == \"'k'\"\n\
         else:\n    raise AssertionError('no error')"
    );
    let program = format!(
        "{kinds}def same(x):\n    return x\n\
         def grown(x):\n    x.append(0)\n    return list(x)\n\
         def broken():\n    return {{}}['k']\n"
    );
    // One function is called by its name; the others go through it.
    let tests = tests
        .replace("same(", "entry('same', ")
        .replace("grown(", "entry('grown', ")
        .replace("broken(", "entry('broken'");
    let program = format!(
        "{program}def entry(name, *rest):\n    return globals_[name](*rest)\nglobals_ = dict(same=same, grown=grown, broken=broken)\n"
    );
    let trial = Trial { shared: "", program: &program, entry_point: "entry", tests: &tests };
    assert_eq!(sandbox.check(&trial).unwrap(), Verdict::Passed);
}

#[test]
fn no_socket_of_any_family_opens() {
    passes(
        "import socket\n\
         for family in range(0, 46):\n\
         \x20   for kind in (1, 2, 3, 5):\n\
         \x20       try:\n            socket.socket(family, kind)\n\
         \x20       except OSError:\n            continue\n\
         \x20       raise AssertionError((family, kind))\n\
         try:\n    socket.socketpair()\n\
         except OSError:\n    pass\n\
         else:\n    raise AssertionError('pair')\n",
    );
}

/// Calls by number, as a program makes them that does not ask the C library.
#[test]
#[cfg(target_arch = "x86_64")]
fn calls_that_reach_out_are_refused() {
    passes(
        "import ctypes, errno\n\
         call = ctypes.CDLL(None, use_errno=True).syscall\n\
         L = ctypes.c_long\n\
         page = ctypes.create_string_buffer(4096)\n\
         calls = {'ptrace attach': (101, 16, 1), 'ptrace seize': (101, 0x4206, 1), 'ptrace me': (101, 0),\n\
         'process_vm_readv': (310, 1, page, 1, page, 1, 0), 'process_vm_writev': (311, 1, page, 1, page, 1, 0),\n\
         'shmget': (29, 0, 4096, 0o1600), 'semget': (64, 0, 1, 0o1600), 'msgget': (68, 0, 0o1600),\n\
         'mq_open': (240, b'x', 0o100, 0o600, None), 'socket': (41, 40, 1, 0), 'socketpair': (53, 1, 1, 0, page),\n\
         'unshare user': (272, 0x10000000), 'unshare net': (272, 0x40000000), 'setns': (308, 0, 0),\n\
         'clone user': (56, 0x10000000 | 17, 0, 0, 0, 0), 'clone3': (435, page, 88), 'keyctl': (250, 0, -3, 0),\n\
         'add_key': (248, b'user', b'n', b'v', 1, -3), 'request_key': (249, b'user', b'n', None, -3),\n\
         'bpf': (321, 0, page, 72), 'io_uring_setup': (425, 8, page), 'perf_event_open': (298, page, 0, -1, -1, 0),\n\
         'userfaultfd': (323, 0), 'memfd_create': (319, b'x', 0), 'memfd_secret': (447, 0), 'pidfd_open': (434, 1, 0),\n\
         'pidfd_getfd': (438, 0, 0, 0), 'prlimit of 1': (302, 1, 9, None, page), 'mount': (165, b'n', b'/', b'tmpfs', 0, 0),\n\
         'open_tree': (428, -100, b'/', 1), 'fsopen': (430, b'tmpfs', 0), 'chroot': (161, b'/'), 'pivot_root': (155, b'/', b'/'),\n\
         'kcmp': (312, 1, 2, 0, 0, 0), 'personality': (135, 0x0040000), 'seccomp': (317, 1, 0, page), 'splice': (275, 0, 0, 1, 0, 1, 0),\n\
         'name_to_handle_at': (303, -100, b'/', page, page, 0), 'init_module': (175, page, 1, b''), 'x32 getpid': (0x40000000 | 39,)}\n\
         for name, (number, *arguments) in calls.items():\n\
         \x20   made = [L(a) if isinstance(a, int) else a for a in arguments]\n\
         \x20   ctypes.set_errno(0)\n\
         \x20   assert call(L(number), *made) == -1, name\n\
         \x20   assert ctypes.get_errno() == errno.EPERM, (name, ctypes.get_errno())\n",
    );
}

/// The processes below `parent`, with what the kernel says of their limits.
fn limits_below(parent: u32) -> Vec<(String, String)> {
    let mut known = vec![parent.to_string()];
    let mut found = Vec::new();
    let mut at = 0;
    while at < known.len() {
        let tasks = Path::new("/proc").join(&known[at]).join("task");
        for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children"));
            for child in children.unwrap_or_default().split_whitespace() {
                let read =
                    |name: &str| std::fs::read_to_string(Path::new("/proc").join(child).join(name));
                if let (Ok(name), Ok(limits)) = (read("comm"), read("limits")) {
                    found.push((name.trim().to_owned(), limits));
                }
                known.push(child.to_owned());
            }
        }
        at += 1;
    }
    found
}

#[test]
fn limits_hold_from_the_first_process_on() {
    let Some(sandbox) = sandbox() else { return };
    let running = std::thread::spawn(move || sandbox.run("import time\ntime.sleep(1.5)").unwrap());
    std::thread::sleep(Duration::from_millis(700));
    let found = limits_below(std::process::id());
    let inside: Vec<_> = found.iter().filter(|(_, limits)| limits.contains("1073741824")).collect();
    // bubblewrap outside, its first process, the judge and the program.
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert!(inside.iter().filter(|(name, _)| name == "bwrap").count() >= 2, "{names:?}");
    assert!(inside.iter().filter(|(name, _)| name.starts_with("python")).count() >= 2, "{names:?}");
    for (name, limits) in inside {
        for line in ["Max address space", "Max file size", "Max core file size", "Max cpu time"] {
            let line = limits.lines().find(|found| found.starts_with(line)).unwrap();
            assert!(!line.contains("unlimited"), "{name}: {line}");
        }
    }
    assert_eq!(running.join().unwrap(), Verdict::Passed);
}

/// A script in bubblewrap's place that drops what it is told, or a part of it.
#[test]
fn a_bubblewrap_that_builds_no_walls_is_refused() {
    if sandbox().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // Another user starts it.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let drop = |condition: &str| {
        format!(
            "#!/bin/bash\nif [ \"$1\" = --help ]; then exec /usr/bin/bwrap --help; fi\n\
             kept=()\nwhile [ $# -gt 0 ]; do\n  if [ \"$1\" = -- ]; then kept+=(\"$@\"); break; fi\n\
             {condition}\n  kept+=(\"$1\"); shift\ndone\nexec /usr/bin/bwrap \"${{kept[@]}}\"\n"
        )
    };
    let fakes = [
        (
            "nothing",
            "#!/bin/bash\nwhile [ \"$1\" != -- ]; do shift; done\nshift\nexec \"$@\"\n".to_owned(),
        ),
        ("filter", drop("if [ \"$1\" = --seccomp ]; then shift 2; continue; fi")),
        ("processes", drop("if [ \"$1\" = --unshare-pid ]; then shift; continue; fi")),
        ("user", drop("if [ \"$1\" = --uid ]; then shift 2; continue; fi")),
        ("writable", drop("if [ \"$1\" = --remount-ro ]; then shift 2; continue; fi")),
        ("outside", drop("if [ \"$1\" = --remount-ro ]; then kept+=(--ro-bind /etc /etc); fi")),
    ];
    for (name, script) in fakes {
        let path = folder.path().join(name);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let made = Sandbox::with_bubblewrap(&path, Limits { seconds: 2.0, ..Limits::default() });
        match made {
            Err(Error::Sandbox(why)) => {
                assert!(why.contains("are not run") && why.contains(name), "{name}: {why}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn the_right_solutions_of_humaneval_pass_and_others_do_not() {
    let Some(sandbox) = sandbox() else { return };
    let file = crate::support::sample().join("humaneval/HumanEval.jsonl");
    // The whole file, where somebody names it.
    let file = std::env::var_os("HYDRALORA_HUMANEVAL").map_or(file, Into::into);
    for line in std::fs::read_to_string(file).unwrap().lines() {
        let problem: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| problem[key].as_str().unwrap().to_owned();
        let (shared, entry_point) = (text("prompt"), text("entry_point"));
        let tests = format!("{}\ncheck({entry_point})", text("test"));
        let with = |solution: &str| {
            let program = format!("{shared}{solution}\n");
            let (shared, tests) = (shared.as_str(), tests.as_str());
            let trial = Trial { shared, program: &program, entry_point: &entry_point, tests };
            sandbox.check(&trial).unwrap()
        };
        assert_eq!(with(&text("canonical_solution")), Verdict::Passed, "{}", text("task_id"));
        assert_ne!(with("    return None\n"), Verdict::Passed, "{}", text("task_id"));
    }
}

#[test]
fn instructed_programs_go_on_from_an_opened_fence() {
    if sandbox().is_none() {
        return;
    }
    let model = crate::support::model();
    let template = hydralora_data::ChatTemplate::builtin("chatml").unwrap();
    let plain =
        Reader { tokenizer: &model.source.tokenizer, template: None, record_template: None };
    let chat = Reader { template: Some(&template), ..plain };
    let settings = Settings {
        data: crate::support::sample(),
        shots: None,
        limit: None,
        seed: 1234,
        repeats: None,
        temperature: None,
        max_new_tokens: Some(12),
        allow_code_execution: true,
        context: 512,
    };
    let opened = tasks::open("humaneval_instruct", &settings, &chat).unwrap();
    let task = &opened.tasks[0];
    assert_eq!(
        (task.info().version, task.info().metrics[0].key()),
        (4.0, "pass@1,create_test".into())
    );
    let item = &task.items()[0];
    let field = |key: &str| item.record[key].as_str().unwrap();
    let program = field("prompt");
    // As lm-evaluation-harness 0.4.13 renders it.
    let user = format!(
        "Write a solution to the following problem and make sure that it passes the tests:\n\
         ```python\n{program}\n```\n"
    );
    let answer = format!("Here is the completed function:\n```python\n{program}\n");
    assert_eq!(plain.render(&item.prompt).unwrap(), format!("{user}{answer}"));
    assert_eq!(
        chat.render(&item.prompt).unwrap(),
        format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}")
    );
    let Work::Write { stops, .. } = &item.work else { panic!("{:?}", item.work) };
    assert_eq!(stops, &["\nclass", "\ndef", "\n#", "\nif", "\nprint", "```"]);
    let score =
        |text: &str| task.score(item, &Answer::Texts(vec![text.to_owned()])).unwrap()[0].value;
    assert_eq!(score(field("canonical_solution")), 1.0);
    assert_eq!(score("    return None\n"), 0.0);
    // Continuing a program behind a template is refused with the name of what asks for one.
    let refused = tasks::open("humaneval", &settings, &chat).err().unwrap().to_string();
    assert!(refused.contains("`humaneval_instruct` asks for one"), "{refused}");
}
