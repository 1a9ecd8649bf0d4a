"""Commands in children of a process that has imported everything: killed at a moment, on a full disk, without rights.

    done = command(folder, "fit", kill=(0.2, signal.SIGKILL))       # 0.2 s after it has begun
    done = command(folder, "run", at=(3, signal.SIGTERM))           # before its third file gets its name
    done = command(folder, "predict", at=(3, signal.SIGTERM))       # before its third answer is printed
    done = command(folder, "merge", room=5000)                      # no file may be longer
    done = command(folder, "run", powerless=True)                   # root, too, heeds permissions

The commands are small ones on the embedded model: `COMMANDS`.
"""

import ctypes
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import click
import pandas  # noqa: F401  (imported before the children are made, as the modules below)
import scipy.stats  # noqa: F401
import torch
import torch._dynamo  # an optimizer of torch imports it, which takes a child a second
import torch.distributed.tensor  # noqa: F401  (imported by huggingface_hub where it plans shards)
from matplotlib.figure import Figure
from safetensors import safe_open
from shipping import shipping
from tqdm import tqdm

import bench.pretrain
import ia2mini.cli.group
import ia2mini.fitting.fit
import ia2mini.report.fit
import ia2mini.study.study  # noqa: F401
from bench.__main__ import main as bench_main
from ia2mini.cli.main import main
from ia2mini.report.figures import FIGURES

ROOT = Path(__file__).parents[1]
FEW = ["--model", str(ROOT / "models/tiny"), *"--rates 1e-2 --epochs 2 --device cpu".split()]
COMMANDS = {
    "run": ["run", "--data", "rows.csv", "--n=2", "--sets=1", "--methods=sft,ia2-sft", *FEW],
    "fit": ["fit", "rows.csv", "--folds", "2", "--methods", "sft", *FEW],
    "predict": ["predict", "fitted", "new.jsonl"],
    "merge": ["merge", "fitted"],
    "pretrain": ["pretrain", "--steps", "4"],
}
COMMANDS = {
    name: words + ["--out", "out"] * (name != "predict") for name, words in COMMANDS.items()
}
MEASURED = r'"?(seconds|seconds_by_phase|peak_memory_bytes)"?: (\{[^}]*\}|[\d.]+),?|<p>[^<]*\d s\b[^<]*</p>'
FORKED = multiprocessing.get_context("forkserver")

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # in place of a semaphore for each child
_figure = Figure()  # the first one reads the fonts
_figure.subplots().plot([0, 1], label="a")
_figure.savefig(io.BytesIO())


class Done(NamedTuple):
    """How a command ended: exit code (negative: the signal), what it printed, its seconds, files named or answers."""

    code: int
    out: bytes
    err: str
    seconds: float
    files: int


def command(folder: Path, name: str, kill=None, **how) -> Done:
    """Run `COMMANDS[name]` in a child, in `folder`."""
    pipes = [FORKED.Pipe(duplex=False) for _ in range(3)]
    process = FORKED.Process(
        target=child, args=(folder, name, [end for _, end in pipes]), kwargs=how
    )
    process.start()
    for _, end in pipes:
        end.close()
    out, err, ready = (end for end, _ in pipes)
    ready.recv()
    begun = time.monotonic()
    if kill:
        process.join(kill[0])
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process.pid, kill[1])
    printed, told = (
        b"".join(iter(lambda end=end: os.read(end.fileno(), 1 << 16), b"")) for end in (out, err)
    )
    process.join(600)
    assert process.exitcode is not None, f"{name} hangs"
    files = ready.recv() if process.exitcode == 0 else 0
    return Done(process.exitcode, printed, told.decode(), time.monotonic() - begun, files)


def child(folder, name, ends, at=None, room=None, powerless=False, output=None) -> None:
    """What the child does: `output` is a file for what the command prints, in place of the pipe."""
    os.chdir(folder)
    for number, end in enumerate(ends[:2], 1):
        os.dup2(end.fileno(), number)
        end.close()
    if output:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    if room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if powerless:
        heed_permissions()
    begin, rename, echo = click.Group.main, os.replace, click.echo
    heed = ia2mini.cli.group.heed_interrupts

    def heeding(came):
        heed(came)
        ends[2].send("begun")  # before this a signal would find Python's own handlers

    def told(*arguments, **more):
        try:
            return begin(*arguments, **more)
        finally:  # the child's own end is not the command's
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    def count():
        count.events += 1
        if at and count.events == at[0]:
            at[1]() if callable(at[1]) else os.kill(os.getpid(), at[1])

    def counted(*paths):
        count()
        rename(*paths)

    def answering(*line, **how):
        count()
        echo(*line, **how)

    count.events = 0
    click.Group.main = told
    ia2mini.cli.group.heed_interrupts = heeding
    os.replace = counted
    if name == "predict":
        click.echo = answering
    for figure in list(FIGURES)[1:]:
        del FIGURES[
            figure
        ]  # the first one stands for the others: they take most of the time of `run`
    sys.argv = ["ia2mini", *COMMANDS[name]]
    if name == "pretrain":
        full = bench.pretrain.pretrain
        bench.pretrain.CONTEXT = 48
        bench.pretrain.probe = lambda *_: {"toy-mood": [0.5] * len(bench.pretrain.SHOTS)}
        bench.pretrain.pretrain = lambda out, **given: full(out, **given, every=1, rows=2)
    try:
        with shipping("sft"):  # so that there is an adapter to load and to merge
            (bench_main if name == "pretrain" else main)()
    finally:
        ends[2].send(count.events)


def heed_permissions() -> None:
    """Give up root's right to write anywhere: capset with no capability."""
    if os.geteuid() == 0:
        assert (
            ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
            == 0
        )


def permit(folder: Path, mode: int) -> None:
    """Set the permissions of a folder and of all below it."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(mode)


def lose_permissions() -> None:
    """Nothing below the folder of results can be written from now on."""
    heed_permissions()
    permit(Path("out"), 0o555)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without what is measured: seconds and memory."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {
        name: data if data[:1] == b"\x89" else measured(name, data) for name, data in found.items()
    }


def measured(name: str, data: bytes) -> bytes:
    if name.endswith("seconds.json"):  # nothing else
        return b""
    text = name.endswith((".json", ".html")) and Path(name).name != "tokenizer.json"
    return re.sub(MEASURED, "", data.decode()).encode() if text else data


def check_whole(folder: Path, wanted: dict[str, bytes]) -> None:
    """Every file with a name of its own is as the undisturbed command wrote it, or a whole one to go on from."""
    for name, data in content(folder).items():
        path = folder / name
        if path.name.startswith("."):
            continue  # what `write` had begun
        if path.name == "seconds.json":
            json.loads(path.read_text())
        elif "unfinished-" in name or path.name == "state.safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(key) is not None for key in file.keys())
        else:
            assert data == wanted[name], f"{name} is not whole"
