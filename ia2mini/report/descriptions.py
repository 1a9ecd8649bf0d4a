"""Numbers that a figure shows and no table has, in words: for the alt text."""

import numpy as np

from ..engine.options import method_name
from ..engine.select import grouped


def asim_layers(view: dict) -> str:
    """The layers where each method is most and least similar to ICL."""
    said = []
    known = [cell for cell in view["cells"] if cell.get("asim_layers")]
    for (method,), cells in grouped(known, "method").items():
        if method == "icl":
            continue
        mean = np.mean([cell["asim_layers"] for cell in cells], axis=0)
        high = f"{mean.max():.2f} in layer {mean.argmax()}"
        said.append(
            f"{method_name(method)} from {mean.min():.2f} in layer {mean.argmin()} to {high}"
        )
    return ", ".join(said)


def reliability(view: dict) -> str:
    """The mean confidence and accuracy of each method."""
    said = []
    known = [cell for cell in view["cells"] if cell.get("reliability")]
    for (method,), cells in grouped(known, "method").items():
        rows, confidences, right = np.sum([cell["reliability"] for cell in cells], axis=(0, 1))
        sure = f"{100 * confidences / rows:.1f} % sure"
        said.append(f"{method_name(method)} {sure}, {100 * right / rows:.1f} % right")
    return "; ".join(said)


def overlap(view: dict) -> str:
    """The overlap of each pair of methods."""
    pairs: dict[tuple, list[dict]] = {}
    for record in view["overlap"]:
        pairs.setdefault(tuple(record["methods"]), []).append(record)
    said = []
    for pair, records in pairs.items():
        mean = np.mean([record["overlap"] for record in records])
        names = " and ".join(map(method_name, pair))
        said.append(f"{names} {mean:.2f} (chance {records[-1]['chance']:.2f})")
    return ", ".join(said)
