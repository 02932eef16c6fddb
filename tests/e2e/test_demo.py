"""`bald-sam demo` as a person types it: from nothing to one address, again with nothing lost, gone without a trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from ml_backend import processes
from ml_backend.demo_project import State
from ml_backend.label_studio_api import LabelStudioApi

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

COMMAND = Path(sys.executable).with_name("bald-sam")
LIMIT_S = 600


class Demo:
    """A running `bald-sam demo`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.family = psutil.Process(process.pid).children(recursive=True)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def address(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+/projects/\d+/data\?task=\d+", self.text)
        assert found, self.text
        return found[0]

    def wait_until_gone(self) -> None:
        """The demo, Label Studio, the backend and their children."""
        _, left = psutil.wait_procs(self.family, timeout=30)
        assert not left, left


@contextmanager
def running_demo(data_dir: Path, folder: Path) -> Iterator[Demo]:
    """The demo, from its start to its panel."""
    ports = [processes.free_port(), processes.free_port()]
    options = ["--no-browser", "--port", str(ports[0]), "--label-studio-port", str(ports[1])]
    environment = os.environ | {"BALD_SAM_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "2", "COLUMNS": "160"}
    log = folder / f"demo-{len(list(folder.glob('demo-*.log')))}.log"
    process = processes.start([COMMAND, "demo", *options], env=environment, cwd=folder, log=log)
    try:
        deadline = time.monotonic() + LIMIT_S
        while "Ctrl-C stops everything" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.5)
        yield Demo(process, log)
    finally:
        processes.stop(process)


def test_from_nothing_to_one_address_and_again(data_dir, tmp_path):
    with running_demo(data_dir, tmp_path) as first:
        state = State.load(data_dir / "demo" / "demo.json")
        assert state.password in first.text
        page = first.address.split("/projects")[0]
        assert requests.get(first.address, timeout=30).ok
        api = LabelStudioApi(page, state.token)
        project = state.projects["samples"]["id"]
        tasks = list(api.tasks(project))
        assert len(tasks) >= 8
        (backend,) = api.call("GET", f"/api/ml?project={project}")
        assert (backend["state"], backend["is_interactive"]) == ("CO", True)
        (hook,) = api.call("GET", f"/api/webhooks/?project={project}")
        assert hook["url"] == f"{backend['url']}/webhook"
        result = {"result": [], "lead_time": 1.0}
        annotation = api.call("POST", f"/api/tasks/{tasks[0]['id']}/annotations/", json=result)
        assert len(first.family) >= 2, "Label Studio and the backend are its children"
        first.process.send_signal(signal.SIGINT)
        first.process.wait(60)
        first.wait_until_gone()
        assert first.process.returncode == 0
        assert "nothing is left running" in first.text

    with running_demo(data_dir, tmp_path) as second:
        page = second.address.split("/projects")[0]
        api = LabelStudioApi(page, state.token)
        assert [task["id"] for task in api.tasks(project)] == [task["id"] for task in tasks], "nothing twice"
        assert api.call("GET", f"/api/annotations/{annotation['id']}/")["id"] == annotation["id"], "nothing lost"
        assert second.address.endswith(f"task={tasks[1]['id']}"), "it goes on at the first picture that is not done"
        (backend,) = api.call("GET", f"/api/ml?project={project}")
        assert len(api.call("GET", f"/api/webhooks/?project={project}")) == 1, "the webhook of the old port is gone"
        assert requests.get(f"{backend['url']}/health", timeout=5).ok, "connected at its new port"
        second.process.kill()
        second.process.wait(10)
        second.wait_until_gone()
