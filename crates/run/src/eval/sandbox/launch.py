# Runs outside the sandbox, as its user, and becomes bubblewrap: sets what has to hold for every process
# of the sandbox, the first one too. Arguments: bubblewrap, its own ones; as JSON before them what is set.
import json
import os
import resource
import sys

given, command = json.loads(sys.argv[1]), sys.argv[2:]
os.closerange(3, 1 << 16)
# The caller has put this process where it belongs.
os.read(0, 1)
for name, value in given["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
try:
    # A session keyring of its own, and an empty one: JOIN_SESSION_KEYRING without a name. Where that
    # cannot be done the filter below still lets nobody read one.
    import ctypes

    ctypes.CDLL(None).syscall(ctypes.c_long(given["keyctl"]), ctypes.c_long(1), None)
except Exception:
    pass
end, other = os.pipe()
os.write(other, bytes.fromhex(given["filter"]))
os.close(other)
os.set_inheritable(end, True)
os.execv(command[0], [command[0], "--seccomp", str(end)] + command[1:])
