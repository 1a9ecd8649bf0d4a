"""Join finished studies: one set of tables, tests and figures for all."""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean

from .. import UsageError
from ..engine.select import grouped
from ..files import is_there, read_json
from ..fitting.spec import is_number, is_text_or_none, is_whole_number, misfit
from ..study.table import METRICS, deviation

# options in which joined studies may differ: tables show them, they change no number, or `fixed` compares them
FREE = {
    "adapter", "alpha", "betas", "checkpoint", "device", "dtype", "evals", "loss", "methods", "model", "n", "pools",
    "rank", "rates", "targets", "tasks", "templates",
}  # fmt: skip
SAME_CELL = ("model", "task", "n", "method", "eval", "adapter", "selected_by")


def number_or_none(value, least: float = -1e300, most: float = 1e300) -> bool:
    return value is None or is_number(least, most)(value)


def share_or_none(value) -> bool:
    return number_or_none(value, 0, 1)


def is_of_adapter(value) -> bool:
    """Whether a value is the name of a folder within the study's own, as "adapters/sst2-n4-sft-set0"."""
    return isinstance(value, str) and value.startswith("adapters/") and ".." not in value


def are_seconds(value) -> bool:
    return isinstance(value, dict) and all(map(is_number(0, 1e300), value.values()))


CELL = {
    "model": str,
    "task": str,
    "eval": str,
    "ood": bool,
    "n": is_whole_number(1, 2**31),
    "method": str,
    "adapter": is_text_or_none,
    "selected_by": is_text_or_none,
    "sets": is_whole_number(1, 2**31),
    "rate": number_or_none,
    "beta": number_or_none,
    "asim_layers": [number_or_none],
}
for metric in METRICS:
    CELL[metric] = [share_or_none if metric in ("acc", "acc_labels") else number_or_none]
    CELL[f"{metric}_mean"] = number_or_none
    CELL[f"{metric}_std"] = number_or_none
OVERLAP = {
    "task": str,
    "n": int,
    "adapter": str,
    "methods": [str],
    "overlap": [number_or_none],
    "chance": number_or_none,
}
ANSWERED = {
    "prompt": str,
    "answer": str,
    "said": is_text_or_none,
    "confidence": number_or_none,
    "right": bool,
}
LISTS = {  # the lists of a results document, and the fields of their records
    "cells": [CELL],
    "runs": [dict],
    "training": [dict],
    "overlap": [OVERLAP],
    "samples": [{"task": str, "n": int, "prompt": str, "rows": [ANSWERED]}],
}
RESULTS = {
    **LISTS,
    "adapters": [is_of_adapter],
    "seconds": are_seconds,
    "peak_memory_bytes": int,
    "config": {
        "ia2mini": str,
        "model": str,
        "labels": str,
        "methods": [str],
    },
    "versions": dict,
}


def join(folders: list[Path]) -> dict:
    """The results documents of finished studies as one document; `studies` holds the options of each by its folder.

    Raises UsageError for a folder that is none, and for studies that do not belong together: other options than
    model, adapter, tasks, N and methods differ, or the same cell has two results.
    """
    documents = {str(folder): read_results(folder) for folder in folders}
    configs = {folder: document["config"] for folder, document in documents.items()}
    check_belonging(documents)
    joined: dict = {key: [] for key in (*LISTS, "adapters")}
    seconds: Counter = Counter()
    for folder, document in documents.items():
        about = {"model": document["cells"][0]["model"], "study": folder}
        for key in LISTS:
            joined[key] += [{**record, **about} for record in document[key]]
        joined["adapters"] += [f"{folder}/{name}" for name in document["adapters"]]
        seconds.update(document["seconds"])
    joined["cells"] = without_repeats(joined["cells"])
    joined["seconds"] = dict(seconds)
    joined["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in documents.values())
    joined["config"] = join_configs(list(configs.values()))
    joined["studies"] = configs
    joined["versions"] = documents[str(folders[0])]["versions"]
    return joined


def read_results(folder: Path) -> dict:
    """The results of a finished study. Raises UsageError."""
    path = folder / "results.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no results.json there; give folders of finished runs")
    document = read_json(path)
    if "studies" in document:
        raise UsageError(f"{folder}: a report of several studies; give their folders instead")
    field = misfit(document, RESULTS, "") or contradiction(document["cells"])
    if field:
        wrong = f"{path}: field {field} is missing or not what it should be"
        raise UsageError(f"{wrong}; it is not the results of an `ia2mini run` of this version")
    return document


