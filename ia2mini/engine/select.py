"""Which learning rate (and β) of a method is reported (protocol section 4)."""

import math
from statistics import fmean

from ..train import Trained


def grouped(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    """The rows by their values of some fields, in order."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row.get(field) for field in fields)
        found.setdefault(key, []).append(row)
    return found


def chosen(records: list[dict], by: str) -> tuple[float | None, float | None]:
    """(rate, β) of one method's records: lowest mean dev loss ("dev"), or highest mean accuracy ("eval")."""

    def cost(record: dict) -> float:
        value = -record["acc"] if by == "eval" else record["dev_loss"]
        return math.inf if value is None or math.isnan(value) else value  # a run that diverged

    def mean_cost(config: tuple) -> float:
        return fmean(map(cost, configs[config]))

    configs = grouped(records, "rate", "beta")
    return min(configs, key=mean_cost)


def at_config(records: list[dict], config: tuple[float | None, float | None]) -> list[int]:
    """Which of a method's records, in order, have this (rate, β)."""
    return [r for r, record in enumerate(records) if (record["rate"], record["beta"]) == config]


def reported(records: list[dict], trained: Trained, sets: int, select: str) -> list[int]:
    """Which of a method's runs are scored: by "dev" those of the chosen rate (and β), else all.

    Not those of a rate that failed in some set: it cannot be chosen.
    """
    if select == "dev":
        return at_config(records, chosen(records, "dev"))
    whole = trained.dev_loss.isfinite().view(sets, -1).all(0)
    return whole.repeat(sets).nonzero()[:, 0].tolist()
