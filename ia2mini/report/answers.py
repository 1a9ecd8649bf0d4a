"""The file of answers: one line for every row, in order, the row's own columns first."""

import csv
import datetime
import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .. import UsageError
from ..files import as_text, json_line, write, write_text
from ..fitting.predictor import ANSWER_COLUMNS
from ..tasks.delimited import style_of
from ..tasks.rows import Row, named_sheet, rename_clashes
from ..tasks.tables import need_package

DIGITS = 4
EXCEL_ROWS = 1_048_575  # below the header
EXCEL_CHARACTERS = 32_767  # of a cell
EXCEL_DIGITS = 15  # of a number that Excel keeps whole
NO_FIELDS = "struct<>"  # a type of Arrow that Parquet does not have
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def check_target(out: Path, rows: str) -> None:
    """Raises UsageError if answers cannot be written to `out`: an unknown kind of file, or the file of the rows."""
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        listed = ", ".join(WRITERS)
        raise UsageError(f"--out {out}: unknown kind of file {suffix!r}; give one of {listed}")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; give a file in it")
    source, _ = named_sheet(Path(rows))
    if rows != "-" and out.exists() and source.exists() and os.path.samefile(out, source):
        raise UsageError(f"--out {out}: holds the rows themselves; give another file")
    package = {".xlsx": "openpyxl", ".parquet": "pyarrow"}.get(suffix)
    if package:
        need_package(package, out, f"writing {suffix}")


def check_size(out: Path, rows: list) -> None:
    """Raises UsageError if Excel cannot hold the rows."""
    if out.suffix.lower() != ".xlsx":
        return
    if len(rows) > EXCEL_ROWS:
        raise UsageError(f"--out {out}: {len(rows)} rows, and Excel holds {EXCEL_ROWS}; use .csv")
    for row in rows:
        for name, value in row.items() if isinstance(row, Row) else ():
            if len(str(cell_text(value))) > EXCEL_CHARACTERS:
                most = f"more than the {EXCEL_CHARACTERS} characters of a cell of Excel"
                raise UsageError(f"{row.where}: column {name!r} has {most}; use .csv")


def rounded(answer: dict, digits: int | None) -> dict:
    """A row with its answer; probabilities are rounded to this many digits (None: not at all)."""
    if digits is None:
        return answer
    found = {**answer, "confidence": round(answer["confidence"], digits)}
    if "probabilities" in answer:
        shares = answer["probabilities"].items()
        found["probabilities"] = {label: round(share, digits) for label, share in shares}
    return found


@dataclass
class Answers:
    """Rows with their answers; a row that was left out has only the reason."""

    source: str  # the file of the rows
    labels: list[str]
    abstains: bool  # the least certain rows are not answered
    pairs: list[tuple[Row, dict]] = field(default_factory=list)

    def add(self, row: Row, answer: dict | UsageError, digits: int) -> None:
        """Add a row of `Predictor.outcomes`."""
        added = (
            {"reason": str(answer)} if isinstance(answer, UsageError) else rounded(answer, digits)
        )
        self.pairs.append((row, added))

    @property
    def left_out(self) -> int:
        return sum("reason" in answer for _, answer in self.pairs)

    @property
    def abstained(self) -> int:
        return sum("abstained" in answer for _, answer in self.pairs)

    @property
    def names(self) -> list[str]:
        """The columns added to every row, without the probabilities."""
        if self.abstains:
            return ["answer", "abstained", "confidence", "reason"]
        return ["answer", "confidence", "reason"]

    def table(self) -> tuple[list[str], list[list]]:
        """A header and a line for every row: own columns, answer columns, and p(label) of each label."""
        shares = [f"p({label})" for label in self.labels]
        added = [*self.names, *shares]
        own: dict[str, None] = {}  # columns, in order
        records = []
        for row, answer in self.pairs:
            renamed = rename_clashes(row, {*ANSWER_COLUMNS, *added})
            own.update(dict.fromkeys(renamed))
            probabilities = answer.get("probabilities", {}).items()
            by_label = {f"p({label})": share for label, share in probabilities}
            records.append({**renamed, **answer, **by_label})
        header = [*own, *added]
        return header, [[record.get(name) for name in header] for record in records]

    def write(self, out: Path) -> None:
        """Write them as a file, whole or not at all. Raises UsageError."""
        WRITERS[out.suffix.lower()](out, self)


