"""The cells of the tables, from the records of runs: means and deviations over sets at the chosen learning rate."""

import math
from statistics import fmean, stdev

from ..engine.select import chosen, grouped

METRICS = {  # metric: heading of its column
    "acc": "accuracy (%) ↑",
    "ece": "ECE ↓",
    "ece_null": "(null)",
    "nll": "NLL ↓",
    "brier": "Brier ↓",
    "asim": "asim ↑",
    "ece_mass": "ECE, mass ↓",
    "acc_labels": "accuracy among labels (%) ↑",
    "ece_labels": "ECE among labels ↓",
    "smooth_ece": "smooth ECE ↓",
    "risk_coverage": "risk-coverage ↓",
    "nll_labels": "NLL among labels ↓",
    "nll_dev": "NLL, dev temperature ↓",
    "nll_left_out": "NLL, left out ↓",
    "nll_oracle": "NLL, oracle ↓",
    "overconfidence": "confidence − accuracy",
    "tokens": "tokens a query",
}
SHARED = ("task", "eval", "ood", "model", "n", "method", "adapter")  # by all records of a cell


def summarise(records: list[dict], select: str = "dev") -> list[dict]:
    """The cells of the table at the learning rate chosen by `select` ("both": two cells each)."""
    cells = []
    for group in grouped(records, "task", "n", "method", "eval", "adapter").values():
        choices = ("dev", "eval") if select == "both" else (select,)
        if group[0]["rate"] is None:  # base and ICL
            choices = (None,)
        for by in choices:
            rate, beta = chosen(group, by) if by else (None, None)
            runs = grouped(group, "rate", "beta")[rate, beta]
            cells.append(table_cell(runs, by, rate, beta))
    return cells


def table_cell(runs: list[dict], by: str | None, rate: float | None, beta: float | None) -> dict:
    """One method on one evaluation, from the records of its runs at one learning rate, one per set."""
    cell = {key: runs[0][key] for key in SHARED}
    cell["sets"] = len(runs)
    cell["selected_by"] = by
    cell["rate"] = rate
    cell["beta"] = beta
    for metric in METRICS:
        values = [number_or_nothing(run.get(metric)) for run in runs]
        known = [value for value in values if value is not None]
        cell[metric] = values
        cell[f"{metric}_mean"] = fmean(known) if known else None
        cell[f"{metric}_std"] = deviation(known)
    if runs[0].get("reliability"):
        diagrams = [run["reliability"] for run in runs]
        cell["reliability"] = [sums(bins) for bins in zip(*diagrams)]
    by_run = [run["asim_layers"] for run in runs]
    cell["asim_layers"] = [fmean(layer) for layer in zip(*by_run)]
    return cell


def number_or_nothing(value: float | None) -> float | None:
    """A metric; None for NaN, which one that leaves a row out is where there is no other row."""
    return None if value is None or math.isnan(value) else value


def sums(bins: tuple[list[float], ...]) -> list[float]:
    """Add up the numbers of one bin over several diagrams."""
    return [sum(values) for values in zip(*bins)]


def deviation(values: list[float]) -> float | None:
    """Standard deviation of a sample, divided by n - 1; None of fewer than two values."""
    return stdev(values) if len(values) > 1 else None
