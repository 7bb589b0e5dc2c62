# Runs inside the sandbox. Two processes: this one, the judge, runs the tests and alone holds the pipe
# on which the verdict goes out; its child runs the program. The child is made before the judge reads a
# byte of the tests. Between the two go plain values as JSON, a line each: the judge calls, the child
# answers, and nothing of what the child says can be more than an answer.
import builtins
import json
import os
import resource
import signal
import sys

MOST = 8 << 20


class Ended(Exception):
    pass


def pack(value):
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value) if -(1 << 53) < value < 1 << 53 else {"int": hex(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind, cls in PLAIN.items():
        if isinstance(value, cls):
            return {kind: [pack(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [pack(part) for part in (value.start, value.stop, value.step)]}
    for module, name in NUMBERS:
        # A module that nobody has loaded made no value.
        if isinstance(value, getattr(sys.modules.get(module), name, ())):
            return {name: str(value)}
    if hasattr(type(value), "__next__"):
        return {"iterator": [pack(item) for item in value]}
    raise TypeError("a value of type " + type(value).__name__ + " cannot be handed over")


def unpack(value):
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "int":
        return int(inner, 16)
    if kind in ("Fraction", "Decimal"):
        import decimal
        import fractions

        return {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal}[kind](inner)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in inner}
    inner = [unpack(item) for item in inner]
    if kind == "complex":
        return complex(*inner)
    if kind == "range":
        return range(*inner)
    if kind == "iterator":
        return iter(inner)
    return PLAIN[kind](inner)


PLAIN = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes, "bytearray": bytearray}
NUMBERS = (("fractions", "Fraction"), ("decimal", "Decimal"))


def say(descriptor, message):
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


def hear(stream):
    line = stream.readline(MOST)
    if not line.endswith(b"\n"):
        raise Ended("answered too much" if len(line) == MOST else "ended the interpreter")
    return json.loads(line)


def told(error):
    return {"error": [type(error).__name__, str(error)[:300]]}


def candidate():
    import io

    # Answers leave here; nothing else is open.
    stream = os.fdopen(0, "rb")
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    scope = {}
    while True:
        request = hear(stream)
        try:
            if "program" in request:
                exec(request["program"], scope)
                answer = {"result": None}
            else:
                arguments = [unpack(argument) for argument in request["arguments"]]
                named = {name: unpack(argument) for name, argument in request["named"].items()}
                result = pack(eval(request["call"], scope)(*arguments, **named))
                answer = {"result": result, "arguments": [pack(argument) for argument in arguments]}
        except BaseException as error:
            answer = told(error)
        say(1, answer)


def judge(pipe, stream):
    request = json.loads(sys.stdin.buffer.read())
    os.close(0)

    def late(*_):
        raise TimeoutError("timed out")

    def asked(message):
        say(pipe, message)
        answer = hear(stream)
        if "error" not in answer:
            return answer
        name, text = map(str, answer["error"])
        # What the tests may expect: a built-in exception of that name.
        base = vars(builtins).get(name)
        if not (isinstance(base, type) and issubclass(base, Exception)):
            base = Exception
        kind = type(name, (base,), {"__str__": lambda _: text})
        raise kind.__new__(kind)

    def call(*arguments, **named):
        message = {
            "call": request["entry_point"],
            "arguments": [pack(argument) for argument in arguments],
            "named": {name: pack(argument) for name, argument in named.items()},
        }
        answer = asked(message)
        # What the program did to its arguments happened to the tests' own.
        for own, other in zip(arguments, answer["arguments"]):
            if isinstance(own, list):
                own[:] = unpack(other)
            elif isinstance(own, (dict, set)):
                other = unpack(other)
                own.clear()
                own.update(other)
        return unpack(answer["result"])

    verdict = "passed"
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    try:
        asked({"program": request["program"]})
        if request["tests"] is not None:
            scope = {}
            for end in ("", "\n    pass\n"):
                try:
                    exec(compile(request["shared"] + end, "prompt", "exec"), scope)
                    break
                except SyntaxError:
                    pass
            scope[request["entry_point"]] = call
            exec(request["tests"], scope)
    except Ended as error:
        verdict = "failed: " + str(error)
    except BaseException as error:
        verdict = "failed: " + type(error).__name__ + ": " + str(error)[:300]
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(1, verdict.encode("utf-8", "replace"))
    os._exit(0)


def run():
    ask, answer = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(ask[0], 0)
            os.dup2(answer[1], 1)
            os.closerange(2, 1 << 16)
            candidate()
        finally:
            os._exit(1)
    os.close(ask[0])
    os.close(answer[1])
    judge(ask[1], os.fdopen(answer[0], "rb"))


run()
