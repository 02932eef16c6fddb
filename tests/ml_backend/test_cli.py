from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ml_backend.cli import COMMANDS, main
from ml_backend.labeling_config import parse

BALD_SAM = [sys.executable, "-m", "ml_backend.cli"]


def call(*args: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(main, args, env=env)


def test_help_names_every_command_and_imports_none() -> None:
    program = "import sys\nfrom ml_backend.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "print(sorted({'flask', 'pydantic', 'torch', 'numpy', 'redis'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    for name in (*COMMANDS, "serve", "worker", "config-xml"):
        assert f"  {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_config_xml(tmp_path: Path) -> None:
    assert parse(call("config-xml", "--labels", "Car, Wheel").output).mask.labels == ("Car", "Wheel")
    path = tmp_path / "config.xml"
    assert call("config-xml", "--labels", "A,B", "--per-class", "--no-boxes", "--out", str(path)).exit_code == 0
    assert len(parse(path.read_text()).points) == 2


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (["config-xml", "--labels", "A,A"], {}, "name of its own"),
        (["config-xml", "--labels", "A", "--out", "/nowhere/a.xml"], {}, "Cannot write"),
        (["serve"], {"BALD_SAM_PREFETCH": "many"}, "BALD_SAM_PREFETCH"),
        (["models", "list"], {"BALD_SAM_DATA_DIR": "~nobody-of-that-name/d"}, "write the path out in full"),
        (["evaluate", "--data", "D", "--out", "O"], {"BALD_SAM_CACHE_MB": "much"}, "BALD_SAM_CACHE_MB"),
        (["serve", "--host", "0.0.0.0"], {}, "--no-auth"),
        (["worker"], {}, "--redis-url"),
        (["worker", "--redis-url", "redis://localhost", "--queues", "fast"], {}, "interactive, embed"),
    ],
)
def test_one_line_and_status_2(args: list[str], env: dict[str, str], said: str) -> None:
    found = call(*args, env=env)
    assert found.exit_code == 2
    assert said in found.output
    assert len(found.output.splitlines()) == 1


@contextmanager
def serving(tmp_path: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*BALD_SAM, "serve", "--port", "0", *args]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + (tmp_path / "log").read_text()
        yield process, address.group()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def health(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_serve_becomes_ready_and_stops(tmp_path: Path) -> None:
    with serving(tmp_path, "--device", "cpu") as (process, address):
        limit = time.monotonic() + 240
        while not (state := health(address))["ready"]:
            assert state["status"] == "UP"
            assert time.monotonic() < limit, (tmp_path / "log").read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*BALD_SAM, "serve", "--port", port], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"Cannot listen on 127.0.0.1:{port}")
    assert "Traceback" not in done.stderr
