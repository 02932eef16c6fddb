"""The click log as files: a table of clicks, or one JSON file an image for prompting research."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine

from ml_backend.clicks.filter import Filter
from ml_backend.clicks.formats import WRITERS
from ml_backend.clicks.people import People
from ml_backend.clicks.pointprompt import write_pointprompt
from ml_backend.clicks.rows import many_rows
from ml_backend.clicks.table import chunks

FORMATS = (*WRITERS, "pointprompt")


def export(engine: Engine, format_: str, out: Path, *, chosen: Filter, key: bytes | None) -> int:
    """Write the clicks to `out` (a file; a folder for `pointprompt`); return how many rows (or images) it holds.

    `key` None keeps the users' names, otherwise they become pseudonyms. A file appears only when it is complete.
    Raises ModuleNotFoundError if `parquet` is asked for without pyarrow, OSError if `out` cannot be written.
    """
    with many_rows(), engine.connect() as connection:
        people = People(connection, key)
        if format_ == "pointprompt":
            return write_pointprompt(connection, out, chosen, people)
        part = out.with_name(out.name + ".part")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            count = WRITERS[format_](part, chunks(connection, chosen, people))
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return count
