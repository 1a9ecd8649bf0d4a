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


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
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
    "lines of blanks": ("text,label\n  \na,0\n\t\nb,1\n", [["a", "0"], ["b", "1"]]),
    "a line of delimiters is a row": ("text,label\na,0\n,\n", [["a", "0"], ["", ""]]),
    "delimiters at the ends of rows": ("text,label\na,0,\nb,1,,\n", [["a", "0"], ["b", "1"]]),
    "the header again in one column": ("text\ntext\na\n", [["text"], ["a"]]),
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


SPACED = {  # a file -> whether blanks after delimiters are no part of its fields
    'text, label\n"a, b", "0"\nc, "1"\n': True,
    'text; label\n"a; b"; "0"\nc; 1\n': True,
    "text, label\na,  'yes'\nb, no\n": False,
    'text,label\n"he said, ""yes"", twice",0\n b,1\n': False,
    'text,label\n a "b",0\nb, 1\n': False,
}


@pytest.mark.parametrize("text", SPACED)
def test_quotes_after_blanks_are_quotes(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    delimiter = ";" if ";" in text else ","
    theirs = pandas.read_csv(path, sep=delimiter, dtype=str, skipinitialspace=SPACED[text])
    theirs = theirs.rename(columns=str.strip)
    assert list(map(dict, read_rows(path))) == theirs.to_dict("records")


def test_invisible_marks_around_the_names_of_the_header_are_dropped(tmp_path):
    """As two byte order marks leave one, and web pages leave blanks without width."""
    text = "\ufeff\ufefftext,\u200blabel\u2060 ,a\u200db,cafe\u0301\na,yes,1,2\n"
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert list(read_rows(tmp_path / "rows.csv")[0]) == ["text", "label", "a\u200db", "caf\u00e9"]


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
    "two files in one": ("text;label\na;0\ntext;label\nb;1\n", "rows.csv:3: the header", "delete"),
    "two files in one, a mark between": (
        "text;label\na;0\n\ufefftext;label\nb;1\n",
        "rows.csv:3: the header",
    ),
    "the header again in other letters": (
        "text,label\na,0\n Text, Label\nb,1\n",
        "rows.csv:3: the header",
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
