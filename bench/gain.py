"""`gain`: what tells beforehand whether IA2 will help? A figure from the kept results of `effect` and `fit`."""

import json
from pathlib import Path
from typing import NamedTuple

from .report import RESULTS, Line, Result, newest

FIGURE = Path(__file__).parents[1] / "docs" / "gain.png"
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
        lines = [line for result in json.loads(path.read_text())["results"] for line in result["lines"]]
        alike = {line["what"]: line["rates"].get("asim") for line in lines if line["stack"] == "ia2"}
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
    from matplotlib.figure import Figure
    from scipy.stats import spearmanr

    result, groups = Result("gain", f"points of accuracy; figure: {figure.name}", []), points(folder)
    drawn = Figure(figsize=(7, 3.4), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for axis in axes:
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
    for group, some in groups.items():
        axis, color = axes[int(group == "fit")], GROUPS[group]
        lead, more = ([getattr(point, key) for point in some] for key in ("lead", "gain"))
        found = spearmanr(lead, more)
        said = f"ρ = {found.statistic:.2f} (p = {found.pvalue:.1g}, {len(some)} points)"
        bars = None if group == "fit" else [[p.gain - p.low for p in some], [p.high - p.gain for p in some]]
        axis.errorbar(lead, more, bars, fmt="o", ms=4, color=color, lw=0.8, label=f"{CAPTIONS[group]}\n{said}")
        result.lines += [Line(p.name, group, rates={"points lead": p.lead, "points gain": p.gain}) for p in some]
        result.remarks.append(f"{CAPTIONS[group]}: ICL's lead and the gain, Spearman's {said}")
        if all(point.asim is not None for point in some):
            alike = spearmanr([point.asim for point in some], more)
            said = f"ρ = {alike.statistic:.2f} (p = {alike.pvalue:.1g})"
            result.remarks.append(f"{CAPTIONS[group]}: asim that IA2 reached and the gain, Spearman's {said}")
        for sign, where in ((1, "ICL ahead of SFT"), (-1, "ICL not ahead")):
            mine = [p.gain for p in some if (p.lead > 0) == (sign > 0)]
            if mine:
                result.ratios[f"{CAPTIONS[group]}, {where}: mean gain of {len(mine)}"] = sum(mine) / len(mine)
    axes[0].set(xlabel="ICL over SFT, evaluation rows (points)", ylabel="IA2→SFT over SFT (points)")
    axes[1].set(xlabel="ICL over SFT, cross-validation (points)")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(figure, dpi=200, metadata={"Software": None})
    return result
