"""Tables of other programs: Parquet, Excel, folders saved by `datasets`, and pandas DataFrames.

Each reader yields pairs: the place of a row ("file row 3") and its columns. All need the extra `data`.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ia2mini import UsageError
from ia2mini.errors import out_of_memory
from ia2mini.files import check_there, is_there, read_json

from .delimited import check_names, under_header

Pairs = list[tuple[str, dict]]
FORMULA = re.compile(rb"<f[ >/]")  # in a sheet of Excel
FLOAT32 = ("float", "float32", "float[pyarrow]")  # in Arrow and in pandas
SAVED = "state.json"  # of one dataset
SPLITS = "dataset_dict.json"  # of several, each in a folder of its own


def need_package(package: str, path: Path, what: str) -> None:
    """Raises UsageError if a package of the extra `data` is missing."""
    if find_spec(package) is None:
        raise UsageError(f"{path}: {what} needs {package}: pip install 'ia2mini[data]'")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn every error into a UsageError: the file is damaged, or memory is too small."""
    try:
        yield
    # of zip, XML, the packages, and Python's for texts and dates that are none
    except Exception as error:
        problem = f"not a whole {kind} file ({error})"
        if out_of_memory(error):
            problem = f"too little memory to read it ({error}); give a part of its rows"
        raise UsageError(f"{path}: {problem}") from None


def read_parquet(path: Path, named_classes: bool = True) -> Pairs:
    """The rows of a Parquet file; with `named_classes` the names of classes in place of their numbers."""
    need_package("pyarrow", path, "reading Parquet")
    from pyarrow import parquet

    check_there(path)
    with reading(path, "Parquet"):
        table = parquet.ParquetFile(path).read()
        rows = rows_of(table)
    check_names(str(path), table.column_names)
    return numbered(path, rows, features_of(table) if named_classes else {})


