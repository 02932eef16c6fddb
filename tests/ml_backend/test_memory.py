from __future__ import annotations

import subprocess
import sys

import pytest

from ml_backend.memory import ARENAS

#: Twelve threads that allocate at the same time; then glibc says how many pools it has made.
THREADS = """
import ctypes, threading
from ml_backend.memory import share_arenas
{before}
meet = threading.Barrier(12)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def allocate():
    meet.wait()
    for _ in range(300):
        libc.malloc(2000)
    meet.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_threads_share_their_pools() -> None:
    def pools(before: str) -> int:
        command = [sys.executable, "-c", THREADS.format(before=before)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("<heap nr")

    assert pools("") > ARENAS
    assert pools("share_arenas()") <= ARENAS
