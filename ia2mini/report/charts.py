"""The figures of a study or a fit: charts of means, lines over N or layers, diagrams of calibration.

A figure of a study is a function of a matplotlib Figure and a view (`summary.views`). It draws and returns the heading;
None if the view has no data for it.
"""

import math
from itertools import product

import numpy as np

from ..engine.options import method_name
from ..engine.select import grouped
from ..files import plural
from ..fitting.sentence import NAMES, with_interval
from ..study.table import METRICS, deviation
from .drawing import (
    COLORS,
    FAINT,
    LINE_OF_TEXT,
    OTHER,
    OTHER_SFT,
    ChartRow,
    draw_interval,
    draw_rows,
    keep_whole,
    name_ends,
    new_figure,
    panels,
    set_note,
)
from .summary import average

DRAWN_METRICS = {"acc": 100, "ece": 1}  # metric: the factor that it is shown with
LEAST = 5  # rows of a bin of confidence that say something
PANEL = 1.5  # inches that a panel of lines is high, at least
ROW = 0.24  # inches of a line of a chart
DIAGRAMS_A_ROW = 3
SMALLEST_DOT = 6  # square points of area
LARGEST_DOT = 150  # of a bin that holds every row


def by_method(cells: list[dict], field: str) -> dict[str, list[dict]]:
    """The cells that have the field, of each method."""
    known = [cell for cell in cells if cell.get(field) is not None]
    return {method: mine for (method,), mine in grouped(known, "method").items()}