def numbered(path: Path, rows: list[dict], features: object) -> Pairs:
    """Each row with its place, and the names of the classes that `features` tell of."""
    pairs = [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    name_classes(pairs, features)
    return pairs


def rows_of(table) -> list[dict]:
    """The rows of an Arrow table."""
    rows = table.to_pylist()
    shorten_floats(rows, {field.name: str(field.type) for field in table.schema})
    return rows


def shorten_floats(rows: list[dict], types: dict[str, str]) -> None:
    """Make numbers of 32 bits those that they are written as: 0.1, not 0.10000000149011612."""
    for column, kind in types.items():
        if kind.lower() not in FLOAT32:
            continue
        for row in rows:
            if row[column] is not None:
                row[column] = plain_value(np.float32(row[column]))


def plain_value(value):
    """A value of NumPy as Python's own, None for what pandas calls missing; any other as it is."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, np.float32):
        return float(str(value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def features_of(table):
    """What `datasets` wrote of the columns into the metadata of a table; nothing where it is not readable."""
    try:
        return json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    except (ValueError, LookupError, TypeError):  # the last where there are no metadata
        return {}


def name_classes(pairs: Pairs, features) -> None:
    """Put the names of classes in place of their numbers; -1 is no class. Raises UsageError for an unknown number.

    Only a column that `features` call a ClassLabel of `datasets` has classes.
    """
    for column, feature in features.items() if isinstance(features, dict) else ():
        is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        names = feature.get("names") if is_class else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            continue
        for where, row in pairs:
            number = row.get(column)
            if type(number) is not int:
                continue
            if number >= len(names):
                known = f"{len(names)} names are known for the classes of column {column!r}"
                raise UsageError(f"{where}: class {number}, but {known}")
            row[column] = names[number] if number >= 0 else None


def read_excel(path: Path, sheet: str | None = None) -> Pairs:
    """The rows of an Excel sheet under the names of its header, the first row that is not empty.

    If several visible sheets hold something, one must be named. A cell with an error (#N/A) counts as empty.
    Raises UsageError.
    """
    need_package("openpyxl", path, "reading Excel")
    import openpyxl

    check_there(path)
    with reading(path, "Excel"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Excel draws and openpyxl does not read
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {}
        for worksheet in book.worksheets:
            if worksheet.sheet_state == "visible" or worksheet.title == sheet:
                sheets[worksheet.title] = cells(path, worksheet)
        book.close()
    filled = {title: rows for title, rows in sheets.items() if rows}
    listed = ", ".join(map(repr, filled))
    if sheet is not None and sheet not in filled:
        raise UsageError(f"{path}: no rows in a sheet {sheet!r}; sheets with rows: {listed}")
    if sheet is None and len(filled) > 1:
        example = f"{path}:{next(iter(filled))}"
        raise UsageError(f"{path}: sheets {listed} hold rows; name one, as {example}")
    if not filled:
        return []
    title = sheet or next(iter(filled))
    check_formulas(path, title)
    (_, header), *rows = filled[title]
    return under_header(str(path), header, rows)


def check_formulas(path: Path, title: str) -> None:
    """Raises UsageError for a formula without its result, as programs leave it that write Excel without computing."""
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        parts = [name for name in archive.namelist() if name.startswith("xl/worksheets/")]
        if not any(FORMULA.search(archive.read(part)) for part in parts):
            return
    with (
        closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as results,
        closing(openpyxl.load_workbook(path, read_only=True)) as formulas,
    ):
        for row, written in zip(results[title].iter_rows(), formulas[title].iter_rows()):
            for result, cell in zip(row, written):
                # a result that is an empty text has another type
                if cell.data_type == "f" and result.value is None and result.data_type == "n":
                    lack = f"the formula in cell {cell.coordinate} has no result"
                    mend = "open the file in Excel or LibreOffice and save it"
                    raise UsageError(f"{path}: {lack}; {mend}")


def cells(path: Path, sheet) -> list[tuple[str, list]]:
    """The place and the values of each row of a sheet that holds something."""
    sheet.reset_dimensions()  # some programs write wrong ones
    rows = []
    for number, row in enumerate(sheet.iter_rows(), 1):
        values = [None if cell.data_type == "e" else cell.value for cell in row]
        if any(value not in (None, "") for value in values):
            rows.append((f"{path} row {number}", values))
    return rows


def read_saved(folder: Path, named_classes: bool = True) -> Pairs:
    """The rows of a folder that `Dataset.save_to_disk` wrote, read without `datasets`. Raises UsageError."""
    if is_there(folder / SPLITS):
        splits = read_json(folder / SPLITS).get("splits")
        listed = ", ".join(str(folder / str(name)) for name in splits or [])
        raise UsageError(f"{folder}: holds several splits; give the folder of one: {listed}")
    if not is_there(folder / SAVED):
        wanted = f"a file of rows, or a folder that `datasets` saved (with its {SAVED})"
        raise UsageError(f"{folder}: a folder; give {wanted}")
    need_package("pyarrow", folder, "reading datasets")
    import pyarrow

    rows: list[dict] = []
    features = {}
    for path in saved_files(folder):
        with reading(path, "Arrow"), pyarrow.memory_map(str(path)) as source:
            table = pyarrow.ipc.open_stream(source).read_all()
            rows += rows_of(table)
        check_names(str(path), table.column_names)
        features = features_of(table)
    if is_there(folder / "dataset_info.json"):
        features = read_json(folder / "dataset_info.json").get("features") or features
    return numbered(folder, rows, features if named_classes else {})


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, in order. Raises UsageError for names that are none, or lead out of the folder."""
    state = read_json(folder / SAVED)
    if state.get("_indices_data_files"):  # of old versions of `datasets`
        mend = "save it again with a newer `datasets`"
        raise UsageError(f"{folder}: keeps the order of its rows in a file of its own; {mend}")
    listed = state.get("_data_files")
    paths = []
    for entry in listed if isinstance(listed, list) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{folder / SAVED}: _data_files names no files of this folder")
        if not is_there(folder / name):
            raise UsageError(f"{folder / name}: no such file, but {SAVED} names it; copy it again")
        paths.append(folder / name)
    return paths


def is_frame(rows) -> bool:
    """Whether `rows` are a pandas DataFrame; pandas need not be there to ask."""
    return hasattr(rows, "columns") and hasattr(rows, "to_dict") and hasattr(rows, "notna")


def read_frame(frame) -> Pairs:
    """The rows of a pandas DataFrame as Python's own values, None for what is missing. Raises UsageError."""
    check_names("DataFrame", list(frame.columns))
    missing = frame.isna().to_numpy()
    pairs = []
    rows = frame.astype(object).to_dict("records")
    shorten_floats(rows, {name: str(kind) for name, kind in frame.dtypes.items()})
    for place, row in enumerate(rows):
        for name, is_missing in zip(frame.columns, missing[place]):
            if is_missing:
                row[name] = None
        pairs.append((f"row {place + 1}", row))
    return pairs