def write_lines(out: Path, answers: Answers) -> None:
    """JSONL: an object for every row, `probabilities` an object in it."""
    names = list(answers.names)
    if answers.labels:
        names.append("probabilities")
    lines = []
    for row, answer in answers.pairs:
        own = rename_clashes(row, {*ANSWER_COLUMNS, *names})
        added = {name: answer.get(name) for name in names}
        lines.append(json_line({**own, **added}) + "\n")
    write_text(out, "".join(lines))


def write_delimited(out: Path, answers: Answers) -> None:
    """CSV or TSV. If the rows came from a CSV, its delimiter and byte order mark are kept."""
    delimiter = ","
    mark = False
    if out.suffix.lower() == ".tsv":
        delimiter = "\t"
    elif answers.source.lower().endswith(".csv"):
        delimiter, mark = style_of(Path(answers.source))
    header, table = answers.table()

    def writer(path: Path) -> None:
        encoding = "utf-8-sig" if mark else "utf-8"
        with path.open("w", encoding=encoding, errors="backslashreplace", newline="") as file:
            for line in [header, *table]:
                file.write(csv_line(map(cell_text, line), delimiter))

    write(out, writer)


def csv_line(cells: Iterable, delimiter: str) -> str:
    """A line of a CSV file; a cell with a line end of any kind stands in quotes, also one of "\\r" alone."""
    line = io.StringIO(newline="")
    csv.writer(line, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def cell_text(value):
    """A value as a cell of text: nothing for None and NaN, JSON for lists and objects."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (bool, dict, list)):
        return json.dumps(value, ensure_ascii=False, default=as_text)
    return value if isinstance(value, (str, int, float)) else as_text(value)


def write_excel(out: Path, answers: Answers) -> None:
    """An Excel file of one sheet; texts stay texts also where Excel would read a formula."""
    import openpyxl
    from openpyxl.cell import WriteOnlyCell

    header, table = answers.table()
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("answers")
    for line in [header, *table]:
        cells = []
        for value in line:
            value = excel_value(value)
            cell = WriteOnlyCell(sheet, value)
            if isinstance(value, str):
                cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    write(out, lambda path: book.save(path))


def excel_value(value):
    """A value for Excel: numbers of up to 15 digits and dates as they are, all else as text."""
    if isinstance(value, int) and len(str(abs(value))) <= EXCEL_DIGITS:
        return value  # also of True and False
    if isinstance(value, float) and math.isfinite(value):
        return value
    is_zoned = getattr(value, "tzinfo", None) is not None
    if isinstance(value, (datetime.date, datetime.time)) and not is_zoned:
        return value
    text = NO_XML.sub(lambda found: repr(found[0])[1:-1], whole_text(value))
    return text or None


def whole_text(value) -> str:
    """A value as text, halves of surrogate pairs spelled out."""
    return str(cell_text(value)).encode("utf-8", "backslashreplace").decode()


def write_parquet(out: Path, answers: Answers) -> None:
    """Parquet; a column of different types, or of objects without fields, is text."""
    import pyarrow
    from pyarrow import parquet

    header, table = answers.table()
    columns = {}
    for name, values in zip(map(whole_text, header), zip(*table)):
        try:
            columns[name] = pyarrow.array(values)
            if NO_FIELDS in str(columns[name].type):
                raise TypeError("an object without fields")
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
            texts = []
            for value in values:
                texts.append(None if value is None else whole_text(value))
            columns[name] = pyarrow.array(texts, pyarrow.string())
    write(out, partial(parquet.write_table, pyarrow.table(columns)))


WRITERS = {
    ".csv": write_delimited,
    ".tsv": write_delimited,
    ".jsonl": write_lines,
    ".xlsx": write_excel,
    ".parquet": write_parquet,
}
