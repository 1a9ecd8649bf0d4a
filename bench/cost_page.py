"""`cost`: docs/cost.md, what one task of the paper's grid costs by its shapes, and what a CPU was measured to take."""

import json
from dataclasses import replace
from pathlib import Path

from .cost import CellSize, Cost, Pass
from .report import RESULTS
from .shapes import SHAPES, SST2_LENGTHS

PAGE = Path(__file__).parents[1] / "docs/cost.md"
RATE = 989e12  # dense bfloat16 FLOP/s of an H100 and an H200 (SXM), NVIDIA's data sheets
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, the same
REACHED = 790e12  # FLOP/s that large matrix products are said to reach; not measured here
WORDS = sum(SST2_LENGTHS) / len(SST2_LENGTHS)
METHODS = ("sft", "ia2", "ia2-sft")  # of `python -m bench cell`
LABELLED = CellSize(query=WORDS, shown=3 * (WORDS + 2))
TEXTS = CellSize(query=60, shown=3 * 182, answer=120, rows=(500, 500))
CELLS = {
    "qwen3-4b": {"sst2": LABELLED, "gsm8k": TEXTS},
    "llama-3.2-1b": {"sst2": LABELLED},
    "llama-3.2-3b": {"sciq_remap": replace(LABELLED, query=60, shown=3 * 62)},
    "llama-3.2-1b-instruct": {"gsm8k": TEXTS},
}
HEAD = """# What a study costs

Written by `python -m bench cost`, computed from shapes (`bench/cost.py`).
**Nothing on this page was measured on a GPU.**

Each table is one task at N = 4: five sets × three learning rates, `base, icl, sft, ia2, ia2-sft`, all 50 epochs with an
evaluation of the dev loss after each (early stopping makes it less). The runs of one learning rate are scored on every
evaluation. Rows are as long as SST2's ({words:.0f} tokens), sciq_remap's (60, assumed) or gsm8k's (60 and 120 of
answer, roughly, on two evaluations of 500 rows).

- TFLOP: what matrix products and attention need, without padding. A test compares it with `torch.utils.flop_counter`.
- GB: memory traffic in bfloat16. A frozen matrix is read once a pass (4,096 tokens; in training a step of all runs);
  inputs and outputs of matrix products count once.
- Kernels: operations of PyTorch's eager mode in bfloat16; a test counts those of a layer. CUDA graphs replay them,
  `--compile` fuses some.
- H100, H200: the least possible seconds. The larger of TFLOP at {rate:.0f} TFLOP/s (the peak of dense bfloat16) and GB
  at {h100} or {h200} TB/s decides.
- s at {reached:.0f}: the same on an H100 at {reached:.0f} TFLOP/s, which large matrix products are said to reach.

If memory is short, runs are automatically trained in groups. Two groups read the matrices twice. Checkpointing
(`--checkpointing`) computes the blocks' forward pass again, which costs more in every table below. A single run that
does not fit is checkpointed automatically.
"""


WAITS = {  # what is done -> how often Python waits for the GPU; tests/test_gpu_pretended.py counts
    "a training step": 0,
    "an evaluation of the dev loss": 1,
    "a generated token, of all rows together": 1,
    "labels scored, whatever the number of rows": 4,
    "answers scored, whatever the number of rows": 1,
    "last states read, whatever the number of rows": 1,
}


def waits() -> list[str]:
    """How often Python waits for the GPU, as a section of the page."""
    out = ["", "## How often Python waits for a GPU", ""]
    out.append("Counted on a pretended GPU, in which every copy to the CPU is noticed.")
    out += ["", "| what | waits |", "|---|---|"]
    return out + [table_row(what, str(count)) for what, count in WAITS.items()]


def steps(config, cell: CellSize) -> str:
    """The least seconds of a step of SFT on an H100: all runs at once, in two groups, and checkpointed."""
    rows = cell.sets * cell.configs * min(cell.n, cell.batch)
    step = Pass(rows, cell.length, rows * cell.answer, backward=True, rank=cell.rank)
    half = replace(step, rows=rows / 2, positions=step.positions / 2, times=2)
    forward = replace(step, head=False, backward=False)
    ways = {
        "at once": step.cost(config),
        "in two groups": half.cost(config),
        "checkpointed": step.cost(config) + forward.cost(config),
    }
    said = []
    for way, cost in ways.items():
        milliseconds = 1e3 * cost.seconds(RATE, BANDWIDTH["H100"])
        said.append(f"{number(milliseconds)} ms {way}")
    return f"A step of SFT for all runs takes at least, on an H100: {', '.join(said)}."


