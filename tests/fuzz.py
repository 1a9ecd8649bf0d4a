"""Seeded harm to files, and the watch under which hostile ones are read: for tests/test_fuzz.py."""

import faulthandler
import json
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ia2mini import UsageError

# mutations of each kind of file, unless $IA2MINI_FUZZ says for how many seconds all kinds are to go on
CASES = 500
KINDS = 5
SLOWEST = 10  # seconds of a processor that a case may take
LONGEST = 300  # seconds after which a case waits for something that never comes
MEMORY = 1 << 30  # bytes that a case may take beyond what is held
DEEP = json.loads("[" * 300 + "]" * 300)
EVIL = [
    {},
    [],
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    2**70,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]
EVIL += [
    "",
    " ",
    "a\nb",
    "../up",
    "/etc/passwd",
    "\0",
    "\ud800",
    "{",
    "{text}{",
    "(",
    "é🙂\u2028",
    "x" * 100_000,
    [[[]]],
]
EVIL += [DEEP, [1], ["a"], [None], {"a": {}}, [2**70], [-1], "nan", "1e5", [0, 1], {"0": 0}]


def any_of(rng: np.random.Generator, values):
    """One of a list, as it is."""
    return values[rng.integers(len(values))]


def harm_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes with one to three of them changed, or a stretch cut, doubled, blanked or put in."""
    at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 64))
    if rng.random() < 0.3:
        at = min(at, int(rng.integers(200)))  # where headers are
    before, some, after = data[:at], data[at : at + length], data[at + length :]
    kind = any_of(
        rng,
        ["bits"] * 4
        + ["cut", "cut", "delete", "double", "blank", "insert", "utf-8", "mark", "empty"],
    )
    if kind == "bits" and data:
        found = bytearray(data)
        for i in [min(at, len(data) - 1), *rng.integers(len(data), size=rng.integers(3))]:
            found[i] ^= 1 << rng.integers(8)
        return bytes(found)
    strange = (
        rng.bytes(length)
        if rng.random() < 0.5
        else any_of(rng, [b"\0", b'"', b"\n", b"{", b"[", b",", b"\r", b"9"])
    )
    made = {
        "cut": before,
        "delete": before + after,
        "double": before + some + some + after,
        "empty": b"",
    }
    made |= {"blank": before + b"\0" * len(some) + after, "insert": before + strange + some + after}
    return made.get(
        kind, before + b"\xff\xfe" + some + after if kind == "utf-8" else b"\xef\xbb\xbf" + data
    )


def places(value, path: tuple = ()) -> list[tuple]:
    """The path to every value inside a JSON document, the outermost first."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [p for key, inner in inside for p in places(inner, (*path, key))]


def harm_json(rng: np.random.Generator, data: bytes, wild: list = EVIL) -> bytes:
    """A JSON document with a value replaced, moved, dropped or named twice; now and then another document."""
    if rng.random() < 0.04:
        return json.dumps(any_of(rng, wild)).encode()
    document = json.loads(data)
    paths = places(document)
    # a vocabulary is no better than any other field
    shallow = [path for path in paths if len(path) <= 2]
    for _ in range(rng.integers(1, 3)):
        *way, last = any_of(rng, shallow if rng.random() < 0.7 else paths)
        try:
            owner = document
            for key in way:
                owner = owner[key]
            kind = rng.random()
            if kind < 0.7:
                owner[last] = any_of(rng, wild)
            elif kind < 0.85:
                del owner[last]
            elif isinstance(owner, dict):
                text = (
                    json.dumps(owner)[:-1]
                    + f", {json.dumps(last)}: {json.dumps(any_of(rng, wild))}}}"
                )
                return json.dumps(document).replace(json.dumps(owner), text, 1).encode()
            elif isinstance(owner, list):
                owner.append(owner[last])
        except (
            KeyError,
            IndexError,
            TypeError,
        ):  # the first harm has taken the second's place away
            pass
    return json.dumps(document).encode()


