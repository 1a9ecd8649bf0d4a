"""Choose the learning rate (and β) that is reported for a method (protocol section 4)."""

import math
from statistics import fmean

RateAndBeta = tuple[float | None, float | None]


def grouped(rows: list[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Group rows by their values of some fields, in order."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row.get(field) for field in fields)
        found.setdefault(key, []).append(row)
    return found


def chosen(records: list[dict], by: str) -> RateAndBeta:
    """(rate, β) of one method's records: lowest mean dev loss ("dev"), or highest mean accuracy ("eval")."""
    configs = grouped(records, "rate", "beta")

    def cost(record: dict) -> float:
        value = -record["acc"] if by == "eval" else record["dev_loss"]
        if value is None or math.isnan(value):  # a run that diverged
            return math.inf
        return value

    def mean_cost(config: RateAndBeta) -> float:
        return fmean(map(cost, configs[config]))

    return min(configs, key=mean_cost)


def at_config(records: list[dict], config: RateAndBeta) -> list[int]:
    """The indices of the records with this (learning rate, β)."""
    found = []
    for r, record in enumerate(records):
        if (record["rate"], record["beta"]) == config:
            found.append(r)
    return found


def runs_to_score(records: list[dict], select: str) -> list[int]:
    """The indices of the runs to score: with "dev" those at the chosen learning rate (and β), else all.

    Runs at a learning rate that failed in some set are left out: it cannot be chosen.
    """
    if select == "dev":
        return at_config(records, chosen(records, "dev"))
    failed = set()
    for record in records:
        if not math.isfinite(record["dev_loss"]):
            failed.add((record["rate"], record["beta"]))
    return [r for r, record in enumerate(records) if (record["rate"], record["beta"]) not in failed]