def line(name: str, costs: list[Cost]) -> str:
    """A line of a table: stages one after another."""
    whole = sum(costs, Cost())
    entries = [whole.flops / 1e12, whole.bytes / 1e9, whole.kernels / 1e3, whole.tokens / 1e3]
    for rate, bandwidth in (
        (RATE, BANDWIDTH["H100"]),
        (RATE, BANDWIDTH["H200"]),
        (REACHED, BANDWIDTH["H100"]),
    ):
        entries.append(sum(cost.seconds(rate, bandwidth) for cost in costs))
    return table_row(name, *map(number, entries))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table_row(*entries: str) -> str:
    return "| " + " | ".join(entries) + " |"


def table_head(*names: str) -> list[str]:
    return [table_row(*names), "|" + "---|" * len(names)]


def table(shape: str, task: str, cell: CellSize) -> list[str]:
    """The stages of a cell at a shape."""
    config = SHAPES[shape.removesuffix("-instruct")]
    stages = cell.stages(config)
    memory = number(cell.memory(config) / 1e9)
    runs = cell.sets * cell.configs
    units = [
        "TFLOP",
        "GB",
        "1,000 kernels",
        "1,000 tokens",
        "s, H100",
        "s, H200",
        f"s at {REACHED / 1e12:.0f}",
    ]
    out = [f"## {shape}, {task}", ""]
    out += [f"Training all {runs} runs takes at most {memory} GB. {steps(config, cell)}", ""]
    out += table_head("stage", *units)
    out += [line(name.replace("look", "dev loss,"), [cost]) for name, cost in stages.items()]
    out += [line("**all**", list(stages.values())), ""]
    return out


def measured() -> list[str]:
    """Our own steps and cells on a CPU, as kept in bench/results: what was reached in each stage."""
    out = [
        "## Measured on a CPU",
        "",
        "float32, two cores. A training step, from the newest whole bench:",
        "",
    ]
    for result in newest("*-all-cpu.json")["results"]:
        if result["bench"] == "step":
            shape = result["about"].partition(":")[0]
            out += [f"- {shape}, {step_reached(entry)}" for entry in our_lines(result)]
    out += ["", "The stages of `python -m bench cell`, which scores three methods:", ""]
    out += table_head("shape", "date", "stage", "GFLOP", "s", "GFLOP/s")
    for shape in ("tiny", "100m"):
        out += cell_reached(shape, newest(f"*-cell-{shape}-cpu.json"))
    return out


def newest(pattern: str) -> dict:
    return json.loads(sorted(RESULTS.glob(pattern))[-1].read_text())


def our_lines(result: dict) -> list[dict]:
    return [entry for entry in result["lines"] if entry["stack"] == "us"]


def step_reached(entry: dict) -> str:
    share = 100 * entry["rates"]["GEMM"]
    reached = entry["rates"]["FLOP/s"] / 1e9
    return f"{entry['what']}: {reached:.0f} GFLOP/s, {share:.0f} % of that machine's matrix rate"


def cell_reached(shape: str, document: dict) -> list[str]:
    """What the stages of a measured cell need by their shapes, and took."""
    spent = {
        entry["what"].strip(): entry["timing"]["seconds"]
        for entry in our_lines(document["results"][0])
    }
    cell = replace(LABELLED, methods=METHODS, shown=3 * (WORDS + 1))
    stages = cell.stages(SHAPES[shape], size=4)
    out = []
    for kind, names in {
        "collect": ("collect",),
        "train": ("train", "look"),
        "evaluate": ("score",),
    }.items():
        work = (
            sum(cost.flops for stage, cost in stages.items() if stage.partition(" ")[0] in names)
            / 1e9
        )
        seconds = spent[kind]
        out.append(
            table_row(
                shape, document["date"], kind, number(work), number(seconds), number(work / seconds)
            )
        )
    return out


def page() -> str:
    """docs/cost.md."""
    bandwidths = {card.lower(): f"{rate / 1e12:g}" for card, rate in BANDWIDTH.items()}
    out = [HEAD.format(words=WORDS, rate=RATE / 1e12, reached=REACHED / 1e12, **bandwidths)]
    for shape, cells in CELLS.items():
        for task, cell in cells.items():
            out += table(shape, task, cell)
    return "\n".join([*out, *waits(), *measured()]) + "\n"