def by_pair(overlaps: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The records of overlap of each pair of methods."""
    found: dict[tuple, list[dict]] = {}
    for record in overlaps:
        found.setdefault(tuple(record["methods"]), []).append(record)
    return found


def known_metrics(cells: list[dict]) -> list[str]:
    return [name for name in DRAWN_METRICS if by_method(cells, f"{name}_mean")]


def color_of(method: str) -> str:
    if method not in COLORS and method.endswith("-sft"):  # from a loss of one's own
        return OTHER_SFT
    return COLORS.get(method, OTHER)


def spread_over_sets(cells: list[dict]) -> str:
    """A note on what the line through a point means."""
    sets = max(cell["sets"] for cell in cells)
    if sets == 1:
        return "One set, so no deviation."
    return f"Lines: one standard deviation over {sets} sets to either side."


def set_scale(axis, metric: str, which: str) -> None:
    """Set the axis: accuracy from 0 to 100, ECE from 0, wider if something is drawn beyond."""
    keep_whole(axis, which, 0, 100 if metric == "acc" else 0)
    if metric == "acc":
        axis.set(**{f"{which}ticks": [0, 50, 100]})


def methods(figure, view: dict) -> str | None:
    """One line for each method: its mean and standard deviation over sets."""
    means = average(view["cells"])
    metrics = known_metrics(means)
    if not metrics:
        return None
    axes = panels(figure, 1.4 + ROW * len(means), 1, len(metrics), sharey=True)
    for axis, metric in zip(axes, metrics):
        draw_rows(axis, [chart_row(mean, metric) for mean in means])
        set_scale(axis, metric, "x")
        axis.set_title(METRICS[metric])
    note = spread_over_sets(view["cells"])
    if "ece" in metrics:
        note += " Upright marks: the ECE that perfect calibration would show."
    set_note(figure, note)
    return f"Methods, mean of {plural(means[0]['evaluations'], 'evaluation')}"


def chart_row(row: dict, metric: str) -> ChartRow:
    """A row of `average` as a line of the chart."""
    factor = DRAWN_METRICS[metric]
    drawn = ChartRow(method_name(row["method"]), color_of(row["method"]))
    mean = row.get(f"{metric}_mean")
    if mean is None:
        return drawn
    drawn.mean = factor * mean
    drawn.text = f"{drawn.mean:.1f}" if metric == "acc" else f"{drawn.mean:.2f}"
    half = row.get(f"{metric}_std")
    if half is not None:
        drawn.low = factor * (mean - half)
        drawn.high = factor * (mean + half)
    drawn.mark = row.get(f"{metric}_null_mean")
    return drawn


def by_n(figure, view: dict) -> str:
    """Lines of the means over N with their deviations over sets: a panel a metric, in and out of distribution."""
    metrics = known_metrics(view["cells"])
    sides = sorted({cell["ood"] for cell in view["cells"]})
    drawn = {cell["method"] for cell in view["cells"]}
    height = panel_height(len(drawn))
    shown = list(product(sides, metrics))
    axes = panels(figure, 1.2 + (height + 0.6) * len(shown), len(shown))
    sizes = [part["n"] for part in view["parts"]]
    for axis, (ood, metric) in zip(axes, shown):
        draw_over_n(axis, view["parts"], ood, metric, height)
        where = "out of distribution" if ood else "in distribution"
        axis.set_title(f"{METRICS[metric]}, {where}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
    axes[-1].set_xlabel("N, training rows of a set")
    set_note(figure, spread_over_sets(view["cells"]))
    return "Methods over N"


def panel_height(names: int) -> float:
    """The height in inches of a panel with this many names beside it."""
    return max(PANEL, LINE_OF_TEXT * (names + 1))


def draw_over_n(axis, parts: list[dict], ood: bool, metric: str, height: float) -> None:
    """One panel of `by_n`."""
    factor = DRAWN_METRICS[metric]
    rows = []
    for part in parts:
        cells = [cell for cell in part["cells"] if cell["ood"] == ood]
        rows += [{**row, "n": part["n"]} for row in average(cells)]
    lines = by_method(rows, f"{metric}_mean")
    ends = []
    for shift, (method, mine) in zip(shifts(len(lines)), lines.items()):
        color = color_of(method)
        x = [row["n"] * 2**shift for row in mine]
        y = [factor * row[f"{metric}_mean"] for row in mine]
        axis.plot(x, y, marker="o", color=color, label=method_name(method), zorder=3)
        for at, middle, row in zip(x, y, mine):
            if row[f"{metric}_std"] is not None:
                half = factor * row[f"{metric}_std"]
                draw_interval(axis, at, middle - half, middle + half, color)
        ends.append((x[-1], y[-1], method_name(method), color))
    set_scale(axis, metric, "y")
    name_ends(axis, ends, height)


def shifts(lines: int) -> np.ndarray:
    """How far each of several lines is moved aside, so that their intervals do not hide one another."""
    return 0.05 * (np.arange(lines) - (lines - 1) / 2)


def asim_layers(figure, view: dict) -> str | None:
    """Lines of asim over layers. ICL is left out: its likeness to itself is 1."""
    others = [cell for cell in view["cells"] if cell["method"] != "icl"]
    lines = by_method(others, "asim_layers")
    if not lines:
        return None
    height = 1.4 * panel_height(len(lines))
    (axis,) = panels(figure, 1.5 + height)
    ends = []
    for shift, (method, mine) in zip(shifts(len(lines)), lines.items()):
        color = color_of(method)
        values = np.array([cell["asim_layers"] for cell in mine], float)  # [evaluations, L]
        mean = values.mean(0)
        layers = np.arange(values.shape[1]) + shift
        axis.plot(layers, mean, marker="o", color=color, label=method_name(method), zorder=3)
        if len(values) > 1:
            half = values.std(0, ddof=1)
            draw_interval(axis, layers, mean - half, mean + half, color)
        ends.append((layers[-1], mean[-1], method_name(method), color))
    keep_whole(axis, "y", 0, 1)
    axis.set(xlabel="layer", title="asim with ICL")
    axis.xaxis.get_major_locator().set_params(integer=True)
    name_ends(axis, ends, height)
    seen = plural(len(next(iter(lines.values()))), "evaluation")
    set_note(figure, f"Mean of {seen}; lines: one standard deviation over them to either side.")
    return "Likeness to ICL by layer"


def asim_scatter(figure, view: dict) -> str | None:
    """One dot for each evaluation (hollow: out of distribution), and a diamond at a method's mean."""
    cells = [cell for cell in view["cells"] if cell.get("asim_mean") is not None]
    metrics = known_metrics(cells)
    if not metrics:
        return None
    height = panel_height(len(by_method(cells, "asim_mean")))
    axes = panels(figure, 1.4 + (height + 0.5) * len(metrics), len(metrics))
    for axis, metric in zip(axes, metrics):
        ends = []
        for method, mine in by_method(cells, f"{metric}_mean").items():
            color = color_of(method)
            x = np.array([cell["asim_mean"] for cell in mine])
            y = DRAWN_METRICS[metric] * np.array([cell[f"{metric}_mean"] for cell in mine])
            faces = ["white" if cell["ood"] else color for cell in mine]
            axis.scatter(
                x.mean(), y.mean(), 70, marker="D", color=color, edgecolor="white", zorder=3
            )
            axis.scatter(x, y, 14, facecolor=faces, edgecolor=color, zorder=4)
            ends.append((x.mean(), y.mean(), method_name(method), color))
        set_scale(axis, metric, "y")
        keep_whole(axis, "x", 0, 1)
        name_ends(axis, ends, height)
        axis.set_title(METRICS[metric])
    axes[-1].set_xlabel("asim with ICL")
    set_note(figure, "Diamonds: means. Dots: evaluations, hollow ones out of distribution.")
    return "Methods by their likeness to ICL"


def reliability(figure, view: dict) -> str | None:
    """One diagram for each method: the share of right answers by confidence, in bins of at least LEAST rows."""
    diagrams = by_method(view["cells"], "reliability")
    if not diagrams:
        return None
    lines = math.ceil(len(diagrams) / DIAGRAMS_A_ROW)
    axes = panels(figure, 1.3 + 1.7 * lines, lines, DIAGRAMS_A_ROW, sharex=True, sharey=True)
    for axis in axes[len(diagrams) :]:
        axis.set_visible(False)
    for place, (axis, (method, mine)) in enumerate(zip(axes, diagrams.items())):
        draw_reliability(axis, mine, color_of(method))
        axis.set_title(method_name(method))
        if place % DIAGRAMS_A_ROW == 0:
            axis.set_ylabel("accuracy (%)")
        if place + DIAGRAMS_A_ROW >= len(diagrams):
            axis.set_xlabel("confidence (%)")
            axis.tick_params(labelbottom=True)
    note = f"Dots: bins of at least {LEAST} rows, larger ones hold more. Dashed: as often right as confident."
    set_note(figure, note)
    return "Accuracy by confidence"


def draw_reliability(axis, cells: list[dict], color: str) -> None:
    """One method's diagram, over its evaluations and sets; both axes in percent, and no dot over the frame."""
    bins = np.sum([cell["reliability"] for cell in cells], axis=0)
    rows, confidences, right = bins.T  # of each bin: rows, sum of confidences, right rows
    full = rows >= LEAST
    x = 100 * confidences[full] / rows[full]
    y = 100 * right[full] / rows[full]
    area = SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * rows[full] / rows.sum()
    axis.plot([0, 100], [0, 100], color=FAINT, linestyle="--", linewidth=1, zorder=1)
    axis.plot(x, y, color=color, linewidth=1, zorder=2)
    axis.scatter(x, y, area, color=color, zorder=3)
    ticks = [0, 50, 100]
    axis.set(xlim=(-12, 112), ylim=(-12, 112), aspect="equal", xticks=ticks, yticks=ticks)


def overlap(figure, view: dict) -> str | None:
    """One line for each pair of methods: the mean over tasks with its deviation over sets, and the value of chance."""
    rows = []
    for pair, records in by_pair(view["overlap"]).items():
        sets = np.mean([record["overlap"] for record in records], axis=0)  # over tasks
        mean = float(sets.mean())
        row = ChartRow(" · ".join(map(method_name, pair)), COLORS["ia2-sft"], mean)
        half = deviation(sets.tolist())
        if half is not None:
            row.low = mean - half
            row.high = mean + half
        row.text = f"{mean:.2f}"
        row.mark = records[-1]["chance"]
        rows.append(row)
    if not rows:
        return None
    (axis,) = panels(figure, 1.5 + ROW * len(rows))
    draw_rows(axis, rows)
    keep_whole(axis, "x", 0, 0)
    axis.set_title("share of the subspace in common")
    set_note(figure, f"{spread_over_sets(view['cells'])} Upright marks: chance.")
    return "Overlap of the methods' LoRA subspaces"


def candidates_of(report: dict) -> list[tuple[str, str, dict]]:
    """What `fit` tried, and the whole choice as "shipped": method, name and measures of each.

    The whole choice: each fold's rows are answered by what the other folds choose.
    """
    found = []
    for method, measures in report["candidates"].items():
        found.append((method, NAMES.get(method, method), measures))
    if report["chosen"]:
        name = "as chosen" if report["chosen"] == "base" else NAMES["shipped"]
        found.append(("shipped", name, report["shipped"]))
    return found


def draw_candidates(report: dict):
    """What `fit` tried, as a matplotlib Figure: held-out rows right in percent, with their 95 % intervals."""
    rows = []
    for method, name, measures in candidates_of(report):
        color = COLORS["ia2-sft"] if method == "shipped" else color_of(method)
        mean, low, high = measures["acc"]
        row = ChartRow(name, color, 100 * mean)
        row.text = with_interval(measures["acc"]).replace(" %", "")
        if low is not None and not math.isnan(low):
            row.low = 100 * low
            row.high = 100 * high
        rows.append(row)
    figure = new_figure(1.2 + ROW * len(rows))
    axis = figure.subplots()
    draw_rows(axis, rows)
    set_scale(axis, "acc", "x")
    agreeing = "as with the context" if "kl" in report else "accuracy"
    axis.set_title(f"{plural(report['rows'], 'held-out row')}: {agreeing} (%)")
    set_note(figure, "Lines and brackets: 95 % intervals (Clopper-Pearson).")
    return figure
