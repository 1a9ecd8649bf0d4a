"""`effect`: does IA2 → SFT beat SFT, and SFT begun again, on the embedded model? The paper's claims on the toy tasks, with tests."""

from pathlib import Path
from statistics import fmean

import torch
from ia2mini.models.checkpoint import load, locate
from safetensors.torch import load_file
from torch import Tensor

from ia2mini.adapters import LoRA, unpack
from ia2mini.cell import Options
from ia2mini.cli import progress
from ia2mini.experiment import Subject, compare
from ia2mini.metrics import paired_test, subspace_overlap
from ia2mini.tasks import find_task

from .report import Line, Result

CLASSES = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap")
SUMS = ("toy-sums", "toy-sums-short")
SIZES = (2, 4, 8, 16)
METHODS = ("base", "icl", "sft", "sft-sft", "ia2", "ia2-sft")
PAIRS = (("ia2", "ia2-sft"), ("sft", "ia2"), ("sft", "ia2-sft"), ("sft", "sft-sft"))


def effect(
    model: str = "tiny",
    sizes: tuple[int, ...] = SIZES,
    sets: int = 10,
    part: str = "all",
    eval_rows: int = 500,
    sum_rows: int = 100,
) -> Result:
    """All toy tasks at every N, or the `part` "classification" or "sums" (on `sum_rows` rows); goes on where an interrupted call was."""
    folder = locate(model)
    network, tokenizer = load(folder)
    subject = Subject(network, tokenizer, folder, "tiny", model)
    about = f"{model}: {sets} sets, {eval_rows} evaluation rows (sums {sum_rows}), rates chosen by dev loss"
    result = Result("effect", f"{about}; gains in points of accuracy, paired by task and set", [])
    for about, names, rows in (("classification", CLASSES, eval_rows), ("sums", SUMS, sum_rows)):
        if part not in ("all", about):
            continue
        options = Options(methods=METHODS, sets=sets, eval_rows=rows)
        document, kept = compare(
            [find_task(name) for name in names], sizes, subject, options, Path("runs"), bar=progress
        )
        for n in sizes:
            for ood in (False, True):
                compared(result, f"{about}, N = {n}{', out of distribution' if ood else ''}", document, n, ood)
            asims = {m: fmean(c["asim_mean"] for c in cells(document, n, m, False)) for m in METHODS if m != "icl"}
            order = " < ".join(f"{m} {value:.2f}" for m, value in sorted(asims.items(), key=lambda item: item[1]))
            result.remarks.append(f"{about}, N = {n}: asim with ICL {order}")
            overlaps(result, f"{about}, N = {n}", document, kept, n, names, LoRA(network))
        result.remarks.append(f"{about}: {kept}")
    return result


def cells(document: dict, n: int, method: str, ood: bool) -> list[dict]:
    """The cells of a method at N, one a task, at the rate chosen by dev loss."""
    wanted = (n, method, ood)
    return [
        c for c in document["cells"] if (c["n"], c["method"], c["ood"]) == wanted and c["selected_by"] in ("dev", None)
    ]


def compared(result: Result, what: str, document: dict, n: int, ood: bool) -> None:
    """Means of all methods, and the gain of IA2 → SFT over SFT and over SFT → SFT, paired over tasks and sets."""
    for method in METHODS:
        found = cells(document, n, method, ood)
        rates = {"% accuracy": 100 * fmean(c["acc_mean"] for c in found)}
        if found[0]["ece_mean"] is not None:
            rates["ECE"] = fmean(c["ece_mean"] for c in found)
        result.lines.append(Line(what, method, rates=rates))
    for metric, factor in (("acc", 100), ("ece", 1)):
        ours = values(document, n, "ia2-sft", ood, metric)
        if None in ours:
            continue
        for control in ("sft", "sft-sft"):
            test = paired_test(
                factor * torch.tensor(ours), factor * torch.tensor(values(document, n, control, ood, metric))
            )
            gain = f"{metric} {test.mean:+.3g}, 95 % [{test.low:+.3g}, {test.high:+.3g}], t = {test.t:.2f}, p = {test.p:.1e}"
            result.remarks.append(f"{what}: ia2-sft against {control}: {gain}, {len(ours)} pairs")
            result.ratios[f"{what}: {metric} gain over {control}"] = test.mean


def values(document: dict, n: int, method: str, ood: bool, metric: str) -> list[float]:
    return [value for cell in cells(document, n, method, ood) for value in cell[metric]]


def overlaps(
    result: Result, what: str, document: dict, kept: Path, n: int, names: tuple[str, ...], adapter: LoRA
) -> None:
    """Mean subspace overlap of LoRA's B between methods (paper Figure 4), every method at its chosen rate."""
    found = {pair: [] for pair in PAIRS}
    for name in names:
        theta: dict[str, Tensor] = {}
        for method in METHODS[2:]:
            (cell,) = [c for c in cells(document, n, method, False) if c["task"] == name]
            grid = [
                r["rate"]
                for r in document["runs"]
                if (r["task"], r["n"], r["method"], r["eval"]) == (name, n, method, name)
            ]
            at = torch.tensor([rate == cell["rate"] for rate in grid])
            theta[method] = load_file(kept / f"{name}-n{n}" / f"fit-{method}.safetensors")["theta"][at]
        for one, other in PAIRS:
            first, second = (unpack(theta[m], adapter.shapes) for m in (one, other))
            each = [
                subspace_overlap(first[key], second[key], adapter.rank).mean().item()
                for key in first
                if key.endswith(".B")
            ]
            found[one, other].append(fmean(each))
    for (one, other), overlap in found.items():
        result.ratios[f"{what}: subspace overlap {one} with {other}"] = fmean(overlap)
