"""`where`: what the time of a training step goes into, by PyTorch's profiler."""

import torch
from torch.profiler import ProfilerActivity, profile

from .report import Line, Result
from .shapes import Stand
from .timing import Timing
from .training import PHASES, OurStep, part, taught_set

KINDS = {  # what a person calls it -> how the names of PyTorch's operations begin, without "aten::"
    "matrix products with weights": ("mm", "addmm"),
    "products by batches: LoRA, and attention written out": ("bmm", "baddbmm"),
    "fused attention": ("_scaled_dot_product",),
    "softmax and cross-entropy": ("_softmax", "_log_softmax", "logsumexp", "nll_loss"),
    "elementwise": (
        "add", "sub", "mul", "div", "pow", "neg", "rsqrt", "sqrt", "exp", "silu", "addcmul", "addcdiv",
    ),
    "sums and norms": ("sum", "mean", "linalg_vecdot", "linalg_vector_norm"),
    "copies and other layouts": (
        "copy_", "cat", "clone", "index", "_index_put", "gather", "roll", "fill_", "zero_", "masked_fill",
    ),
}  # fmt: skip
REST = "Python, launching, views and memory"


def where(
    stand: Stand, runs: int = 15, n: int = 4, tokens: int = 26, steps: int = 5, warm: int = 3
) -> Result:
    """Shares of a training step's time: `runs` runs on `n` rows of `tokens` tokens, by kind of operation."""
    about = f"{stand.about}; {runs} runs × {n} rows × {tokens} tokens, {steps} steps"
    result = Result("where", f"{about}, {torch.get_num_threads()} threads", [])
    rows = [taught_set(stand, n, number, (tokens,)) for number in range(5)]
    for method, (phase, _) in PHASES.items():
        mine = [part(rows[r % 5], method)[0] for r in range(runs)]
        step = OurStep(stand, mine, phase, stand.theta(runs))
        for _ in range(warm):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(steps):
                step()
        seconds = by_kind(profiled.key_averages())
        whole = sum(seconds.values())
        for kind, spent in seconds.items():
            share = {"% of the step": 100 * spent / whole}
            result.add(Line(method, kind, Timing.of([spent / steps]), "step", share))
    return result


def by_kind(operations) -> dict[str, float]:
    """Seconds that operations took by themselves, not in those that they call; the largest kind first."""
    seconds = dict.fromkeys([*KINDS, REST], 0.0)
    for operation in operations:
        seconds[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda kind: -kind[1]))


def kind_of(operation: str) -> str:
    """The kind of a profiled operation, by the beginning of its name."""
    name = operation.removeprefix("aten::")
    if name == operation:  # a function of ours, or of the profiler
        return REST
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return REST
