"""The commands on one's own rows: a model that is named, labels and templates that can be used, JSON that is valid."""

import datetime
import decimal
import json
import shlex
import sys
import warnings

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from mistakes import refused
from pyarrow import parquet
from scipy import stats

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.fit import few_rows_note, margin
from ia2mini.cli.main import main
from ia2mini.files import finite, json_line
from ia2mini.tasks import world
from ia2mini.tasks.own import true_answer
from ia2mini.tasks.rows import Row

QUICK = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    fitted = fit(world.rows("toy-mood", "train")[4:16], open_subject("tiny", "cpu"), QUICK)
    fitted.save(folder := tmp_path_factory.mktemp("own") / "a")
    return folder


def run(*arguments, code=0, input=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # words that the embedded model does not know
        result = CliRunner().invoke(main, list(map(str, arguments)), input=input)
    assert result.exit_code == code, result.output
    return result


def toy_file(path, count=30):
    rows = [
        {"text": row["text"], "label": str(row["label"])}
        for row in world.rows("toy-mood", "train")[:count]
    ]
    path.write_text("text;label\n" + "".join(f'"{row["text"]}";{row["label"]}\n' for row in rows))
    return path


def test_own_rows_are_fitted_on_a_model_that_was_named(tmp_path):
    rows = toy_file(tmp_path / "rows.csv")
    (tmp_path / "context.txt").write_text("good: 0, bad: 1")
    for how in ([rows], ["--context", tmp_path / "context.txt", "--prompts", rows]):
        told = run("fit", *how, "--out", tmp_path / "o", code=2).stderr
        assert "name a --model for your own rows" in told and told.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_fit_says_how_rows_were_read_and_what_to_type_next(tmp_path):
    rows = toy_file(tmp_path / "rows.csv", 12)
    rows.write_text(rows.read_text() + "good;\n;1\n")
    out = tmp_path / "my folder's"
    how = "--model tiny --methods sft --epochs 1 --rates 1e-2 --folds 2".split()
    found = run("fit", rows, *how, "--out", out)
    lines = [
        f"left out for want of prompt: 1 of 14 rows ({rows}:15)",
        f"left out for want of answer: 1 of 14 rows ({rows}:14)",
        "columns: the prompt is 'text'; the answer is 'label'",
        "answers: 2 labels (0: 10, 1: 2)",
    ]
    told = found.stderr.splitlines()
    assert told[:4] == lines
    assert told[4].startswith("12 rows are few: they measure accuracy to within about 23 points")
    assert "8 to 16 rows of each label (16 to 32) are better" in told[4]
    *_, last, next_command = found.stdout.splitlines()
    assert not set(lines) & set(found.stdout.splitlines()), "told once"
    assert shlex.split(next_command.removeprefix("next: ")) == [
        "ia2mini",
        "predict",
        str(out),
        "NEW_ROWS",
    ]
    assert json.loads((out / "ia2mini.json").read_text())["report"]["rows"] == 12
    predicted = run("predict", out, rows)
    assert len(predicted.stdout.splitlines()) == 13, "as in fit"
    assert predicted.stderr == f"ia2mini: {rows}:15: the prompt is empty; left out\n"


def test_score_reads_whole_numbers_as_fit_does(saved, tmp_path):
    rows = world.rows("toy-mood", "train")[:8]
    (tmp_path / "ints.csv").write_text(
        "text;label\n" + "".join(f'"{r["text"]}";{r["label"]}\n' for r in rows)
    )
    (tmp_path / "floats.csv").write_text(
        "text;label\n" + "".join(f'"{r["text"]}";{r["label"]}.0\n' for r in rows)
    )
    one, other = (
        run("score", saved, tmp_path / name).stdout for name in ("ints.csv", "floats.csv")
    )
    assert one.partition("\n")[2] == other.partition("\n")[2] and "8 rows" in one


SPELLINGS = {  # labels -> ways to write the first of them as a true answer
    ("true", "false"): ["true", "True", "TRUE", True, np.True_],
    ("True", "False"): ["true", True],
    ("1", "0"): ["1", "1.0", 1, 1.0, True, "true", np.int8(1)],
    ("caf\u00e9", "bar"): ["cafe\u0301"],
    ("cafe\u0301", "bar"): ["caf\u00e9"],
    ("1.5", "0"): [1.5, np.float32(1.5)],
}


@pytest.mark.parametrize("labels", SPELLINGS, ids=repr)
def test_a_true_answer_may_be_written_in_several_ways(labels):
    for value in SPELLINGS[labels]:
        assert true_answer(Row("here", {"label": value}), "label", list(labels)) == labels[0]
    for other in ("", "Yes", "10", "cafe", "1.50", " 1", "b\u00e4r"):
        refused(
            lambda other=other: true_answer(Row("here", {"label": other}), "label", list(labels)),
            repr(other),
        )


@pytest.mark.parametrize("rows", [8, 16, 100])
def test_the_margin_of_few_rows_is_half_the_width_of_an_interval(rows):
    low, high = stats.norm.interval(0.95, 0.8, (0.8 * 0.2 / rows) ** 0.5)
    assert margin(rows) == pytest.approx(100 * (high - low) / 2, rel=1e-3)
    assert few_rows_note(29, 2) and not few_rows_note(30, 2)
    assert "label" not in few_rows_note(29, 0)[0], "of text"


def test_queries_without_a_prompt_are_left_out_and_named(saved):
    rows = world.rows("toy-mood", "train")[4:16]
    more = [{"text": "good"}, {"text": None}, {}]
    options = FitOptions(epochs=1, rates=(1e-2,), methods=("ia2",), folds=2)
    report = fit(rows, open_subject("tiny", "cpu"), options, unlabelled=more).report
    assert "left out for want of prompt: 2 of 3 rows (row 2, row 3)" in report["remarks"]
    assert any(remark.startswith("1 row without answers joined") for remark in report["remarks"])


def test_run_and_tasks_guess_columns_as_fit_does(tmp_path):
    rows = toy_file(tmp_path / "rows.csv")
    rows.write_text(rows.read_text().replace("text;label", "Review;Sentiment"))
    said = "columns: the prompt is 'Review'; the answer is 'Sentiment'"
    shown = run("tasks", "--data", rows, "--model", "tiny", "--n", 2)
    assert (
        f"{said}\nanswers: 2 labels (0: 20, 1: 10)\n" in shown.stderr
        and shown.stdout.count("demonstration:") == 2
    )
    how = "--model tiny --device cpu --n 2 --sets 1 --methods base --eval-rows 4 --figures=".split()
    found = run("run", "--data", rows, *how, "--out", tmp_path / "runs")
    assert found.stderr.splitlines()[0] == said
    rows.write_text(
        "premise,hypothesis,label\n" + "".join(f"a {i},b {i},{i % 2}\n" for i in range(30))
    )
    for command in (["tasks", "--data", rows], ["run", "--data", rows, *how]):
        told = run(*command, code=2).stderr
        assert (
            "'premise', 'hypothesis', 'label'" in told
            and "--template" in told
            and told.count("\n") == 1
        )
    told = run("run", "toy-mood", "--answer-column", "label", code=2).stderr
    assert "give --data too" in told


def test_tables_are_named_where_they_were_written(tmp_path, monkeypatch):
    how = "run toy-mood --model tiny --device cpu --n 2 --sets 1 --methods base --eval-rows 4 --figures png".split()
    assert "results.json, tables, " in run(*how, "--out", tmp_path / "all").stdout
    monkeypatch.setitem(sys.modules, "pandas", None)
    found = run(*how, "--out", tmp_path / "few").stdout
    assert (
        "results.json, tables" not in found
        and "results.json, table.txt (pip install 'ia2mini[report]'" in found
    )
    (folder,) = (tmp_path / "few").iterdir()
    assert {path.stem for path in folder.glob("table.*")} == {"table"} and not (
        folder / "table.csv"
    ).exists()


def test_labels_of_an_option(saved):
    rows = json.dumps({"text": "good"}) + "\n"
    plain = run("predict", saved, "-", "--labels", "0,1", input=rows).stdout
    assert run("predict", saved, "-", "--labels", " 0 , 1", input=rows).stdout == plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ia2mini.engine.subject.open_subject", None)  # no model is loaded before
        for labels in ("0,", ",", "", "0, ,1", "0,0", "0, 0", "0"):
            told = run("predict", saved, "-", "--labels", labels, input=rows, code=2).stderr
            assert "labels = [" in told and "two or more different texts" in told
            assert told.count("\n") == 1
    for labels in (["0", ""], ["0", "0"], ["0"], ["0", 1]):
        refused(
            lambda labels=labels: load_adapter(saved, labels=labels),
            "labels = ",
            "two or more different texts",
        )


def test_a_template_without_a_column_asks_every_row_the_same(saved):
    for template in ("Is it good?", "", "{text", "\\n"):
        told = run("predict", saved, "-", "--template", template, input="", code=2).stderr
        assert "must name a column of the prompt, as {text}" in told and told.count("\n") == 1
        refused(
            lambda template=template: load_adapter(saved, template=template),
            "template = ",
            "columns in braces",
        )


@pytest.mark.parametrize(
    "field, values",
    [
        ("parser", ["nonsense", 3, ["number"], {}]),
        ("labels", [["0", ""], ["0", "0"], ["0"], "01", [0, 1]]),
        ("template", ["Is it good?", "", 3]),
    ],
)
def test_a_description_that_cannot_be_used_is_one_line(saved, tmp_path, field, values):
    whole = json.loads((saved / "ia2mini.json").read_text())
    for value in values:
        (tmp_path / "ia2mini.json").write_text(json.dumps(whole | {field: value}))
        refused(
            lambda: load_adapter(tmp_path), f"ia2mini.json: field {field}", "fit the adapter again"
        )
    (tmp_path / "ia2mini.json").write_text(json.dumps(whole | {"labels": [], "parser": None}))
    refused(lambda: load_adapter(tmp_path), "ia2mini.json: field parser")


def refuse_constant(name: str):
    raise ValueError(name)


def test_a_rows_own_columns_are_valid_json(saved, tmp_path):
    odd = {"text": "good", "n": float("nan"), "deep": [{"x": float("-inf")}, 1.5]}
    found = run("predict", saved, "-", input=json.dumps(odd) + "\n").stdout
    row = json.loads(found, parse_constant=refuse_constant)
    assert row["n"] is None and row["deep"] == [{"x": None}, 1.5] and row["answer"] in ("0", "1")
    day, price = datetime.date(2024, 2, 29), decimal.Decimal("1.50")
    columns = {
        "text": ["good"],
        "day": [day],
        "price": [price],
        "image": [b"\xff\x00"],
        "n": [float("inf")],
    }
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    row = json.loads(
        run("predict", saved, tmp_path / "rows.parquet").stdout, parse_constant=refuse_constant
    )
    assert (row["day"], row["price"], row["image"], row["n"]) == (
        "2024-02-29",
        "1.50",
        "/wA=",
        None,
    )
    assert json.loads(json_line({"a": [float("nan")]})) == {"a": [None]}
    with pytest.raises(TypeError):
        finite({"a": day})  # in our own files it would be a mistake of ours


def test_a_number_that_is_missing_is_no_prompt(saved):
    given = '{"text": NaN}\n{"text": null}\n{"text": Infinity}\n{"text": "good"}\n'
    found = run("predict", saved, "-", input=given)
    assert len(found.stdout.splitlines()) == 1
    assert [line.split(": ")[1] for line in found.stderr.splitlines()] == ["-:1", "-:2", "-:3"]


def test_an_unknown_word_is_warned_of_once_and_few_are_named():
    strange = "Abend Berg Chor Dorf Eule Fluss Garten Hund Insel Jahr Katze Licht".split()
    rows = [{"text": f"good {word}", "label": i % 2} for i, word in enumerate(strange)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(rows, open_subject("tiny", "cpu"), QUICK)
    lines = [str(warning.message) for warning in said if "vocabulary" in str(warning.message)]
    named = [
        f"{word!r} is not in the vocabulary and is read as an unknown word" for word in strange[:5]
    ]
    assert lines == [*named, "more words are not in the vocabulary; they are not named"]


def test_answers_that_hold_the_end_of_a_text_are_named():
    subject = open_subject("tiny", "cpu")
    (end,) = subject.tokenizer.eos_ids
    stop = subject.tokenizer.backend.id_to_token(end)
    rows = world.rows("toy-sums", "train")[:8]
    assert len({row["answer"] for row in rows}) > 2
    rows[2]["answer"] += f" {stop} 4"
    report = fit(rows, subject, QUICK, (None, "answer", None, "text")).report
    (said,) = [remark for remark in report["remarks"] if "ends a text" in remark]
    assert said.startswith(f"1 answer with {stop!r}") and "(row 3)" in said
