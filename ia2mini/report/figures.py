"""Figures of a study, ready for a paper, and their captions; drawn with matplotlib where it is installed."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from .. import UsageError
from ..engine.options import LABELS
from ..engine.select import grouped
from ..files import count, write
from ..study.table import METRICS, deviation
from .summary import average, dashed, parts, title

# after Okabe and Ito, who chose them to be told apart by every eye; blue for IA2 and what follows it
COLORS = {
    "base": "#b0b0b0", "icl": "#404040", "sft": "#d55e00", "sft-sft": "#f0a070", "soft": "#e6b000",
    "soft-sft": "#a07800", "hidden": "#8fd0b0", "hidden-sft": "#3a8a60", "ridge": "#9a8fd0", "ridge-sft": "#5a48a0",
    "ia2": "#56b4e9", "sft-ia2": "#cc79a7", "ia2+sft": "#009e73", "ia2-sft": "#0072b2",
}  # fmt: skip
CAPTIONS = {  # in the order of the page
    "methods": "Means over evaluations, their deviation over sets; black: the ECE that perfect calibration would show.",
    "by_n": "The methods over N, the training rows of a set; bands: deviation over sets (paper Figures 5 and 6).",
    "asim_layers": "Likeness of attention outputs to those with demonstrations (asim; 1: the same), layer by layer.",
    "asim_scatter": "What likeness to the model with demonstrations brings; a point an evaluation (paper Figure 3).",
    "reliability": "Are confident answers right as often as they should be (dashed)? Larger dots: more rows.",
    "overlap": "Share of LoRA's subspace that two methods have in common, beside that of random ones (paper Figure 4).",
}
# so that a document gives the same bytes again
LEFT_OUT = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}
STYLE: dict = {  # parse_math: a $ in a task's name is a $
    "font.size": 8.5, "axes.titlesize": 8.5, "figure.titlesize": 8.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "savefig.dpi": 200,
    "grid.color": "#eeeeee", "lines.linewidth": 1.2, "errorbar.capsize": 2, "legend.frameon": False, "pdf.fonttype": 42,
    "svg.hashsalt": "ia2mini", "text.parse_math": False,
}  # fmt: skip
LEAST = 5  # rows of a bin of confidence that say something


def views(document: dict):
    """What is drawn of each model, adapter and choice of the rate: its parts; of the largest N, cells and overlaps."""
    found = grouped(parts(document), "by", "adapter", "model")
    choices, kinds, models = (list(dict.fromkeys(values)) for values in zip(*found))
    for (by, kind, model), mine in found.items():
        mine = sorted(mine, key=lambda part: part["n"])
        cells = mine[-1]["cells"]
        saved = []
        for record in document.get("overlap") or []:
            about = record["n"], record.get("adapter", kind), record.get("model", model)
            if by == choices[0] and about == (mine[-1]["n"], kind, model):
                saved.append(record)
        suffix = ""
        if len(models) > 1:
            suffix += f"-{dashed(model)}"
        if len(kinds) > 1:
            suffix += f"-{dashed(kind or '')}"
        if len(choices) > 1:
            suffix += f"-{by}"
        sizes = ", ".join(str(part["n"]) for part in mine)
        heading = title([cells[0] | {"n": sizes}, *cells], by)
        yield {"suffix": suffix, "parts": mine, "cells": cells, "overlap": saved, "title": heading}


def draw_figures(document: dict, folder: Path, formats: tuple[str, ...] = ("png",)) -> list[str]:
    """Draw a study into `folder`; file names, none without matplotlib. UsageError at once for an unknown format."""
    if unknown := [form for form in formats if form not in LEFT_OUT]:
        raise UsageError(
            f"--figures {unknown[0]}: unknown format; figures are written as {', '.join(LEFT_OUT)}"
        )
    try:
        from matplotlib import rc_context
    except ImportError:
        return []
    names = []
    with rc_context(STYLE):
        for view, name in ((view, name) for view in views(document) for name in CAPTIONS):
            for form in formats if (figure := draw(name, view)) else ():
                names.append(f"{name}{view['suffix']}.{form}")
                write(
                    folder / names[-1],
                    partial(figure.savefig, format=form, metadata={LEFT_OUT[form]: None}),
                )
    return names


def draw(name: str, view: dict):
    """The figure called `name` as a matplotlib Figure; None where the view has no data for it."""
    from matplotlib.figure import Figure

    figure, several = Figure(figsize=(7, 3.4), layout="constrained"), len(view["parts"]) > 1
    if name == ("methods" if several else "by_n") or (heading := DRAWN[name](figure, view)) is None:
        return None
    heading += f"; here N = {view['cells'][0]['n']}" if several and name != "by_n" else ""
    figure.suptitle(f"{heading}\n{view['title']}".replace(" · rate by", "\nrate by"), wrap=True)
    keys = {
        key: handle
        for axis in figure.axes
        for handle, key in zip(*axis.get_legend_handles_labels())
    }
    if lines := math.ceil(len(keys) / int(0.9 * figure.get_figwidth())):
        figure.legend(
            keys.values(), keys, loc="outside lower center", ncols=math.ceil(len(keys) / lines)
        )
    return figure


def by_method(cells: list[dict], field: str):
    """(label and colour, cells) of each method, of the cells that have the field."""
    for (method,), mine in grouped(
        [c for c in cells if c.get(field) is not None], "method"
    ).items():
        yield {"label": LABELS.get(method, method), "color": COLORS.get(method, "#777777")}, mine


def panels(figure, cells: list[dict], rows=(("", None),)):
    """(axis, metric, factor, value): for each (title, value) of `rows` accuracy, 0 to 100, and ECE from 0, if known."""
    metrics = [
        metric
        for metric in ("acc", "ece")
        if any(c.get(f"{metric}_mean") is not None for c in cells)
    ]
    figure.set_size_inches(7 if len(metrics) > 1 else 4.2, 1.4 + 2.2 * len(rows))
    grid = figure.subplots(len(rows), len(metrics) or 1, squeeze=False, sharey="col")
    for axis, (metric, heading, value) in zip(
        grid.flat, ((m, *row) for row in rows for m in metrics)
    ):
        axis.set(ylabel=METRICS[metric], title=heading)
        yield axis, metric, 100 if metric == "acc" else 1, value
    for axis, metric in zip(grid[0], metrics):
        axis.set_ylim(0, 100 if metric == "acc" else None)


def methods(figure, view: dict) -> str | None:
    """Bars of the means, with numbers."""
    rows = average(view["cells"])
    for axis, metric, factor, _ in panels(figure, rows):
        for x, (style, (row,)) in enumerate(styled := list(by_method(rows, f"{metric}_mean"))):
            mean, std, null = (
                factor * (row.get(f"{metric}_{k}") or 0) for k in ("mean", "std", "null_mean")
            )
            top, number = (
                (min(mean + std, 100), f"{mean:.1f}")
                if metric == "acc"
                else (mean + std, f"{mean:.2f}")
            )
            axis.bar(x, mean, yerr=[[min(std, mean)], [top - mean]], color=style["color"])
            if null:
                axis.hlines(
                    null, x - 0.45, x + 0.45, color="black", label="ECE if perfectly calibrated"
                )
            axis.annotate(
                number,
                (x, max(top, null)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axis.set_xticks(
            range(x + 1),
            [s["label"] for s, _ in styled],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
    return f"Methods, mean of {count(rows[0]['evaluations'], 'evaluation')}" if rows else None


def by_n(figure, view: dict) -> str:
    """Lines of the means over N with bands of the deviation over sets, in and out of distribution."""
    sides = [
        (("out of" if o else "in") + " distribution", o)
        for o in sorted({c["ood"] for c in view["cells"]})
    ]
    for axis, metric, factor, ood in panels(figure, view["cells"], sides):
        rows = [
            r | {"n": p["n"]}
            for p in view["parts"]
            for r in average([c for c in p["cells"] if c["ood"] == ood])
        ]
        for style, mine in by_method(rows, f"{metric}_mean"):
            n, mean, std = (
                np.array([row[k] or 0 for row in mine])
                for k in ("n", f"{metric}_mean", f"{metric}_std")
            )
            axis.plot(n, factor * mean, marker=".", clip_on=False, **style)
            band = factor * np.clip([mean - std, mean + std], 0, 1)
            axis.fill_between(n, *band, color=style["color"], alpha=0.15, lw=0)
        axis.set_xlabel("N, training rows of a set")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes := [part["n"] for part in view["parts"]], map(str, sizes))
    return "Methods over N"


def asim_layers(figure, view: dict) -> str | None:
    """Lines of asim over layers. ICL is left out: its likeness to itself is 1."""
    axis = figure.subplots()
    for style, mine in by_method([c for c in view["cells"] if c["method"] != "icl"], "asim_layers"):
        rows = np.array([c["asim_layers"] for c in mine], float)  # [evaluations, L]
        mean, layers = rows.mean(0), range(rows.shape[1])
        std = rows.std(0, ddof=1) if len(rows) > 1 else 0 * mean
        axis.plot(layers, mean, marker=".", clip_on=False, **style)
        axis.fill_between(layers, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
    axis.set(xlabel="layer", ylabel="asim with ICL", ylim=(min(0, axis.get_ylim()[0]), 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    return "Likeness to ICL by layer, mean and deviation over evaluations" if axis.lines else None


def asim_scatter(figure, view: dict) -> str | None:
    """A point an evaluation, hollow out of distribution, and a diamond at a method's mean."""
    cells = [c for c in view["cells"] if c.get("asim_mean") is not None]
    for axis, metric, factor, _ in panels(figure, cells):
        for style, mine in by_method(cells, f"{metric}_mean"):
            x, y = np.array([[c["asim_mean"], factor * c[f"{metric}_mean"]] for c in mine]).T
            axis.scatter(
                x.mean(), y.mean(), 80, marker="D", ec="white", clip_on=False, zorder=3, **style
            )
            faces = ["white" if c["ood"] else style["color"] for c in mine]
            axis.scatter(x, y, 16, fc=faces, ec=style["color"], clip_on=False, zorder=4)
        for label, mark in {
            "mean": "Dk",
            "in distribution": "ok",
            "out of distribution": "ow",
        }.items():
            axis.plot([], [], mark[0], mfc=mark[1], ms=4, color="black", label=label)
        axis.set_xlabel("asim with ICL")
    return "Methods by their likeness to ICL" if cells else None


