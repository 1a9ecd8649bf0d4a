"""From records to cells and verdicts: the choice of a rate, means and deviations, what IA2 before SFT brought."""

import math
import re

import numpy as np
import pytest
from scipy import stats
from test_report import ACC, record, records, study

from ia2mini.engine.select import chosen
from ia2mini.files import finite
from ia2mini.report.summary import paired, verdict
from ia2mini.study.table import summarise


def versus(
    sft: list[float], ours: list[float], icl: list[float] | None = None, ece: bool = True
) -> list[str]:
    """The verdict on accuracies of SFT, IA2→SFT and ICL, a set each."""
    runs = []
    for method, values in (("sft", sft), ("ia2-sft", ours), ("icl", icl or [])):
        rate = (None, None) if method == "icl" else (1e-3, 0.1)
        runs += [record(method, s, acc, *rate) for s, acc in enumerate(values)]
    for run in runs if not ece else ():
        run["ece"] = None
    return verdict(summarise(runs))


SFT, OURS = [0.6, 0.65, 0.7, 0.6, 0.64], [0.8, 0.86, 0.9, 0.81, 0.84]
SHARED = "5 pairs of task and set, not independent: those of a task share their evaluation rows."


def test_verdict_of_a_certain_gain():
    (line,) = versus(SFT, OURS, [0.95] * 5)
    found = re.fullmatch(
        r"IA2→SFT against SFT: accuracy \+20\.4 points \(95 % \+(\S+) to \+(\S+), p = (\S+), d = (\S+)\); "
        rf"ECE -0\.05 \(95 % (\S+) to (\S+), p = (\S+), d = (\S+)\); {SHARED}",
        line,
    )
    want = stats.ttest_rel(OURS, SFT)
    ends = want.confidence_interval(0.95)
    low, high, p = map(float, found.groups()[:3])
    assert (low, high) == pytest.approx((100 * ends.low, 100 * ends.high), abs=0.051)
    assert p == pytest.approx(want.pvalue, rel=0.05)


def test_verdict_of_texts_says_nothing_of_calibration():
    (line,) = versus(SFT, OURS, ece=False)
    assert "accuracy +20.4 points" in line and "ECE" not in line


def test_verdict_of_what_may_be_chance():
    lines = versus([0.6, 0.9, 0.7, 0.6, 0.8], [0.8, 0.7, 0.75, 0.7, 0.7])
    assert lines[0].startswith("IA2→SFT against SFT: accuracy +1.0 points (95 % -")
    assert lines[1:] == ["The difference in accuracy may be chance; more --sets tell."]


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_verdict_of_few_pairs_has_no_interval(pairs):
    lines = versus(SFT[:pairs], [acc + 0.2 for acc in SFT[:pairs]])
    noun = "pair" if pairs == 1 else "pairs"
    said = f"{pairs} {noun} of task and set: too few for a p-value or an interval."
    assert lines[0] == f"IA2→SFT against SFT: accuracy +20.0 points; ECE -0.05; {said}"
    assert lines[1:] == ["The difference in accuracy may be chance; more --sets tell."]


def test_verdict_of_equal_differences_has_no_interval():
    lines = versus(SFT, [acc + 0.2 for acc in SFT])
    equal = "(equal in all pairs: no test)"
    assert (
        lines[0]
        == f"IA2→SFT against SFT: accuracy +20.0 points {equal}; ECE -0.05 {equal}; {SHARED}"
    )
    assert lines[1:] == ["The difference in accuracy may be chance; more --sets tell."]


def test_verdict_of_a_loss():
    lines = versus(OURS, SFT, [0.95] * 5)
    assert lines[0].startswith("IA2→SFT against SFT: accuracy -20.4 points (95 % -")
    assert lines[1:] == ["IA2→SFT is worse than SFT here: take SFT."]


def test_verdict_where_demonstrations_teach_less_than_sft():
    lines = versus(SFT, OURS, [acc - 0.1 for acc in SFT])
    said = "Demonstrations teach this model less than SFT does (ICL -10.0 points): IA2 has little to pass on."
    assert lines[1:] == [said]


def test_no_verdict_without_both_methods():
    assert verdict(summarise([run for run in records() if run["method"] != "sft"])) == []
    assert verdict(summarise([run for run in records() if run["method"] in ("base", "icl")])) == []


