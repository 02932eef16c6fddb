"""Memory of a process with many threads."""

from __future__ import annotations

import contextlib
import ctypes

M_ARENA_MAX = -8  # of glibc's malloc.h
ARENAS = 2


def share_arenas() -> None:
    """Let all threads allocate from the same few pools; to be called before there are many. Harmless without glibc.

    By default glibc gives threads pools of their own, and each keeps what its largest request has needed: with 32
    threads a server's memory rises for thousands of requests, though no more of it is in use (docs/security-review.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
