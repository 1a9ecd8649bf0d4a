"""Figures of made-up results: what is drawn, on which axes, into which files, and what is said of them."""

import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ia2mini.engine.options import METHOD_NAMES
from ia2mini.report.charts import LARGEST_DOT, SMALLEST_DOT, draw_candidates
from ia2mini.report.drawing import COLORS, spread, styled
from ia2mini.report.figures import FIGURES, alt_text, draw, draw_figures
from ia2mini.report.summary import best, views

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def style():
    with styled():
        yield


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
    assert names == [f"{name}.png" for name in FIGURES if name != "by_n"]
    # and nothing temporary beside them
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    (view,) = views(made_up((2, 4, 8)))
    assert [name for name in FIGURES if draw(name, view)] == [
        name for name in FIGURES if name != "methods"
    ]
    (view,) = views(made_up(text=True) | {"overlap": []})  # text has no confidence
    assert [name for name in FIGURES if draw(name, view)] == [
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
def test_accuracy_from_0_to_100_and_ece_from_0_and_no_interval_is_cut(name, sizes):
    which = "x" if name == "methods" else "y"
    for axis in figure(name, sizes=sizes).axes:
        low, high = getattr(axis, f"get_{which}lim")()
        assert low < 0
        ticks = getattr(axis, f"get_{which}ticks")()
        if "accuracy" in axis.get_title(loc="left"):
            assert high > 100 and list(ticks) == [0, 50, 100]
        for line in axis.collections:
            for path in line.get_paths() if hasattr(line, "get_segments") else ():
                ends = path.vertices[:, 0 if which == "x" else 1]
                assert low < ends.min() and ends.max() < high


def note_of(drawn) -> str:
    return drawn._supxlabel.get_text().replace("\n", " ")


def ends_of(collection, column: int) -> list[float]:
    """From where to where a line of an axis reaches."""
    return collection.get_segments()[0][:, column].tolist()


def test_a_line_a_method_shows_mean_deviation_value_and_the_null():
    acc, ece = figure("methods").axes
    assert [line.get_xdata()[0] for line in acc.lines] == pytest.approx([45, 95, 70, 91])
    assert [text.get_text() for text in acc.texts] == ["45.0", "95.0", "70.0", "91.0"]
    # ICL's two sets, on the mean of both evaluations: 87 and 103, whole though it is above 100
    half = 8 * 2**0.5
    assert ends_of(acc.collections[1], 0) == pytest.approx([95 - half, 95 + half])
    nulls = [ends_of(line, 0) for line in ece.collections if line.get_linewidth()[0] == 1.2]
    assert nulls == [[0.04, 0.04]] * 4
    note = note_of(figure("methods"))
    assert "one standard deviation over 2 sets" in note and "perfect calibration" in note


def test_by_n_has_ticks_at_the_sizes_and_a_panel_for_each_distribution():
    drawn = figure("by_n", sizes=(8, 2, 32))
    assert (
        "tiny · mood · N = 2, 8, 32 · lora · 2 sets\nrate by lowest dev loss"
        in drawn.get_suptitle()
    )
    sides = ["in distribution"] * 2 + ["out of distribution"] * 2
    assert [axis.get_title(loc="left").partition(", ")[2] for axis in drawn.axes] == sides
    for axis in drawn.axes:
        assert axis.get_xscale() == "log" and [
            text.get_text() for text in axis.get_xticklabels()
        ] == ["2", "8", "32"]
        assert {text.get_text() for text in axis.texts} == {"base", "ICL", "SFT", "IA2→SFT"}
    # ICL out of distribution
    assert drawn.axes[2].lines[1].get_ydata() == pytest.approx([90] * 3)


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
    assert "hollow ones out of distribution" in note_of(drawn)


def test_reliability_drops_bins_of_few_rows_and_overlap_shows_chance():
    drawn = [axis for axis in figure("reliability").axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in drawn] == ["base", "ICL", "SFT", "IA2→SFT"]
    # in percent, not the 2 + 2 rows
    assert drawn[0].lines[1].get_xdata() == pytest.approx([100 * 17.9 / 20, 100 * 68 / 70])
    assert drawn[0].lines[1].get_ydata() == pytest.approx([100 * 15 / 20, 100 * 66 / 70])
    (axis,) = figure("overlap").axes
    assert axis.lines[0].get_xdata()[0] == pytest.approx(0.4)
    assert ends_of(axis.collections[-1], 0) == [0.1, 0.1]


def test_dots_grow_with_their_bins_and_stay_inside_the_frame():
    document = made_up()
    for cell in document["cells"]:
        cell["reliability"] = [[5, 0.0, 0], [50, 2.0, 50], [500, 500.0, 500]]
    drawn = draw("reliability", next(views(document)))
    drawn.draw_without_rendering()
    for axis in drawn.axes[:4]:
        (dots,) = axis.collections
        areas = dots.get_sizes()
        assert (np.diff(areas) > 0).all() and SMALLEST_DOT < areas[0] < areas[-1] < LARGEST_DOT
        assert areas[2] - SMALLEST_DOT == pytest.approx(100 * (areas[0] - SMALLEST_DOT))
        middle = axis.transData.transform(dots.get_offsets())
        reach = (areas**0.5 / 2 * drawn.dpi / 72)[:, None]
        frame = axis.get_window_extent()
        assert (middle - reach > frame.min).all() and (middle + reach < frame.max).all()


def test_deviations_are_of_samples_and_one_set_has_none():
    (axis,) = figure("overlap").axes
    half = 0.02**0.5  # of 0.3 and 0.5
    assert ends_of(axis.collections[0], 0) == pytest.approx([0.4 - half, 0.4 + half])
    document = made_up()
    document["overlap"].append(document["overlap"][0] | {"task": "b", "overlap": [0.5, 0.3]})
    (axis,) = draw("overlap", next(views(document))).axes
    # the sets' means over tasks are equal
    assert ends_of(axis.collections[0], 0) == pytest.approx([0.4, 0.4])
    document = made_up()
    for cell in document["cells"]:
        cell["asim_layers"] = [0.7 if cell["ood"] else 0.9, 0.2]
    (axis,) = draw("asim_layers", next(views(document))).axes
    # of 0.7 and 0.9
    assert ends_of(axis.collections[0], 1) == pytest.approx([0.8 - half, 0.8 + half])
    document = made_up(sizes=(2, 4))
    for cell in document["cells"]:
        cell["acc"] = cell["acc"][:1]
    (view,) = views(document)
    assert not draw("by_n", view).axes[0].collections  # of one set nothing is known


def drawn_texts(drawn) -> list:
    """Every text of a figure that is seen, with where it stands, in pixels."""
    from matplotlib.text import Text

    drawn.draw_without_rendering()
    unseen = set()
    for axis in drawn.axes:
        for line in (axis.xaxis, axis.yaxis):
            low, high = sorted(line.get_view_interval())
            for place, label in zip(line.get_majorticklocs(), line.get_ticklabels()):
                if not axis.get_visible() or not low <= place <= high:
                    unseen.add(label)
    found = []
    for text in drawn.findobj(Text):
        if text.get_text().strip() and text.get_visible() and text not in unseen:
            # of a note its words alone, without the line to its point
            found.append((text.get_text(), Text.get_window_extent(text)))
    return found


ALL_METHODS = tuple(METHOD_NAMES)
REPORT = {
    "rows": 24,
    "chosen": "sft",
    "candidates": {
        "base": {"acc": [0.29, 0.13, 0.51]},
        "commonest": {"acc": [0.62, 0.41, 0.81]},
        "sft": {"acc": [1.0, 0.86, 1.0]},
    },
    "shipped": {"acc": [1.0, float("nan"), None]},
}


@pytest.mark.parametrize("methods", [("base", "icl", "sft", "ia2-sft"), ALL_METHODS], ids=len)
@pytest.mark.parametrize("name", [*FIGURES, "candidates"])
def test_no_text_stands_on_another_or_leaves_the_figure(name, methods):
    if name == "candidates":
        drawn = draw_candidates(REPORT)
    else:
        drawn = figure(name, methods=methods, sizes=(2, 4, 8) if name == "by_n" else (4,))
    texts = drawn_texts(drawn)
    width, height = drawn.bbox.size
    assert len(texts) > 5
    for text, box in texts:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text
    for (one, first), (other, second) in combinations(texts, 2):
        apart_x = first.x1 <= second.x0 + 1 or second.x1 <= first.x0 + 1
        apart_y = first.y1 <= second.y0 + 1.5 or second.y1 <= first.y0 + 1.5
        assert apart_x or apart_y, (one, other)


def test_names_are_pushed_apart_in_their_order():
    assert spread([0.5, 0.1], 0.2) == [0.5, 0.1]
    assert spread([1.0, 1.0, 0.2], 0.1) == pytest.approx([0.9, 1.0, 0.2])
    assert spread([0.0, 0.05, 0.0], 0.1) == pytest.approx([0.0, 0.2, 0.1])


def test_the_usual_methods_are_told_apart_by_every_eye():
    """Colours as red-blind and green-blind eyes see them (Machado et al. 2009), in linear RGB."""
    blind = {
        "nobody": np.eye(3),
        "red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    for seen in blind.values():
        colors = {}
        for method in ("base", "icl", "sft", "ia2", "ia2-sft"):
            code = COLORS[method]
            rgb = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
            colors[method] = np.clip(seen @ linear, 0, 1) ** (1 / 2.2)
        for (one, first), (other, second) in combinations(colors.items(), 2):
            assert np.abs(first - second).max() > 0.15, (one, other)


def test_the_candidates_of_fit_are_drawn_with_their_intervals():
    (axis,) = draw_candidates(REPORT).axes
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx([29, 62, 100, 100])
    assert ends_of(axis.collections[0], 0) == pytest.approx([13, 51])
    assert len(axis.collections) == 3, "what has no interval shows none"
    assert [text.get_text() for text in axis.texts][:2] == ["29 (13 to 51)", "62 (41 to 81)"]
    assert axis.get_yticklabels()[-1].get_text() == "as shipped"
    (axis,) = draw_candidates(REPORT | {"chosen": "base"}).axes  # nothing is shipped
    assert axis.get_yticklabels()[-1].get_text() == "as chosen"


@pytest.mark.parametrize(
    "name, said",
    [
        ("asim_layers", "SFT from -0.10 in layer 2 to 0.90 in layer 0"),
        ("reliability", "base 95.2 % sure, 88.0 % right"),
        ("overlap", "SFT and IA2→SFT 0.40 (chance 0.10)"),
    ],
)
def test_numbers_that_no_table_has_are_told_to_who_cannot_see_them(name, said):
    text = alt_text(name, next(views(made_up())))
    assert said in text and text.startswith("tiny · mood · N = 4") and name not in text


@pytest.mark.parametrize("name", ["methods", "by_n", "asim_scatter"])
def test_numbers_of_a_table_are_not_read_twice(name):
    view = next(views(made_up()))
    assert alt_text(name, view) == f"{view['title']}. {FIGURES[name].caption}"


def test_the_best_of_other_methods():
    cells = made_up(methods=("base", "icl"))["cells"]
    assert best(cells) == "ICL is right most often: 95.0 %, mean of 2 evaluations."
    for cell in cells:
        cell["method"] += cell["eval"]
    assert best(cells) == "No method has a result on every evaluation."


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


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_figures(made_up(), tmp_path) == [] and not list(tmp_path.iterdir())


IDEA = Path(__file__).parents[1] / "docs" / "idea.svg"


def test_the_drawing_of_the_idea_has_room_for_a_wider_font():
    """In DejaVu Sans, a wide one, every text ends an eighth of its length before its card does."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    root = ElementTree.parse(IDEA).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    cards = [one for one in root.iter(f"{svg}rect") if one.get("class") == "card"]
    texts = list(root.iter(f"{svg}text"))
    assert len(cards) == 3 and len(texts) == 15
    for text in texts:
        start = float(text.get("x"))
        is_head = text.get("class") == "head"
        font = FontProperties(family="DejaVu Sans", weight="bold" if is_head else "normal")
        path = TextPath((0, 0), text.text, size=18 if is_head else 17, prop=font)
        ends = [float(card.get("x")) + float(card.get("width")) for card in cards]
        end = min(end for end in ends if end > start)
        assert start + 1.125 * path.get_extents().width < end - 8, text.text
