"""Excel files, folders of `datasets` and DataFrames as rows: what pandas, openpyxl and datasets themselves read."""

import datetime
import io
import json
import re

import numpy as np
import pandas
import pyarrow as pa
import pytest
from mistakes import refused
from pyarrow import parquet

from ia2mini import FitOptions, UsageError, fit, open_subject
from ia2mini.fitting.rows import read_own
from ia2mini.tasks import world
from ia2mini.tasks.rows import as_rows, iter_rows, read_rows

QUICK = FitOptions(epochs=1, rates=(1e-2,), methods=("sft",), folds=2)


def workbook(path, sheets: dict[str, list[list]], hidden=()):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed (extra `data`)")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, lines in sheets.items():
        sheet = book.create_sheet(name)
        sheet.sheet_state = "hidden" if name in hidden else "visible"
        for line in lines:
            sheet.append(line)
    book.save(path)
    return path


LINES = [
    [" text ", "label\u200b", "n", "day", None],
    ["good 🙂\nfilm", "yes", 1, datetime.datetime(2024, 2, 29), None],
    [None, None, None, None, None],
    ["bad", "no", 2.5, None, None],
    ["'=1+1", "#N/A", True, datetime.datetime(2024, 1, 1, 12, 30), None],
]


def test_an_excel_sheet_is_read_as_by_pandas(tmp_path):
    path = workbook(tmp_path / "rows.xlsx", {"Sheet 1": LINES})
    rows = read_rows(path)
    theirs = pandas.read_excel(path, keep_default_na=False, na_values=["#N/A"]).dropna(how="all")
    theirs = theirs.dropna(axis=1, how="all").rename(columns=lambda name: name.strip(" \u200b"))
    assert list(rows[0]) == list(theirs.columns) == ["text", "label", "n", "day"]
    for row, expected in zip(rows, theirs[theirs["text"] != ""].to_dict("records"), strict=True):
        for name, value in expected.items():
            ours = "" if row[name] is None else row[name]
            if not pandas.isna(value):
                assert ours == value
    assert [row.where for row in rows] == [f"{path} row {i}" for i in (2, 4, 5)]
    assert rows[2]["label"] is None, "an error is no label"
    _, task = read_own(workbook(tmp_path / "own.xlsx", {"a": [["text", "label"], *own_lines()]}))
    assert task.labels == ("0", "1") and task.name == "own"


def test_a_header_that_stands_in_a_sheet_again_is_no_row(tmp_path):
    lines = [["text", "label"], *own_lines(), ["Text ", "label"], *own_lines()]
    path = workbook(tmp_path / "rows.xlsx", {"a": lines})
    refused(lambda: read_rows(path), f"{path} row 10: the header stands here again")


def own_lines():
    return [[f"text {i}", i % 2] for i in range(8)]


def test_of_several_sheets_one_is_named(tmp_path):
    held = [["text", "label"], ["a", 1]]
    other = [["text", "label"], ["b", 2]]
    path = workbook(tmp_path / "two.xlsx", {"one": held, "two words": other, "empty": []})
    refused(lambda: read_rows(path), "'one', 'two words'", f"{path}:one")
    assert read_rows(tmp_path / "two.xlsx:two words")[0]["text"] == "b"
    refused(lambda: read_rows(tmp_path / "two.xlsx:three"), "'three'", "'one', 'two words'")
    refused(lambda: read_rows(tmp_path / "none.xlsx:one"), "none.xlsx: no such file")
    path = workbook(tmp_path / "hidden.xlsx", {"one": held, "lists": other}, hidden=["lists"])
    assert read_rows(path)[0]["text"] == "a"
    assert read_rows(tmp_path / "hidden.xlsx:lists")[0]["text"] == "b"


def test_a_wrong_dimension_hides_no_row(tmp_path):
    """As some programs write it."""
    import zipfile

    path = workbook(tmp_path / "rows.xlsx", {"a": [["text", "label"], *own_lines()]})
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "odd.xlsx", "w") as target:
        for name in source.namelist():
            data = source.read(name).replace(b'<dimension ref="A1:B9"', b'<dimension ref="A1"')
            target.writestr(name, data)
    assert list(map(dict, read_rows(tmp_path / "odd.xlsx"))) == list(map(dict, read_rows(path)))


