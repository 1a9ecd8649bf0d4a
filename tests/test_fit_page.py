"""The page of `fit`: what is seen at once, what is folded, and its figure."""

import re
import sys

import pytest

from ia2mini import FitOptions, fit, open_subject
from ia2mini.report.fit import fit_page
from ia2mini.tasks import world

QUICK = FitOptions(epochs=8, rates=(1e-2,), methods=("sft",), folds=2)


@pytest.fixture(scope="module")
def report() -> dict:
    return fit(world.rows("toy-mood", "train")[4:20], open_subject("tiny", "cpu"), QUICK).report


def test_the_first_screen_is_a_title_a_sentence_a_table_and_a_figure(report):
    pytest.importorskip("matplotlib")
    page = fit_page(report, "ia2mini fit rows.csv")
    first, _, rest = page.partition("<details>")
    (title,) = re.findall("<h1>(.*?)</h1>", first)
    assert len(title) < 60 and title.endswith("held out in 2 folds")
    assert "is shipped" in first
    assert [first.count(tag) for tag in ("<p>", "<table", "<figure>", "data:image/png")] == [1] * 4
    assert first.index("<h1>") < first.index("<p>") < first.index("<table") < first.index("<figure")
    (alt,) = re.findall('alt="([^"]*)"', first)
    assert "Candidates: base " in alt and alt.startswith(first.split("<p>")[1].split(". ")[0][:20])
    assert "ia2mini fit rows.csv" in rest and "A query costs" in rest
    assert not re.search(r'(src|href)="(?!data:)', page), "a page that needs no other file"


def test_the_whole_sentence_stands_below_the_title(report):
    words = re.sub("<[^>]*>", " ", fit_page(report, "").partition("</header>")[0])
    for part in report["sentence"].split(". "):
        assert part.rstrip(".").replace("<", "&lt;").replace("'", "&#x27;") in words


def test_without_matplotlib_there_is_no_figure(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = fit_page(report, "")
    assert "<figure>" not in page and page.count("<table") >= 3
