# Tries the walls from inside, as a program does. WALLS is set before it: limits, names of the root.
import os
import resource
import socket


def closed(what, action):
    try:
        action()
    except OSError:
        return
    raise AssertionError(what)


assert os.getpid() <= 3 and os.getppid() <= 2, "it shares the machine's processes"
assert os.getuid() == 65534, "it runs as user " + str(os.getuid())
assert os.uname().nodename == "sandbox", "it has the machine's name"
found = set(os.listdir("/")) - set(WALLS["root"])
assert not found, "it sees " + ", ".join(sorted(found))
for path in ("/etc/passwd", "/proc/self/status", "/dev/null", WALLS["home"]):
    closed("it reads " + path, lambda: os.stat(path))
for path in ("/x", "/usr/lib/x", "/tmp/x"):
    closed("it writes " + path, lambda: open(path, "w"))
for family in (socket.AF_INET, socket.AF_UNIX, getattr(socket, "AF_NETLINK", 16), getattr(socket, "AF_VSOCK", 40)):
    closed("it opens a socket of family " + str(family), lambda: socket.socket(family, socket.SOCK_STREAM))
closed("it starts a process", os.fork)
for name, most in WALLS["limits"].items():
    _, hard = resource.getrlimit(getattr(resource, name))
    assert 0 <= hard <= most, name + " is " + str(hard)
try:
    import ctypes
except ImportError:
    # Without it no program makes such calls either, and the sockets above have shown the filter.
    ctypes = None
if ctypes is not None:
    library = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_long
    for what, result in (
        ("it makes a user namespace", library.unshare(0x10000000)),
        ("it traces process 1", library.ptrace(16, 1, None, None)),
        ("it mounts", library.mount(b"none", b"/usr", b"tmpfs", 0, None)),
        ("it has shared memory", library.shmget(0, word(4096), 0o1600)),
        # GET_KEYRING_ID of the session's.
        ("it has a keyring", library.syscall(word(WALLS["keyctl"]), word(0), word(-3), word(0))),
    ):
        assert result == -1, what
