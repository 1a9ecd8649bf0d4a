"""Tables, figures and page of a made-up results document."""

import csv
import io
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2mini import report


def cell(method, acc, ece, asim=None, selected_by=None, rate=None, task="mood", evaluation="mood", ood=False, **other):
    base = {
        "task": task,
        "eval": evaluation,
        "ood": ood,
        "model": "tiny",
        "n": 4,
        "method": method,
        "adapter": "lora",
        "sets": 2,
    }
    base |= {"selected_by": selected_by, "rate": rate, "beta": None, "acc_mean": acc, "acc_std": 0.031, "ece_mean": ece}
    base |= {
        "ece_std": None if ece is None else 0.01,
        "nll_mean": 0.5,
        "brier_mean": 0.25,
        "asim_mean": asim,
        "acc": [acc, acc],
    }
    return base | {"ece": [ece, ece], "asim_layers": None if asim is None else [asim, asim / 2, asim]} | other


@pytest.fixture
def document():
    cells = []
    for evaluation, ood, worse in (("mood", False, 0), ("news", True, 0.2)):
        place = {"evaluation": evaluation, "ood": ood}
        cells += [
            cell("ia2-sft", 0.866 - worse, 0.07, 0.6, "dev", 0.001, **place),
            cell("ia2-sft", 0.9 - worse, 0.08, 0.5, "eval", 0.01, **place),
            cell("icl", 1.0 - worse, 0.02, **place, asim_layers=[1.0, 1.0, 1.0]),
            cell("sft", 0.768 - worse, 0.22, 0.45, "dev", 0.01, **place),
            cell("sft", 0.77 - worse, 0.05, 0.4, "eval", 0.0003, **place),
            cell("base", 0.064, 0.3, 0.4, **place),
        ]
    seconds = {"collect": 1.25, "train": 150.0}
    return {
        "cells": cells,
        "seconds": seconds,
        "peak_memory_bytes": 2**29,
        "config": {"seed": 0},
        "versions": {"torch": "2"},
    }


TABLE = """\
tiny · N = 4 · lora · 2 sets
  method          acc ↑        ece ↓  asim ↑   rate  │        acc ↑        ece ↓    rate
mood → mood
  base      06.4 (03.1)  0.30 (0.01)    0.40      –  │
  icl      100.0 (03.1)  0.02 (0.01)       –      –  │
  sft       76.8 (03.1)  0.22 (0.01)    0.45   0.01  │  77.0 (03.1)  0.05 (0.01)  0.0003
  ia2-sft   86.6 (03.1)  0.07 (0.01)    0.60  0.001  │  90.0 (03.1)  0.08 (0.01)    0.01
mood → news*
  base      06.4 (03.1)  0.30 (0.01)    0.40      –  │
  icl       80.0 (03.1)  0.02 (0.01)       –      –  │
  sft       56.8 (03.1)  0.22 (0.01)    0.45   0.01  │  57.0 (03.1)  0.05 (0.01)  0.0003
  ia2-sft   66.6 (03.1)  0.07 (0.01)    0.60  0.001  │  70.0 (03.1)  0.08 (0.01)    0.01
mean of 2 evaluations
  base      06.4 (03.1)  0.30 (0.01)    0.40      –  │
  icl       90.0 (03.1)  0.02 (0.01)       –      –  │
  sft       66.8 (03.1)  0.22 (0.01)    0.45      –  │  67.0 (03.1)  0.05 (0.01)       –
  ia2-sft   76.6 (03.1)  0.07 (0.01)    0.60      –  │  80.0 (03.1)  0.08 (0.01)       –
ia2-sft against sft: accuracy +9.8 points, ECE -0.15

mean (standard deviation) over sets of accuracy in % and expected calibration error
asim: similarity of attention outputs to ICL's; * out of distribution
left half: rate by lowest dev loss
right half: rate by accuracy on the evaluation rows, the paper's choice"""


def test_terminal_table(document):
    assert report.table(document) == TABLE
    assert max(map(len, TABLE.splitlines())) <= 110


