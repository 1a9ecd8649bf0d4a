"""From scores to the cells of the table: the metrics of a run, the choice of a rate, means and deviations over sets."""

from math import inf
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor

from . import metrics

METRICS = ("acc", "ece", "nll", "brier", "asim", "ece_mass", "acc_labels", "ece_labels")


def measure(scores: dict[str, Tensor], labels: list[int | None], scheme: str = "width") -> dict:
    """The metrics of one run on Q rows whose true `labels` are given; calibration only where answers are single tokens.

    `scores`: `asim` [L], `correct` [Q]; for single tokens also `confidence` [Q] of the top-1 token and `labels` [Q, C].
    `scheme`: bins of equal "width" or "mass" for `ece`. Source: protocol section 5.
    """
    layers = scores["asim"].tolist()
    found = {"acc": metrics.accuracy(scores["correct"]), "asim": sum(layers) / len(layers), "asim_layers": layers}
    if "labels" not in scores:
        return found | dict.fromkeys(("ece", "ece_mass", "nll", "brier", "acc_labels", "ece_labels", "reliability"))
    gold = torch.tensor(labels)
    probabilities, confidence, correct = scores["labels"], scores["confidence"], scores["correct"]
    among = probabilities / probabilities.sum(-1, keepdim=True)
    best = among.max(-1)
    return found | {
        "reliability": metrics.reliability(confidence, correct).tolist(),
        "ece": metrics.ece(confidence, correct, scheme=scheme),
        "ece_mass": metrics.ece(confidence, correct, scheme="mass"),
        "nll": metrics.nll(probabilities.gather(1, gold[:, None])[:, 0]),
        "brier": metrics.brier(probabilities, gold),
        "acc_labels": metrics.accuracy(best.indices == gold),
        "ece_labels": metrics.ece(best.values, best.indices == gold),
    }


def chosen(records: list[dict], by: str) -> tuple[float | None, float | None]:
    """(rate, β) of one method's records: lowest mean dev loss over sets (`by` "dev"), or highest mean accuracy ("eval", the paper's)."""
    means: dict[tuple, list[float]] = {}
    for record in records:
        dev_loss = inf if record["dev_loss"] is None else record["dev_loss"]  # a file's null is a run that diverged
        means.setdefault((record["rate"], record["beta"]), []).append(dev_loss if by == "dev" else -record["acc"])
    return min(means, key=lambda config: fmean(means[config]))


def summarise(records: list[dict], select: str = "dev") -> list[dict]:
    """The cells of the table: means and deviations over sets at the chosen rate; beside a choice by dev loss also the paper's."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in ("task", "n", "method", "eval")), []).append(record)
    cells = []
    for group in groups.values():
        trained = group[0]["rate"] is not None
        for by in (("dev", "eval") if select == "dev" else ("eval",)) if trained else (None,):
            rate, beta = chosen(group, by) if by else (None, None)
            runs = [record for record in group if (record["rate"], record["beta"]) == (rate, beta)]
            cell = {key: runs[0][key] for key in ("task", "eval", "ood", "model", "n", "method", "adapter")}
            cell |= {"sets": len(runs), "selected_by": by, "rate": rate, "beta": beta}
            for metric in METRICS:
                values = [record[metric] for record in runs]
                known = values[0] is not None
                cell |= {
                    f"{metric}_mean": fmean(values) if known else None,
                    f"{metric}_std": pstdev(values) if known else None,
                }
            if runs[0].get("reliability"):
                cell["reliability"] = np.sum([record["reliability"] for record in runs], 0).tolist()
            layers = [fmean(layer) for layer in zip(*(record["asim_layers"] for record in runs))]
            cells.append(
                cell | {"acc": [r["acc"] for r in runs], "ece": [r["ece"] for r in runs], "asim_layers": layers}
            )
    return cells
