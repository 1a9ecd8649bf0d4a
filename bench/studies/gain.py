"""`gain`: what tells beforehand whether IA2 will help? A figure from the kept results of `effect` and `fit`."""

import json
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ia2mini.report.drawing import (
    FAINT,
    draw_interval,
    new_figure,
    save,
    set_heading,
    set_note,
    styled,
)

from ..report import RESULTS, Line, Result, newest

FIGURE = Path(__file__).parents[2] / "docs" / "gain.png"
GROUPS = {"toy": "#0072b2", "real": "#d55e00", "fit": "#009e73"}
CAPTIONS = {
    "toy": "toy tasks, embedded model",
    "real": "real relations, SmolLM2-135M",
    "fit": "generated tasks, by cross-validation",
}


class Point(NamedTuple):
    """A task at one N: how far ICL leads SFT, and what IA2 → SFT gains over SFT, in points of accuracy."""

    name: str
    lead: float
    gain: float
    low: float  # of the gain's 95 % interval; the gain itself where there is none
    high: float
    asim: float | None = None  # to the model with demonstrations, that IA2 reached


def points(folder: Path = RESULTS) -> dict[str, list[Point]]:
    """Toy and real tasks of the newest `effect` results, generated ones of the newest `fit` results."""
    found: dict[str, list[Point]] = {group: [] for group in GROUPS}
    for name, path in newest("*-cpu.json", folder).items():
        lines = []
        for result in json.loads(path.read_text()).get("results", []):
            lines += result["lines"]
        alike = {
            line["what"]: line["rates"].get("asim") for line in lines if line["stack"] == "ia2"
        }
        for line in lines:
            rates = line["rates"]
            if line["stack"] == "ia2-sft over sft":
                numbers = [rates[f"points {key}"] for key in ("lead", "gain", "low", "high")]
                point = Point(line["what"], *numbers, alike.get(line["what"]))
                found["real" if "relations" in name else "toy"].append(point)
            elif {"held out % icl", "% ia2-sft"} <= rates.keys():
                lead = rates["held out % icl"] - rates["held out % sft"]
                gain = rates["% ia2-sft"] - rates["% sft"]
                found["fit"].append(Point(line["what"], lead, gain, gain, gain))
    return {group: some for group, some in found.items() if some}


def gain(folder: Path = RESULTS, figure: Path = FIGURE) -> Result:
    """What IA2 → SFT gains over SFT against what ICL leads SFT by, with Spearman's rank correlation of each group."""
    result = Result("gain", f"points of accuracy; figure: {figure.name}", [])
    groups = points(folder)
    labels = {}
    for group, some in groups.items():
        for p in some:
            result.lines.append(
                Line(p.name, group, rates={"points lead": p.lead, "points gain": p.gain})
            )
        labels[group] = f"{CAPTIONS[group]}\n{correlated(result, CAPTIONS[group], some)}"
        for where, ahead in (("ICL ahead of SFT", True), ("ICL not ahead", False)):
            mine = [p.gain for p in some if (p.lead > 0) == ahead]
            if mine:
                result.ratios[f"{CAPTIONS[group]}, {where}: mean gain of {len(mine)}"] = fmean(mine)
    draw(groups, labels, figure)
    return result


def correlated(result: Result, caption: str, some: list[Point]) -> str:
    """How ICL's lead goes with the gain, in words; as remarks of the result that, and how asim does."""
    from scipy.stats import spearmanr

    gains = [p.gain for p in some]
    found = spearmanr([p.lead for p in some], gains)
    said = f"ρ = {found.statistic:.2f} (p = {found.pvalue:.1g}, {len(some)} points)"
    result.remarks.append(f"{caption}: ICL's lead and the gain, Spearman's {said}")
    if all(p.asim is not None for p in some):
        alike = spearmanr([p.asim for p in some], gains)
        of_asim = f"ρ = {alike.statistic:.2f} (p = {alike.pvalue:.1g})"
        result.remarks.append(
            f"{caption}: asim that IA2 reached and the gain, Spearman's {of_asim}"
        )
    return said


def draw(groups: dict[str, list[Point]], labels: dict[str, str], figure: Path) -> None:
    """A panel a group, all on the same axes."""
    with styled():
        drawn = new_figure(1.1 + 1.9 * len(groups))
        axes = drawn.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, (group, some) in zip(axes, groups.items()):
            draw_group(axis, some, GROUPS[group])
            axis.set_title(labels[group])
        axes[-1].set_xlabel("ICL over SFT (points of accuracy)")
        set_heading(drawn, "What IA2→SFT gains over SFT (points of accuracy)")
        note = "Lines: 95 % intervals over sets."
        if "fit" in groups:
            note += " Generated tasks have none; there ICL over SFT is known from cross-validation."
        set_note(drawn, note)
        save(drawn, figure)


def draw_group(axis, some: list[Point], color: str) -> None:
    """The points of one group with their intervals."""
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.axvline(0, color=FAINT, linewidth=0.8)
    for point in some:
        if point.low < point.high:
            draw_interval(axis, point.lead, point.low, point.high, color)
    leads = [point.lead for point in some]
    gains = [point.gain for point in some]
    axis.plot(leads, gains, "o", color=color, markersize=4, alpha=0.7, zorder=3)
