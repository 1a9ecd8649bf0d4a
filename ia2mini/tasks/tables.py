"""Tables of other programs: Parquet, Excel, folders saved by `datasets`, and pandas DataFrames.

Each reader yields pairs: the place of a row ("file row 3") and its columns. All need the extra `data`.
"""

import json
import re
import warnings
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np

from ia2mini import UsageError
from ia2mini.errors import out_of_memory
from ia2mini.files import is_there
from ia2mini.files import read_json as read_object

from .delimited import check_names, column_name

Pairs = list[tuple[str, dict]]
FORMULA = re.compile(rb"<f[ >/]")  # in a sheet of Excel
FLOAT32 = ("float", "float32", "float[pyarrow]")  # in Arrow and in pandas
SAVED = "state.json"  # of one dataset
SPLITS = "dataset_dict.json"  # of several, each in a folder of its own


def missing_package(package: str, path: Path, what: str) -> UsageError:
    """The error for a missing package of the extra `data`."""
    return UsageError(f"{path}: {what} needs {package}: pip install 'ia2mini[data]'")


def unreadable(path: Path, kind: str, error: Exception) -> UsageError:
    """The message for a file that could not be read: it is damaged, or memory is too small."""
    if out_of_memory(error):
        return UsageError(
            f"{path}: too little memory to read it ({error}); give a part of its rows"
        )
    return UsageError(f"{path}: not a whole {kind} file ({error})")


def read_parquet(path: Path, named_classes: bool = True) -> Pairs:
    """The rows of a Parquet file; with `named_classes` the names of classes in place of their numbers."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_package("pyarrow", path, "reading Parquet") from None
    if not is_there(path):
        raise UsageError(f"{path}: no such file")
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        check_names(str(path), schema.names)
        rows = rows_of(file.read())
    except UsageError:
        raise
    except Exception as error:  # pyarrow's own, and Python's for texts and dates that are none
        raise unreadable(path, "Parquet", error) from None
    pairs = numbered(path, rows)
    if named_classes:
        name_classes(pairs, class_names(features_of(schema.metadata)))
    return pairs


def numbered(path: Path, rows: list[dict]) -> Pairs:
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


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


def features_of(metadata: dict[bytes, bytes] | None):
    """What `datasets` wrote of the columns into the metadata of a table; nothing where it is not readable."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}


def class_names(features) -> dict[str, list[str]]:
    """The names of the classes of each column that is a ClassLabel of `datasets`."""
    by_column = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        names = feature.get("names") if is_class else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            by_column[column] = names
    return by_column


def name_classes(pairs: Pairs, names: dict[str, list[str]]) -> None:
    """Put the names of classes in place of their numbers; -1 is no class. Raises UsageError for an unknown number."""
    for column, classes in names.items():
        for where, row in pairs:
            number = row.get(column)
            if type(number) is not int:
                continue
            if number >= len(classes):
                known = f"{len(classes)} names are known for the classes of column {column!r}"
                raise UsageError(f"{where}: class {number}, but {known}")
            row[column] = classes[number] if number >= 0 else None


def read_excel(path: Path, sheet: str | None = None) -> Pairs:
    """The rows of an Excel sheet under the names of its header, the first row that is not empty.

    If several visible sheets hold something, one must be named. A cell with an error (#N/A) counts as empty.
    Raises UsageError.
    """
    try:
        import openpyxl
    except ImportError:
        raise missing_package("openpyxl", path, "reading Excel") from None
    if not is_there(path):
        raise UsageError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Excel draws and openpyxl does not read
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            sheets = {}
            for worksheet in book.worksheets:
                if worksheet.sheet_state == "visible" or worksheet.title == sheet:
                    sheets[worksheet.title] = cells(worksheet)
            book.close()
    except Exception as error:  # of zip, XML, and openpyxl's own
        raise unreadable(path, "Excel", error) from None
    filled = {title: rows for title, rows in sheets.items() if rows}
    listed = ", ".join(map(repr, filled))
    if sheet is not None and sheet not in filled:
        raise UsageError(
            f"{path}: no rows in a sheet {sheet!r}; the sheets that hold some: {listed}"
        )
    if sheet is None and len(filled) > 1:
        example = f"{path}:{next(iter(filled))}"
        raise UsageError(f"{path}: sheets {listed} hold rows; name one, as {example}")
    if not filled:
        return []
    title = sheet or next(iter(filled))
    check_formulas(path, title)
    (_, header), *rows = filled[title]
    return under_header(path, header, rows)


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


def cells(sheet) -> list[tuple[int, list]]:
    """The number and the values of each row of a sheet that holds something."""
    sheet.reset_dimensions()  # some programs write wrong ones
    rows = []
    for number, row in enumerate(sheet.iter_rows(), 1):
        values = [None if cell.data_type == "e" else cell.value for cell in row]
        if any(value not in (None, "") for value in values):
            rows.append((number, values))
    return rows


def under_header(path: Path, header: list, rows: list[tuple[int, list]]) -> Pairs:
    """Rows of a sheet as columns. Columns without a name and without content are dropped."""
    width = max(len(values) for _, values in [(0, header), *rows])
    names = ["" if name is None else column_name(str(name)) for name in header]
    names += [""] * (width - len(names))
    padded = [(number, values + [None] * (width - len(values))) for number, values in rows]
    kept = []
    for place, name in enumerate(names):
        if name or any(values[place] is not None for _, values in padded):
            kept.append(place)
    check_names(str(path), [names[place] for place in kept])
    pairs = []
    for number, values in padded:
        pairs.append((f"{path} row {number}", {names[place]: values[place] for place in kept}))
    return pairs


def read_saved(folder: Path, named_classes: bool = True) -> Pairs:
    """The rows of a folder that `Dataset.save_to_disk` wrote, read without `datasets`. Raises UsageError."""
    if is_there(folder / SPLITS):
        splits = read_object(folder / SPLITS).get("splits")
        listed = ", ".join(str(folder / str(name)) for name in splits or [])
        raise UsageError(f"{folder}: holds several splits; give the folder of one: {listed}")
    if not is_there(folder / SAVED):
        wanted = f"a file of rows, or a folder that `datasets` saved (with its {SAVED})"
        raise UsageError(f"{folder}: a folder; give {wanted}")
    try:
        import pyarrow
    except ImportError:
        raise missing_package("pyarrow", folder, "reading datasets") from None
    rows: list[dict] = []
    features = {}
    for path in saved_files(folder):
        try:
            with pyarrow.memory_map(str(path)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
                check_names(str(path), table.column_names)
                rows += rows_of(table)
        except UsageError:
            raise
        except Exception as error:  # pyarrow's own, and Python's for texts that are none
            raise unreadable(path, "Arrow", error) from None
        features = features_of(table.schema.metadata)
    if is_there(folder / "dataset_info.json"):
        features = read_object(folder / "dataset_info.json").get("features") or features
    pairs = numbered(folder, rows)
    if named_classes:
        name_classes(pairs, class_names(features))
    return pairs


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, in order. Raises UsageError for names that are none, or lead out of the folder."""
    state = read_object(folder / SAVED)
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
