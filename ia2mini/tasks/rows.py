"""Rows as users and datasets keep them: JSONL, JSON, CSV, TSV and Parquet files, a dict of columns a row.

Text is UTF-8 (a byte order mark is allowed); lines end at "\\n" only, since real rows hold U+2028. Parquet needs
pyarrow (extra `data`). Every UsageError names the file and, where there is one, the line.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ia2mini import UsageError
from ia2mini.files import is_there, read_text

COLUMN = r"\{([^{}]*)\}"  # in a template


class Row(dict):
    """The columns of one row, and where it stands ("file:line"); a column that is not there is a UsageError."""

    def __init__(self, where: str, columns: dict):
        if not isinstance(columns, dict):
            raise UsageError(f"{where}: a JSON {type(columns).__name__}, not an object; one object a row is expected")
        super().__init__(columns)
        self.where = where

    def __missing__(self, column: str):
        there = ", ".join(map(repr, self)) or "none"
        raise UsageError(f"{self.where}: no column {column!r}; the columns there are {there}")

    def text(self, column: str) -> str:
        """The value of a column as text: numbers and booleans as JSON writes them. UsageError for anything else."""
        value = self[column]
        if isinstance(value, (bool, int, float)):
            return str(value).lower()
        if not isinstance(value, str):
            held = f"{'nothing' if value is None else repr(value)[:60]}, not a text"
        elif re.search("[\ud800-\udfff]", value):
            held = "half a surrogate pair, which is no character; mend the \\ud… escape"
        else:
            return value
        raise UsageError(f"{self.where}: column {column!r} holds {held}")


def placeholders(template: str) -> list[str]:
    """The column names between braces in a template."""
    return re.findall(COLUMN, template)


def fill(template: str, row: Row) -> str:
    """A template with every `{column}` replaced by that column's text."""
    return re.sub(COLUMN, lambda match: row.text(match[1]), template)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, read by its suffix. UsageError naming file and line for whatever is wrong with it."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}; rows are read from {', '.join(READERS)}")
    if not (rows := reader(path)):
        raise UsageError(f"{path}: the file holds no rows")
    return rows


def parse_json(text: str, where: str, wanted: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an endless number
        raise UsageError(f"{where}: not JSON ({error}); {wanted}") from None


def read_jsonl(path: Path) -> list[Row]:
    lines = {f"{path}:{number}": line for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()}
    return [Row(where, parse_json(line, where, "one object a line is expected")) for where, line in lines.items()]


def read_json(path: Path) -> list[Row]:
    table = parse_json(read_text(path), str(path), "a list of objects is expected, or one a line in a .jsonl")
    if not isinstance(table, list):
        raise UsageError(f"{path}: a JSON {type(table).__name__}; a list of objects is expected")
    return [Row(f"{path} row {i}", columns) for i, columns in enumerate(table, 1)]


def read_csv(path: Path) -> list[Row]:
    """Rows of a file with a header; a field in quotes may hold delimiters, line ends and doubled quotes."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows, header, start = [], None, 1
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise UsageError(f"{where}: two columns of the same name in the header")
            elif fields and len(fields) != len(header):
                counts = f"{len(fields)} fields, the header has {len(header)}"
                raise UsageError(f"{where}: {counts}; quote a field that holds {delimiter!r}")
            elif fields:
                rows.append(Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise UsageError(f"{path}:{start}: {error}; is a quote not closed?") from None
    return rows


def read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: pip install 'ia2mini[data]'") from None
    if not is_there(path):
        raise UsageError(f"{path}: no such file")
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # pyarrow's own, and Python's for texts and dates that are none
        raise UsageError(f"{path}: not a whole Parquet file ({error})") from None
    return [Row(f"{path} row {i}", columns) for i, columns in enumerate(rows, 1)]


READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv}


def as_rows(rows: str | Path | Sequence[dict]) -> list[Row]:
    """The rows of a file, or dicts of columns as rows. Raises UsageError."""
    if isinstance(rows, (str, Path)):
        return read_rows(Path(rows))
    return [row if isinstance(row, Row) else Row(f"row {i}", row) for i, row in enumerate(rows, 1)]
