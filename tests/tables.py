"""Rows that are hard to keep, and files of every kind that hold them, for the tests of rows and sources."""

import io
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

TRICKY = [
    "plain",
    'comma, "quotes"',
    "line\nend",
    "\u2028 separators \x85\x0b\x0c",
    "blank at the end ",
    "naïve 東京 🙂",
    "\\ {x}",
    "\t",
]
SST2 = [{"sentence": f"{text}{i}", "label": i % 2} for i in range(5) for text in TRICKY]


def parquet_bytes(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as the file's suffix says, with pyarrow's own writers where it has one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_bytes(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )
    elif path.suffix == ".json":
        path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())
    elif path.suffix == ".parquet":
        path.write_bytes(parquet_bytes(rows))
    else:
        options = csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
        csv.write_csv(pa.Table.from_pylist(rows), path, options)
    return path