def test_color_only_adds_codes_and_bold_is_the_best_trained(document):
    text = report.table(document, color=True)
    assert re.sub(r"\x1b\[\d?m", "", text).replace("; bold: best trained method", "") == TABLE
    assert text.count("bold: best trained method") == 1
    bold = re.findall(r"\x1b\[1m *(.*?)\x1b\[0m", text)
    best = [f"{acc} (03.1)" if acc else "0.07 (0.01)" for acc in ("86.6", "", "66.6", "", "76.6", "")]
    assert bold == ["tiny · N = 4 · lora · 2 sets", *best]
    assert all("│  \x1b[2m" in line for line in text.splitlines() if line.startswith("  sft") or "  ia2-sft" in line)


def test_one_choice_of_rate_leaves_one_half(document):
    document["cells"] = [c for c in document["cells"] if c["selected_by"] != "dev"]
    text = report.table(document)
    assert "│" not in text and "half" not in text and "90.0 (03.1)" in text and "the paper's choice" in text


def test_multi_token_diverged_and_unknown(document):
    document["cells"] = [
        cell("icl", 0.5, None, adapter=None),
        cell("sft", 0.3, None, 0.2, "dev", 0.01),
        cell("ia2-sft", 0.4, None, float("nan"), "dev", 0.01),
        cell("ia2+sft", 0.4, None, 0.3, "dev", 0.01, beta=0.5),
        cell("mine", 0.2, None, 0.3, "dev", 0.01, adapter="ia3"),
    ]
    text = report.table(document, color=True)
    lines = [line.split() for line in re.sub(r"\x1b\[\d?m", "", text).splitlines() if line.startswith("  ")]
    assert ["icl", "50.0", "(03.1)", "–", "–", "–"] in lines
    assert ["ia2+sft", "40.0", "(03.1)", "–", "0.30", "0.01", "β0.5"] in lines
    assert ["ia2-sft", "40.0", "(03.1)", "–", "–", "0.01"] in lines
    assert ["mine", "20.0", "(03.1)", "–", "0.30", "0.01"] in lines
    assert "accuracy +10.0 points\n" in text and text.count("\x1b[1m40.0") == 2
    assert [line[0] for line in lines] == ["method", "icl", "sft", "ia2+sft", "ia2-sft", "method", "icl", "mine"]
    assert "ece" not in report.table(document, "latex")


def test_the_mean_is_over_methods_that_every_evaluation_has(document):
    document["cells"] = [c for c in document["cells"] if (c["method"], c["eval"]) != ("sft", "news")]
    mean = report.table(document).split("mean of 2 evaluations\n")[1].split("\n\n")[0]
    assert [line.split()[:2] for line in mean.splitlines()] == [["base", "06.4"], ["icl", "90.0"], ["ia2-sft", "76.6"]]


