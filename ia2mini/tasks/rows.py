"""Rows as users and datasets keep them: JSONL, JSON, CSV, TSV and Parquet files, a dict of columns a row.

Text is UTF-8 (a byte order mark is allowed); lines end at "\\n" only, since real rows hold U+2028. Parquet needs
pyarrow (extra `data`). Every UsageError names the file and, where there is one, the line.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ia2mini import UsageError
from ia2mini.files import is_there, read_text

from .delimited import check_names, read_delimited

# in a template: a line end before it, whether it may be empty, its name
COLUMN = re.compile(r"(\n?)\{(\??)([^{}]*)\}")
# a whole number as pandas writes it where its column also held nothing
WHOLE = re.compile(r"(-?\d+)\.0+")
MISSING = ("", "nan", "<na>")  # what stands in a cell that holds nothing, in small letters


class Row(dict):
    """The columns of one row, and where it stands ("file:line"); a column that is not there is a UsageError."""

    def __init__(self, where: str, columns: dict):
        if not isinstance(columns, dict):
            raise UsageError(
                f"{where}: a JSON {type(columns).__name__}, not an object; one object a row is expected"
            )
        super().__init__(columns)
        self.where = where

    def __missing__(self, column: str):
        there = ", ".join(map(repr, self)) or "none"
        raise UsageError(f"{self.where}: no column {column!r}; the columns there are {there}")

    def holds_nothing(self, column: str) -> bool:
        """Whether a column is not there, or holds None or NaN."""
        value = self.get(column)
        return value is None or (isinstance(value, float) and math.isnan(value))

    def text(self, column: str) -> str:
        """The value of a column as text, booleans as JSON writes them, whole numbers without ".0".

        Raises UsageError for anything else.
        """
        value = self[column]
        if isinstance(value, str):
            if re.search("[\ud800-\udfff]", value):
                held = "half a surrogate pair, which is no character; mend the \\ud… escape"
                raise UsageError(f"{self.where}: column {column!r} holds {held}")
            return value
        if self.holds_nothing(column):
            raise UsageError(f"{self.where}: column {column!r} holds nothing")
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
        if isinstance(value, (bool, int)):
            return str(value).lower()
        raise UsageError(f"{self.where}: column {column!r} holds {repr(value)[:60]}, not a text")


def placeholders(template: str) -> list[str]:
    """The column names between braces in a template, also those that may be empty."""
    return [name for _, _, name in COLUMN.findall(template)]


def needed_columns(template: str) -> list[str]:
    """The columns of a template that may not be empty."""
    return [name for _, may_be_empty, name in COLUMN.findall(template) if not may_be_empty]


def fill(template: str, row: Row) -> str:
    """A template with every `{column}` replaced by that column's text.

    `{?column}` may be empty or missing: then a line end that stands right before it goes, too.
    """

    def text_of(match: re.Match) -> str:
        line_end, may_be_empty, column = match.groups()
        if may_be_empty and is_blank(row, column):
            return ""
        return line_end + row.text(column)

    return COLUMN.sub(text_of, template)


def whole_number(text: str) -> str:
    """A whole number without its ".0"; any other text as it is."""
    found = WHOLE.fullmatch(text)
    return found[1] if found else text


def is_blank(row: Row, column: str) -> bool:
    """Whether a column of a row holds nothing, or a text of blanks alone."""
    value = row.get(column)
    return row.holds_nothing(column) or (isinstance(value, str) and not value.strip())


def lacks(row: Row, template: str, answer: str | None) -> str | None:
    """What a row of one's own lacks, "prompt" or "answer"; None if it has both (with `answer` None: a prompt).

    A prompt needs every column of the template that may not be empty, and not blanks alone.
    """
    if any(row.holds_nothing(column) for column in needed_columns(template)):
        return "prompt"
    if all(is_blank(row, column) for column in placeholders(template)):
        return "prompt"
    if answer is None:
        return None
    value = row.get(answer)
    if is_blank(row, answer) or (isinstance(value, str) and value.strip().lower() in MISSING):
        return "answer"
    return None


def read_rows(path: Path, named_classes: bool = True) -> list[Row]:
    """The rows of a file, read by its suffix. UsageError naming file and line for whatever is wrong with it.

    Parquet files of `datasets` keep the names of classes beside their numbers; with `named_classes` a row holds names.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: unknown kind of file {path.suffix!r}; rows are read from {', '.join(READERS)}"
        )
    rows = read_parquet(path, named_classes) if reader is read_parquet else reader(path)
    if not rows:
        raise UsageError(f"{path}: the file holds no rows")
    return rows


def one_each(pairs: list[tuple]) -> dict:
    """The keys and values of a JSON object. Raises ValueError for a key that is given twice."""
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"key {key!r} is given {times} times")
    return dict(pairs)


def parse_json(text: str, where: str, wanted: str):
    """The value of a JSON text. Raises UsageError, also for an object that gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=one_each)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); {wanted}") from None
    except ValueError as error:  # a key that is given twice, or an endless number
        raise UsageError(f"{where}: not JSON that can be read ({error})") from None


def read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append(Row(where, parse_json(line, where, "one object a line is expected")))
    return rows


def read_json(path: Path) -> list[Row]:
    table = parse_json(
        read_text(path), str(path), "a list of objects is expected, or one a line in a .jsonl"
    )
    if not isinstance(table, list):
        raise UsageError(f"{path}: a JSON {type(table).__name__}; a list of objects is expected")
    return [Row(f"{path} row {i}", columns) for i, columns in enumerate(table, 1)]


def read_csv(path: Path) -> list[Row]:
    """Rows of a file with a header, whose delimiter is seen from it; a .tsv's is a tab where that fits."""
    first = "\t" if path.suffix.lower() == ".tsv" else ","
    return [Row(where, columns) for where, columns in read_delimited(path, first)]


def read_parquet(path: Path, named_classes: bool = True) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path}: reading Parquet needs pyarrow: pip install 'ia2mini[data]'"
        ) from None
    if not is_there(path):
        raise UsageError(f"{path}: no such file")
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        check_names(str(path), schema.names)
        rows = file.read().to_pylist()
    except UsageError:
        raise
    except Exception as error:  # pyarrow's own, and Python's for texts and dates that are none
        raise UsageError(f"{path}: not a whole Parquet file ({error})") from None
    rows = [Row(f"{path} row {i}", columns) for i, columns in enumerate(rows, 1)]
    if named_classes:
        name_classes(rows, schema.metadata or {})
    return rows


def name_classes(rows: list[Row], metadata: dict[bytes, bytes]) -> None:
    """Put the names that `datasets` keeps in a Parquet file's metadata in place of classes' numbers; -1 is no class."""
    for column, names in class_names(metadata).items():
        for row in rows:
            number = row.get(column)
            if type(number) is not int:
                continue
            if number >= len(names):
                known = f"{len(names)} names are known for the classes of column {column!r}"
                raise UsageError(f"{row.where}: class {number}, but {known}")
            row[column] = names[number] if number >= 0 else None


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes of each column that is a ClassLabel of `datasets`; none from what is not readable."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        names = feature.get("names") if is_class else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def as_rows(rows: str | Path | Sequence[dict]) -> list[Row]:
    """The rows of a file, or dicts of columns as rows. Raises UsageError."""
    if isinstance(rows, (str, Path)):
        return read_rows(Path(rows))
    return [row if isinstance(row, Row) else Row(f"row {i}", row) for i, row in enumerate(rows, 1)]
