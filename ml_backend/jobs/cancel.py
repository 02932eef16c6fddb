"""Ending what runs on another thread, between two of its steps."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = (ctypes.c_ulong, ctypes.py_object)


class Cancellable:
    """A block that another thread may end: `cancel()` raises `kind` in the thread that entered the block.

    A call into C, such as one layer of a network, is finished first. Once the block is left nothing is raised any more.
    """

    def __init__(self, kind: type[Exception]) -> None:
        self._kind = kind
        self._thread: int | None = None
        self._asked = False
        self._lock = threading.Lock()

    def __enter__(self) -> Cancellable:
        self._thread = threading.get_ident()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        thread = threading.get_ident()
        with self._lock:
            self._thread = None
        _raise_in(thread, ctypes.py_object())  # what was not raised yet is taken back

    def cancel(self) -> None:
        """End the block, from any thread; harmless before and after it."""
        with self._lock:
            self._asked = True
            if self._thread is not None:
                _raise_in(self._thread, self._kind)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block, for what the thread does meanwhile: that is not ended. If somebody asked for it, the block
        ends after it."""
        with self._lock:
            thread, self._thread = self._thread, None
        try:
            yield
        finally:
            with self._lock:
                self._thread = thread
            if self._asked:
                raise self._kind