def check_report_folder(folder: Path) -> None:
    """Raises UsageError for a folder with a study, or with any other file that is not of an earlier report."""
    results = folder / "results.json"
    mend = "give another folder"
    if is_there(results):
        if "studies" not in read_json(results):
            raise UsageError(f"--out {folder}: a study is there; {mend}")
        return
    for path in sorted(folder.glob("*")):
        if path.is_file() and not path.name.startswith("."):
            what = f"holds {path.name!r} and is no folder of an earlier report"
            raise UsageError(f"--out {folder}: {what}; {mend}")


def contradiction(cells: list[dict]) -> str | None:
    """The first field of `cells` that does not follow from the others; "cells" if there are none."""
    if not cells:
        return "cells"
    layers: dict[tuple, int] = {}
    for cell in cells:
        for metric in METRICS:
            known = [value for value in cell[metric] if value is not None]
            mean = cell[f"{metric}_mean"]
            if len(cell[metric]) != cell["sets"]:
                return f"cells.{metric}"
            if (mean is None) == bool(known):
                return f"cells.{metric}_mean"
            if known and not math.isclose(mean, fmean(known), rel_tol=1e-6, abs_tol=1e-9):
                return f"cells.{metric}_mean"
            spread = cell[f"{metric}_std"]
            expected = deviation(known)
            if (spread is None) != (expected is None):
                return f"cells.{metric}_std"
            if spread is not None and not math.isclose(
                spread, expected, rel_tol=1e-6, abs_tol=1e-9
            ):
                return f"cells.{metric}_std"
        depth = len(cell["asim_layers"])
        if not depth or layers.setdefault((cell["method"], cell["task"]), depth) != depth:
            return "cells.asim_layers"
    return None


def check_belonging(documents: dict[str, dict]) -> None:
    """Raises UsageError if studies differ in what no table shows, or call two things by one name."""
    options: set[str] = set()
    for document in documents.values():
        options.update(document["config"])
    known: dict[str, tuple] = {}
    for folder, document in documents.items():
        for what, value in fixed(document, sorted(options - FREE)).items():
            first, theirs = known.setdefault(what, (folder, value))
            if value != theirs:
                both = f"{what} = {theirs!r} in {first} and {value!r} in {folder}"
                raise UsageError(f"{both}: these studies do not belong together; leave one out")


def fixed(document: dict, options: list[str]) -> dict:
    """What must be the same in all studies that have it: these options, and what is meant by each name."""
    config = document["config"]
    found = {option: config.get(option) for option in options}
    for option in ("checkpoint", "dtype"):
        found[f"{option} of {document['cells'][0]['model']}"] = config.get(option)
    for option in ("loss", "templates", "pools", "evals"):
        named = config.get(option)
        for name, value in named.items() if isinstance(named, dict) else ():
            origin = value.get("digest") if isinstance(value, dict) else value
            found[f"{option} of {name}"] = origin
    return found


def without_repeats(cells: list[dict]) -> list[dict]:
    """Each cell once: studies of several adapters have the same base and ICL. UsageError where its results differ."""
    found = []
    for key, same in grouped(cells, *SAME_CELL).items():
        first = same[0]
        for other in same[1:]:
            if other["acc"] != first["acc"]:
                cell = " · ".join(str(value) for value in key if value is not None)
                both = f"{first['study']} and {other['study']} both hold {cell}, with different results"
                raise UsageError(f"{both}: leave one out")
        found.append(first)
    return found


def join_configs(configs: list[dict]) -> dict:
    """The options that the studies share; for an option that differs, the list of its values."""
    joined = {}
    for option, value in configs[0].items():
        values = [config.get(option) for config in configs]
        different = [v for i, v in enumerate(values) if v not in values[:i]]
        joined[option] = value if len(different) == 1 else different
    return joined
