"""`cost`: docs/cost.md, what a cell of the paper's grid costs by its shapes, and what a CPU was measured to take."""

import json
from dataclasses import replace
from pathlib import Path

from ia2mini.cost import Cell, Cost, Pass

from .report import RESULTS
from .shapes import SHAPES, SST2_LENGTHS

PAGE = Path(__file__).parents[1] / "docs/cost.md"
RATE = 989e12  # dense bfloat16 FLOP/s of an H100 and an H200 (SXM), NVIDIA's data sheets
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, the same
REACHED = 790e12  # FLOP/s that large matrix products are said to reach; not measured here
WORDS = sum(SST2_LENGTHS) / len(SST2_LENGTHS)
METHODS = ("sft", "ia2", "ia2-sft")  # of `python -m bench cell`
LABELLED = Cell(query=WORDS, shown=3 * (WORDS + 2))
TEXTS = Cell(query=60, shown=3 * 182, answer=120, rows=(500, 500))
CELLS = {
    "qwen3-4b": {"sst2": LABELLED, "gsm8k": TEXTS},
    "llama-3.2-1b": {"sst2": LABELLED},
    "llama-3.2-3b": {"sciq_remap": replace(LABELLED, query=60, shown=3 * 62)},
    "llama-3.2-1b-instruct": {"gsm8k": TEXTS},
}
HEAD = """# What a cell costs

Made by `python -m bench cost` from shapes (`ia2mini/cost.py`); `ia2mini run --dry-run` computes the same of any study.
**Nothing on this page was measured on a GPU.**

A cell: one task at N = 4, five sets × three rates, `base, icl, sft, ia2, ia2-sft`, all 50 epochs with a look at the dev
loss after each (early stopping makes it less), the runs of one rate scored on every evaluation. Rows are as long as
SST2's ({words:.0f} tokens), sciq_remap's (60, assumed) or gsm8k's (60 and 120 of answer, roughly, on two evaluations of
500 rows).

- TFLOP: what matrix products and attention need, without padding; a test compares it with `torch.utils.flop_counter`.
- GB: a frozen matrix read once a pass (4,096 tokens; in training a step of all runs), inputs and outputs of matrix
  products once, in bfloat16.
- Kernels: operations of PyTorch's eager mode in bfloat16; a test counts those of a layer. CUDA graphs replay them,
  `--compile` fuses some.
- H100, H200: the least seconds, the larger of TFLOP at {rate:.0f} TFLOP/s (the peak of dense bfloat16) and GB at {h100}
  or {h200} TB/s.
- s at {reached:.0f}: the same at the {reached:.0f} TFLOP/s that large matrix products are said to reach, on an H100.

Where memory is short, runs are trained in groups, by themselves: two groups read the matrices twice, checkpointing
(`--checkpointing`) computes the blocks' forward pass again, which is the dearer of the two in every cell below. A
single run that does not fit is checkpointed by itself.
"""


def steps(config, cell: Cell) -> str:
    """The least seconds of a step of SFT on an H100: all runs at once, in two groups, and checkpointed."""
    rows = cell.sets * cell.configs * min(cell.n, cell.batch)
    step = Pass(rows, cell.length, rows * cell.answer, True, True, cell.rank)
    half = replace(step, rows=rows / 2, positions=step.positions / 2, times=2)
    forward = replace(step, head=False, backward=False).cost(config)
    ways = {"at once": step.cost(config), "in two groups": half.cost(config)}
    ways["checkpointed"] = ways["at once"] + forward
    said = (f"{number(1e3 * cost.seconds(RATE, BANDWIDTH['H100']))} ms {way}" for way, cost in ways.items())
    return f"A step of SFT of all runs, at the least on an H100: {', '.join(said)}."


def line(name: str, costs: list[Cost]) -> str:
    """A line of a table: stages one after another."""
    whole = sum(costs, Cost())
    machines = [(RATE, BANDWIDTH["H100"]), (RATE, BANDWIDTH["H200"]), (REACHED, BANDWIDTH["H100"])]
    spent = [sum(cost.seconds(*machine) for cost in costs) for machine in machines]
    entries = [whole.flops / 1e12, whole.bytes / 1e9, whole.kernels / 1e3, whole.tokens / 1e3, *spent]
    return f"| {name} | " + " | ".join(map(number, entries)) + " |"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(shape: str, task: str, cell: Cell) -> list[str]:
    """The stages of a cell at a shape."""
    config = SHAPES[shape.removesuffix("-instruct")]
    stages = cell.stages(config)
    memory = cell.memory(config) / 1e9
    out = [
        f"## {shape}, {task}",
        "",
        f"In training at most {number(memory)} GB, all {cell.sets * cell.configs} runs. {steps(config, cell)}",
    ]
    out += ["", "| stage | TFLOP | GB | 1,000 kernels | 1,000 tokens | s, H100 | s, H200 |"]
    out[-1] += f" s at {REACHED / 1e12:.0f} |"
    out += ["|---|---|---|---|---|---|---|---|"]
    out += [line(name, [cost]) for name, cost in stages.items()]
    return [*out, line("**cell**", list(stages.values())), ""]


def measured(folder: Path = RESULTS) -> list[str]:
    """Our own steps and cells on a CPU, as kept in bench/results: what was reached in each stage."""
    out = ["## Measured on a CPU", "", "float32, two cores. A training step, from the newest whole bench:", ""]
    for result in json.loads(sorted(folder.glob("*-all-cpu.json"))[-1].read_text())["results"]:
        for entry in (e for e in result["lines"] if result["bench"] == "step" and e["stack"] == "us"):
            share, reached = f"{100 * entry['rates']['GEMM']:.0f} %", entry["rates"]["FLOP/s"] / 1e9
            shape = result["about"].partition(":")[0]
            out.append(f"- {shape}, {entry['what']}: {reached:.0f} GFLOP/s, {share} of that machine's matrix rate")
    out += ["", "The stages of `python -m bench cell`, which scores three methods:", ""]
    out += ["| shape | date | stage | GFLOP | s | GFLOP/s |", "|---|---|---|---|---|---|"]
    for shape in ("tiny", "100m"):
        document = json.loads(sorted(folder.glob(f"*-cell-{shape}-cpu.json"))[-1].read_text())
        lines = [entry for entry in document["results"][0]["lines"] if entry["stack"] == "us"]
        spent = {entry["what"].strip(): entry["timing"]["seconds"] for entry in lines}
        stages = replace(LABELLED, methods=METHODS, shown=3 * (WORDS + 1)).stages(SHAPES[shape], size=4)
        for kind, names in {"collect": ("collect",), "train": ("train", "look"), "evaluate": ("score",)}.items():
            work = sum(cost.flops for stage, cost in stages.items() if stage.partition(" ")[0] in names) / 1e9
            entries = [number(work), number(spent[kind]), number(work / spent[kind])]
            out.append(f"| {shape} | {document['date']} | {kind} | " + " | ".join(entries) + " |")
    return out


def page() -> str:
    """docs/cost.md."""
    bandwidths = {card.lower(): f"{rate / 1e12:g}" for card, rate in BANDWIDTH.items()}
    out = [HEAD.format(words=WORDS, rate=RATE / 1e12, reached=REACHED / 1e12, **bandwidths)]
    for shape, cells in CELLS.items():
        for task, cell in cells.items():
            out += table(shape, task, cell)
    return "\n".join([*out, *measured()]) + "\n"
