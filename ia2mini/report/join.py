"""Several finished studies as one: their cells in one set of tables, tests and figures."""

from pathlib import Path

from .. import UsageError
from ..engine.select import grouped
from ..files import read_json

LISTS = ("cells", "runs", "training", "overlap", "samples")  # of a results document
FREE = {  # options in which joined studies may differ: each is told apart in the tables, or changes no number
    "adapter", "alpha", "betas", "checkpoint", "device", "dtype", "evals", "methods", "model", "n", "pools", "rank",
    "rates", "targets", "tasks", "templates",
}  # fmt: skip
SAME_CELL = ("model", "task", "n", "method", "eval", "adapter", "selected_by")


def join(folders: list[Path]) -> dict:
    """The results documents of finished studies as one document.

    Raises UsageError for a folder that is none, and for studies that do not belong together: other options than
    model, adapter, tasks, N and methods differ, or the same cell has two results.
    """
    documents = [read_results(folder) for folder in folders]
    check_options(folders, documents)
    joined = {key: [] for key in LISTS}
    joined["adapters"] = []
    for folder, document in zip(folders, documents):
        for key in LISTS:
            joined[key] += document[key]
        joined["adapters"] += [str(folder / name) for name in document["adapters"]]
    joined["cells"] = without_repeats(joined["cells"])
    joined["seconds"] = add_up([document["seconds"] for document in documents])
    joined["peak_memory_bytes"] = max(document["peak_memory_bytes"] for document in documents)
    joined["config"] = join_configs([document["config"] for document in documents])
    joined["versions"] = documents[0]["versions"]
    return joined


def read_results(folder: Path) -> dict:
    """The results of a finished study. Raises UsageError."""
    path = folder / "results.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no results.json there; give folders of finished `ia2mini run`s")
    document = read_json(path)
    for key in (*LISTS, "adapters", "seconds", "config", "versions", "peak_memory_bytes"):
        if key not in document:
            raise UsageError(f"{path}: no {key!r} in it; it is not the results of an `ia2mini run` of this version")
    return document


def check_options(folders: list[Path], documents: list[dict]) -> None:
    """Raises UsageError for an option in which studies differ though their tables do not show it."""
    first = documents[0]["config"]
    for folder, document in zip(folders[1:], documents[1:]):
        config = document["config"]
        for option in sorted((first.keys() | config.keys()) - FREE):
            mine = config.get(option)
            if mine != first.get(option):
                both = f"{option} = {first.get(option)!r} in {folders[0]} and {mine!r} in {folder}"
                raise UsageError(f"{both}: these studies do not belong together")


def without_repeats(cells: list[dict]) -> list[dict]:
    """Each cell once: studies of several adapters have the same base and ICL. UsageError where its results differ."""
    found = []
    for key, same in grouped(cells, *SAME_CELL).items():
        for other in same[1:]:
            if other["acc"] != same[0]["acc"]:
                where = ", ".join(f"{name} {value}" for name, value in zip(SAME_CELL, key) if value is not None)
                raise UsageError(f"two different results of one cell ({where}): these studies do not belong together")
        found.append(same[0])
    return found


def add_up(seconds: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in seconds:
        for stage, took in one.items():
            total[stage] = total.get(stage, 0.0) + took
    return total


def join_configs(configs: list[dict]) -> dict:
    """What the studies have in common, and of other options the list of their values."""
    joined = {}
    for option, value in configs[0].items():
        values = [config.get(option) for config in configs]
        different = [v for i, v in enumerate(values) if v not in values[:i]]
        joined[option] = value if len(different) == 1 else different
    return joined
