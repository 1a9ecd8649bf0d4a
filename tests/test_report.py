"""Tables and verdicts of a made-up study; after a wanted change `python tests/test_report.py` writes them anew."""

import csv
import io
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2mini.files import plural
from ia2mini.report.summary import average, parts
from ia2mini.report.tables import seconds_line, write_table, write_tables
from ia2mini.study.table import METRICS, summarise

GOLDEN = Path(__file__).parent / "golden"
ACC = {  # of three sets; a rate of 0.01 adds 0.04 on evaluation rows, and 0.2 of dev loss
    "base": (0.25, 0.25, 0.25),
    "icl": (0.9, 0.95, 1.0),
    "sft": (0.6, 0.7, 0.65),
    "ia2": (0.7, 0.75, 0.8),
    "ia2-sft": (0.8, 0.85, 0.9),
}


def record(
    method, number, acc, rate=None, dev_loss=None, task="mood", evaluation="mood", **other
) -> dict:
    ood = evaluation != task
    about = {
        "task": task,
        "eval": evaluation,
        "ood": ood,
        "model": "tiny",
        "n": 4,
        "method": method,
    }
    about |= {
        "adapter": rate and "lora",
        "set": number,
        "rate": rate,
        "beta": None,
        "dev_loss": dev_loss,
        "steps": 3,
    }
    numbers = {metric: 0.5 for metric in METRICS} | {
        "acc": acc,
        "ece": (1 - acc) / 4,
        "ece_null": 0.1,
        "tokens": 90.0 if method == "icl" else 12.5,
    }
    asim = {"base": 0.3, "icl": 1.0, "sft": 0.35, "ia2": 0.8, "ia2-sft": 0.7}.get(method, 0.5)
    return about | numbers | {"asim": asim, "asim_layers": [asim, number]} | other


def records(task="mood", evaluation="mood", worse=0.0, **other) -> list[dict]:
    """Every method, set and rate on one evaluation."""
    found = []
    for method, accuracies in ACC.items():
        for number, acc in enumerate(accuracies):
            make = partial(record, method, number, task=task, evaluation=evaluation, **other)
            if method in ("base", "icl"):
                found.append(make(acc - worse))
            else:
                found += [make(acc - worse, 1e-3, 0.3), make(acc - worse + 0.04, 1e-2, 0.5)]
    return found


def study(select="dev") -> dict:
    """A results document: two tasks, one of them on two evaluations."""
    runs = records() + records(evaluation="news", worse=0.1) + records("topic", "topic", 0.05)
    spent = {
        "seconds": {"collect": 1.25, "train": 150.0, "evaluate": 3.0},
        "peak_memory_bytes": 2**29,
    }
    return {"cells": summarise(runs, select), **spent}


def on_two() -> dict:
    """One task on two evaluations."""
    return {"cells": summarise(records() + records(evaluation="news", worse=0.1))}


def texts() -> dict:
    """A task whose answers are text: no calibration."""
    lacking = {metric: None for metric in METRICS if metric not in ("acc", "asim")}
    return {"cells": summarise(records("sums", "sums", **lacking))}


def tables(document: dict) -> dict[str, str]:
    """table.md, table.tex and table.csv of a document."""
    with tempfile.TemporaryDirectory() as folder:
        write_tables(document, Path(folder))
        return {
            path.suffix[1:]: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()
        }


