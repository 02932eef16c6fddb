"""Children end with us, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ml_backend import processes

FAMILY = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"


def wait_until(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stop_takes_the_whole_family(tmp_path):
    log = tmp_path / "log"
    child = processes.start([sys.executable, "-c", FAMILY], env=os.environ, cwd=tmp_path, log=log)
    wait_until(lambda: log.read_text() == "up\n")
    (grandchild,) = psutil.Process(child.pid).children()
    processes.stop(child)
    assert child.returncode == -signal.SIGTERM
    wait_until(lambda: ended(grandchild.pid))
    processes.stop(child)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_LIMIT_S", 0.3)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    child = processes.start([sys.executable, "-c", code], env=os.environ, cwd=tmp_path, log=log)
    wait_until(lambda: log.read_text() == "up\n")
    processes.stop(child)
    assert child.returncode == -signal.SIGKILL


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    parent_code = (
        "import os, pathlib, sys, time\n"
        "from ml_backend import processes\n"
        "here = pathlib.Path.cwd()\n"
        "child = processes.start(['sleep', '600'], env=os.environ, cwd=here, log=here / 'log')\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[1])}
    command = [sys.executable, "-c", parent_code]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not ended(child)
        parent.kill()
    wait_until(lambda: ended(child))


def test_free_ports_are_free():
    assert processes.port_is_free(processes.free_port())


def test_last_words(tmp_path):
    (tmp_path / "log").write_text("first\nlast words\n\n")
    assert processes.last_words(tmp_path / "log") == "last words"
