"""Pre-labelling in a real Label Studio under kill -9: `python scripts/measure_prelabel_kills.py`.

A project of small pictures, each with the rectangle of another model. The first half is asked for with *Retrieve
Predictions* through `bald-sam serve`, the other with `bald-sam prelabel`; one `bald-sam worker` behind a Redis does the
work. Worker, server and command are killed at random moments all over the run, and started again as a supervisor, or a
person with the arrow key, would. At the end every task must have one prediction. Prints JSON.

`--kills 0 --retrieved 0 --tasks 1000` is one undisturbed run of the command.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from ml_backend import label_studio, processes
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError
from ml_backend.labeling_config import recommended_config
from ml_backend.prelabel.upload import tasks_with

EMAIL, PASSWORD = "measure@example.com", "measure-12345"
VERSION = "bald-sam-tiny"
SIDE = 64
#: Pictures in one upload; Label Studio takes 100.
UPLOAD = 100
#: A kill comes up to so many seconds after the progress at which it is due.
DELAY_S = 3.0
LIMIT_S = 3600.0


def picture(number: int) -> bytes:
    """A PNG with a square."""
    pixels = np.full((SIDE, SIDE, 3), 30, np.uint8)
    pixels[16:48, 16:48] = (200, number % 200, 60)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_project(api: LabelStudioApi, count: int) -> tuple[int, list[int]]:
    """A project of `count` tasks and their ids."""
    config = recommended_config(["Cell"])
    project = api.call("POST", "/api/projects/", json={"title": "Pre-labels", "label_config": config})["id"]
    for start in range(0, count, UPLOAD):
        numbers = range(start, min(start + UPLOAD, count))
        files = {f"f{n}": (f"p{n}.png", picture(n), "image/png") for n in numbers}
        api.call("POST", f"/api/projects/{project}/import", files=files)
    tasks = [task["id"] for task in api.tasks(project, regions=False)]
    size = {"original_width": SIDE, "original_height": SIDE}
    box = {"x": 20, "y": 20, "width": 60, "height": 60, "rotation": 0}
    region = {"id": "r", "from_name": "rect", "to_name": "image", "type": "rectangle", "value": box, **size}
    api.create_predictions(
        project, [{"task": task, "result": [region], "score": 0.5, "model_version": "detector"} for task in tasks]
    )
    return project, tasks


class Actors:
    """The processes that are killed: `worker`, `server`, and `command` until it has ended by itself."""

    def __init__(self, folder: Path, studio: tuple[str, str], redis_url: str, command: list[str]) -> None:
        self.port = processes.free_port()
        own = {"LABEL_STUDIO_URL": studio[0], "LABEL_STUDIO_API_KEY": studio[1], "BALD_SAM_REDIS_URL": redis_url}
        self._folder, self._environment = folder, os.environ | own | {"BALD_SAM_DATA_DIR": str(folder / "data")}
        program = [sys.executable, "-m", "ml_backend.cli"]
        self._commands = {
            "worker": [*program, "worker"],
            "server": [*program, "serve", "--port", str(self.port)],
            "command": [*program, *command],
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: Counter[str] = Counter()

    def start(self, name: str) -> None:
        """Start one, for the first time or again."""
        self.starts[name] += 1
        log = self._folder / f"{name}-{self.starts[name]}.log"
        self.running[name] = processes.start(self._commands[name], env=self._environment, cwd=self._folder, log=log)

    def kill(self, name: str) -> None:
        """kill -9, and a new start."""
        self.running[name].kill()
        self.running[name].wait()
        self.start(name)

    def output(self, name: str) -> str:
        """What the last start of one wrote."""
        return (self._folder / f"{name}-{self.starts[name]}.log").read_text()

    def stop(self) -> None:
        """End them all."""
        for process in self.running.values():
            processes.stop(process)


def retrieve(api: LabelStudioApi, project: int, tasks: list[int]) -> None:
    """Press the button of the Data Manager; a server that is killed meanwhile is an error in the page."""
    chosen = {"all": False, "included": tasks}
    body = {"selectedItems": chosen, "filters": {"conjunction": "and", "items": []}}
    try:
        api.call("POST", f"/api/dm/actions?project={project}&id=retrieve_tasks_predictions", json=body)
    except (LabelStudioError, requests.RequestException) as error:
        print(f"Retrieve Predictions: {error}", file=sys.stderr)


def jobs(port: int) -> list[dict[str, Any]] | None:
    """Retrievals of the server, None while it does not answer."""
    try:
        found: list[dict[str, Any]] = requests.get(f"http://127.0.0.1:{port}/jobs", timeout=5).json()["jobs"]
    except (requests.RequestException, KeyError, ValueError):
        return None
    return found


def until(condition: Any, limit_s: float = 300.0) -> None:
    """Wait. Ends the program when it takes too long."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            sys.exit("waited in vain")
        time.sleep(0.3)


