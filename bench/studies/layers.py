"""`layers`: which layers' attention outputs must be aligned, and how few are enough?"""

import json
from dataclasses import replace
from pathlib import Path

from ia2mini.cli.group import progress
from ia2mini.engine.options import LABELS, Options
from ia2mini.engine.select import grouped
from ia2mini.engine.subject import Subject
from ia2mini.report.summary import average, interval, paired
from ia2mini.study.study import compare

from ..report import RESULTS, Line, Result, difference, newest
from .effect import about, kept, tasks_of
from .reopened import RUNS

CONTROLS = ("base", "icl", "sft")
MATCHED = ("ia2", "ridge")
FIGURE = Path(__file__).parents[2] / "docs" / "layers.png"
PARTS = {"classification": "toy tasks, embedded model", "relations": "real relations, SmolLM2-135M"}
COLORS = {"ia2": "#0072b2", "ridge": "#5a48a0"}
MOST_SPACED = 16  # layers in even steps
APART = 0.12  # how far points of two methods stand from one another's middle


def bands(depth: int) -> dict[str, tuple[int, ...]]:
    """Name -> layers: all, the thirds, and 1, 2, 4 … layers in even steps, of a model of `depth` layers."""
    found: dict[str, tuple[int, ...]] = {"all": ()}
    for i, name in enumerate(("first third", "middle third", "last third")):
        found[name] = tuple(range(depth * i // 3, depth * (i + 1) // 3))
    count = 1
    while count < depth and count <= MOST_SPACED:
        found[f"{count} of {depth}"] = tuple(
            (2 * i + 1) * depth // (2 * count) for i in range(count)
        )
        count *= 2
    return found


def layers(
    subject: Subject, options: Options, part: str, data: Path | None = None, matched=MATCHED
) -> Result:
    """What IA2 (and its closed form) before SFT gains over SFT where only some layers are aligned."""
    depth = subject.model.config.num_hidden_layers
    aligned = about(subject, options, part).replace(
        subject.name, f"{subject.name} of {depth} layers", 1
    )
    result = Result("layers", f"{aligned}; rates chosen by dev loss", [])
    cells = []
    for band, chosen in bands(depth).items():
        methods = list(CONTROLS) if band == "all" else []
        for first in matched:
            methods += [first, f"{first}-sft"]
        asked = replace(options, layers=chosen, methods=tuple(methods))
        document, folder = compare(tasks_of(part, data), subject, asked, RUNS, bar=progress)
        for cell in document["cells"]:
            if not cell["ood"]:
                method = cell["method"]
                cells.append(
                    cell | {"method": method if method in CONTROLS else f"{method}, {band}"}
                )
        result.remarks.append(f"{band}: {kept(document, folder)}")
    for (n,), mine in grouped(cells, "n").items():
        for row in average(mine):
            rates = {"% accuracy": 100 * row["acc_mean"], "asim": row["asim_mean"]}
            if "-sft, " in row["method"]:
                rates.update(gained(result, f"{part}, N = {n}", mine, row["method"]))
            result.lines.append(Line(f"{part}, N = {n}", row["method"], rates=rates))
    return result


def gained(result: Result, where: str, cells: list[dict], name: str) -> dict[str, float]:
    """What alignment of some layers before SFT gains over SFT; and, as a remark, how far it is behind all layers."""
    first = name.partition("-sft, ")[0]
    gain = paired(cells, "acc", name, "sft")
    behind = paired(cells, "acc", name, f"{first}-sft, all")
    said = f"{name} against all layers: {100 * behind.mean:+.1f}{interval(behind, 100, '.1f')}"
    result.remarks.append(f"{where}: {said}; against SFT {difference(gain, 100, '.1f')}")
    numbers = {"gain": gain.mean, "low": gain.low, "high": gain.high}
    return {f"points {key}": 100 * value for key, value in numbers.items()}


def draw(folder: Path = RESULTS, figure: Path = FIGURE) -> None:
    """The gain over SFT against the band, from the newest kept result of each part; intervals of 95 %."""
    from matplotlib.figure import Figure

    lines = []
    for path in newest("*-layers-*.json", folder).values():
        for result in json.loads(path.read_text())["results"]:
            lines += result["lines"]
    panels = grouped(lines, "what")
    drawn = Figure(figsize=(7, 3.2), layout="constrained")
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((what,), mine) in zip(axes, panels.items()):
        draw_panel(axis, what, mine)
    axes[0].set_ylabel("points of accuracy over SFT")
    axes[0].legend(frameon=False)
    figure.parent.mkdir(exist_ok=True)
    drawn.savefig(figure, dpi=200, metadata={"Software": None})


def draw_panel(axis, what: str, lines: list[dict]) -> None:
    """The lines of one part at one N."""
    names = [
        line["stack"].partition("-sft, ")[2] for line in lines if "points gain" in line["rates"]
    ]
    names = list(dict.fromkeys(names))
    for shift, first in zip((-APART, APART), MATCHED):
        rates = [line["rates"] for line in lines if line["stack"].startswith(f"{first}-sft, ")]
        gains = [each["points gain"] for each in rates]
        below = [each["points gain"] - each["points low"] for each in rates]
        above = [each["points high"] - each["points gain"] for each in rates]
        places = [place + shift for place in range(len(rates))]
        look = {
            "fmt": "o",
            "ms": 4,
            "color": COLORS[first],
            "capsize": 2,
            "label": LABELS[f"{first}-sft"],
        }
        axis.errorbar(places, gains, yerr=[below, above], **look)
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    part, _, n = what.partition(", ")
    axis.set_title(f"{PARTS.get(part, part)}, {n}", fontsize=9)
