"""Figures of made-up results: what is drawn, on which axes, into which files."""

import sys

import pytest

from ia2mini import UsageError
from ia2mini.report.figures import CAPTIONS, draw, draw_figures, views

pytest.importorskip("matplotlib")


def made_up(
    sizes=(4,), choices=("dev",), text=False, methods=("base", "icl", "sft", "ia2-sft")
) -> dict:
    """A results document of one task with an evaluation in and one out of distribution; two sets, three layers."""
    cells = []
    for n, (at, method), ood in (
        (n, m, ood) for n in sizes for m in enumerate(methods) for ood in (False, True)
    ):
        for by in (None,) if method in ("base", "icl") else choices:
            acc = (0.5, 1.0, 0.75, 0.96)[at % 4] - 0.1 * ood
            cell = {
                "task": "mood",
                "eval": "news" if ood else "mood",
                "ood": ood,
                "model": "tiny",
                "n": n,
            }
            cell |= {
                "method": method,
                "adapter": by and "lora",
                "sets": 2,
                "selected_by": by,
                "beta": None,
            }
            cell |= {
                "rate": by and 0.01,
                "acc_mean": acc,
                "acc_std": 0.08,
                "acc": [acc - 0.08, acc + 0.08],
            }
            cell |= {
                "asim_mean": 0.3 + at / 10,
                "asim_std": 0.0,
                "asim_layers": [0.9, 0.2 * at, -0.1],
            }
            if not text:
                cell |= {"ece_mean": 0.02, "ece_std": 0.05, "ece_null_mean": 0.04}
                cell["reliability"] = [[0, 0, 0]] * 12 + [
                    [2, 1.7, 0],
                    [20, 17.9, 15],
                    [70, 68.0, 66],
                ]
            cells.append(cell | {"ece": [None if text else 0.02] * 2})
    overlap = {
        "task": "mood",
        "methods": ["sft", "ia2-sft"],
        "overlap": [0.3, 0.5],
        "mean": 0.4,
        "chance": 0.1,
    }
    row = {"prompt": "Text:fine\nLabel:", "answer": "1", "confidence": None if text else 0.875}
    rows = [row | {"said": "1", "right": True}, row | {"said": "0", "right": False}]
    sample = {
        "task": "mood",
        "prompt": "Text:bad\nLabel:0\n\nText:fine\nLabel:",
        "method": "ia2-sft",
        "set": 0,
    }
    document = {
        "cells": cells,
        "overlap": [overlap | {"n": n} for n in sizes],
        "seconds": {"train": 2.0},
    }
    document["samples"] = [sample | {"n": n, "rows": rows} for n in sizes]
    document["adapters"] = [
        f"adapters/mood-n{n}-{m}-set{k}" for n in sizes for m in methods[2:] for k in (0, 1)
    ]
    return document | {
        "config": {"model": "org/base", "adapter": "lora"},
        "versions": {"torch": "2"},
    }


def figure(name, **options):
    return draw(name, next(views(made_up(**options))))


def test_one_n_draws_bars_and_several_draw_lines_over_n(tmp_path):
    names = draw_figures(made_up(), tmp_path)
    assert names == [f"{name}.png" for name in CAPTIONS if name != "by_n"]
    # and nothing temporary beside them
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    (view,) = views(made_up((2, 4, 8)))
    assert [name for name in CAPTIONS if draw(name, view)] == [
        name for name in CAPTIONS if name != "methods"
    ]
    (view,) = views(made_up(text=True) | {"overlap": []})  # text has no confidence
    assert [name for name in CAPTIONS if draw(name, view)] == [
        "methods",
        "asim_layers",
        "asim_scatter",
    ]


def test_each_choice_of_the_rate_has_its_figures():
    first, second = views(made_up(choices=("dev", "eval")))
    assert (first["suffix"], second["suffix"]) == ("-dev", "-eval")
    assert "rate by lowest dev loss" in draw("methods", first).get_suptitle()
    assert "rate by accuracy on the evaluation rows" in draw("methods", second).get_suptitle()
    assert draw("overlap", first) and not draw("overlap", second)  # the saved adapters are dev's


@pytest.mark.parametrize(
    "name, sizes", [("methods", (4,)), ("asim_scatter", (4,)), ("by_n", (2, 4, 8))]
)
def test_accuracy_from_0_to_100_and_ece_from_0(name, sizes):
    axes = figure(name, sizes=sizes).axes
    assert {a.get_ylim() for a in axes if "accuracy" in a.get_ylabel()} == {(0, 100)}
    assert {a.get_ylim()[0] for a in axes if "ECE" in a.get_ylabel()} == {0}


def test_bars_show_means_deviations_and_the_null():
    acc, ece = figure("methods").axes
    assert [bar.get_height() for bar in acc.patches] == pytest.approx([45, 95, 70, 91])
    assert [text.get_text() for text in acc.texts] == ["45.0", "95.0", "70.0", "91.0"]
    # ICL's deviation, cut off
    assert max(max(line.get_paths()[0].vertices[:, 1]) for line in acc.collections) == 100
    assert [line.get_label() for line in ece.collections].count("ECE if perfectly calibrated") == 4


