"""The paper's numbers (all tables but 8, in paper.csv) beside a study's, and its Table 8 of several studies."""

import csv
import math
from dataclasses import asdict
from pathlib import Path

from .. import UsageError
from ..engine.intervals import PairedTest, paired_test
from ..engine.options import BETAS, RATES, Options
from ..engine.select import grouped
from ..files import finite

FIELDS = ("model", "n", "adapter", "labels", "task", "eval", "method")
SAME = ("layers", "sets", "epochs", "patience", "batch_size", "eval_rows", "soft_k")


def departures(document: dict) -> list[str]:
    """The options, as they are typed, by which the runs of a study, or of joined ones, are not those of the paper."""
    usual = finite(asdict(Options()))  # as a document has them
    found = []
    for config in (document.get("studies") or {"": document["config"]}).values():
        for name in SAME:
            if finite(config[name]) != usual[name]:
                found.append(f"--{name.replace('_', '-')}")
        if config["rates"] and tuple(config["rates"]) != RATES[config["adapter"]]:
            found.append("--rates")
        if config["betas"] and tuple(config["betas"]) not in BETAS.values():
            found.append("--betas")
        if "draw" in config:
            found.append("another teacher")
    return list(dict.fromkeys(found))


def add_paper(document: dict) -> int:
    """Add a field `paper` ("accuracy / ECE") to each cell that the paper has, too; returns their number.

    None where `departures` finds an option that the paper did not use.
    """
    config = document["config"]
    if departures(document):
        return 0
    with (Path(__file__).parent / "paper.csv").open(encoding="utf-8") as file:
        known = {tuple(row[field] for field in FIELDS): row for row in csv.DictReader(file)}
    found = 0
    for cell in document["cells"]:
        labels = config["labels"] if cell["method"] in ("sft", "ia2-sft") else ""
        model = cell["model"].split("--")[-1].lower()
        about = {**cell, "labels": labels, "adapter": cell["adapter"] or "", "model": model}
        row = known.get(tuple(str(about[field]) for field in FIELDS))
        if row:
            cell["paper"] = " / ".join(filter(None, (row["acc"], row["ece"])))
            found += 1
    return found


def table_8(document: dict) -> list[tuple[str, int, str, str, PairedTest]]:
    """The paper's Table 8 of a study or joined ones: lines of (kind, N, metric, choice of the rate, test).

    A pair is one set on one evaluation, of SFT and IA2→SFT with LoRA on true answers; those of all models, tasks and
    evaluations are pooled. Differences are what IA2→SFT has gained: accuracy, or ECE that it lost.
    """
    lines: list[tuple] = []
    if document["config"]["labels"] != "truth":
        return lines
    for kind, metrics in (("single-token", ("acc", "ece")), ("multi-token", ("acc",))):
        mine = []
        for cell in document["cells"]:
            labelled = cell["ece_mean"] is not None
            compared = cell["adapter"] == "lora" and cell["method"] in ("sft", "ia2-sft")
            if compared and labelled == ("ece" in metrics):
                mine.append(cell)
        for (n, by), some in sorted(grouped(mine, "n", "selected_by").items()):
            for metric in metrics:
                lines.append((kind, n, metric, by, pooled(some, metric)))
    return lines


def write_table_8(document: dict) -> str:
    """Table 8 as text. Raises UsageError where no cell belongs in it."""
    found = table_8(document)
    if not found:
        wanted = "SFT and IA2→SFT with LoRA on true answers"
        raise UsageError(f"no cells of {wanted}; Table 8 compares these")
    lines = [f"{'task':<14}{'metric':<8}{'rate by':<9}{'N':>4}{'t':>9}{'p':>12}{'pairs':>7}"]
    for kind, n, metric, by, test in found:
        tested = f"{test.t:>9.4f}{test.p:>12.4g}"
        if math.isnan(test.p):
            tested = f"{'–':>9}{'–':>12}"
        lines.append(f"{kind:<14}{metric:<8}{by:<9}{n:>4}{tested}{test.pairs:>7}")
    shared = "pairs of one evaluation share its rows: not independent"
    return "\n".join([*lines, f"A pair is one set on one evaluation; {shared}."])


def pooled(cells: list[dict], metric: str) -> PairedTest:
    """IA2→SFT against SFT over every set of every evaluation that both have."""
    ours: list[float] = []
    theirs: list[float] = []
    for pair in grouped(cells, "model", "task", "eval").values():
        by_method = {cell["method"]: cell[metric] for cell in pair}
        if len(by_method) == 2:
            ours += by_method["ia2-sft"]
            theirs += by_method["sft"]
    return paired_test(theirs, ours) if metric == "ece" else paired_test(ours, theirs)
