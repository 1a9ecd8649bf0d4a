"""From the records of runs to the cells of the tables: means and deviations over sets at the chosen rate."""

from statistics import fmean, stdev

from ..engine.select import chosen, grouped

METRICS = {  # metric: as the head of its column has it
    "acc": "accuracy (%) ↑", "ece": "ECE ↓", "ece_null": "(null)", "nll": "NLL ↓", "brier": "Brier ↓", "asim": "asim ↑",
    "ece_mass": "ECE, mass ↓", "acc_labels": "accuracy among labels (%) ↑", "ece_labels": "ECE among labels ↓",
    "smooth_ece": "smooth ECE ↓", "risk_coverage": "risk-coverage ↓", "nll_labels": "NLL among labels ↓",
    "nll_dev": "NLL, dev temperature ↓", "nll_left_out": "NLL, left out ↓", "nll_oracle": "NLL, oracle ↓",
    "overconfidence": "confidence − accuracy", "tokens": "tokens a query",
}  # fmt: skip


def summarise(records: list[dict], select: str = "dev") -> list[dict]:
    """The cells of the table, at the rate chosen by `select` ("both": two cells)."""
    cells = []
    for group in grouped(records, "task", "n", "method", "eval", "adapter").values():
        choices = ("dev", "eval") if select == "both" else (select,)
        if group[0]["rate"] is None:  # base and ICL
            choices = (None,)
        for by in choices:
            rate, beta = chosen(group, by) if by else (None, None)
            runs = grouped(group, "rate", "beta")[rate, beta]
            cells.append(make_cell(runs, by, rate, beta))
    return cells


def make_cell(runs: list[dict], by: str | None, rate: float | None, beta: float | None) -> dict:
    """One method on one evaluation, from the records of its runs at one rate, one a set."""
    cell = {key: runs[0][key] for key in ("task", "eval", "ood", "model", "n", "method", "adapter")}
    cell["sets"] = len(runs)
    cell["selected_by"] = by
    cell["rate"] = rate
    cell["beta"] = beta
    for metric in METRICS:
        values = [run.get(metric) for run in runs]
        known = [value for value in values if value is not None]
        cell[metric] = values
        cell[f"{metric}_mean"] = fmean(known) if known else None
        cell[f"{metric}_std"] = deviation(known)
    if runs[0].get("reliability"):
        bins = zip(*(run["reliability"] for run in runs))
        cell["reliability"] = [[sum(values) for values in zip(*parts)] for parts in bins]
    cell["asim_layers"] = [fmean(layer) for layer in zip(*(run["asim_layers"] for run in runs))]
    return cell


def deviation(values: list[float]) -> float | None:
    """Standard deviation of a sample, divided by n - 1; None of fewer than two values."""
    return stdev(values) if len(values) > 1 else None
