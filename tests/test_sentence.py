"""What `fit` and `score` say: right by itself, with the measure named, and nothing claimed of what proves nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mistakes import refused
from sklearn.metrics import f1_score

from ia2mini import FitOptions, fit, open_subject
from ia2mini.cli.fit import next_step
from ia2mini.fitting.measures import macro_f1
from ia2mini.fitting.score import score_rows
from ia2mini.fitting.sentence import join_names, p_value, sentence, with_interval
from ia2mini.report.fit import fit_table
from ia2mini.tasks import world
from ia2mini.tasks.rows import as_rows

QUICK = FitOptions(epochs=1, rates=(1e-4,), methods=("sft",), folds=3)


def numbers(acc: float, nll: float) -> dict:
    return {"acc": [acc, acc - 0.1, min(1, acc + 0.1)], "nll": [nll, nll, nll], "ece": 0.1}


def report(chosen: str, **changes) -> dict:
    found = {"base": numbers(0.5, 0.7), "icl": numbers(0.75, 0.5), "sft": numbers(0.71, 0.6)}
    found["commonest"] = numbers(0.5, 0.69)
    about = {
        "rows": 24,
        "chosen": chosen,
        "candidates": found,
        "shipped": numbers(0.73, 0.65),
        "all_differ": False,
        "wanted": False,
        "nearest": None,
    }
    about |= {
        "tokens": {"query": 20.0, "icl": 200.0},
        "classes": [],
        "against": {"base": (4, 0, 0.125)},
    }
    return about | changes


def test_an_adapter_is_told_by_the_whole_choice_and_row_by_row():
    text = sentence(report("sft", against={"base": (4, 0, 0.125), "icl": (0, 0, 1.0)}))
    assert text.startswith("SFT is shipped: 73 % (63 to 83) of 24 held-out rows right")
    assert (
        "Compared with base (50 %): 4 rows gained, none lost (p = .12: it may be chance)." in text
    )
    lower = sentence(report("sft", lower_loss=["base"]))
    assert "(p = .12: it may be chance, but its loss is significantly lower)." in lower
    surely_more = sentence(report("sft", lower_loss=["base"], against={"base": (9, 0, 0.004)}))
    assert "(p = .004)." in surely_more
    assert "Compared with ICL (75 % at 10.0 × the tokens): right on the same rows." in text
    assert "Always giving the commonest answer: 50 %." in text


def test_a_probe_that_is_shipped_is_told_as_such():
    found = report("probe")["candidates"] | {"probe": numbers(0.9, 0.4)}
    text = sentence(report("probe", candidates=found))
    assert text.startswith("A linear probe on the base's last hidden state is shipped, without an")


def test_an_adapter_with_demonstrations_is_told_with_its_price():
    found = report("icl-sft")["candidates"] | {"icl-sft": numbers(0.9, 0.4)}
    text = sentence(report("icl-sft", candidates=found))
    assert text.startswith("Demonstrations in the prompt are shipped with an adapter")
    assert text.endswith("A query costs 200 tokens instead of 20.")


def test_what_came_nearest_is_named_where_nothing_is_shipped():
    text = sentence(report("base", nearest=("sft", 3, 1, 0.625)))
    assert "SFT has the lowest loss; against the base 3 rows gained, 1 lost (p = .62)" in text
    assert "`--ship sft` ships it anyway" in text and "--ship" not in sentence(report("base"))


def test_what_was_asked_for_is_shipped(subject):
    """Whatever the held-out rows say; they still say what it is worth, by its own choices alone."""
    rows = world.rows("toy-mood-remap", "train")[4:16]
    found = fit(rows, subject, replace(QUICK, ship="sft", temperature=False)).report
    assert found["chosen"] == "sft" and "SFT is shipped, as requested" in found["sentence"]
    assert found["shipped"] == found["candidates"]["sft"]
    assert fit(rows, subject, replace(QUICK, ship="probe")).probe is not None
    refused(lambda: fit(rows, subject, replace(QUICK, ship="ridge")), "--ship ridge", "icl, probe")


def test_where_nothing_is_shipped_it_says_what_was_tried_and_what_to_do():
    text = sentence(report("base"))
    assert (
        "Nothing is shipped. ICL and SFT were tried" in text
        and "more rows, or a larger model" in text
    )
    than_base = "none was both better than the base (50 % right; ICL must be significantly better)"
    assert f"{than_base} and significantly better than always" in text


def test_a_base_that_is_worse_than_the_commonest_answer_is_warned_of():
    found = report("base")["candidates"]
    assert "do not use it" not in sentence(report("base"))
    found["commonest"] = numbers(0.66, 0.6)
    text = sentence(report("base", candidates=found))
    assert (
        "The base is worse than always giving the commonest answer: do not use it either." in text
    )


def test_what_to_do_next_never_contradicts_the_sentence():
    out = Path("out")
    assert next_step(report("sft"), out) == "next: ia2mini predict out NEW_ROWS"
    good_base = next_step(report("base"), out)
    assert good_base.startswith("next: add rows") and "predict out" in good_base
    worse = report("base")
    worse["candidates"]["commonest"] = numbers(0.66, 0.6)
    assert "predict" not in next_step(worse, out)


@pytest.mark.parametrize("least, told", [(2, True), (15, True), (16, False)])
def test_how_many_more_rows_may_help_depends_on_the_rarest_label(least, told):
    classes = [
        {"label": "a", "rows": 20, "recall": 1.0},
        {"label": "b", "rows": least, "recall": 1.0},
    ]
    text = sentence(report("base", classes=classes))
    assert ("more rows (8 to 16 of each label), or a larger model" in text) == told


def test_of_texts_and_contexts_it_says_why_nothing_is_shipped():
    found = report("base")["candidates"]
    del found["commonest"]
    text = sentence(report("base", candidates=found))
    assert (
        "none had a significantly lower loss than the base (50 % right) and was right on more."
        in text
    )
    context = sentence(report("base", candidates=found, kl={"base": 0.7}))
    assert "SFT was tried; on 24 held-out rows" in context
    assert "the base (50 % in agreement with the model that sees the context)" in context
    assert "and was in agreement on more." in context
    wrong = {name: numbers(0.0, 1.0) for name in found}
    assert "exactly. What may help: more rows, or a larger model." in sentence(
        report("base", candidates=wrong)
    )
    differ = sentence(report("base", candidates=wrong, all_differ=True))
    assert "exactly, so held-out rows cannot judge answers that all differ." in differ


def test_labels_that_are_never_right_are_named():
    classes = [
        {"label": name, "rows": 4, "recall": recall}
        for name, recall in (("a", 0.0), ("b", 1.0), ("c", 0.0))
    ]
    assert "Never answered correctly: 'a' and 'c'." in sentence(report("sft", classes=classes))


@pytest.mark.parametrize(
    "p, text", [(0.125, "p = .12"), (1.0, "p = 1.00"), (0.0041, "p = .004"), (0.0002, "p < .001")]
)
def test_probabilities_are_short(p, text):
    assert p_value(p) == text


def test_lists_and_shares():
    assert [join_names(["a"]), join_names(["a", "b"]), join_names(["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    assert (
        with_interval([1.0, 0.8575, 1.0]) == "100 % (86 to 100)"
        and with_interval([1.0, float("nan"), None]) == "100 %"
    )


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def fitted(subject):
    return fit(world.rows("toy-mood", "train")[4:16], subject, QUICK)


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_score_of_few_rows_is_cautious(fitted, count):
    found = score_rows(
        fitted, as_rows(world.rows("toy-mood", "train")[200 : 200 + count]), icl=False
    )
    assert ("So few rows prove nothing." in found["sentence"]) == (count < 5)
    assert bool(re.search(r"\(\d+ to \d+\) of 6 rows", found["sentence"])) == (count == 6)
    assert "commonest answer" in fit_table(found) and "nan" not in fit_table(found)


def test_answers_that_all_differ_are_not_judged(subject):
    words = "good bad sun rain walk day park movie".split()
    texts = [row["text"] for row in world.rows("toy-mood", "train")[:12]]
    rows = [
        {"text": text, "answer": f"{words[i % 8]} {words[i // 8 + 3]}"}
        for i, text in enumerate(texts)
    ]
    found = fit(rows, subject, QUICK).report
    assert len({row["answer"] for row in rows}) == 12 and found["chosen"] == "base"
    assert any("every row has another answer" in text for text in found["remarks"])
    assert not any(one["acc"][0] for one in found["candidates"].values()), (
        "this test needs texts that nobody knows"
    )
    assert (
        "held-out rows cannot judge answers that all differ" in found["sentence"]
        and "0 %" not in found["sentence"]
    )


def test_rows_that_cannot_be_learned_ship_nothing(subject):
    """Five labels dealt at random over twenty rows: what knows nothing is not shipped."""
    deal = torch.randperm(20, generator=torch.Generator().manual_seed(0)) % 5
    rows = [
        {"text": row["text"], "stars": str(int(y) + 1)}
        for row, y in zip(world.rows("toy-mood", "train"), deal)
    ]
    found = fit(rows, subject, FitOptions(epochs=3, rates=(1e-2,)), columns=("text", "stars"))
    assert found.spec["method"] == "base" and found.adapter is None
    assert (
        "Nothing is shipped" in found.report["sentence"]
        and "commonest" in found.report["candidates"]
    )


def test_macro_f1_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    for labels in (2, 3, 7):
        said, gold = torch.randint(0, labels, (2, 15), generator=generator).numpy()
        assert macro_f1(said, gold) == pytest.approx(f1_score(gold, said, average="macro"))