def harm_safetensors(rng: np.random.Generator, data: bytes) -> bytes:
    """A safetensors file with its header harmed as JSON, or with weights that are no numbers."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], bytearray(data[8 + size :])
    if rng.random() < 0.5:
        names = sorted(set(json.loads(header)) - {"__metadata__"})
        shapes = [[10**9, 0], [0], [2**62, 4], [-1], [8], ["F64"], [[0, 10**9]], [1, 1]]
        header = harm_json(
            rng, header, [*EVIL, *shapes, "F64", "I32", "BF16", "F8_E4M3", "BOOL", *names]
        )
        return len(header).to_bytes(8, "little") + header + bytes(body)
    at = int(rng.integers(len(body) // 4)) * 4
    body[at : at + 4] = np.float32(any_of(rng, [np.nan, np.inf, -np.inf, 3e38, 1e-40])).tobytes()
    return data[: 8 + size] + bytes(body)


HARM = {".json": harm_json, ".safetensors": harm_safetensors}


def harm(rng: np.random.Generator, folder: Path, names: list[str], elsewhere: Path) -> str:
    """Harm one of the files `names` of a folder; what was done to it, in words."""
    path = folder / any_of(rng, names)
    data, kind, own = path.read_bytes(), rng.random(), HARM.get(path.suffix)
    if kind < 0.86:
        special = own if own and rng.random() < 0.65 else harm_bytes
        path.write_bytes(special(rng, data))
        return f"{special.__name__} {path.name}"
    path.unlink()
    if kind < 0.88:
        path.mkdir()
        return f"a folder for {path.name}"
    if kind < 0.90:
        return f"no {path.name}"
    if kind < 0.92:
        path.symlink_to(
            any_of(rng, ["/dev/zero", "/dev/null", "nowhere", path.name, "..", "/proc/self/mem"])
        )
        return f"{path.name} is a link to {os.readlink(path)}"
    if kind < 0.94:
        os.mkfifo(path)
        return f"a pipe for {path.name}"
    if kind < 0.96:
        (elsewhere / path.name).write_bytes(data)
        path.symlink_to(elsewhere / path.name)
        return f"{path.name} is a link out of the folder"
    other = any_of(
        rng,
        sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
        or [Path(__file__)],
    )
    path.write_bytes(other.read_bytes())
    return f"{other.name} for {path.name}"


def content(folder: Path) -> dict[str, bytes | str]:
    """What a folder holds: bytes of files, targets of links."""
    found = {}
    for path in folder.rglob("*"):
        read = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (
            path.read_bytes() if read else os.path.islink(path) and os.readlink(path)
        )
    return found


class Hang(BaseException):
    """A case took too long."""


@contextmanager
def watched():
    """Run the block within SLOWEST seconds and MEMORY bytes; Hang, or whatever running out of memory raises."""

    def stop(*_):
        raise Hang(f"more than {SLOWEST} seconds of a processor, or {LONGEST} of waiting")

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, SLOWEST),
        signal.ITIMER_REAL: (signal.SIGALRM, LONGEST),
    }
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(name: str, tmp: Path, make: Callable, check: Callable, kept: bool = True) -> Counter:
    """Harm what `make(rng, folder)` writes, and read it with `check(folder)`, for many seeds; how often each way ended.

    `make` returns what it did in words. `check` returns what is wrong with a result, or None; a UsageError of one line
    is as good. Fails with the first cases that end otherwise, take too long or too much, or change what was there.
    """
    budget, start, ends, failed, case = (
        float(os.environ.get("IA2MINI_FUZZ", 0)) / KINDS,
        time.monotonic(),
        Counter(),
        [],
        0,
    )
    while case < CASES or time.monotonic() - start < budget:
        if case % 10 == 0:  # a hang in which Python does not come to word ends the process
            faulthandler.dump_traceback_later(10 * LONGEST, exit=True)
        rng, folder = np.random.default_rng([case, *name.encode()]), tmp / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        done = make(rng, folder)
        before, wrong = content(folder), None
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = check(folder)
            ends["read"] += 1
        except UsageError as error:
            ends["refused"] += 1
            text = str(error)
            if len(text.splitlines()) != 1 or len(text) > 1000:
                wrong = f"a message of {len(text.splitlines())} lines, {len(text)} characters: {text[:200]!r}"
        except (Exception, Hang) as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
            way = traceback.extract_tb(error.__traceback__)[:1:-1][:7]  # the innermost first
            wrong += " @ " + " < ".join(f"{Path(at.filename).name}:{at.lineno}" for at in way)
        if kept and content(folder) != before:
            wrong = f"its files were changed (and: {wrong})"
        if wrong:
            failed.append(f"case {case}, {done}: {wrong}")
        case += 1
    faulthandler.cancel_dump_traceback_later()
    assert not failed, f"{len(failed)} of {case} cases:\n" + "\n".join(failed[:200])
    return ends