def test_a_formula_that_nobody_computed_is_no_empty_cell(tmp_path):
    """openpyxl writes formulas without results; a result may also be an empty text, or an error."""
    import zipfile

    lines = [["text", "label", "note"], *([f"text {i}", i % 2, None] for i in range(8))]
    lines[3][2] = '=IF(A4="","none","")'
    path = workbook(tmp_path / "rows.xlsx", {"a": lines})
    refused(lambda: read_rows(path), "the formula in cell C4 has no result", "save it")
    for number, cell in enumerate(['<c r="C4" t="str"><f>1</f><v></v></c>',
                                   '<c r="C4" t="e"><f>1</f><v>#N/A</v></c>',
                                   '<c r="C4"><f>1</f><v>7</v></c>']):  # fmt: skip
        computed = tmp_path / f"{number}.xlsx"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(computed, "w") as target:
            for name in source.namelist():
                data = source.read(name).decode()
                if name.startswith("xl/worksheets/"):
                    data, changed = re.subn(r'<c r="C4".*?</c>', cell, data)
                    assert changed == 1
                target.writestr(name, data)
        notes = [row.get("note") for row in read_rows(computed)]
        assert [note or None for note in notes] == [None, None, 7 if number == 2 else None] + 5 * [
            None
        ]


def test_what_is_no_excel_file_is_one_line(tmp_path):
    path = workbook(tmp_path / "rows.xlsx", {"a": [["text", "text"], ["a", "b"]]})
    refused(lambda: read_rows(path), "two columns of the same name, 'text'")
    refused(lambda: read_rows(workbook(path, {"a": [["text", "label"]]})), "holds no rows")
    refused(lambda: read_rows(workbook(path, {"a": []})), "holds no rows")
    for data in (b"", b"PK", path.read_bytes()[:-40], b"text,label\na,1\n"):
        path.write_bytes(data)
        refused(lambda: read_rows(path), "rows.xlsx: not a whole Excel file")
    (tmp_path / "folder.xlsx").mkdir()
    refused(lambda: read_rows(tmp_path / "folder.xlsx"), "it is not a file")


@pytest.mark.parametrize("kind", ["Parquet", "Excel", "Arrow"])
def test_too_little_memory_is_not_called_a_damaged_file(kind, tmp_path, monkeypatch):
    """pyarrow's own error where it is pyarrow that reads."""

    def fails(*given, **more):
        pa.allocate_buffer(1 << 60)

    if kind == "Parquet":
        place = tmp_path / "rows.parquet"
        parquet.write_table(pa.table({"text": ["a"], "label": ["b"]}), place)
        monkeypatch.setattr("pyarrow.parquet.ParquetFile.read", fails)
    elif kind == "Excel":
        place = workbook(tmp_path / "rows.xlsx", {"a": [["text", "label"], *own_lines()]})
        monkeypatch.setattr("openpyxl.load_workbook", fails)
    else:
        place = saved(tmp_path / "saved")
        monkeypatch.setattr("pyarrow.ipc.open_stream", fails)
    refused(lambda: read_rows(place), "too little memory to read it", "give a part of its rows")


def test_excel_without_openpyxl_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    refused(lambda: read_rows(tmp_path / "a.xlsx"), "needs openpyxl: pip install 'ia2mini[data]'")


FEATURES = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
}


