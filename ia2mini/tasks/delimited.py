"""CSV and TSV files: find the delimiter, and read rows under the names of the header."""

import codecs
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
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
    at the end of a row, and columns, that have neither a name nor content. Raises UsageError.
    """
    delimiter, first_line, text = find_delimiter(path, default)
    if "\0" in text:
        raise UsageError(f"{path}: holds zero bytes, as UTF-16 does; save the file as UTF-8")
    lines = list(records(text, delimiter, path, first_line))
    if not lines:
        return []
    line, header = lines[0]
    rows = []
    for number, fields in lines[1:]:
        where = f"{path}:{number}"
        if len(header) > 1 and len(fields) == 1 and not fields[0].strip():
            continue
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(fields) != len(header):
            counts = f"{len(fields)} fields, the header has {len(header)}"
            mend = f"quote a field that holds {delimiter!r}, delete a title above the header"
            raise UsageError(f"{where}: {counts}; {mend}")
        rows.append((where, fields))
    return under_header(f"{path}:{line}", header, rows)


def under_header(where: str, header: list[str], rows: list[tuple[str, list]]) -> list[tuple]:
    """The place of each row, and its values under the names of the header at `where`.

    Names lose blanks around them, and have accents as one letter each (NFC; macOS writes two). Columns without a name
    and without content are dropped. Raises UsageError for a column that is there twice, and where the header stands
    again.
    """
    kept = []
    for name, *values in zip_longest(header, *(values for _, values in rows)):
        name = column_name(name)
        if name or any(value is not None and str(value).strip() for value in values):
            kept.append((name, values))
    check_names(where, [name for name, _ in kept])
    pairs = []
    for number, (place, _) in enumerate(rows):
        row = {name: values[number] for name, values in kept}
        if len(row) > 1 and all(same_name(value, name) for name, value in row.items()):
            raise UsageError(f"{place}: the header stands here again; delete this line")
        pairs.append((place, row))
    return pairs


def column_name(value) -> str:
    """A cell as the name of a column: without blanks and invisible marks around it, accents as one letter each."""
    return "" if value is None else normalize("NFC", trimmed(str(value)))


def same_name(one, other) -> bool:
    """Whether two cells name the same column, in any case."""
    return column_name(one).casefold() == column_name(other).casefold()


def style_of(path: Path) -> tuple[str, bool]:
    """The delimiter of a CSV file, and whether the file begins with a byte order mark (Excel's sign of UTF-8)."""
    delimiter, _, _ = find_delimiter(path, ",")
    return delimiter, path.read_bytes().startswith(codecs.BOM_UTF8)


def records(text: str, delimiter: str, path: Path, line: int) -> Iterator[tuple[int, list[str]]]:
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


def find_delimiter(path: Path, default: str) -> tuple[str, int, str]:
    """A file's delimiter, the line of its header, and the text from there on.

    It is named in the first line, or splits the header, and every row into as many fields; the default where none
    does. Raises UsageError where two do.
    """
    text = read_text(path)
    declared = NAMED_DELIMITER.match(text)
    if declared:
        return declared[1], 2, text[declared.end() :]
    uneven = {}
    for delimiter in dict.fromkeys((default, *DELIMITERS)):
        count = uneven_rows(text, path, delimiter)
        if count is not None:
            uneven[delimiter] = count
    best, *others = sorted(uneven, key=uneven.get) or [default]
    if others and uneven[best] == uneven[others[0]] == 0:
        both = f"both {best!r} and {others[0]!r} split every line alike"
        raise UsageError(f"{path}: {both}; put the names of the header into quotes")
    return best, 1, text


def uneven_rows(text: str, path: Path, delimiter: str) -> float | None:
    """How many rows do not have as many fields as the header; None where the delimiter does not split the header."""
    width = 0
    uneven: float = 0
    try:
        for _, fields in records(text, delimiter, path, 1):
            width = width or len(fields)
            if len(fields) != width:
                uneven += 1
    except UsageError:  # a quote is not closed, or not before this delimiter
        uneven = math.inf
    return uneven if width > 1 else None


def trimmed(text: str) -> str:
    """A text without the blanks and invisible marks at its ends."""
    return EDGES.sub("", text)


def check_names(where: str, names: list[str]) -> None:
    """Raises UsageError for a column that is there twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise UsageError(f"{where}: two columns of the same name, {name!r}; rename one")
