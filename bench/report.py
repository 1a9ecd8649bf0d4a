"""What a bench says: a table for people, one JSON line for programs, a dated file if asked."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import click
import torch

from ia2mini.engine.intervals import LEAST_ROWS, PairedTest
from ia2mini.engine.store import versions
from ia2mini.files import finite, write_text
from ia2mini.report.summary import interval

from .timing import Timing

RESULTS = Path(__file__).parent / "results"


@dataclass
class Line:
    """One measured thing under one stack: "us", "(a)", "(b)" or another named contestant."""

    what: str
    stack: str
    timing: Timing | None = None
    unit: str = ""  # what one run of the timing was: "run and step", "cell" …
    # tokens/s, runs/hour, FLOP/s, share of the GEMM ceiling, bytes …
    rates: dict[str, float] = field(default_factory=dict)
    note: str = ""  # extrapolated from what, and the like


@dataclass
class Result:
    """A bench's lines, under which conditions, and its ratios: name -> value."""

    bench: str
    about: str
    lines: list[Line]
    ratios: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        """One more line; it is shown at once, as all of them are at the end."""
        self.lines.append(line)
        tell(said(line))

    def remark(self, text: str) -> None:
        self.remarks.append(text)
        tell(text)

    def ratio(self, name: str, slow: Timing, fast: Timing) -> None:
        self.ratios[name] = slow.seconds / fast.seconds


def amount(name: str, value: float) -> str:
    """A rate in words: 152 GFLOP/s, 87 % of GEMM, 1.2 GB, 3,400 tokens/s."""
    if name == "GEMM":
        return f"{100 * value:.0f} % of GEMM"
    if name.startswith("FLOP"):
        return f"{value / 1e9:,.1f} GFLOP/s"
    if name.startswith("bytes"):
        text = f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:.1f} MB"
        return f"{text} {name[6:]}".strip()
    return f"{value:,.3g} {name}" if abs(value) < 100 else f"{value:,.0f} {name}"


def said(line: Line) -> str:
    spent = str(line.timing) if line.timing else ""
    rates = [amount(name, value) for name, value in line.rates.items()]
    return "  ".join([line.what, line.stack, spent, *rates])


def tell(text: str) -> None:
    """Show on stderr what has just been found, in the minutes before the table."""
    click.echo(f"  … {text}", err=True)


def show(result: Result) -> None:
    click.secho(f"\n{result.bench}", bold=True, nl=False)
    click.echo(f"  {result.about}")
    widths = [
        max([len(getattr(line, key)) for line in result.lines] or [0]) for key in ("what", "stack")
    ]
    for line in result.lines:
        spent = f"{line.timing}{' a ' + line.unit if line.unit else ''}" if line.timing else ""
        rates = " · ".join(amount(name, value) for name, value in line.rates.items())
        text = f"  {line.what:<{widths[0]}}  {line.stack:<{widths[1]}}  {spent:<38} {rates}"
        click.echo(text.rstrip() + (f"  ({line.note})" if line.note else ""))
    for name, value in result.ratios.items():
        click.echo(f"  {name}: {value:.3g}")
    for remark in result.remarks:
        click.echo(f"  {remark}")


def difference(test: PairedTest, factor: float, form: str) -> str:
    """A paired difference in words: "+3.1 (95 % +0.8 to +5.4, p = 0.015, d = 0.47), 30 pairs"."""
    few = ", too few for a test" if test.pairs < LEAST_ROWS else ""
    return f"{factor * test.mean:+{form}}{interval(test, factor, form)}, {test.pairs} pairs{few}"


def newest(pattern: str, folder: Path = RESULTS) -> dict[str, Path]:
    """Of the kept results that fit a pattern the newest of each name (without its date)."""
    return {path.name[len("2026-01-01-") :]: path for path in sorted(folder.glob(pattern))}


def hardware() -> dict:
    """The machine, in words and numbers."""
    name = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    found = {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        }
    return found


def finish(results: list[Result], command: str, save: bool, name: str | None = None) -> None:
    """Print the JSON line; with `save`, keep it and the machine in bench/results/<date>-<command>.json."""
    document = written(results, command)
    if save:
        click.echo(f"\nsaved in {keep(document, name)}")
    click.echo(json.dumps(document))


def written(results: list[Result], command: str) -> dict:
    """The results, what made them and the machine, as JSON has them."""
    import peft
    import transformers

    document = {
        "date": date.today().isoformat(),
        "command": command,
        "hardware": hardware(),
        "versions": versions()
        | {"transformers": transformers.__version__, "peft": peft.__version__},
        "results": [asdict(result) for result in results],
    }
    return finite(document)


def keep(document: dict, name: str | None = None) -> Path:
    """Write a document into bench/results; the file."""
    words = (
        document["command"]
        .removeprefix("python -m bench")
        .replace("--save", "")
        .replace("--", "")
        .split()
    )
    name = name or "-".join(words) or "all"
    kind = document["hardware"].get("gpu", "cpu").replace(" ", "-")
    path = RESULTS / f"{document['date']}-{name}-{kind}.json"
    write_text(path, json.dumps(document, indent=1) + "\n")
    return path


# Of the largest value: how far rounding may take two stacks apart. In bfloat16 up to 1.8e-2 was seen, of 8 layers.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def agree(what: str, ours, theirs, tolerance: float = 1e-3) -> str:
    """Check that two stacks computed the same numbers, relative to their size, before either is timed.

    `tolerance`: see `TOLERANCE`. Returns a remark saying how closely.
    """
    ours = torch.as_tensor(ours).float().cpu()
    theirs = torch.as_tensor(theirs).float().cpu()
    assert ours.shape == theirs.shape, (
        f"{what}: shapes differ, {tuple(ours.shape)} and {tuple(theirs.shape)}"
    )
    gap = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
    assert gap <= tolerance, (
        f"{what}: the stacks differ by {gap:.1e} of the largest value, more than {tolerance:.0e}; nothing was timed"
    )
    return f"same {what} in both stacks, to {gap:.0e} of the largest value"