def test_by_n_has_ticks_at_the_sizes_and_a_panel_for_each_distribution():
    drawn = figure("by_n", sizes=(8, 2, 32))
    assert (
        "tiny · mood · N = 2, 8, 32 · lora · 2 sets\nrate by lowest dev loss"
        in drawn.get_suptitle()
    )
    assert [axis.get_title() for axis in drawn.axes] == ["in distribution"] * 2 + [
        "out of distribution"
    ] * 2
    for axis in drawn.axes:
        assert axis.get_xscale() == "log" and [
            text.get_text() for text in axis.get_xticklabels()
        ] == ["2", "8", "32"]
    # ICL out of distribution
    assert drawn.axes[2].lines[1].get_ydata().tolist() == pytest.approx([90] * 3)


def test_layers_of_the_largest_n_without_icl():
    drawn = figure("asim_layers", sizes=(8, 2))
    assert [line.get_label() for line in drawn.axes[0].lines] == ["base", "SFT", "IA2→SFT"]
    assert drawn.axes[0].get_ylim()[0] < -0.1 and "here N = 8" in drawn.get_suptitle()


def test_scatter_is_hollow_out_of_distribution_and_says_so():
    drawn = figure("asim_scatter")
    diamond, points = drawn.axes[0].collections[:2]
    assert (
        diamond.get_offsets().tolist()[0] == pytest.approx([0.3, 45])
        and len(points.get_offsets()) == 2
    )
    inside, outside = points.get_facecolors().tolist()
    assert outside == [1, 1, 1, 1] != inside
    assert "out of distribution" in [text.get_text() for text in drawn.legends[0].get_texts()]


def test_reliability_drops_bins_of_few_rows_and_overlap_shows_chance():
    curves, where = figure("reliability").axes
    # not the 2 + 2 rows
    assert curves.lines[0].get_ydata().tolist() == pytest.approx([15 / 20, 66 / 70])
    assert where.patches[0].get_data().values[-3:].tolist() == pytest.approx(
        [200 / 92, 2000 / 92, 7000 / 92]
    )
    (axis,) = figure("overlap").axes
    assert axis.patches[0].get_width() == pytest.approx(0.4)
    assert axis.collections[-1].get_segments()[0][:, 0].tolist() == [0.1, 0.1]


def test_deviations_are_of_samples_and_one_set_has_none():
    (axis,) = figure("overlap").axes
    assert reach(axis) == pytest.approx([0.4 - 0.02**0.5, 0.4 + 0.02**0.5])  # of 0.3 and 0.5
    document = made_up()
    document["overlap"].append(document["overlap"][0] | {"task": "b", "overlap": [0.5, 0.3]})
    (axis,) = draw("overlap", next(views(document))).axes
    assert reach(axis) == pytest.approx([0.4, 0.4])  # the sets' means over tasks are equal
    document = made_up()
    for cell in document["cells"]:
        cell["asim_layers"] = [0.7 if cell["ood"] else 0.9, 0.2]
    (axis,) = draw("asim_layers", next(views(document))).axes
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.8 + 0.02**0.5))  # of 0.7 and 0.9
    document = made_up(sizes=(2, 4))
    for cell in document["cells"]:
        cell["acc"] = cell["acc"][:1]
    (view,) = views(document)
    band = draw("by_n", view).axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band == pytest.approx(50)  # the base in distribution: no wider than its line


def reach(axis) -> list[float]:
    """From where to where the first error bar of an axis reaches."""
    return axis.containers[0].lines[2][0].get_segments()[0][:, 0].tolist()


def test_the_same_document_gives_the_same_bytes(tmp_path):
    # also: a method without a colour
    document = made_up(text=True, methods=("base", r"$\new$")) | {"overlap": []}
    document["cells"] = [
        {k: v for k, v in cell.items() if "asim" not in k} for cell in document["cells"]
    ]
    names = draw_figures(document, tmp_path / "a", ("png", "pdf", "svg"))
    assert (
        names == draw_figures(document, tmp_path / "b", ("png", "pdf", "svg")) and len(names) == 3
    )
    files = [(tmp_path / "a" / name).read_bytes() for name in names]
    assert files == [(tmp_path / "b" / name).read_bytes() for name in names]
    assert not [
        word
        for word in (b"Software", b"CreationDate", b"dc:date")
        for file in files
        if word in file
    ]


def test_unknown_format_is_refused_before_anything_is_drawn_and_no_matplotlib_draws_nothing(
    tmp_path, monkeypatch
):
    with pytest.raises(
        UsageError, match="bmp: unknown format; figures are written as png, pdf, svg"
    ):
        draw_figures(made_up(), tmp_path, ("png", "bmp"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_figures(made_up(), tmp_path) == [] and not list(tmp_path.iterdir())
