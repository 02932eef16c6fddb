"""Writing the table of clicks: Parquet, CSV, JSON lines. What all clicks of an object share is put into words once."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ml_backend.clicks.table import COLUMNS, HEAD, OF_CLICK, TAIL, Chunk

#: Floats in CSV and JSON lines: nine digits are a millionth of a pixel, and take half the time of seventeen. Parquet
#: keeps them as they are.
FLOAT = "%.9g"

_BOOL = {None: None, 0: False, 1: True}


def write_parquet(out: Path, chunks: Iterator[Chunk]) -> int:
    """Write `out`; return how many rows it has. Raises ModuleNotFoundError without pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "text": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    count = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for chunk in chunks:
            index = pa.array(chunk.of)
            arrays = {}
            for names, rows in ((HEAD, chunk.head), (TAIL, chunk.tail)):
                for name, shared in zip(names, zip(*rows, strict=True), strict=True):
                    arrays[name] = pa.array(shared, type=schema.field(name).type).take(index)
            for name, values in chunk.columns.items():
                kind = COLUMNS[name]
                if kind == "time":
                    arrays[name] = pa.array(_microseconds(values), type=types[kind])
                elif kind == "bool":
                    arrays[name] = pa.array(map(_BOOL.__getitem__, values), type=types[kind], size=len(values))
                else:
                    arrays[name] = pa.array(values, type=types[kind])
            writer.write_table(pa.Table.from_arrays([arrays[name] for name in COLUMNS], schema=schema))
            count += len(chunk.of)
    return count


def write_csv(out: Path, chunks: Iterator[Chunk]) -> int:
    """Write `out`; return how many rows it has."""
    words = {None: None, 0: "false", 1: "true"}
    count = 0
    with out.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        for chunk in chunks:
            head = [line + "," for line in _csv_lines(chunk.head)]
            tail = ["," + line + "\n" for line in _csv_lines(chunk.tail)]
            rows = _csv_lines(zip(*_texts(chunk.columns, words), strict=True))
            file.writelines(head[of] + row + tail[of] for of, row in zip(chunk.of, rows, strict=True))
            count += len(chunk.of)
    return count


def _csv_lines(rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """Each row as a line of CSV without its end. What clicks share is put into words once."""
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="").writerows(rows)
    return lines


def write_jsonl(out: Path, chunks: Iterator[Chunk]) -> int:
    """Write `out`; return how many rows it has."""
    line = ",".join(f'"{name}":%s' for name in OF_CLICK)
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            head = ["{" + _fields(HEAD, row) + "," for row in chunk.head]
            tail = ["," + _fields(TAIL, row) + "}\n" for row in chunk.tail]
            columns = [_json_texts(name, values) for name, values in chunk.columns.items()]
            rows = zip(*columns, strict=True)
            file.writelines(head[of] + line % row + tail[of] for of, row in zip(chunk.of, rows, strict=True))
            count += len(chunk.of)
    return count


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _fields(names: Sequence[str], values: tuple[Any, ...]) -> str:
    """`"name":value,...` without braces."""
    return _encode(dict(zip(names, values, strict=True)))[1:-1]


def _json_texts(name: str, values: Sequence[Any]) -> list[str]:
    """A column in JSON. Column by column takes a third of the time of row by row."""
    kind = COLUMNS[name]
    if kind == "time":
        return [f'"{text}"' for text in _iso(values)]
    if kind in {"int", "float"}:
        form = FLOAT if kind == "float" else "%d"
        return ["null" if value is None else form % value for value in values]
    if kind == "text":
        return ["null" if value is None else encode_basestring(value) for value in values]
    words = {None: "null", 0: "false", 1: "true"}
    return [words[value] for value in values]


def _texts(columns: dict[str, Sequence[Any]], words: dict[int | None, Any]) -> list[Sequence[Any]]:
    """The columns of the clicks with times in ISO form, and truth in `words`."""
    found: list[Sequence[Any]] = []
    for name, column in columns.items():
        kind, values = COLUMNS[name], column
        if kind == "time":
            values = _iso(values)
        elif kind == "bool":
            values = [words[value] for value in values]
        elif kind == "float":
            values = [value if value is None else FLOAT % value for value in values]
        found.append(values)
    return found


def _microseconds(seconds: Sequence[float]) -> Any:
    return np.round(np.asarray(seconds, np.float64) * 1e6).astype("datetime64[us]")


def _iso(seconds: Sequence[float]) -> list[str]:
    """UTC, to the millisecond."""
    milliseconds = np.round(np.asarray(seconds, np.float64) * 1e3).astype("datetime64[ms]")
    found: list[str] = np.datetime_as_string(milliseconds, timezone="UTC").tolist()
    return found


WRITERS: dict[str, Callable[[Path, Iterator[Chunk]], int]] = {
    "parquet": write_parquet,
    "csv": write_csv,
    "jsonl": write_jsonl,
}