SHOWN = {
    "short.txt": lambda: write_table(study()),
    "full.txt": lambda: write_table(study(), full=True),
    "both.txt": lambda: write_table(study("both")),
    "texts.txt": lambda: write_table(texts()),
    "one.txt": lambda: write_table({"cells": summarise(records())}, full=True),
    "table.md": lambda: tables(on_two())["md"],
    "table.tex": lambda: tables(on_two())["tex"],
    "table.csv": lambda: tables(on_two())["csv"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_golden(name):
    pytest.importorskip("scipy")
    if name.startswith("table"):
        pytest.importorskip("pandas")
    shown, golden = (
        SHOWN[name]().rstrip("\n"),
        (GOLDEN / name).read_text(encoding="utf-8").rstrip("\n"),
    )
    if name.endswith(".csv"):  # unrounded: the last digit is Python's business
        shown, golden = (
            re.sub(r"\d\.\d+", lambda n: f"{float(n[0]):.9f}", text) for text in (shown, golden)
        )
    assert shown == golden


def test_a_table_fits_the_terminal():
    for select in ("dev", "both"):
        for line in write_table(study(select), full=True).splitlines():
            assert len(line) <= 120 or "against SFT" in line, line


def test_color_only_adds_codes_and_bold_is_ia2_before_sft():
    plain, text = write_table(study(), full=True), write_table(study(), full=True, color=True)
    assert re.sub(r"\x1b\[\d*m", "", text) == plain and "\x1b" not in plain
    bold = re.findall(r"\x1b\[1m(.*?)\x1b\[0m", text)
    assert [line.split(" ")[0] for line in bold] == ["tiny", *["IA2→SFT"] * 4, "IA2→SFT"]
    assert bold[-1].startswith("IA2→SFT against SFT: ")


def test_texts_diverged_betas_and_methods_of_ones_own():
    runs = [record("sft", s, 0.3, 0.01, 0.1, ece=None) for s in (0, 1)]
    runs += [record("ia2-sft", s, 0.4, 0.01, 0.1, ece=None, asim=None) for s in (0, 1)]
    runs += [record("mine", s, 0.2, 0.01, 0.1, ece=None) for s in (0, 1)]
    runs += [record("ia2+sft", s, 0.4, 0.01, 0.1, ece=None, beta=0.5) for s in (0, 1)]
    for run in runs:
        run["ece_null"] = None
    lines = [line.split() for line in write_table({"cells": summarise(runs)}).splitlines()]
    assert lines[1] == "accuracy (%) ↑ asim ↑ rate".split()
    assert ["IA2+SFT", "40.0", "±", "0.0", "0.50", "0.01", "β", "0.5"] in lines
    assert ["IA2→SFT", "40.0", "±", "0.0", "–", "0.01"] in lines
    # unknown ones last
    assert [line[0] for line in lines[3:7]] == ["SFT", "IA2+SFT", "IA2→SFT", "mine"]


def test_the_mean_is_over_methods_that_every_evaluation_has():
    cells = study()["cells"]
    some = [cell for cell in cells if (cell["method"], cell["eval"]) != ("sft", "news")]
    assert [row["method"] for row in average(cells)] == list(ACC)
    assert [row["method"] for row in average(some)] == ["base", "icl", "ia2", "ia2-sft"]
    row = average(cells)[-1]
    assert row["acc_mean"] == pytest.approx(np.mean([0.85, 0.75, 0.8])) and row["evaluations"] == 3
    assert row["acc_std"] == pytest.approx(np.std([0.8, 0.85, 0.9], ddof=1)) and row["rate"] == 1e-3
    cells[-1]["rate"] = 0.1
    # tasks that chose different rates have none in common
    assert average(cells)[-1]["rate"] is None


def test_the_deviation_of_a_mean_is_that_of_the_sets_means():
    """Sets that are good on one evaluation and bad on another differ little in the mean."""
    accuracies = {"mood": [0.9, 0.5, 0.7], "news": [0.5, 0.9, 0.8]}
    runs = [
        record("icl", s, acc, evaluation=e)
        for e, values in accuracies.items()
        for s, acc in enumerate(values)
    ]
    (row,) = average(summarise(runs))
    means = np.mean(list(accuracies.values()), axis=0)
    assert row["acc_mean"] == pytest.approx(means.mean()) and row["acc_std"] == pytest.approx(
        np.std(means, ddof=1)
    )
    runs[0]["asim"] = None
    (row,) = average(summarise(runs))
    assert row["asim_mean"] is not None and row["asim_std"] is None  # not known of every set


def test_a_metric_that_is_not_there_for_one_row_is_unknown():
    """A study on a single evaluation row ended in an error of `statistics`."""
    runs = [record("sft", n, 0.3, 0.01, 0.1, nll_left_out=float("nan")) for n in range(2)]
    (cell,) = summarise(runs)
    assert cell["nll_left_out"] == [None, None] and cell["nll_left_out_mean"] is None
    assert cell["nll_left_out_std"] is None and cell["acc_std"] == 0


def test_of_one_set_no_deviation_is_shown():
    runs = [
        record("sft", 0, 0.3, 0.01, 0.1),
        record("base", 0, 0.2),
        record("ia2-sft", 0, 0.4, 0.01, 0.1),
    ]
    text = write_table({"cells": summarise(runs)}, full=True)
    assert "±" not in text and "one set, so no deviation" in text
    assert re.search(r"SFT  +30.0  +0.17  +0.10  +0.35  +0.01\n", text)
    assert (
        "accuracy +10.0 points; ECE -0.02; 1 pair of task and set: too few for a p-value or an interval."
        in text
    )


def test_what_counts_as_right_stands_below_the_table():
    document = {"cells": summarise(records())}
    short, both = write_table(document), write_table(document | {"columns": ("acc", "acc_labels")})
    told = "accuracy: of all tokens the likeliest is the label; among labels, as `fit` counts: of the labels"
    assert told + " (--columns acc_labels)\n" in short and "among labels (%)" not in short
    assert told + "\n" in both + "\n" and "accuracy among labels (%) ↑" in both
    assert "of the labels" not in write_table(texts())


def test_parts_are_models_sizes_and_choices_of_rate():
    assert [(part["n"], part["by"]) for part in parts(study())] == [(4, "dev")]
    both = [{**run, "n": n} for n in (4, 8) for run in records()]
    found = parts({"cells": summarise(both, "both")})
    assert [(part["n"], part["by"]) for part in found] == [
        (4, "dev"),
        (4, "eval"),
        (8, "dev"),
        (8, "eval"),
    ]
    assert all([cell["method"] for cell in part["cells"]] == list(ACC) for part in found)
    assert found[1]["title"].startswith(
        "tiny · mood · N = 4 · lora · 3 sets · rate by accuracy on the evaluation rows"
    )
    (untrained,) = parts({"cells": summarise([record("base", 0, 0.5), record("icl", 0, 0.9)])})
    assert untrained["title"] == "tiny · mood · N = 4 · 1 set"


def test_markdown_parses_back():
    pytest.importorskip("pandas")
    document = {"cells": summarise(records("a|b_c", "a|b_c"))}
    lines = [line for line in tables(document)["md"].splitlines() if line.startswith("|")]
    rows = [[entry.strip() for entry in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {8} and len(rows) == 2 + 5
    assert rows[0][:4] == ["trained on", "evaluated on", "method", "accuracy (%) ↑"]
    assert rows[-1][0] == r"a\|b_c" and rows[-1][3:] == [
        "85.0 ± 5.0",
        "0.04 ± 0.01",
        "0.10",
        "0.70",
        "0.001",
    ]


def test_columns_keep_their_order_when_the_first_task_lacks_some():
    pytest.importorskip("pandas")
    mixed = {"cells": texts()["cells"] + study()["cells"]}
    for cell in mixed["cells"]:
        cell["task"] = {"sums": "a"}.get(cell["task"], cell["task"])
    heads = next(line for line in tables(mixed)["md"].splitlines() if line.startswith("|"))
    assert [
        head.strip() for head in heads.split("|")[4:-1]
    ] == "accuracy (%) ↑,ECE ↓,(null),asim ↑,rate".split(",")


def latex_rows(text: str) -> list[list[str]]:
    return [
        re.split(r" (?<!\\)& ", line.removesuffix(r" \\"))
        for line in text.splitlines()
        if line.endswith(r" \\")
    ]


def test_latex_escapes_and_is_a_table_a_choice():
    pytest.importorskip("pandas")
    name = "50%_a&b#{}$~^\\"
    runs = records(name, name) + [
        record("ia2+sft", s, 0.5, 1e-3, 0.1, task=name, evaluation=name, beta=0.5) for s in range(3)
    ]
    text = tables({"cells": summarise(runs, "both")})["tex"]
    assert (
        text.count(r"\begin{table}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 2
    )
    rows = latex_rows(text)
    assert {len(row) for row in rows} == {8} and len(rows) == 2 * (1 + 6)
    escaped = r"50\%\_a\&b\#\{\}\$\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert rows[1][0].strip() == escaped and escaped in text.split(r"\caption")[1].splitlines()[0]
    assert rows[0][3] == r"accuracy (\%) $\uparrow$" and rows[1][7] == "--"
    assert rows[5][2] == "IA2+SFT" and rows[5][7] == r"0.001 $\beta$ 0.5"
    assert (
        rows[6][2] == r"IA2$\rightarrow$SFT" and rows[6][3] == r"85.0 $\pm$ 5.0" and text.isascii()
    )


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Cs"]), min_size=1
)


@settings(max_examples=30, deadline=None)
@given(NAMES)
def test_any_name_keeps_latex_balanced(name):
    pytest.importorskip("pandas")
    text = tables(
        {"cells": summarise([record("sft", 0, 0.5, 1e-3, 0.1, task=name, evaluation="mood")])}
    )["tex"]
    plain = re.sub(r"\\[&%$#_{}]", "", text)
    assert (
        plain.count("{") == plain.count("}")
        and not set("%#~^") & set(plain)
        and plain.count("$") % 2 == 0
    )


def test_csv_parses_back_unrounded():
    pytest.importorskip("pandas")
    document = study("both")
    rows = list(csv.DictReader(io.StringIO(tables(document)["csv"])))
    for row, cell in zip(rows, document["cells"], strict=True):
        wanted = {
            f: "" if v is None else str(v) for f, v in cell.items() if not isinstance(v, list)
        }
        assert row == wanted


@pytest.mark.parametrize("missing", ["pandas", "tabulate", "jinja2"])
def test_without_pandas_there_are_no_tables_as_files(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    write_tables(study(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_seconds_line():
    said = "collect 1.2 s · train 2.5 min · evaluate 3.0 s · total 2.6 min · peak memory 0.50 GiB"
    assert seconds_line(study()) == said
    assert seconds_line({"cells": [], "seconds": {"train": 2}}) == "train 2.0 s · total 2.0 s"
    assert seconds_line({"cells": []}) == "total 0.0 s"


def test_counts():
    assert [plural(n, "adapter") for n in (0, 1, 2, 1200)] == [
        "0 adapters",
        "1 adapter",
        "2 adapters",
        "1,200 adapters",
    ]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, make in SHOWN.items():
        (GOLDEN / name).write_text(make().rstrip("\n") + "\n", encoding="utf-8")
