"""Fair measuring: contestants in turn, warmed up and synchronised; peak memory; the GEMM ceiling."""

import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ia2mini.scale import graphs


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of `repeats` runs, the fastest and the slowest."""

    seconds: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(median(seconds), min(seconds), max(seconds), len(seconds))

    def scaled(self, factor: float) -> "Timing":
        return Timing(self.seconds * factor, self.low * factor, self.high * factor, self.repeats)

    def __str__(self) -> str:
        unit, factor = ("s", 1.0) if self.seconds >= 1 else ("ms", 1e3)
        return (
            f"{self.seconds * factor:.3g} {unit} [{self.low * factor:.3g}–{self.high * factor:.3g}]"
        )


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(run: Callable[[], object], device="cpu") -> float:
    """Seconds that `run` takes, the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def race(
    stacks: dict[str, Callable], repeats: int = 5, seconds: float = 20.0, device="cpu"
) -> dict[str, Timing]:
    """Time the stacks in turn, round after round, so that a busy spell of the machine meets all of them.

    `repeats` rounds after one to warm up, fewer once `seconds` are over but at least two. A first round that takes a
    third of `seconds` counts as any other: what is long needs no warming. Where steps are recorded all stacks warm up
    for as many rounds as a recording needs: no timing mixes calls before it with replays.
    """
    for _ in range(graphs.OFTEN + 1 if torch.device(device).type in graphs.RECORDERS else 0):
        for run in stacks.values():
            clock(run, device)
    start = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in stacks}
    done = 0
    first = True
    while done < repeats and (done < 2 or time.perf_counter() - start < seconds):
        for name, run in stacks.items():
            times[name].append(clock(run, device))
        if first and time.perf_counter() - start < seconds / 3:
            times = {name: [] for name in stacks}
        else:
            done += 1
        first = False
    return {name: Timing.of(values) for name, values in times.items()}


def recorded() -> str:
    """What our stack has recorded since it was last asked, for a result's remarks; empty without a recorder."""
    counts = dict(graphs.COUNTED)
    graphs.COUNTED.clear()
    if not counts:
        return ""
    found = f"recorded {counts.get('recordings', 0)} ×, {counts.get('replays', 0)} of {counts['calls']} calls replayed"
    return f"CUDA graphs: {found}, warming up included"


def gemm_rate(
    rows: int, inputs: int, outputs: int, device="cpu", dtype=torch.float32, seconds: float = 0.5
) -> float:
    """FLOP/s of x [rows, inputs] @ W^T [inputs, outputs]: the best of as many rounds as fit into `seconds`."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    w = torch.randn(outputs, inputs, device=device, dtype=dtype)
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        times.append(clock(lambda: F.linear(x, w), device))
    return 2 * rows * inputs * outputs / min(times)


def gemm_ceiling(config, rows: int, device="cpu", dtype=torch.float32) -> float:
    """The machine's matrix rate, FLOP/s: the better of a 2048-cube and the model's own MLP map over `rows` tokens."""
    own = gemm_rate(rows, config.hidden_size, config.intermediate_size, device, dtype)
    return max(own, gemm_rate(2048, 2048, 2048, device, dtype))


class Bystanders:
    """How much of the processors others had while a block ran, programs or the host's other machines.

    `share`: 0 to 1; 0 without /proc.
    """

    def __enter__(self) -> "Bystanders":
        self.start, self.share = self.spent(), 0.0
        return self

    def __exit__(self, *error) -> None:
        wall, busy, own = (b - a for a, b in zip(self.start, self.spent()))
        self.share = max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def spent() -> tuple[float, float, float]:
        """Seconds: on the clock, of all processors busy, of this process and its children."""
        try:
            user, nice, system, *_, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            busy = (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")
        except OSError:
            busy = 0.0
        return time.perf_counter(), busy, sum(os.times()[:4])


def resident() -> tuple[int, int]:
    """Bytes resident now, and the most since `reset_peak` (or since the start, where the kernel cannot reset it)."""
    try:
        status = Path("/proc/self/status").read_text()
        return tuple(
            int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("VmRSS", "VmHWM")
        )
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most, most


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def allocated(function: Callable, device="cpu") -> int:
    """The most bytes of tensors that the second call of `function()` has beside those that were there before."""
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    sizes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(sizes, key=lambda e: e.start_ns())))


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr, where the profiler is chatty."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
