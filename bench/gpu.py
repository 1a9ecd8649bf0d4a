"""`gpu`: the first hour on a GPU as one command. Its steps, one process each, in an order that pays early.

What a step says is shown and kept as it comes; the same command goes on with what is missing. `--failed` also tries
again what has failed.
"""

import os
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
STEP = 530.0  # seconds at most of a step
ALL = 1490.0  # of a call
QUIET = 30.0  # seconds without a word of a step, after which one is said for it
TICK = 0.1  # seconds between looks at a step
TIMEOUT = 124  # exit status of what ran too long
NO_COMMAND = 127  # of what could not be begun
SAID = 4000  # characters that are kept of what a step said


def steps(
    shapes: tuple[str, ...] = SHAPES, device: str = "cuda", more=("--save",)
) -> dict[str, list[str]]:
    """Name -> command: tests first, then every bench on the small shape before the next one's large one."""
    python = [sys.executable, "-m"]
    found = {"tests": [*python, "pytest", "-q", "tests/test_graphs.py", "tests/test_gpu.py"]}
    for bench in BENCHES:
        for shape in shapes[:1] if bench == "kernel" else shapes:  # its sizes are its own
            asked = [] if bench == "kernel" else ["--shape", shape]
            found[" ".join([bench, *asked[1:]])] = [
                *python,
                "bench",
                bench,
                *asked,
                "--device",
                device,
                *more,
            ]
    return found


def dry_steps() -> dict[str, list[str]]:
    """The same on a CPU in seconds, in the GPU's dtype; the tests, which `make test` runs, are only collected."""
    found = steps(("tiny",), "cpu", ("--dtype", "bfloat16", "--quick"))
    found["tests"].append("--collect-only")
    return found


def attempt(command: list[str], log: Path, seconds: float, say: Callable) -> tuple[int, str]:
    """Exit status of a command and the end of what it said; it is stopped after so many seconds.

    `say` is told every line as it comes, and the seconds where none comes for a while; the JSON line, which --save
    keeps, is left out. `log` gets everything, from the command itself.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    said: list[str] = []
    part = ""
    late = over = False
    with log.open("ab") as written, log.open(encoding="utf-8", errors="replace") as read:
        read.seek(0, os.SEEK_END)
        begun = heard = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=written, stderr=written, env=environment
            )
        except OSError as error:
            return NO_COMMAND, str(error)
        try:
            while not over:
                over = process.poll() is not None  # asked before its last lines are read
                *lines, part = (part + read.read()).split("\n")
                lines = [line for line in lines if not line.startswith("{")]
                for line in lines:
                    say(line)
                said += lines
                now = time.perf_counter()
                if lines:
                    heard = now
                elif now - heard > QUIET:
                    heard = now
                    say(f"  … {now - begun:.0f} s")
                if now - begun > seconds and not over:
                    late = True
                    process.kill()
                time.sleep(TICK)
        finally:
            process.kill()
            process.wait()
    if part:
        say(part)
        said.append(part)
    return TIMEOUT if late else process.returncode, "\n".join(said)[-SAID:]


def first_hour(
    todo: dict[str, list[str]],
    kept: Path,
    failed: bool = False,
    step: float = STEP,
    total: float = ALL,
    say: Callable = click.echo,
    run: Callable = attempt,
) -> list[str]:
    """Run what `kept` (JSON) has not, each step for `step` seconds at most, all for `total`; which are not done.

    What failed in an earlier call, or had all of its seconds, is only tried again with `failed`, and last. Beside
    `kept` a file of the same name, .log, has all that the steps have said, as it came.
    """
    found = read_json(kept) if kept.is_file() else {}
    start = time.perf_counter()
    for name in sorted(todo, key=lambda name: name in found):
        before = found.get(name, {})
        if before.get("status") == 0:
            say(f"{name}: done before, in {before['seconds']:.0f} s")
            continue
        if before.get("for_good") and not failed:
            say(f"{name}: {ending(before['status'])} in an earlier call; --failed tries it again")
            continue
        most = min(step, total - (time.perf_counter() - start))
        if most <= 0:
            say(f"{name}: not begun, {total:.0f} s are over; the same command goes on here")
            continue
        say(f"== {name}")
        begun = time.perf_counter()
        status, said = run(todo[name], kept.with_suffix(".log"), most, say)
        seconds = time.perf_counter() - begun
        cut_short = status == TIMEOUT and most < step
        found[name] = {
            "status": status,
            "for_good": status != 0 and not cut_short,
            "seconds": seconds,
            "said": said,
            "when": f"{datetime.now():%Y-%m-%d %H:%M}",
        }
        write_json(kept, found)
        say(f"== {name}: {ending(status)} after {seconds:.0f} s; kept in {kept}\n")
    return [name for name in todo if found.get(name, {}).get("status") != 0]


def ending(status: int) -> str:
    return {0: "done", TIMEOUT: "ran too long"}.get(status, f"failed with status {status}")