def reliability(figure, view: dict) -> str | None:
    """Left accuracy over confidence, in bins of at least LEAST rows, dots by their number; right where the rows are."""
    (curves, where), start = figure.subplots(1, 2), 0.9
    for style, mine in by_method(view["cells"], "reliability"):
        # [bins, (rows, sum of confidence, right)]
        bins = np.sum([c["reliability"] for c in mine], axis=0)
        full, share = bins[:, 0] >= LEAST, bins[:, 0] / bins[:, 0].sum()
        x, y = (bins[full, 1:] / bins[full, :1]).T
        curves.plot(x, y, **style)
        curves.scatter(x, y, 6 + 120 * share[full], color=style["color"], alpha=0.8, clip_on=False)
        where.stairs(100 * share, np.linspace(0, 1, len(bins) + 1), color=style["color"])
        start = min([start, *np.floor(10 * x) / 10])
    curves.axline((0, 0), slope=1, color="#999999", ls="--", zorder=0)
    curves.set(xlabel="confidence", ylabel="accuracy", xlim=(start, 1), ylim=(0, 1))
    where.set(xlabel="confidence", ylabel="share of rows (%)", xlim=(start, 1), ylim=(0, 100))
    return f"Accuracy by confidence, in bins of at least {LEAST} rows" if where.patches else None


def overlap(figure, view: dict) -> str | None:
    """A bar a pair of methods: mean over tasks, deviation over sets of that mean; marks of chance."""
    pairs = {tuple(o["methods"]): o["chance"] for o in view["overlap"]}
    figure.set_size_inches(6, 1.6 + 0.24 * len(pairs))
    axis = figure.subplots()
    for y, (pair, chance) in enumerate(pairs.items()):
        # over tasks
        sets = np.mean(
            [o["overlap"] for o in view["overlap"] if tuple(o["methods"]) == pair], axis=0
        )
        name = " · ".join(LABELS.get(m, m) for m in pair)
        bar = axis.barh(name, sets.mean(), xerr=deviation(sets.tolist()), color=COLORS["ia2-sft"])
        axis.bar_label(bar, fmt="%.2f", padding=2, fontsize=7)
        axis.vlines(chance, y - 0.5, y + 0.5, color="black", ls="--", label="chance")
    axis.set(
        xlabel="share of the subspace in common", xlim=(0, None), ylim=(len(pairs) - 0.4, -0.6)
    )
    return "Overlap of the methods' LoRA subspaces" if pairs else None


DRAWN = dict(zip(CAPTIONS, (methods, by_n, asim_layers, asim_scatter, reliability, overlap)))