def test_pairs_are_tasks_and_sets_averaged_over_evaluations():
    cells = study()["cells"]
    test = paired(cells, "acc")
    values = {}
    for method in ("ia2-sft", "sft"):
        at = np.array(ACC[method])
        # mood on mood and news; topic
        values[method] = np.concatenate([(at + at - 0.1) / 2, at - 0.05])
    gain = values["ia2-sft"] - values["sft"]
    expected = stats.ttest_rel(values["ia2-sft"], values["sft"])
    assert test.pairs == 6 and test.mean == pytest.approx(gain.mean())
    assert (test.t, test.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert paired(cells, "acc", "ia2", "icl").mean == pytest.approx(-0.2)
    assert paired(cells, "acc", "ia2", "soft") is None


def cell(task: str, method: str, values: list[float], evaluation: str = "") -> dict:
    return {"task": task, "eval": evaluation or task, "method": method, "acc": values}


def test_only_the_same_sets_of_the_same_evaluations_are_pairs():
    """Joined studies may have a method for one task and another for another, in any order."""
    low = [0.1, 0.2, 0.15, 0.3, 0.2]
    high = [0.9, 0.8, 0.95, 0.7, 0.85]
    apart = [cell("mood", "ia2-sft", high), cell("topic", "sft", low)]
    assert paired(apart, "acc") is None
    crossed = [
        cell("mood", "sft", low),
        cell("topic", "sft", high),
        cell("topic", "ia2-sft", high),
        cell("mood", "ia2-sft", low),
    ]
    test = paired(crossed, "acc")
    assert test.mean == 0 and test.pairs == 10
    assert paired([*apart, cell("mood", "sft", high)], "acc").pairs == 5
    # an evaluation of one method alone does not count
    further = [cell("mood", "ia2-sft", low, "news"), cell("mood", "sft", high)]
    assert paired([*further, cell("mood", "ia2-sft", high)], "acc").mean == 0


RATES = [  # a low dev loss in one set does not win; nor does one good set
    record("sft", 0, 0.5, 1e-4, 0.9, ece=0.3), record("sft", 0, 0.9, 1e-3, 0.1), record("sft", 0, 0.6, 1e-2, 0.5),
    record("sft", 1, 0.7, 1e-4, 0.9, ece=0.1), record("sft", 1, 0.2, 1e-3, 2.9), record("sft", 1, 0.5, 1e-2, 0.6),
]  # fmt: skip


def test_chosen_by_means_over_sets():
    assert chosen(RATES, "dev") == (1e-2, None)  # means 0.9, 1.5, 0.55
    assert chosen(RATES, "eval") == (1e-4, None)  # means 0.6, 0.55, 0.55
    mixed = [
        {**r, "beta": beta, "dev_loss": r["dev_loss"] + beta} for r in RATES for beta in (0.5, 0.1)
    ]
    assert chosen(mixed, "dev") == (1e-2, 0.1)


def test_summarise_against_numpy():
    base = [record("base", s, 0.25) for s in range(2)]
    other = [{**r, "eval": "news", "ood": True, "acc": 1 - r["acc"]} for r in RATES]
    cells = summarise(base + RATES + other, "both")
    keys = [(c["method"], c["eval"], c["selected_by"], c["rate"]) for c in cells]
    assert keys == [("base", "mood", None, None), ("sft", "mood", "dev", 1e-2), ("sft", "mood", "eval", 1e-4),
                    ("sft", "news", "dev", 1e-2), ("sft", "news", "eval", 1e-3)]  # fmt: skip
    paper = cells[2]
    assert (paper["acc"], paper["ece"], paper["sets"], paper["ood"]) == (
        [0.5, 0.7],
        [0.3, 0.1],
        2,
        False,
    )
    for metric, values in (("acc", [0.5, 0.7]), ("ece", [0.3, 0.1])):
        assert paper[f"{metric}_mean"] == pytest.approx(np.mean(values))
        assert paper[f"{metric}_std"] == pytest.approx(np.std(values, ddof=1))
    assert paper["asim_layers"] == pytest.approx([0.35, 0.5])
    for select in ("dev", "eval"):
        assert [c["selected_by"] for c in summarise(RATES, select)] == [select]
    assert summarise(RATES) == summarise(RATES, "dev")
    no_ece = summarise([{**r, "ece": None} for r in RATES])[0]
    assert no_ece["ece_mean"] is None and no_ece["ece_std"] is None and "reliability" not in no_ece


def test_dev_choice_needs_only_the_chosen_runs():
    """What is reported when only the runs at the chosen rate are scored is what a choice among all gives."""
    rate, _ = chosen(RATES, "dev")
    assert summarise([run for run in RATES if run["rate"] == rate]) == summarise(RATES)


def test_reliability_is_pooled_over_sets():
    curves = [[[3, 0.6, 1], [0, 0.0, 0]], [[1, 0.1, 0], [2, 1.9, 2]]]
    (summary,) = summarise(
        [record("base", s, 0.5, reliability=curve) for s, curve in enumerate(curves)]
    )
    assert summary["reliability"] == [[4, pytest.approx(0.7), 1], [2, 1.9, 2]]


def test_a_run_that_diverged_is_never_chosen_also_from_the_saved_file():
    diverged = [{**r, "dev_loss": math.inf} if r["rate"] in (1e-4, 1e-2) else r for r in RATES]
    # JSON holds no infinity
    assert chosen(diverged, "dev") == chosen(finite(diverged), "dev") == (1e-3, None)
    assert summarise(finite(diverged)) == summarise(diverged)
    unknown = [{**r, "dev_loss": math.nan if r["rate"] == 1e-4 else r["dev_loss"]} for r in RATES]
    assert chosen(unknown, "dev") == (1e-2, None)
