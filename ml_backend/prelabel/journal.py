"""What a pre-labelling run has done, one line for each image, so that it can be killed anywhere and go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ml_backend.errors import BackendError


class JournalInUse(BackendError):  # noqa: N818 (says what is, like FileExistsError)
    """Another process works on this run."""

    status = 409


class Journal:
    """A file of JSON lines: a header that says what the run is, then `{"key": ..., "done": ...}` or `{"key": ...,
    "error": ...}`. The last line about a key counts, and a line that was cut off by a kill counts for nothing.

    One process holds it at a time. `open` begins anew when the header in the file is another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        #: Key -> what was done with it.
        self.done: dict[str, Any] = {}
        #: Key -> why it could not be done.
        self.failed: dict[str, str] = {}
        self._file: IO[str] | None = None

    def open(self, header: dict[str, Any] | None = None) -> Journal:
        """Take the file and read what it holds; `header` None keeps the one it has.

        Raises JournalInUse while another process has it, BackendError when it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise BackendError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise JournalInUse("This run is under way in another process.", "Wait for it, or stop it.") from None
        self._file = file
        self._read()
        if header is not None and header != self.header:
            file.truncate(0)
            self.header, self.done, self.failed = header, {}, {}
            self._write({"run": header})
        return self

    def add(self, key: str, done: Any) -> None:
        """Note that `key` is done. `done` is any JSON that the caller wants back."""
        self.failed.pop(key, None)
        self.done[key] = done
        self._write({"key": key, "done": done})

    def fail(self, key: str, error: str) -> None:
        """Note why `key` could not be done."""
        self.failed[key] = error
        self._write({"key": key, "error": error})

    def close(self, *, delete: bool = False) -> None:
        """Let go of the file; `delete` it where nothing of it is needed any more."""
        if self._file is not None:
            if delete:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _read(self) -> None:
        """Take over what the file holds."""
        for line in _lines(self.path):
            if "run" in line:
                self.header, self.done, self.failed = line["run"], {}, {}
            elif "error" in line:
                self.done.pop(line["key"], None)
                self.failed[line["key"]] = line["error"]
            elif "key" in line:
                self.failed.pop(line["key"], None)
                self.done[line["key"]] = line["done"]

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        # Begins with a line end, so that a line that was cut off before stays alone.
        self._file.write("\n" + json.dumps(line))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_journal(path: Path) -> Journal:
    """What a journal holds now, without taking it; empty if the file is gone."""
    journal = Journal(path)
    with suppress(FileNotFoundError):
        journal._read()
    return journal


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