def test_markdown_parses_back(document):
    document["cells"][0]["task"] = document["cells"][1]["task"] = "a|b_c"
    lines = [line for line in report.table(document, "markdown").splitlines() if line.startswith("|")]
    rows = [[entry.strip() for entry in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {9}
    assert rows[0][:3] == ["trained → evaluated", "method", "acc ↑"]
    left, right = (
        ["**86.6 (03.1)**", "**0.07 (0.01)**", "0.60", "0.001"],
        ["**90.0 (03.1)**", "**0.08 (0.01)**", "0.01"],
    )
    assert [r"a\|b\_c → mood", "ia2-sft", *left, *right] in rows
    assert [r"mood → news\*", "sft", "56.8 (03.1)"] in [row[:3] for row in rows]


def test_latex_is_table_1_twice_and_escapes(document):
    for c in document["cells"]:
        c["task"] = "50%_a&b#{}$~^\\"
    text = report.table(document, "latex")
    assert text.count(r"\begin{tabular}{llrrrrrrrrrrrr}") == 2 == text.count(r"\end{table}")
    rows = [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in text.splitlines() if line.startswith("50")]
    assert [len(row) for row in rows] == [14] * 4
    assert rows[0][0] == r"50\%\_a\&b\#\{\}\$\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert rows[1][1] == "news*" and rows[0][11:] == [r"\textbf{86.6 (03.1)}", r"\textbf{0.07 (0.01)}", "0.60"]
    assert rows[0][5:8] == rows[2][5:8] == ["100.0 (03.1)", "0.02 (0.01)", "--"]
    assert rows[2][11] == r"\textbf{90.0 (03.1)}" and rows[2][9] == r"\textbf{0.05 (0.01)}"
    assert r"IA2$\rightarrow$SFT" in text and "the paper's choice" in text.split(r"\end{table}")[1] and text.isascii()


def test_csv_parses_back_unrounded(document):
    rows = list(csv.DictReader(io.StringIO(report.table(document, "csv"))))
    assert len(rows) == len(document["cells"])
    for row, c in zip(rows, document["cells"], strict=True):
        assert row == {f: "" if v is None else str(v) for f, v in c.items() if f not in ("acc", "ece", "asim_layers")}


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Cs"]), min_size=1))
def test_any_name_keeps_latex_balanced(name):
    text = report.table({"cells": [cell("sft", 0.5, 0.1, 0.2, "dev", 0.1, task=name)]}, "latex")
    plain = re.sub(r"\\[&%$#_{}]", "", text)
    assert plain.count("{") == plain.count("}") and not set("%#~^") & set(plain) and plain.count("$") % 2 == 0


def test_seconds_line(document):
    assert report.seconds_line(document) == "collect 1.2 s · train 2.5 min · total 2.5 min · peak memory 0.50 GiB"
    assert report.seconds_line({"cells": [], "seconds": {"train": 2, "total": 3}}) == "train 2.0 s · total 3.0 s"


def test_figures_show_what_the_cells_hold(document, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    paths = report.figures(document, tmp_path / "new")
    assert (
        [p.name for p in paths]
        == ["methods.png", "asim_layers.png", "asim_scatter.png"]
        == [p.name for p in paths if p.exists()]
    )
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    for path, seen in zip(paths, ("base icl sft ia2-sft", "base sft ia2-sft", "base sft ia2-sft"), strict=True):
        pixels = np.round(image.imread(path)[..., :3] * 255).astype(int)
        assert pixels.shape == (480, 1120, 3)
        for method, (_, colour) in report.METHODS.items():
            near = np.abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(-1) <= 2
            assert (near.sum() > 100) == (method in seen.split()), (path, method)
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in report.figures(document, tmp_path)] == first


def test_figures_of_multi_token_cells_and_of_none(document, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.figures({"cells": []}, tmp_path) == []
    assert [p.name for p in report.figures({"cells": [cell("base", 0.5, None)]}, tmp_path)] == ["methods.png"]


def test_reliability_shows_every_method_icl_too(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    cells = [
        cell(method, 0.9, 0.1, reliability=[[0, 0, 0]] * 13 + [[90, 80.0, 60], [10, 9.9, 10]])
        for method in ("icl", "base")
    ]
    path = report.figures({"cells": cells}, tmp_path)[-1]
    assert path.name == "reliability.png"
    pixels = np.round(image.imread(path)[..., :3] * 255).astype(int)
    for method in ("icl", "base"):
        colour = [int(report.METHODS[method][1][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(-1) <= 2).sum() > 100, method


def test_no_matplotlib_means_no_figures(document, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.figures(document, tmp_path) == [] == list(tmp_path.iterdir())


def test_html_is_one_small_page(document, tmp_path):
    document["cells"][0]["model"] = document["cells"][3]["model"] = "<script>"
    figures = report.figures(document, tmp_path)
    page = report.html(document, figures)
    assert page.count("data:image/png;base64,") == len(figures) and len(page) < 500_000
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert (
        re.search(r"<span class=s1> *86.6 \(03.1\)</span>", page)
        and "<span class=s2>" in page
        and "&quot;seed&quot;: 0" in page
    )
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
