"""Rows as users and datasets keep them, a dict of columns each: in files of text here, in tables (`tables.py`).

Text is UTF-8 (a byte order mark is allowed); lines end at "\\n" only, since real rows hold U+2028. Every UsageError
names the file and, where there is one, the line.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from unicodedata import normalize

from ia2mini import UsageError
from ia2mini.files import check_text, read_text

from .delimited import read_delimited, same_name, trimmed
from .tables import is_frame, plain_value, read_excel, read_frame, read_parquet, read_saved

# in a template: a line end before it, whether it may be empty, its name
COLUMN = re.compile(r"(\n?)\{(\??)([^{}]*)\}")
# a whole number as pandas writes it where its column also held nothing
WHOLE = re.compile(r"(-?\d+)\.0+")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".xlsx")  # of files of rows
BLOCK_SIZE = 64  # rows that are answered together
TRUE_FALSE = {"true": "1", "false": "0"}
MISSING = ("", "nan", "<na>")  # how an empty cell is written, in small letters


class Row(dict):
    """The columns of one row and its place ("file:line"), NumPy's values as Python's own.

    A missing column raises UsageError, and so does a name that is no text.
    """

    def __init__(self, where: str, columns: dict):
        if not isinstance(columns, dict):
            kind = type(columns).__name__
            raise UsageError(f"{where}: a JSON {kind}, not an object; one object a row is expected")
        for name in columns:
            if not isinstance(name, str):
                raise UsageError(f"{where}: column {name!r} has no text for a name; rename it")
        super().__init__({name: plain_value(value) for name, value in columns.items()})
        self.where = where

    def __missing__(self, column: str):
        raise no_column(self.where, self, column)

    def is_missing(self, column: str) -> bool:
        """Whether a column is missing, or holds None or NaN."""
        value = self.get(column)
        return value is None or (isinstance(value, float) and math.isnan(value))

    def text(self, column: str) -> str:
        """The value of a column as text, booleans as JSON writes them, whole numbers without ".0".

        Raises UsageError for anything else.
        """
        value = self[column]
        if isinstance(value, str):
            check_text(value, f"{self.where}: column {column!r}:", "mend the \\ud… escape")
            return value
        if self.is_missing(column):
            raise UsageError(f"{self.where}: column {column!r} holds nothing")
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
        if isinstance(value, (bool, int)):
            return str(value).lower()
        raise UsageError(f"{self.where}: column {column!r} holds {repr(value)[:60]}, not a text")


def no_column(where: str, columns: Iterable[str], column: str) -> UsageError:
    """The error for a column that is not among those of a row."""
    listed = ", ".join(map(repr, columns)) or "none"
    return UsageError(f"{where}: no column {column!r}; the columns there are {listed}")


def placeholders(template: str) -> list[str]:
    """The column names between braces in a template, also those that may be empty."""
    return [name for _, _, name in COLUMN.findall(template)]


def needed_columns(template: str) -> list[str]:
    """The columns of a template that may not be empty."""
    return [name for _, may_be_empty, name in COLUMN.findall(template) if not may_be_empty]


def check_columns(rows: list[Row], template: str, answer: str | None = None) -> None:
    """Raises UsageError where a column that the template or the answer needs is in no row; warns of any other."""
    needed = [*needed_columns(template), answer]
    for column in (*placeholders(template), answer):
        if not rows or column is None or any(column in row for row in rows):
            continue
        if column in needed:
            raise no_column(rows[0].where, rows[0], column)
        told = f"no row has a column {column!r}, which the template takes where it is there"
        warnings.warn(f"{rows[0].where}: {told}", stacklevel=2)


def only_column(template: str) -> str:
    """The column for a row that is only a text: the template's only required column, else "text"."""
    needed = needed_columns(template)
    return needed[0] if len(needed) == 1 else "text"