def saved(folder, parts=((0, 1, -1), (1, 0)), features=FEATURES):
    """A folder as `Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    names = []
    for number, labels in enumerate(parts):
        texts = [f"text {number} {i}" for i in range(len(labels))]
        table = pa.table({"text": texts, "label": pa.array(labels, pa.int64())})
        names.append(f"data-{number:05}-of-{len(parts):05}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_a_folder_of_datasets_is_read_without_it(tmp_path):
    rows = read_rows(saved(tmp_path / "mine"))
    assert [row["label"] for row in rows] == ["bad", "good", None, "good", "bad"]
    assert rows[3]["text"] == "text 1 0" and rows[3].where == f"{tmp_path / 'mine'} row 4"
    assert [row["label"] for row in read_rows(tmp_path / "mine", False)] == [0, 1, -1, 1, 0]
    _, task = read_own(saved(tmp_path / "own", [(0, 1) * 4]))
    assert task.labels == ("bad", "good") and task.name == "own"


def test_a_folder_of_datasets_is_read_as_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    columns = {"text": [f"text {i}" for i in range(9)], "label": [0, 1, 1] * 3}
    made = datasets.Dataset.from_dict(columns, features=features).shuffle(seed=3)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    rows = read_rows(tmp_path / "one")
    assert [row["text"] for row in rows] == list(made["text"])
    assert [row["label"] for row in rows] == [features["label"].int2str(i) for i in made["label"]]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    both = [str(tmp_path / "two" / name) for name in ("train", "test")]
    refused(lambda: read_rows(tmp_path / "two"), *both)
    assert list(map(dict, read_rows(tmp_path / "two" / "train"))) == list(map(dict, rows))


def test_what_is_no_folder_of_datasets_is_one_line(tmp_path):
    (tmp_path / "plain").mkdir()
    refused(lambda: read_rows(tmp_path / "plain"), "a folder", "state.json")
    refused(lambda: read_rows(tmp_path / "nope"), "nope: no such file or folder")
    (tmp_path / "plain" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(lambda: read_rows(tmp_path / "plain"), "several splits", str(tmp_path / "plain/train"))
    folder = saved(tmp_path / "mine")
    first = folder / "data-00000-of-00002.arrow"
    whole = first.read_bytes()
    for data in (b"", b"nonsense", whole[: len(whole) // 2]):
        first.write_bytes(data)
        refused(lambda: read_rows(folder), "data-00000-of-00002.arrow: not a whole Arrow file")
    first.unlink()
    refused(lambda: read_rows(folder), "data-00000-of-00002.arrow: no such file")
    for names in (None, [{"filename": "../x.arrow"}], [{}], [3], {"a": 1}):
        (folder / "state.json").write_text(json.dumps({"_data_files": names}))
        refused(lambda: read_rows(folder), "state.json", "names no files of this folder")
    chosen = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (folder / "state.json").write_text(json.dumps(chosen))
    refused(lambda: read_rows(folder), "keeps the order of its rows", "save it again")
    (folder / "state.json").write_text("{")
    refused(lambda: read_rows(folder), "state.json: not valid JSON")
    refused(lambda: read_rows(saved(tmp_path / "far", [(0, 5)])), "far row 2: class 5", "2 names")


FRAME = {
    "ints": pandas.Series([1, 0, 2]),
    "floats": pandas.Series([1.0, np.nan, 2.5]),
    "nullable": pandas.Series([1, None, 3], dtype="Int64"),
    "flags": pandas.Series([True, False, None], dtype="boolean"),
    "bools": pandas.Series([True, False, True]),
    "texts": pandas.Series(["a", None, "c"], dtype="string"),
    "objects": pandas.Series(["a", np.nan, np.int64(3)], dtype=object),
    "classes": pandas.Series(["x", "y", "x"], dtype="category"),
    "days": pandas.Series(pandas.to_datetime(["2024-02-29", None, "2024-01-01"])),
}


def test_a_data_frame_holds_pythons_own_values():
    frame = pandas.DataFrame(FRAME).set_index(pandas.Index([7, 3, 5]))
    rows = as_rows(frame)
    for name in frame.columns:
        for row, value in zip(rows, frame[name].tolist(), strict=True):
            assert (row[name] is None) == bool(pandas.isna(value))
            assert row[name] is None or row[name] == value
            assert not isinstance(row[name], np.generic)
    assert [row.where for row in rows] == ["row 1", "row 2", "row 3"]
    assert [rows[0].text(name) for name in ("ints", "bools", "texts")] == ["1", "true", "a"]


def test_numbers_of_32_bits_are_those_that_csv_has(tmp_path):
    values = np.array([0.1, 3.7, 1e-7, 2.0, np.nan, np.inf, 16777217.0], np.float32)
    frame = pandas.DataFrame({"text": list("abcdefg"), "label": values})
    frame["nullable"] = frame["label"].astype("Float32")
    frame["arrow"] = frame["label"].astype("float[pyarrow]")
    frame["wide"] = frame["label"].astype("float64")
    written = pandas.read_csv(io.StringIO(frame.to_csv(index=False)))
    frame.to_parquet(tmp_path / "rows.parquet")
    for rows in (as_rows(frame), read_rows(tmp_path / "rows.parquet")):
        for row, expected, exact in zip(rows, written["label"], values.tolist(), strict=True):
            for name in ("label", "nullable", "arrow"):
                assert row[name] == expected or row[name] is None or np.isnan(row[name])
            assert row["wide"] == exact or row["wide"] is None or np.isnan(row["wide"])
    assert [as_rows(frame)[i].text("label") for i in (0, 1, 3)] == ["0.1", "3.7", "2"]


def test_numpys_values_are_pythons_own():
    values = [np.int64(3), np.float32(0.1), np.float64(0.5), np.bool_(True), np.str_("a")]
    values += [np.array([{"role": "user"}]), np.float32("nan")]
    rows = as_rows([{"x": value} for value in values])
    assert [row["x"] for row in rows[:-1]] == [3, 0.1, 0.5, True, "a", [{"role": "user"}]]
    assert [type(row["x"]) for row in rows] == [int, float, float, bool, str, list, float]
    assert rows[-1].is_missing("x")
    frame = pandas.DataFrame(FRAME)
    for row, expected in zip(as_rows(frame.to_dict("records")), as_rows(frame), strict=True):
        for name in frame.columns:
            assert row.is_missing(name) == expected.is_missing(name)
            assert row.is_missing(name) or row[name] == expected[name]


def test_a_data_frame_is_fitted_as_its_rows_are():
    rows = world.rows("toy-mood", "train")[4:16]
    subject = open_subject("tiny", "cpu")
    from_rows = fit(rows, subject, QUICK)
    frame = pandas.DataFrame(rows)
    more = pandas.DataFrame({"text": ["good", "bad"]})
    from_frame = fit(frame, subject, QUICK, unlabelled=more.iloc[:0])
    assert from_frame.report["candidates"] == from_rows.report["candidates"]
    options = FitOptions(epochs=1, rates=(1e-2,), methods=("ia2",), folds=2)
    found = [fit(rows, subject, options, unlabelled=each).report["candidates"] for each in (
        more, list(more["text"]), more.to_dict("records"))]  # fmt: skip
    assert found[0] == found[1] == found[2] != fit(rows, subject, options).report["candidates"]


def test_what_is_no_table_of_rows_is_one_line():
    frame = pandas.DataFrame([["a", 1]])
    refused(lambda: as_rows(frame), "column 0 has no text for a name")
    frame.columns = ["a", "a"]
    refused(lambda: as_rows(frame), "two columns of the same name, 'a'")
    refused(lambda: as_rows({"text": ["a"], "label": [1]}), "one dict", "a list")
    refused(lambda: as_rows(b"rows.csv"), "one bytes", "a list")
    refused(lambda: list(iter_rows("a text")), "one str", "a list")
    refused(lambda: as_rows([{"text": "a"}, 3]), "row 2", "not an object")
    refused(lambda: as_rows([{"text": "a"}, {0: "a"}]), "row 2: column 0 has no text for a name")
    refused(lambda: as_rows(["a", None]), "row 2", "None")
    refused(lambda: as_rows(np.zeros((2, 3))), "row 1", "not an object")
    assert as_rows(["a", np.str_("b")]) == [{"text": "a"}, {"text": "b"}]
    assert as_rows(pandas.Series(["a", "b"]), "body") == [{"body": "a"}, {"body": "b"}]
    error = UsageError("wrong")
    assert list(iter_rows([None, error])) == [None, error]
