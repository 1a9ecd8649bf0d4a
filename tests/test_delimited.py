"""CSV and TSV files as spreadsheets and pandas write them, against pandas' own reader."""

import csv

import pandas
import pytest
from mistakes import refused

from ia2mini.tasks.rows import read_rows

ROWS = [
    ("gut, sehr gut", "3,5"),
    ('sagt "ja"; nein', "1"),
    ("zwei\nZeilen", "2,0"),
    ("ein\tTab", ""),
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_delimiter_is_seen_from_the_file(tmp_path, delimiter, suffix, line_end):
    path = tmp_path / f"rows.{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end)
        writer.writerows([("text", "note"), *ROWS])
    theirs = pandas.read_csv(
        path, sep=delimiter, dtype=str, keep_default_na=False, lineterminator=None
    )
    assert list(map(dict, read_rows(path))) == theirs.to_dict("records")
    assert [row["note"] for row in read_rows(path)] == [note for _, note in ROWS]


READ = {  # a file, and the rows that it holds
    "a comma in a name": (
        "text;note, more;label\na;b;c\nd, x;e;f\n",
        [["a", "b", "c"], ["d, x", "e", "f"]],
    ),
    "one row decides": ("text, a;label\nx, y;0\nz;1\n", [["x, y", "0"], ["z", "1"]]),
    "all in quotes": ('"text";"label"\n"a;b";"0"\n', [["a;b", "0"]]),
    "Excel names it": ("sep=;\ntext;label\na;0\n", [["a", "0"]]),
    "one column": ("text\nhello\n", [["hello"]]),
    "empty lines first": ("\n\ntext,label\na,0\n", [["a", "0"]]),
    "columns without name and content": ("text;label;;\na;0;;\nb;1;;\n", [["a", "0"], ["b", "1"]]),
    "pandas' index": (",text,label\n0,a,x\n", [["0", "a", "x"]]),
    "only line ends of old Macs": ("text,label\ra,0\rb,1\r", [["a", "0"], ["b", "1"]]),
}


@pytest.mark.parametrize("name", READ)
def test_odd_files_are_read(tmp_path, name):
    text, rows = READ[name]
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert [list(row.values()) for row in read_rows(tmp_path / "rows.csv")] == rows


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "rows.csv").write_text('sep=;\ntext;label\n"a\nb";0\n\nc;1\n')
    assert [row.where.rsplit(":")[-1] for row in read_rows(tmp_path / "rows.csv")] == ["3", "6"]


def test_blanks_around_the_names_of_the_header_are_dropped(tmp_path):
    (tmp_path / "rows.csv").write_text("text, label \na, yes\n")
    assert list(map(dict, read_rows(tmp_path / "rows.csv"))) == [{"text": "a", "label": " yes"}]


def test_a_field_of_any_length(tmp_path):
    long = "x" * 300_000
    (tmp_path / "rows.csv").write_text(f"text,label\n{long},0\n")
    assert read_rows(tmp_path / "rows.csv")[0]["text"] == long


WRONG = {
    "two ways": ("text, a;label\nx, y;0\n", "rows.csv: both ',' and ';'"),
    "ragged": ("text;label\na;0\nb;1;2\n", "rows.csv:3: 3 fields, the header has 2", "';'"),
    "open quote": ('text;label\n"a;0\nb;1\n', "rows.csv:2: ", "is a quote not closed"),
    "a name twice": (
        "text;label;label\na;0;1\n",
        "rows.csv:1: two columns of the same name, 'label'",
    ),
    "a name twice but for blanks": (
        "text,label, label\na,0,1\n",
        "two columns of the same name, 'label'",
    ),
    "only a header": ("text;label\n", "rows.csv: the file holds no rows"),
    "only a mark": ("\ufeff", "rows.csv: the file holds no rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    text, *said = WRONG[name]
    (tmp_path / "rows.csv").write_bytes(text.encode())
    refused(lambda: read_rows(tmp_path / "rows.csv"), *said)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    (tmp_path / "rows.csv").write_bytes("text;label\na;0\n".encode(encoding))
    refused(lambda: read_rows(tmp_path / "rows.csv"), "rows.csv", "save the file as UTF-8")
