"""Append-only files between the answer path and the database: what is in them survives a kill and a database outage.

Each process writes segments in a folder of its own and holds a lock on it. A folder whose lock is free belongs to a
dead process: whoever finds it first adopts its segments.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import IO, Any
from uuid import uuid4

log = logging.getLogger(__name__)

REFUSED = "refused.jsonl"


class Journal:
    """Segments `<root>/<process>/<number>.jsonl`. `append` and `take` may run in different threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / f"{os.getpid()}-{uuid4().hex[:8]}"
        self._folder.mkdir(parents=True, mode=0o700)
        self._lock_file = _locked(self._folder / "lock")
        self._segment: IO[str] | None = None
        self._number = 0
        self._lock = Lock()
        with contextlib.suppress(FileNotFoundError):  # a newer version may be able to write what an older one refused
            (root / REFUSED).rename(self._folder / f"{self._number:09d}.jsonl")

    def append(self, lines: Iterable[str]) -> None:
        """Write whole lines and wait until they are on the disk. Raises OSError where that fails."""
        with self._lock:
            if self._segment is None:
                self._number += 1
                self._segment = (self._folder / f"{self._number:09d}.jsonl").open("a", encoding="utf-8")
            self._segment.writelines(lines)
            self._segment.flush()
            os.fsync(self._segment.fileno())

    def take(self) -> list[Path]:
        """Finished segments, oldest first. The current one is finished only when there is no other."""
        with self._lock:
            finished = self._finished()
            if not finished and self._segment is not None:
                self._segment.close()
                self._segment = None
                finished = self._finished()
            return finished

    def adopt(self) -> None:
        """Move the segments of dead processes into this folder, to be taken like our own."""
        for folder in sorted(path for path in self._root.iterdir() if path.is_dir() and path != self._folder):
            owner = _locked(folder / "lock")
            if owner is None:
                continue
            with self._lock:
                for segment in sorted(folder.glob("*.jsonl")):
                    self._number += 1
                    segment.rename(self._folder / f"{self._number:09d}.jsonl")
                if self._segment is not None:  # keep the order: what comes later gets a higher number
                    self._segment.close()
                    self._segment = None
            (folder / "lock").unlink(missing_ok=True)
            folder.rmdir()
            owner.close()

    def refuse(self, line: str) -> Path:
        """Keep an event that the database will never take, for a person to look at; return the file."""
        path = self._root / REFUSED
        with self._lock, path.open("a", encoding="utf-8") as file:
            file.write(line)
        return path

    def close(self) -> None:
        """Close the files; remove the folder if nothing is left in it."""
        with self._lock:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            if not list(self._folder.glob("*.jsonl")):
                (self._folder / "lock").unlink(missing_ok=True)
                self._folder.rmdir()
        if self._lock_file is not None:
            self._lock_file.close()

    def _finished(self) -> list[Path]:
        current = Path(self._segment.name) if self._segment is not None else None
        return [path for path in sorted(self._folder.glob("*.jsonl")) if path != current]


def read(segment: Path) -> Iterator[dict[str, Any]]:
    """Events of a segment in order. A line cut off by a kill, before its answer was a second old, is left out."""
    with segment.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                log.warning("Line %d of the click journal %s is not whole and was left out.", number, segment)


def _locked(path: Path) -> IO[str] | None:
    """The lock file, locked by this process; None if another one holds it. A dead process holds nothing."""
    try:
        file = path.open("a")
    except FileNotFoundError:  # the folder was adopted in this moment
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
