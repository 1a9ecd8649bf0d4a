"""The paper's numbers (all tables but 8, in paper.csv) beside a study's, and its Table 8 of several studies."""

import csv
from pathlib import Path

from .. import UsageError
from ..engine.options import BETAS, RATES, Options
from ..metrics import PairedTest, paired_test
from .summary import grouped

FIELDS = ("model", "n", "adapter", "labels", "task", "eval", "method")
SAME = ("teacher", "layers", "sets", "epochs", "patience", "batch_size", "eval_rows", "unlabelled", "soft_k")


def departures(config: dict) -> list[str]:
    """The options of a study, as they are typed, by which its runs are not those of the paper."""
    usual = Options()
    found = []
    for name in SAME:
        value, paper = config[name], getattr(usual, name)
        if isinstance(paper, tuple):
            value = tuple(value)
        if value != paper:
            found.append(f"--{name.replace('_', '-')}")
    trained = config.get("adapters") or {config["adapter"][0]: config}
    for name, about in trained.items():
        kind = name.split(" ")[0]
        if tuple(about["rates"]) not in ((), RATES[kind]):
            found.append("--rates")
    if config["betas"] and tuple(config["betas"]) not in BETAS.values():
        found.append("--betas")
    return list(dict.fromkeys(found))


def add_paper(document: dict) -> int:
    """Give each cell of a study that the paper has too a field `paper`, "accuracy / ECE"; how many there are.

    None where `departures` finds an option that the paper did not use.
    """
    config = document["config"]
    if departures(config):
        return 0
    with (Path(__file__).parent / "paper.csv").open(encoding="utf-8") as file:
        known = {tuple(row[field] for field in FIELDS): row for row in csv.DictReader(file)}
    found = 0
    for cell in document["cells"]:
        labels = config["labels"] if cell["method"] in ("sft", "ia2-sft") else ""
        model = cell["model"].split("--")[-1].lower()
        about = cell | {"labels": labels, "adapter": cell["adapter"] or "", "model": model}
        if row := known.get(tuple(str(about[field]) for field in FIELDS)):
            cell["paper"] = " / ".join(filter(None, (row["acc"], row["ece"])))
            found += 1
    return found


def table_8(documents: dict[str, dict]) -> list[tuple[str, int, str, str, PairedTest]]:
    """The paper's Table 8 of several studies (name -> results document): lines of (kind, N, metric, choice, test).

    A pair is one set on one evaluation, of SFT and IA2→SFT with LoRA on true answers; those of all models, tasks and
    evaluations are pooled. Differences are what IA2→SFT has gained: accuracy, or ECE that it lost. Raises UsageError
    for two studies with the same cell.
    """
    cells: dict[tuple, dict] = {}
    origin: dict[tuple, str] = {}
    for name, document in documents.items():
        if document["config"]["labels"] != "truth":
            continue
        for cell in document["cells"]:
            key = tuple(cell[field] for field in ("model", "task", "eval", "n", "selected_by", "method"))
            if cell["adapter"] != "lora" or cell["method"] not in ("sft", "ia2-sft"):
                continue
            if key in cells:
                raise UsageError(f"{name} and {origin[key]} both hold {' · '.join(map(str, key))}: leave one out")
            cells[key], origin[key] = cell, name
    lines = []
    for kind, metrics in (("single-token", ("acc", "ece")), ("multi-token", ("acc",))):
        mine = [c for c in cells.values() if (c["ece_mean"] is not None) == ("ece" in metrics)]
        for (n, by), some in sorted(grouped(mine, "n", "selected_by").items()):
            for metric in metrics:
                lines.append((kind, n, metric, by, pooled(some, metric)))
    return lines


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
