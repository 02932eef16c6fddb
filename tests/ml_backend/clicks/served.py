"""The real server in a process of its own, with a runner that needs no model: `python served.py DATA_DIR [URL]`.

It says its port and serves until it is killed. `Traffic` clicks on it, each time on a new object.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

ROOT = Path(__file__).parents[3]
EVERY_S = 0.02


class Server:
    """A server process; `url` is where it listens."""

    def __init__(self, data_dir: Path, clicks_url: str | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(data_dir), *([clicks_url] if clicks_url else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def kill(self) -> float:
        """SIGKILL; returns when."""
        self.process.kill()
        killed = time.time()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return killed


class Traffic:
    """Clicks by one annotator after the other while it is entered; `answered`: session and time of each good answer."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.answered: list[tuple[str, float]] = []
        self.failed: list[str] = []
        self._url, self._body = url, copy.deepcopy(body)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._click)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _click(self) -> None:
        prompts = self._body["params"]["context"]["result"]
        del prompts[1:]
        project, task = str(self._body["project"]).partition(".")[0], self._body["tasks"][0]["id"]
        with requests.Session() as session:
            session.trust_env = False
            while not self._stop.wait(EVERY_S):
                prompts[0]["id"] = f"p{len(self.answered)}"
                try:
                    answer = session.post(f"{self._url}/predict", json=self._body, timeout=10)
                except requests.RequestException as error:
                    self.failed.append(str(error))
                    return
                if answer.status_code == 200:
                    self.answered.append((f"{project}:{task}:{prompts[0]['id']}", time.time()))
                else:
                    self.failed.append(answer.text)


def main(data_dir: Path, clicks_url: str | None) -> None:
    import waitress

    from ml_backend.app import create_app
    from ml_backend.settings import Settings
    from tests.ml_backend.conftest import FakeRunner

    app = create_app(Settings(_env_file=None, data_dir=data_dir, clicks_url=clicks_url), FakeRunner())
    app.extensions["bald_sam_clicks"].start()
    server = waitress.create_server(app, host="127.0.0.1", port=0)
    sys.stdout.write(f"{server.effective_port}\n")
    sys.stdout.flush()
    server.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
