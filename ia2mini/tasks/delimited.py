"""CSV and TSV files: find the delimiter, and read rows under the names of the header."""

import codecs
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

from ia2mini import UsageError
from ia2mini.files import read_text

DELIMITERS = (",", ";", "\t", "|")  # semicolons where a comma is the decimal point
# a first line that Excel reads and writes
NAMED_DELIMITER = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
# blanks and marks that nobody sees, at the ends of a text
EDGES = re.compile(r"^[\s\u200b-\u200d\u2060\ufeff]+|[\s\u200b-\u200d\u2060\ufeff]+\Z")
csv.field_size_limit(2**31 - 1)  # Python's own limit is 131,072 characters


def read_delimited(path: Path, default: str) -> list[tuple[str, dict[str, str]]]:
    """The place of each row ("file:line") and its columns.

    A field in quotes may hold delimiters, line ends and doubled quotes. Lines of blanks are dropped, and so are fields
    at the end of a row, and columns at the end, that have neither a name nor content. Raises UsageError.
    """
    text = read_text(path)
    if "\0" in text:
        raise UsageError(f"{path}: holds zero bytes, as UTF-16 does; save the file as UTF-8")
    first_line = 1
    declared = NAMED_DELIMITER.match(text)
    if declared:
        delimiter = declared[1]
        text = text[declared.end() :]
        first_line = 2
    else:
        delimiter = find_delimiter(text, path, default)
    lines = list(records(text, delimiter, path, first_line))
    if not lines:
        return []
    line, first = lines[0]
    header = [column_name(name) for name in first]
    rows = []
    for number, fields in lines[1:]:
        line_of_blanks = len(fields) == 1 and not fields[0].strip()
        if len(header) > 1 and line_of_blanks:
            continue
        rows.append((number, fields))
        if len(header) > 1 and fields == first:
            raise UsageError(f"{path}:{number}: the header stands here again; delete this line")
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(fields) != len(header):
            counts = f"{len(fields)} fields, the header has {len(header)}"
            mend = f"quote a field that holds {delimiter!r}, delete a title above the header"
            raise UsageError(f"{path}:{number}: {counts}; {mend}")
    while header and not header[-1]:
        last = len(header) - 1
        if any(fields[last].strip() for _, fields in rows):
            break
        header.pop()
    check_names(f"{path}:{line}", header)
    return [(f"{path}:{number}", dict(zip(header, fields))) for number, fields in rows]


def style_of(path: Path) -> tuple[str, bool]:
    """The delimiter of a CSV file, and whether the file begins with a byte order mark (Excel's sign of UTF-8)."""
    text = read_text(path)
    declared = NAMED_DELIMITER.match(text)
    delimiter = declared[1] if declared else find_delimiter(text, path, ",")
    return delimiter, path.read_bytes().startswith(codecs.BOM_UTF8)


def records(
    text: str, delimiter: str, path: Path, line: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """The line at which each record begins, and its fields; `line` is that of the text. Raises UsageError.

    Where a quote follows blanks (`a, "b"`), blanks after a delimiter are no part of any field.
    """
    mark = re.escape(delimiter)
    blank_quoted = re.search(rf'{mark} +"[^"]*" *({mark}|\r?$)', text, re.MULTILINE)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=blank_quoted is not None,
        strict=True,
    )
    start = line
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = line + reader.line_num
    except csv.Error as error:
        raise UsageError(f"{path}:{start}: {error}; is a quote not closed?") from None


def find_delimiter(text: str, path: Path, default: str) -> str:
    """The delimiter that splits the header, and every row into as many fields; the default where none does.

    Raises UsageError where two do.
    """
    uneven = {}
    for delimiter in dict.fromkeys((default, *DELIMITERS)):
        count = uneven_rows(text, path, delimiter)
        if count is not None:
            uneven[delimiter] = count
    if not uneven:
        return default
    best, *others = sorted(uneven, key=uneven.get)
    if others and uneven[best] == uneven[others[0]] == 0:
        both = f"both {best!r} and {others[0]!r} split every line alike"
        raise UsageError(f"{path}: {both}; put the names of the header into quotes")
    return best


def uneven_rows(text: str, path: Path, delimiter: str) -> float | None:
    """How many rows do not have as many fields as the header; None where the delimiter does not split the header."""
    width = 0
    count = 0
    try:
        for _, fields in records(text, delimiter, path):
            width = width or len(fields)
            if width == 1:
                return None
            if len(fields) != width:
                count += 1
    except UsageError:  # a quote is not closed, or not before this delimiter
        return math.inf if width else None
    return count if width else None


def column_name(cell: str) -> str:
    """A name of the header without blanks around it, its accents as one letter each (NFC; macOS writes two)."""
    return normalize("NFC", trimmed(cell))


def trimmed(text: str) -> str:
    """A text without the blanks and invisible marks at its ends."""
    return EDGES.sub("", text)


def check_names(where: str, names: list[str]) -> None:
    """Raises UsageError for a column that is there twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise UsageError(f"{where}: two columns of the same name, {name!r}; rename one")
