"""`layers`: which layers' attention outputs must be aligned, and how few are enough?"""

import json
from dataclasses import replace
from pathlib import Path

from ia2mini.cli.main import progress
from ia2mini.engine.options import THIRDS, Options
from ia2mini.report.summary import (LABELS, average, grouped, interval, paired)
from ia2mini.study.study import compare
from ia2mini.engine.subject import Subject

from .effect import tasks_of
from .report import RESULTS, Line, Result, difference, newest

MATCHED = ("ia2", "ridge")
FIGURE = Path(__file__).parents[1] / "docs" / "layers.png"
PARTS = {"classification": "toy tasks, embedded model", "relations": "real relations, SmolLM2-135M"}
COLORS = {"ia2": "#0072b2", "ridge": "#5a48a0"}


def bands(depth: int) -> dict[str, tuple[str, ...]]:
    """Name -> `--layers`: all, the thirds, and 1, 2, 4 … layers in even steps, of a model of `depth` layers."""
    found: dict[str, tuple[str, ...]] = {"all": (), **{name.replace("-", " "): (name,) for name in THIRDS}}
    counts = [2**power for power in range(5) if 2**power < depth]
    for count in counts:
        spaced = [(2 * i + 1) * depth // (2 * count) for i in range(count)]
        found[f"{count} of {depth}"] = tuple(map(str, spaced))
    return found


def layers(subject: Subject, options: Options, part: str, data: Path | None = None, matched=MATCHED) -> Result:
    """What IA2 (and its closed form) before SFT gains over SFT where only some layers are aligned."""
    depth = subject.model.config.num_hidden_layers
    about = f"{subject.name} of {depth} layers, {part}: {options.sets} sets, {options.eval_rows} evaluation rows"
    result, cells = Result("layers", f"{about}; rates chosen by dev loss", []), []
    for band, chosen in bands(depth).items():
        controls = ("base", "icl", "sft") * (band == "all")
        methods = (*controls, *(name for first in matched for name in (first, f"{first}-sft")))
        asked = replace(options, layers=chosen, methods=methods)
        document, kept = compare(tasks_of(part, data), subject, asked, Path("runs"), bar=progress)
        for cell in document["cells"]:
            if not cell["ood"]:
                method = cell["method"]
                cells.append(cell | {"method": method if method in controls else f"{method}, {band}"})
        result.remarks.append(f"{band}: {kept}, {sum(document['seconds'].values()):.0f} s in all")
    for (n,), mine in grouped(cells, "n").items():
        for row in average(mine):
            rates, name = {"% accuracy": 100 * row["acc_mean"], "asim": row["asim_mean"]}, row["method"]
            first, _, band = name.partition("-sft, ")
            if band:
                gain, behind = paired(mine, "acc", name, "sft"), paired(mine, "acc", name, f"{first}-sft, all")
                numbers = {"gain": gain.mean, "low": gain.low, "high": gain.high}
                rates |= {f"points {key}": 100 * value for key, value in numbers.items()}
                said = f"{name} against all layers: {100 * behind.mean:+.1f}{interval(behind, 100, '.1f')}"
                said += f"; against SFT {difference(gain, 100, '.1f')}"
                result.remarks.append(f"{part}, N = {n}: {said}")
            result.lines.append(Line(f"{part}, N = {n}", name, rates=rates))
    return result


def draw(folder: Path = RESULTS, figure: Path = FIGURE) -> None:
    """The gain over SFT against the band, from the newest kept result of each part; intervals of 95 %."""
    from matplotlib.figure import Figure

    found = [json.loads(path.read_text())["results"] for path in newest("*-layers-*.json", folder).values()]
    panels = grouped([line for results in found for result in results for line in result["lines"]], "what")
    drawn = Figure(figsize=(7, 3.2), layout="constrained")
    for axis, ((what,), lines) in zip(drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        names = [line["stack"].partition("-sft, ")[2] for line in lines if "points gain" in line["rates"]]
        names = list(dict.fromkeys(names))
        for shift, first in zip((-0.12, 0.12), MATCHED):
            mine = [line["rates"] for line in lines if line["stack"].startswith(f"{first}-sft, ")]
            gain, low, high = ([rates[f"points {key}"] for rates in mine] for key in ("gain", "low", "high"))
            ends = [[g - a for g, a in zip(gain, low)], [b - g for g, b in zip(gain, high)]]
            places = [place + shift for place in range(len(mine))]
            look = {"fmt": "o", "ms": 4, "color": COLORS[first], "capsize": 2, "label": LABELS[f"{first}-sft"]}
            axis.errorbar(places, gain, yerr=ends, **look)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        part, _, n = what.partition(", ")
        axis.set_title(f"{PARTS.get(part, part)}, {n}", fontsize=9)
    drawn.axes[0].set_ylabel("points of accuracy over SFT")
    drawn.axes[0].legend(frameon=False)
    figure.parent.mkdir(exist_ok=True)
    drawn.savefig(figure, dpi=200, metadata={"Software": None})
