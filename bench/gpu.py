"""`gpu`: the first hour on a GPU as one command. Its steps, one process each, in an order that pays early.

What each step found is kept as it ends; the same command goes on with what is missing or has failed.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import click

from ia2mini.files import read_json, write_json

ROOT = Path(__file__).parents[1]
SHAPES = ("qwen3-0.6b", "qwen3-4b")
BENCHES = ("step", "cell", "kernel", "collect", "icl", "generate", "memory")
STEP, ALL = 530.0, 1490.0  # seconds at most: of a step, of a call
TIMEOUT, SAID = 124, 4000  # exit status of what ran too long; characters that are kept of what a step said


def steps(shapes: tuple[str, ...] = SHAPES, device: str = "cuda") -> dict[str, list[str]]:
    """Name -> command: tests first, then every bench on the small shape before the next one's large one."""
    python = [sys.executable, "-m"]
    found = {"tests": [*python, "pytest", "-q", "tests/test_graphs.py", "tests/test_gpu.py"]}
    for bench in BENCHES:
        for shape in shapes[:1] if bench == "kernel" else shapes:  # its sizes are its own
            asked = [] if bench == "kernel" else ["--shape", shape]
            found[" ".join([bench, *asked[1:]])] = [*python, "bench", bench, *asked, "--device", device, "--save"]
    return found


def first_hour(
    todo: dict[str, list[str]], kept: Path, step: float = STEP, total: float = ALL, say: Callable = click.echo
) -> dict[str, dict]:
    """Run what `kept` (JSON) has not as done, each for `step` seconds at most, all for `total`; what is known of all.

    What was not begun before comes first, then what has failed.
    """
    found, start = read_json(kept) if kept.is_file() else {}, time.perf_counter()
    for name in sorted(todo, key=lambda name: name in found):
        if found.get(name, {}).get("status") == 0:
            say(f"{name}: done before, in {found[name]['seconds']:.0f} s")
            continue
        left = total - (time.perf_counter() - start)
        if left <= 0:
            say(f"{name}: not begun, {total:.0f} s are over; the same command goes on here")
            continue
        begun = time.perf_counter()
        status, said = attempt(todo[name], min(step, left))
        seconds = time.perf_counter() - begun
        found[name] = {"status": status, "seconds": seconds, "said": said, "when": f"{datetime.now():%Y-%m-%d %H:%M}"}
        write_json(kept, found)
        ending = {0: "done", TIMEOUT: "ran too long"}.get(status, f"failed with status {status}")
        say(f"{said}\n== {name}: {ending} after {seconds:.0f} s; kept in {kept}\n")
    return found


def attempt(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status of a command and the end of what it said; it is stopped after so many seconds."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds)
        status, said = done.returncode, (done.stdout, done.stderr)
    except subprocess.TimeoutExpired as late:
        status, said = TIMEOUT, (late.stdout, late.stderr)
    lines = [line for part in said for line in (part or b"").decode(errors="replace").splitlines()]
    return status, "\n".join(line for line in lines if not line.startswith("{"))[-SAID:]  # the JSON line is saved