def fill(template: str, row: Row) -> str:
    """A template with every `{column}` replaced by that column's text.

    `{?column}` may be empty or missing; then a line end right before it is dropped, too. Raises UsageError where it is
    there in another spelling.
    """

    def text_of(match: re.Match) -> str:
        line_end, may_be_empty, column = match.groups()
        if may_be_empty and is_blank(row, column):
            refuse_other_spelling(row, column)
            return ""
        return line_end + row.text(column)

    return COLUMN.sub(text_of, template)


def refuse_other_spelling(row: Row, column: str) -> None:
    """Raises UsageError where a row lacks a column, and has one whose name differs in case or blanks alone."""
    if column in row:
        return
    for name in row:
        if same_name(name, column):
            raise UsageError(f"{row.where}: no column {column!r}, but {name!r}; rename it")


def blank_of(template: str) -> str:
    """The blank at a template's end. It belongs to the answer, since most tokenizers join it to the next word."""
    return template[len(template.rstrip(" ")) :]


def prompt_of(template: str, row: Row) -> str:
    """The prompt of a row: the template filled, without the blank at its end."""
    return fill(template.rstrip(" "), row)


def nonempty_prompt(template: str, row: Row) -> str:
    """`prompt_of`; raises UsageError where every column of the template is blank, as in rows that `fit` leaves out."""
    prompt = prompt_of(template, row)
    if all(is_blank(row, column) for column in placeholders(template)):
        raise UsageError(f"{row.where}: the prompt is empty")
    return prompt


def labels_after_prompt(template: str, labels: Iterable[str]) -> tuple[str, ...]:
    """Labels as they stand after a prompt: with the blank at the template's end."""
    blank = blank_of(template)
    return tuple(blank + label for label in labels)


def whole_number(text: str) -> str:
    """A whole number without its ".0"; any other text as it is."""
    match = WHOLE.fullmatch(text)
    return match[1] if match else text


def find_label(text: str, labels: Iterable[str]) -> str | None:
    """The label that a text means: a number, true, false and accents may be written in another way than in it."""
    if text in labels:
        return text
    label_of = {spelling(label): label for label in labels}
    plain = spelling(text)
    return label_of.get(plain) or label_of.get(TRUE_FALSE.get(plain))


def spelling(text: str) -> str:
    """The common form of a whole number, of true and false, and of letters with accents."""
    text = normalize("NFC", whole_number(text))
    return text.lower() if text.lower() in TRUE_FALSE else text


def is_blank(row: Row, column: str) -> bool:
    """Whether a column of a row holds nothing, or a text of blanks alone."""
    value = row.get(column)
    return row.is_missing(column) or (isinstance(value, str) and not trimmed(value))


def missing_part(row: Row, template: str, answer: str | None) -> str | None:
    """What a row lacks, "prompt" or "answer"; None if nothing. With `answer` None only the prompt is needed.

    A prompt needs every column of the template that may not be empty, and not blanks alone.
    """
    if any(row.is_missing(column) for column in needed_columns(template)):
        return "prompt"
    if all(is_blank(row, column) for column in placeholders(template)):
        return "prompt"
    if answer is None:
        return None
    value = row.get(answer)
    is_empty = isinstance(value, str) and trimmed(value).lower() in MISSING
    return "answer" if is_empty or row.is_missing(answer) else None


