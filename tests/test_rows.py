"""Rows: the same from every kind of file, a clear line for whatever is wrong with one, and templates."""

import gzip
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import SST2, parquet_bytes, write_rows

from ia2mini import UsageError
from ia2mini.tasks.rows import Row, fill, placeholders, read_rows


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1
    )
)
def test_any_text_comes_back_from_every_kind_of_file(tmp_path, rows):
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        path = write_rows(tmp_path / f"any{suffix}", [{"a": text, "b": 1} for text in rows])
        assert [row["a"] for row in read_rows(path)] == rows


def test_u2028_stays_inside_a_real_row(shared_data):
    rows = read_rows(shared_data / "gsm8k/train.jsonl")
    assert len(rows) == 4000 and sum(row["question"].count("\u2028") for row in rows) == 2


def test_json_is_a_list_of_objects(tmp_path):
    (tmp_path / "a.JSON").write_bytes(
        b'\xef\xbb\xbf[{"a": "x\xe2\x80\xa8y", "b": 1}, {"a": true}]\n'
    )
    rows = read_rows(tmp_path / "a.JSON")
    assert rows == [{"a": "x\u2028y", "b": 1}, {"a": True}]
    assert [row.where for row in rows] == [f"{tmp_path / 'a.JSON'} row {i}" for i in (1, 2)]
    with pytest.raises(UsageError, match=r"a.JSON row 2: no column 'b'; the columns there are 'a'"):
        rows[1].text("b")


WRONG = {  # file, its bytes, the message
    "broken.jsonl": (b'{"a": "1"}\n\n{"a": \n', r"broken.jsonl:3: not JSON \(Expecting value"),
    "list.jsonl": (b'{"a": "1"}\n[1]\n', "list.jsonl:2: a JSON list, not an object"),
    "latin.jsonl": (
        '{"a": "1"}\n{"a": "é"}\n'.encode("latin-1"),
        r"latin.jsonl:2: not UTF-8 \(byte 0xe9\)",
    ),
    "latin.csv": ("a,b\n1,2\n3,é\n".encode("latin-1"), r"latin.csv:3: not UTF-8"),
    "empty.jsonl": (b"\n\n", "empty.jsonl: the file holds no rows"),
    "empty.csv": (b"", "empty.csv: the file holds no rows"),
    "header.csv": (b"a,b\n", "header.csv: the file holds no rows"),
    "long.csv": (
        b'a,b\n"1\n1",2\n1,2,3\n',
        "long.csv:4: 3 fields, the header has 2; quote a field that holds ','",
    ),
    "short.tsv": (b"a\tb\n1\n", r"short.tsv:2: 1 fields"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: two columns of the same name"),
    "open.csv": (b'a,b\n1,2\n"3,4\n5,6\n', "open.csv:3: .*is a quote not closed"),
    "cut.parquet": (parquet_bytes(SST2)[:-9], "cut.parquet: not a whole Parquet file"),
    "number.jsonl": (b'{"a": ' + b"9" * 5000 + b"}", "number.jsonl:1: not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not JSON"),
    "broken.json": (b'[{"a": "1"},\n {"a": ]', r"broken.json: not JSON \(Expecting value: line 2"),
    "lines.json": (
        b'{"a": "1"}\n{"a": "2"}\n',
        r"lines.json: not JSON \(Extra data.*or one a line in a .jsonl",
    ),
    "object.json": (b'{"rows": []}', "object.json: a JSON dict; a list of objects is expected"),
    "mixed.json": (b'[{"a": "1"}, 2]', "mixed.json row 2: a JSON int, not an object"),
    "latin.json": ('[\n{"a": "é"}]'.encode("latin-1"), r"latin.json:2: not UTF-8 \(byte 0xe9\)"),
    "empty.json": (b"[]", "empty.json: the file holds no rows"),
    "nothing.json": (b"", "nothing.json: not JSON"),
    "deep.json": (b"[" * 100_000, "deep.json: not JSON"),
    "rows.jsonl": (gzip.compress(b'{"a": "1"}\n'), "rows.jsonl: is packed"),
    "rows.ods": (
        b"PK",
        "rows.ods: unknown kind of file '.ods'; "
        "rows are read from .jsonl, .json, .parquet, .csv, .tsv, .xlsx",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file(tmp_path, name):
    data, message = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_absent_files_marks_and_absent_pyarrow(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="gone.csv: no such file"):
        read_rows(tmp_path / "gone.csv")
    (tmp_path / "marked.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,"2\r\n3"\r\n\r\n4,5')
    rows = read_rows(tmp_path / "marked.csv")
    assert rows == [{"a": "1", "b": "2\r\n3"}, {"a": "4", "b": "5"}]
    assert [row.where.rsplit(":")[-1] for row in rows] == ["2", "5"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'ia2mini\[data\]'"):
        read_rows(write_rows(tmp_path / "a.jsonl", SST2).rename(tmp_path / "a.parquet"))


def test_missing_and_unusable_columns():
    row = Row("f.jsonl:2", {"text": "x", "label": None, "odd": ["list"], "half": "\ud800"})
    assert [Row("", {"a": value}).text("a") for value in (True, 7, 1.5, " A ")] == [
        "true",
        "7",
        "1.5",
        " A ",
    ]
    for column, problem in {
        "sentence": "no column 'sentence'; the columns there are 'text', 'label', 'odd', 'half'",
        "label": "column 'label' holds nothing",
        "odd": "not a text",
        "half": "surrogate",
    }.items():
        with pytest.raises(UsageError, match=problem):
            row.text(column)


@given(st.text(), st.text())
def test_any_text_survives_the_template(first, second):
    row = Row("", {"a": first, "b b": second})
    assert fill("<{a}>{b b}</{a}>", row) == f"<{first}>{second}</{first}>"


def test_placeholders_are_the_columns_in_braces():
    assert placeholders("<{a}>{b b}{}{{a}}") == ["a", "b b", "", "a"]


def test_parquet_with_texts_that_are_none_is_one_line(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [{"a": "abcdefghij"}])
    path.write_bytes(path.read_bytes().replace(b"abcdefghij", b"\xff" * 10))
    with pytest.raises(UsageError, match="a.parquet: not a whole Parquet file .*utf-8"):
        read_rows(path)
    path.write_bytes(parquet_bytes(SST2)[:40] + b"\0" * 60 + parquet_bytes(SST2)[100:])
    with pytest.raises(UsageError, match="a.parquet: not a whole Parquet file") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_a_folder_or_pipe_for_a_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("a.parquet", "a.csv"):
        (tmp_path / name).mkdir()
    for name in ("pipe.jsonl", "a.parquet", "a.csv"):
        with pytest.raises(UsageError, match=f"{name}: cannot be read .it is not a file"):
            read_rows(tmp_path / name)
