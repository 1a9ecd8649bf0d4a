"""`layers`: which layers' attention outputs must be aligned, and how few are enough?"""

import json
import math
from dataclasses import replace
from pathlib import Path

from ia2mini.engine.options import METHOD_NAMES, Options
from ia2mini.engine.select import grouped
from ia2mini.engine.subject import Subject
from ia2mini.report.charts import ROW
from ia2mini.report.drawing import (
    COLORS,
    FAINT,
    ChartRow,
    draw_rows,
    keep_whole,
    new_figure,
    save,
    set_heading,
    set_note,
    styled,
)
from ia2mini.report.summary import average, interval, paired

from ..report import RESULTS, Line, Result, difference, newest
from .effect import about, studied
from .tasks import tasks_of

CONTROLS = ("base", "icl", "sft")
MATCHED = ("ia2", "ridge")
FIGURE = Path(__file__).parents[2] / "docs" / "layers.png"
PARTS = {"classification": "toy tasks, embedded model", "relations": "real relations, SmolLM2-135M"}
MOST_SPACED = 16  # layers in even steps


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
        document = studied(result, band, tasks_of(part, data), subject, asked)
        for cell in document["cells"]:
            if not cell["ood"]:
                method = cell["method"]
                cells.append(
                    cell | {"method": method if method in CONTROLS else f"{method}, {band}"}
                )
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
    """The gain over SFT of every band, from the newest kept result of each part; intervals of 95 %."""
    lines = []
    for path in newest("*-layers-*.json", folder).values():
        for result in json.loads(path.read_text())["results"]:
            lines += result["lines"]
    panels = {what: chart_rows(mine) for (what,), mine in grouped(lines, "what").items()}
    counts = [len(rows) for rows in panels.values()]
    figure.parent.mkdir(exist_ok=True)
    with styled():
        drawn = new_figure(1.1 + sum(0.5 + ROW * count for count in counts))
        axes = drawn.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
        )[:, 0]
        for axis, (what, rows) in zip(axes, panels.items()):
            part, _, n = what.partition(", ")
            axis.axvline(0, color=FAINT, linewidth=0.8)
            draw_rows(axis, rows)
            keep_whole(axis, "x", 0, 0)
            axis.set_title(f"{PARTS.get(part, part)}, {n}")
        set_heading(drawn, "Points of accuracy over SFT, by the layers that are aligned")
        set_note(drawn, "Lines: 95 % intervals over tasks and sets. k of L: in even steps.")
        save(drawn, figure)


def chart_rows(lines: list[dict]) -> list[ChartRow]:
    """A line of the chart for each band of layers and each method that aligned it."""
    gains = {}
    bands_in_order = {}
    for line in lines:
        first, _, band = line["stack"].partition("-sft, ")
        if "points gain" in line["rates"]:
            gains[band, first] = line["rates"]
            bands_in_order[band] = None
    rows = []
    for band in bands_in_order:
        for first in MATCHED:
            if (band, first) not in gains:
                continue
            gain, low, high = (
                gains[band, first][f"points {key}"] for key in ("gain", "low", "high")
            )
            if math.isnan(low):
                low = None
            name = f"{band}, {METHOD_NAMES[first + '-sft']}"
            rows.append(ChartRow(name, COLORS[f"{first}-sft"], gain, low, high, f"{gain:+.1f}"))
    return rows
