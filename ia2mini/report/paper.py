"""The paper's numbers (Tables 1 to 4, 6, 7 and 9 to 20, in paper.csv) beside a study's where the cell is the same."""

import csv
from pathlib import Path

FIELDS = ("model", "n", "adapter", "labels", "task", "eval", "method")


def add_paper(document: dict) -> int:
    """Give each cell of a study that the paper has too a field `paper`, "accuracy / ECE"; how many there are."""
    with (Path(__file__).parent / "paper.csv").open(encoding="utf-8") as file:
        known = {tuple(row[field] for field in FIELDS): row for row in csv.DictReader(file)}
    config, found = document["config"], 0
    for cell in document["cells"] if not any(config["unlabelled"]) else ():
        labels = config["labels"] if cell["method"] in ("sft", "ia2-sft") else ""
        model = cell["model"].split("--")[-1].lower()
        about = cell | {"labels": labels, "adapter": cell["adapter"] or "", "model": model}
        if row := known.get(tuple(str(about[field]) for field in FIELDS)):
            cell["paper"] = " / ".join(filter(None, (row["acc"], row["ece"])))
            found += 1
    return found
