"""The finding of a study and of each figure in words: the page's first sentence, and alt texts."""

import numpy as np

from ..engine.options import label
from ..engine.select import grouped
from ..files import count
from .summary import average, evaluations, paired


def finding(cells: list[dict]) -> str:
    """The gain of IA2→SFT over SFT, or else the most accurate method."""
    gain = paired(cells, "acc")
    if gain is None:
        return best(cells)
    points = 100 * abs(gain.mean)
    said = f"IA2→SFT is {points:.1f} points of accuracy {'below' if gain.mean < 0 else 'above'} SFT"
    if gain.low == gain.low:  # not NaN
        said += f" (95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    if gain.p < 0.05:
        return f"{said}."
    return f"{said}, which may be chance."


def best(cells: list[dict]) -> str:
    """The most accurate method."""
    rows = [row for row in average(cells) if row["acc_mean"] is not None]
    if not rows:
        return "No method has a result on every evaluation."
    first = max(rows, key=lambda row: row["acc_mean"])
    seen = count(len(evaluations(cells)), "evaluation")
    return f"{label(first['method'])} is right most often: {percent(first['acc_mean'])}, mean of {seen}."


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def describe(figure: str, view: dict) -> str:
    """The alt text of a figure: its finding and numbers."""
    return f"{view['title']}. {DESCRIBED[figure](view)}"


def methods(view: dict) -> str:
    said = []
    for row in average(view["cells"]):
        if row["acc_mean"] is None:
            continue
        text = f"{label(row['method'])} {percent(row['acc_mean'])}"
        if row["ece_mean"] is not None:
            text += f" (ECE {row['ece_mean']:.2f})"
        said.append(text)
    return f"{finding(view['cells'])} Right: {', '.join(said)}."


def by_n(view: dict) -> str:
    """From the smallest N to the largest."""
    first = view["parts"][0]
    last = view["parts"][-1]
    before = {row["method"]: row["acc_mean"] for row in average(first["cells"])}
    said = []
    for row in average(last["cells"]):
        start = before.get(row["method"])
        if start is not None and row["acc_mean"] is not None:
            said.append(
                f"{label(row['method'])} from {percent(start)} to {percent(row['acc_mean'])}"
            )
    return f"Right, from N = {first['n']} to N = {last['n']}: {', '.join(said)}."


def asim_layers(view: dict) -> str:
    """The layers where each method is most and least similar to ICL."""
    said = []
    known = [cell for cell in view["cells"] if cell.get("asim_layers")]
    for (method,), cells in grouped(known, "method").items():
        if method == "icl":
            continue
        mean = np.mean([cell["asim_layers"] for cell in cells], axis=0)
        high = f"{mean.max():.2f} in layer {mean.argmax()}"
        said.append(f"{label(method)} from {mean.min():.2f} in layer {mean.argmin()} to {high}")
    return f"Likeness of attention outputs to those with demonstrations: {', '.join(said)}."


def asim_scatter(view: dict) -> str:
    """The methods in the order of their likeness, with their accuracy."""
    rows = []
    for row in average(view["cells"]):
        if row["asim_mean"] is not None and row["acc_mean"] is not None:
            rows.append(row)
    rows.sort(key=lambda row: row["asim_mean"])
    said = []
    for row in rows:
        said.append(f"{label(row['method'])} {row['asim_mean']:.2f} ({percent(row['acc_mean'])})")
    return f"From the least like the model with demonstrations to the most, with rows right: {', '.join(said)}."


def reliability(view: dict) -> str:
    """The mean confidence and accuracy of each method."""
    said = []
    known = [cell for cell in view["cells"] if cell.get("reliability")]
    for (method,), cells in grouped(known, "method").items():
        rows, confidences, right = np.sum([cell["reliability"] for cell in cells], axis=(0, 1))
        mean = percent(confidences / rows)
        said.append(f"{label(method)} {mean} sure, {percent(right / rows)} right")
    return f"On average: {'; '.join(said)}."


def overlap(view: dict) -> str:
    """The overlap of each pair of methods."""
    said = []
    for (pair,), records in grouped(
        [{**record, "pair": tuple(record["methods"])} for record in view["overlap"]], "pair"
    ).items():
        mean = np.mean([record["overlap"] for record in records])
        names = " and ".join(map(label, pair))
        said.append(f"{names} {mean:.2f} (chance {records[-1]['chance']:.2f})")
    return f"Share of LoRA's subspace in common: {', '.join(said)}."


DESCRIBED = {
    "methods": methods,
    "by_n": by_n,
    "asim_layers": asim_layers,
    "asim_scatter": asim_scatter,
    "reliability": reliability,
    "overlap": overlap,
}
