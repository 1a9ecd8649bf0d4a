"""docs/rivals.png: the accuracy of every rival with its interval, from a kept result of `python -m bench rivals`."""

import json
import math
from pathlib import Path
from statistics import fmean

from ia2mini.engine.intervals import mean_interval, share_interval
from ia2mini.report.drawing import (
    COLORS,
    OTHER,
    ChartRow,
    draw_rows,
    keep_whole,
    new_figure,
    save,
    set_heading,
    set_note,
    styled,
)

from .report import RESULTS, newest
from .rivals_page import TITLES, Table
from .studies.fit import REAL, SOME
from .studies.rivals import NAMES

FIGURE = Path(__file__).parents[1] / "docs/rivals.png"
SHOWN = ("base", "icl", "sft", "ia2-sft", "hidden-sft", "shipped", "setfit", "embedding")
SHORT = {"embedding": "embedding +\nlogistic regression"}
# after Okabe and Ito, like the others
RIVALS = {"shipped": "#000000", "setfit": "#cc79a7", "embedding": "#009e73"}
LINE = 0.24  # inches


def number_of_lines(result: dict) -> int:
    return len(result["lines"])


def draw(folder: Path = RESULTS, figure: Path = FIGURE) -> bool:
    """Draw the newest result of the model with most fits; False where none is kept."""
    results = []
    for path in newest("*-rivals-*.json", folder).values():
        results += json.loads(path.read_text(encoding="utf-8"))["results"]
    if not results:
        return False
    result = max(results, key=number_of_lines)
    table = Table(result["lines"])
    shown = [name for name in SHOWN if NAMES[name] in table.rivals]
    with styled():
        drawn = new_figure(1.2 + len(table.tasks) * (0.35 + LINE * (len(shown) + 1)))
        axes = drawn.subplots(len(table.tasks), 1, sharex=True, squeeze=False)[:, 0]
        for axis, task in zip(axes, table.tasks):
            draw_rows(axis, [chart_row(table, name, task) for name in shown])
            axis.set_title(TITLES.get(task, task))
            keep_whole(axis, "x", 0, 100)
            axis.set_xticks([0, 50, 100])
        axes[-1].set_xlabel("accuracy on new rows (%)")
        few = table.sizes[0]
        many = table.sizes[-1]
        model = result["about"].partition(":")[0]
        set_heading(drawn, f"{many} rows a class to learn from; {model}")
        over = "new rows" if len(table.cells(table.tasks[0], many)) == 1 else "draws"
        note = f"Lines: 95 % intervals over {over}."
        if few != many:
            note += f" Upright marks: {few} a class."
        set_note(drawn, note)
        save(drawn, figure)
    return True


def chart_row(table: Table, name: str, task: str) -> ChartRow:
    """A rival on one data set: with the most rows a class, marked with the fewest."""
    values = table.values(NAMES[name], "% accuracy", task, table.sizes[-1])
    mean, low, high = interval(values, task)
    color = RIVALS.get(name, COLORS.get(name, OTHER))
    row = ChartRow(SHORT.get(name, NAMES[name]), color, mean, low, high, f"{mean:.1f}")
    few = table.values(NAMES[name], "% accuracy", task, table.sizes[0])
    if few and len(table.sizes) > 1:
        row.mark = fmean(few)
    return row


def interval(values: list[float], task: str) -> tuple[float, float | None, float | None]:
    """Mean accuracy (%) with its 95 % interval: of one draw over its new rows (Clopper-Pearson), else over draws."""
    if len(values) > 1:
        mean, low, high = mean_interval(values)
        return (mean, None, None) if math.isnan(low) else (mean, low, high)
    labels = REAL[task][2]
    rows = SOME // len(labels) * len(labels)
    right = round(values[0] / 100 * rows)
    share, low, high = share_interval(right, rows)
    return 100 * share, 100 * low, 100 * high