def run(count: int, kills: int, retrieved: float, seed: int) -> dict[str, Any]:
    """The whole run; see the top of the file."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = label_studio.ensure_environment(label_studio.default_environment(Path.cwd()))
        (folder / "studio").mkdir()
        redis_port = processes.free_port()
        redis = processes.start(
            ["redis-server", "--port", str(redis_port), "--save", ""],
            env=os.environ,
            cwd=folder,
            log=folder / "redis.log",
        )
        studio = label_studio.LabelStudioServer(
            environment, data_dir=folder / "studio", port=processes.free_port(), email=EMAIL, password=PASSWORD
        )
        with studio:
            token = label_studio.personal_access_token(studio.url, EMAIL, PASSWORD)
            api = LabelStudioApi(studio.url, token)
            project, tasks = make_project(api, count)
            asked = tasks[: int(retrieved * count)]
            others = f"{tasks[len(asked)]}-{tasks[-1]}"
            command = ["prelabel", "--project", str(project), "--tasks", others, "--json"]
            actors = Actors(folder, (studio.url, token), f"redis://127.0.0.1:{redis_port}", command)
            try:
                return _killing(api, project, tasks, asked, actors, rng, kills)
            finally:
                actors.stop()
                processes.stop(redis)


def _killing(
    api: LabelStudioApi,
    project: int,
    tasks: list[int],
    asked: list[int],
    actors: Actors,
    rng: random.Random,
    kills: int,
) -> dict[str, Any]:
    actors.start("worker")
    presses = 0
    button = threading.Thread()
    if asked:
        actors.start("server")
        url = f"http://127.0.0.1:{actors.port}"
        until(lambda: jobs(actors.port) is not None)
        api.call("POST", "/api/ml", json={"url": url, "title": "bald-sam", "project": project})

    def press() -> None:
        nonlocal presses, button
        presses += 1
        button = threading.Thread(target=retrieve, args=(api, project, asked), daemon=True)
        button.start()

    began = time.monotonic()
    if asked:
        press()
    actors.start("command")
    names = ["worker", "command", *(["server"] if asked else [])]
    victims = [names[number % len(names)] for number in range(kills)]
    rng.shuffle(victims)
    due = sorted(rng.uniform(0.0, 0.95) * len(tasks) for _ in range(kills))
    killed: Counter[str] = Counter()
    reached: list[int] = []
    while True:
        if time.monotonic() - began > LIMIT_S:
            sys.exit("the run takes too long")
        time.sleep(0.5)
        done = len(tasks_with(api, project, VERSION))
        if len(reached) < kills and done >= due[len(reached)]:
            time.sleep(rng.uniform(0.0, DELAY_S))
            victim = victims[len(reached)]
            if victim == "command" and actors.running[victim].poll() is not None:
                victim = "worker"  # the command is through
            actors.kill(victim)
            killed[victim] += 1
            reached.append(done)
            print(f"{done} of {len(tasks)}: {victim} killed", file=sys.stderr, flush=True)
            continue
        ended = actors.running["command"].poll()
        if ended not in (None, 0):
            sys.exit(f"the command ended with {ended}: {actors.output('command')}")
        if asked and not button.is_alive():
            found = jobs(actors.port)
            if found is not None and all(one["state"] == "finished" for one in found):
                if not set(asked) <= tasks_with(api, project, VERSION):
                    press()  # it was killed before it had noted the request; the page showed an error
                elif ended == 0:
                    break
        elif not asked and ended == 0:
            break
    return _outcome(api, project, tasks) | {
        "by_retrieve_predictions": len(asked),
        "kills": dict(killed),
        "done_at_kills": reached,
        "retrieve_pressed": presses,
        "command": json.loads(actors.output("command").strip().splitlines()[-1]),
        "seconds": round(time.monotonic() - began, 1),
    }


def _outcome(api: LabelStudioApi, project: int, tasks: list[int]) -> dict[str, int]:
    """What Label Studio holds in the end."""
    each = {
        task["id"]: [one for one in task["predictions"] if one["model_version"] == VERSION]
        for task in api.tasks(project)
    }
    return {
        "tasks": len(tasks),
        "lost": sum(not each[task] for task in tasks),
        "doubled": sum(len(found) > 1 for found in each.values()),
        "without_region": sum(not any(one["result"] for one in found) for found in each.values()),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--retrieved", type=float, default=0.5, help="share of the tasks, by the button")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    found = run(chosen.tasks, chosen.kills, chosen.retrieved, chosen.seed)
    print(json.dumps(found))
    if found["lost"] or found["doubled"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
