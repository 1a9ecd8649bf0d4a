"""`gain`: what tells beforehand whether IA2 will help? A figure from the kept results of `effect` and `fit`."""

import json
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

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
        lines = [
            line for result in json.loads(path.read_text())["results"] for line in result["lines"]
        ]
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
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for axis in (left, right):
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for group, some in groups.items():
        bars = None
        if group != "fit":  # its points have no interval
            bars = [[p.gain - p.low for p in some], [p.high - p.gain for p in some]]
        look = {"fmt": "o", "ms": 4, "color": GROUPS[group], "lw": 0.8, "label": labels[group]}
        axis = right if group == "fit" else left
        axis.errorbar([p.lead for p in some], [p.gain for p in some], bars, **look)
        axis.legend(fontsize=7, frameon=False)
    left.set(xlabel="ICL over SFT, evaluation rows (points)", ylabel="IA2→SFT over SFT (points)")
    right.set(xlabel="ICL over SFT, cross-validation (points)")
    drawn.savefig(figure, dpi=200, metadata={"Software": None})