def read_rows(path: Path, named_classes: bool = True) -> list[Row]:
    """The rows of a file, read by its suffix, or of a folder that `datasets` saved. Raises UsageError.

    The message names file and line. `book.xlsx:sheet` names a sheet of Excel. Files of `datasets`
    keep the names of classes beside their numbers; with `named_classes` a row holds names.
    """
    path, sheet = named_sheet(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        pairs = read_jsonl_rows(path)
    elif suffix == ".json":
        pairs = read_json_rows(path)
    elif suffix in (".csv", ".tsv"):
        pairs = read_delimited(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        pairs = read_parquet(path, named_classes)
    elif suffix == ".xlsx":
        pairs = read_excel(path, sheet)
    elif path.is_dir():
        pairs = read_saved(path, named_classes)
    elif suffix or path.exists():
        listed = ", ".join(SUFFIXES)
        kind = f"unknown kind of file {path.suffix!r}"
        raise UsageError(f"{path}: {kind}; rows are read from {listed}")
    else:
        raise UsageError(f"{path}: no such file or folder")
    if not pairs:
        raise UsageError(f"{path}: the file holds no rows")
    return [Row(where, columns) for where, columns in pairs]


def named_sheet(path: Path) -> tuple[Path, str | None]:
    """A path without the sheet of Excel that it names, and the sheet."""
    book, mark, sheet = str(path).rpartition(":")
    if mark and book.lower().endswith(".xlsx") and not path.exists():
        return Path(book), sheet
    return path, None


def unique_keys(pairs: list[tuple]) -> dict:
    """The keys and values of a JSON object. Raises ValueError for a key that is given twice."""
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"key {key!r} is given {times} times")
    return dict(pairs)


def parse_json(text: str, where: str, expected: str):
    """The value of a JSON text. Raises UsageError, also for an object that gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    # a ValueError is also a key that is given twice, or an endless number
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); {expected}") from None


def read_jsonl_rows(path: Path) -> list[tuple]:
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            pairs.append((where, parse_json(line, where, "one object a line is expected")))
    return pairs


def read_json_rows(path: Path) -> list[tuple]:
    table = parse_json(
        read_text(path), str(path), "a list of objects is expected, or one a line in a .jsonl"
    )
    if not isinstance(table, list):
        raise UsageError(f"{path}: a JSON {type(table).__name__}; a list of objects is expected")
    return [(f"{path} row {i}", columns) for i, columns in enumerate(table, 1)]


def as_rows(rows, column: str = "text") -> list[Row]:
    """The rows of a file, of a pandas DataFrame, or of an iterable of dicts. Raises UsageError.

    A text in place of a dict is a row whose only column is `column`.
    """
    return all_rows(Path(rows) if isinstance(rows, str) else rows, column)


def all_rows(rows, column: str) -> list[Row]:
    """`as_rows` of what is no file's name as a text. Raises UsageError."""
    checked = []
    for row in iter_rows(rows, column):
        if not isinstance(row, Row):
            raise UsageError(f"row {len(checked) + 1}: {row!r} is no row; leave it out")
        checked.append(row)
    return checked


def iter_rows(rows, column: str = "text") -> Iterator[Row | UsageError | None]:
    """`as_rows` one by one, of what is no file's name; None and a UsageError in place of a row are passed on."""
    if isinstance(rows, (str, bytes, dict)):
        mend = "give a list of them, as [{'text': …}] or ['…']"
        raise UsageError(f"rows: one {type(rows).__name__} in place of several rows; {mend}")
    if isinstance(rows, Path):
        yield from read_rows(rows)
        return
    if is_frame(rows):
        yield from [Row(where, columns) for where, columns in read_frame(rows)]
        return
    number = 0
    for row in rows:
        if row is None or isinstance(row, (Row, UsageError)):
            yield row
            continue
        number += 1
        if isinstance(row, str):
            row = {column: str(row)}
        yield Row(f"row {number}", row)


def rename_clashes(row: dict, added: Collection[str]) -> dict:
    """The columns of a row; a name that is in `added`, also one with row_ before it, gets row_ before it."""
    columns = {}
    for name, value in row.items():
        stem = re.sub("^(row_)+", "", name)
        columns[f"row_{name}" if stem in added else name] = value
    return columns


def blocks(rows: Iterable[Row | UsageError | None]) -> Iterator[list[Row | UsageError]]:
    """Rows in lists of up to `BLOCK_SIZE`; shorter if the next row has not come yet (None)."""
    block: list[Row | UsageError] = []
    for row in rows:
        if row is not None:
            block.append(row)
        if block and (row is None or len(block) == BLOCK_SIZE):
            yield block
            block = []
    if block:
        yield block
