"""`predict --out`: a line for every row beside its own columns, as pandas, openpyxl and pyarrow read it."""

import csv
import datetime
import json
import os

import pandas
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from shipping import shipping

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.report import answers as answer_files
from ia2mini.tasks import world
from ia2mini.tasks.rows import read_rows

QUICK = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=2)
KINDS = ("csv", "tsv", "jsonl", "xlsx", "parquet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "a"
    with shipping("sft"):
        fit(world.rows("toy-mood", "train")[4:16], open_subject("tiny", "cpu"), QUICK).save(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """An adapter that answers with text."""
    folder = tmp_path_factory.mktemp("fitted") / "texts"
    rows = [{"text": row["text"], "label": "apple"} for row in world.rows("toy-mood", "train")[:8]]
    rows[0]["label"] = "banana"
    with shipping("sft"):
        how = (None, None, None, "text")
        fit(rows, open_subject("tiny", "cpu"), QUICK, how).save(folder)
    return folder


def run(*arguments, code=0, input=None):
    result = CliRunner().invoke(main, list(map(str, arguments)), input=input)
    assert result.exit_code == code, result.output
    return result


def table(path) -> pandas.DataFrame:
    """A table as pandas reads it, all texts, nothing for what is missing."""
    kind = path.suffix
    if kind == ".xlsx":
        pytest.importorskip("openpyxl", reason="openpyxl is not installed (extra `data`)")
        found = pandas.read_excel(path, dtype=object)
    elif kind == ".parquet":
        found = pandas.read_parquet(path)
    else:
        found = pandas.read_csv(path, sep="\t" if kind == ".tsv" else ",", dtype=object)
    return found.astype(object).where(found.notna(), None)


ROWS = [
    {"id": 1, "text": "a good film", "answer": "mine", "reason": "why", "p(0)": 3},
    {"id": 2, "text": None},
    {"id": 3, "text": "a bad film; truly", "tags": ["x", {"y": None}], "flag": True},
    {"id": 4, "text": 'he said "bad",\nthen good'},
    {"id": 5},
    {"id": 6, "text": "good", "n": float("nan"), "row_answer": "older"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_its_line_in_order(saved, tmp_path, kind):
    if kind == "xlsx":
        pytest.importorskip("openpyxl", reason="openpyxl is not installed (extra `data`)")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "new folder" / f"out.{kind}"
    told = run("predict", saved, path, "--out", out).stdout
    assert told == f"{out}: 6 rows, 2 of them without an answer: see the column `reason`\n"
    expected = {row["id"]: row for row in load_adapter(saved).answer_rows(
        [row for row in ROWS if row.get("text")])}  # fmt: skip
    if kind == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert found[2]["tags"] == ["x", {"y": None}] and found[2]["flag"] is True
        shares = [row["probabilities"] for row in found]
        own = ["row_answer", "row_reason"]
    else:
        found = table(out).to_dict("records")
        assert json.loads(found[2]["tags"]) == ["x", {"y": None}]
        both = [{"0": row["p(0)"], "1": row["p(1)"]} for row in found]
        shares = [None if each["0"] is None else each for each in both]
        own = ["row_answer", "row_reason", "row_p(0)"]
        names = ["answer", "confidence", "reason", "p(0)", "p(1)"]
        assert list(table(out).columns)[-5:] == names
    assert [int(row["id"]) for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(found[0][name] is not None for name in own)
    assert found[5]["row_row_answer"] == "older" and found[3]["text"] == ROWS[3]["text"]
    for row, share in zip(found, shares):
        if int(row["id"]) in (2, 5):
            assert row["answer"] is None and row["confidence"] is None and share is None
            assert f"{path}:{row['id']}" in row["reason"] and "'text'" in row["reason"]
            continue
        wanted = expected[int(row["id"])]
        assert str(row["answer"]) == wanted["answer"] and row["reason"] is None
        assert float(row["confidence"]) == round(wanted["confidence"], 4)
        for label, value in wanted["probabilities"].items():
            assert float(share[label]) == round(value, 4)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_line_ends_of_any_kind_and_objects_without_fields(saved, tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    text = "a good\rfilm, \r\ntruly\n"
    rows = [{"text": text, "more": {}, "parts": [{}], "old": "a\rb"}, {"text": "a bad film"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / f"out.{kind}"
    run("predict", saved, path, "--out", out)
    if kind == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert found[0]["more"] == {} and found[0]["parts"] == [{}]
    else:
        found = table(out).to_dict("records")
        assert found[0]["more"] == "{}" and found[0]["parts"] == "[{}]"
    assert [row["text"] for row in found] == [text, "a bad film"]
    assert found[0]["old"] == "a\rb" and found[1].get("more") is None


def test_a_line_that_is_no_row_keeps_its_place(saved, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{broken\n\n[1]\n{"text": "bad"}\n')
    run("predict", saved, path, "--out", tmp_path / "out.csv")
    found = table(tmp_path / "out.csv")
    assert [answer is None for answer in found["answer"]] == [False, True, True, False]
    assert f"{path}:2: not JSON" in found["reason"][1] and f"{path}:4" in found["reason"][2]
    told = run("predict", saved, path, "--out", tmp_path / "no.csv", "--strict", code=2).stderr
    assert f"{path}:2: not JSON" in told and not (tmp_path / "no.csv").exists()


def test_rows_without_a_prompt_have_no_answer(saved, tmp_path):
    (tmp_path / "rows.csv").write_text('id,text\n1,\n2, \n3,good\n4,"\u200b"\n')
    run("predict", saved, tmp_path / "rows.csv", "--out", tmp_path / "out.csv")
    found = table(tmp_path / "out.csv")
    assert [answer is None for answer in found["answer"]] == [True, True, False, True]
    assert found["reason"][3] == f"{tmp_path / 'rows.csv'}:5: the prompt is empty"


def test_a_file_of_which_no_row_is_answered_is_a_mistake(saved, tmp_path):
    rows = tmp_path / "rows.csv"
    (tmp_path / "out.csv").write_text("older")
    rows.write_text("Text\ngood\nbad\n")
    for more in ((), ("--out", tmp_path / "out.csv")):
        told = run("predict", saved, rows, *more, code=2)
        lack = f"{rows}:2: no column 'text'; the columns there are 'Text'"
        assert told.stderr == f"ia2mini: {lack}\n" and told.stdout == ""
    rows.write_text('text,n\n,1\n" ",2\n')
    told = run("predict", saved, rows, "--out", tmp_path / "out.csv", code=2)
    assert told.stdout == "" and "no row could be answered" in told.stderr.splitlines()[-1]
    assert (tmp_path / "out.csv").read_text() == "older"
    told = run("predict", saved, "-", input="good\n", code=2)
    assert "no row could be answered" in told.stderr and told.stdout == ""
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "good"}\n{"text": "bad"}\n'.encode("utf-16"))
    assert f"{path}:1: not UTF-8 (byte 0xff)" in run("predict", saved, path, code=2).stderr
    path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\n{"text": "g\xf6od"}\n')
    told = run("predict", saved, path)
    assert told.stdout.count("\n") == 1 and f"{path}:2: not UTF-8 (byte 0xf6)" in told.stderr
    for empty in ("", "\n"):
        assert run("predict", saved, "-", input=empty).output == ""


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_in_a_columns_name(saved, tmp_path, kind):
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "a\\ud83d": "\\ud83d"}\n')
    out = tmp_path / f"out.{kind}"
    run("predict", saved, tmp_path / "rows.jsonl", "--out", out)
    if kind == "jsonl":
        assert json.loads(out.read_text())["a\ud83d"] == "\ud83d"
    else:
        assert table(out)["a\\ud83d"][0] == "\\ud83d"


def test_digits_coverage_and_standard_input(saved, tmp_path):
    rows = world.rows("toy-mood", "train")[:8]
    given = "".join(json.dumps(row) + "\n" for row in rows)
    full = [
        json.loads(line)
        for line in run("predict", saved, "-", input=given).stdout.split("\n")
        if line
    ]
    short = run("predict", saved, "-", "--digits", 2, input=given).stdout
    assert [json.loads(line)["confidence"] for line in short.split("\n") if line] == [
        round(row["confidence"], 2) for row in full
    ]
    out = tmp_path / "out.csv"
    run("predict", saved, "-", "--digits", 9, "--out", out, input=given)
    found = [float(value) for value in table(out)["confidence"]]
    assert found == [round(row["confidence"], 9) for row in full]
    told = run("predict", saved, "-", "--coverage", 0.5, "--out", out, input=given).stdout
    covered = list(load_adapter(saved).answer_rows(rows, coverage=0.5))
    assert list(table(out)["answer"]) == [row["answer"] for row in covered]
    assert list(table(out)["abstained"]) == [row.get("abstained") for row in covered]
    abstained = sum(row["answer"] is None for row in covered)
    assert abstained and f"{abstained} of them not answered" in told


def test_answers_that_are_texts_have_no_probabilities(texts, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\ngood\nbad\n")
    for kind in ("csv", "jsonl"):
        run("predict", texts, path, "--out", tmp_path / f"out.{kind}")
    assert list(table(tmp_path / "out.csv").columns) == ["text", "answer", "confidence", "reason"]
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert list(first) == ["text", "answer", "confidence", "reason"]


def test_a_csv_keeps_the_delimiter_and_the_mark_of_its_rows(saved, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffid;text\n7;schön good, film\n8;bad\n".encode())
    run("predict", saved, path, "--out", tmp_path / "out.csv")
    data = (tmp_path / "out.csv").read_bytes()
    assert data.startswith(
        "\ufeffid;text;answer;confidence;reason;p(0);p(1)\n7;schön good, film;".encode()
    )
    rows = read_rows(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == ["7", "8"]
    run("predict", saved, tmp_path / "out.csv", "--out", tmp_path / "again.csv")
    assert "row_answer" in read_rows(tmp_path / "again.csv")[0]
    run("predict", saved, path, "--out", tmp_path / "out.tsv")
    assert (
        list(csv.reader((tmp_path / "out.tsv").open(), delimiter="\t"))[1][1] == "schön good, film"
    )


def test_texts_stay_texts_in_excel(saved, tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed (extra `data`)")
    day = datetime.datetime(2024, 2, 29, 12)
    own = {"text": "good", "sum": "=1+1", "bell": "a\x07b", "id": 12345678901234567890, "n": 12.5}
    columns = {name: [value] for name, value in own.items() if name != "id"}
    table_of = pa.table({**columns, "id": [str(own["id"])], "day": [day], "b": [b"\xff"]})
    parquet.write_table(table_of, tmp_path / "rows.parquet")
    run("predict", saved, tmp_path / "rows.parquet", "--out", tmp_path / "out.xlsx")
    header, line = openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows()
    found = {name.value: cell for name, cell in zip(header, line)}
    assert found["sum"].data_type == "s" and found["sum"].value == "=1+1"
    assert found["bell"].value == "a\\x07b" and found["day"].value == day
    assert found["n"].value == 12.5 and found["b"].value == "/w=="
    (tmp_path / "rows.jsonl").write_text(json.dumps(own) + "\n")
    run("predict", saved, tmp_path / "rows.jsonl", "--out", tmp_path / "out.xlsx")
    assert read_rows(tmp_path / "out.xlsx")[0]["id"] == "12345678901234567890"
    long = json.dumps({"text": "good", "more": "a" * 40_000})
    (tmp_path / "rows.jsonl").write_text(long + "\n")
    how = ("predict", saved, tmp_path / "rows.jsonl", "--out", tmp_path / "long.xlsx")
    told = run(*how, code=2).stderr
    assert "rows.jsonl:1" in told and "'more'" in told and not (tmp_path / "long.xlsx").exists()


def test_the_rows_are_never_overwritten(saved, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("text\ngood\n")
    os.link(path, tmp_path / "link.csv")
    (tmp_path / "soft.csv").symlink_to(path)
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr("ia2mini.cli.use.open_adapter", None)  # before a model is loaded
    monkeypatch.chdir(tmp_path)
    wrong = {
        name: "holds the rows themselves" for name in (path, "rows.csv", "link.csv", "soft.csv")
    }
    wrong |= {"folder.csv": "is a folder", "out": "unknown kind of file", "out.txt": ".jsonl"}
    for name, said in wrong.items():
        told = run("predict", saved, path, "--out", name, code=2).stderr
        assert said in told and told.count("\n") == 1
    assert path.read_text() == "text\ngood\n"
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    told = run("predict", saved, path, "--out", "out.xlsx", code=2).stderr
    assert "pip install 'ia2mini[data]'" in told


def test_an_answer_file_is_whole_or_not_there(saved, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("text\ngood\n")
    (tmp_path / "out.csv").write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer_files, "cell_text", full)
    told = run("predict", saved, path, "--out", tmp_path / "out.csv", code=2).stderr
    assert "No space left" in told and (tmp_path / "out.csv").read_text() == "older"
    assert {each.name for each in tmp_path.iterdir()} == {"rows.csv", "out.csv"}
