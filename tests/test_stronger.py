"""The study of a stronger teacher: which methods it compares, on which rows, and what it tells of them."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from bench.studies import tasks
from bench.studies.stronger import ITSELF, MATCHED, PLAIN, stronger
from ia2mini.engine.options import Options
from ia2mini.engine.subject import open_subject
from ia2mini.tasks import load_examples


def test_plain_and_tuned_teachers_are_compared_on_the_same_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "classification", ("toy-mood",))
    options = Options(n=(2,), sets=2, eval_rows=8, epochs=2, rates=(1e-2,))
    found = stronger(open_subject("tiny", "cpu"), options, "classification")
    cells = {}
    for folder in Path("runs").iterdir():
        document = json.loads((folder / "results.json").read_text())
        suffix = ", tuned" if document["config"]["teacher"] == "tuned" else ""
        for cell in document["cells"]:
            if not cell["ood"]:
                cells[cell["method"] + suffix] = cell
    lines = {line.stack: line.rates for line in found.lines if line.what == "classification, N = 2"}
    tuned = {f"{method}, tuned" for method in MATCHED + ITSELF}
    assert lines.keys() == cells.keys() == {*PLAIN, *MATCHED, *tuned}
    for method, rates in lines.items():
        assert rates["% accuracy"] == pytest.approx(100 * fmean(cells[method]["acc"]))
        assert rates["overconfidence"] == pytest.approx(fmean(cells[method]["overconfidence"]))
    gain = 100 * (fmean(cells["ia2-sft, tuned"]["acc"]) - fmean(cells["ia2-sft"]["acc"]))
    said = f"% accuracy: ia2-sft, tuned against ia2-sft: {gain:+.1f}, 2 pairs, too few for a test"
    assert f"classification, N = 2: {said}" in found.remarks


def test_words_are_labels_of_real_rows_and_no_row_is_in_both_parts(
    shared_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for task, labels in zip(
        tasks.tasks_of("words", shared_data),
        ({"negative", "positive"}, {"World", "Sports", "Business", "Technology"}),
        strict=True,
    ):
        assert set(task.labels) == labels
        pool = load_examples(task, "train").rows
        fresh = load_examples(task, "eval").rows
        assert not {row.prompt for row in pool} & {row.prompt for row in fresh}
        assert len(pool) <= tasks.WORD_ROWS * len(labels)
