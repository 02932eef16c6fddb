"""Start-up, and the first click on an image that was opened a while ago or not at all."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.bench.clicks import Clicks, clicks_on
from evaluation.bench.server import BALD_SAM, Page, shared
from evaluation.bench.setup import Bench

WIDTH, HEIGHT = 1600, 1200
#: Numbers of the tasks of images that are warm begin here.
WARM = 1000


def measure(bench: Bench) -> dict[str, Any]:
    """`cold`: seconds of start-up and milliseconds of first clicks; `first_click_ratio`: of the first backbone, first
    click on an image whose task was open for longer than one encode, by the same click on a copy of the image that was
    clicked on before, on another object."""
    commands = {
        "import_s": [sys.executable, "-c", "import ml_backend"],
        "help_s": [*BALD_SAM, "--help"],
        "import_app_s": [sys.executable, "-W", "ignore", "-c", "import ml_backend.app"],
    }
    found: dict[str, Any] = {name: _seconds(command, bench.count(5, 1)) for name, command in commands.items()}
    for name in bench.backbones if not bench.quick else bench.backbones[:1]:
        bench.say(f"cold start: {name}")
        server = shared(bench, name)
        with server.page() as page:
            found[name] = {"listening_s": round(server.listening, 2), "ready_s": round(server.ready, 2)}
            found[name] |= _first_clicks(bench, name, page)
    first = found[bench.backbones[0]]
    return {"cold": found, "first_click_ratio": first["first_click_ratio"]}


def _first_clicks(bench: Bench, backbone: str, page: Page) -> dict[str, Any]:
    unopened: list[float] = []
    opened: list[float] = []
    warm: list[float] = []
    rounds = bench.count(*((10, 1) if backbone == "tiny" else (3, 1)))
    for turn in range(rounds):
        number = 2 * turn + 1
        image, clicks, _ = _picture(bench, number)
        unopened.append(page.click(image, number, f"first-{number}", clicks))
        number += 1
        image, clicks, others = _picture(bench, number)
        page.open(image, number)
        time.sleep(2 * max(unopened) / 1000)
        opened.append(page.click(image, number, f"first-{number}", clicks))
        # The same picture, of other bytes: whether a click looks at a part of it depends on what is there.
        copy, task = bench.image(f"warm-{number}", number, WIDTH, HEIGHT), WARM + number
        page.click(copy, task, f"elsewhere-{number}", others)
        warm.append(page.click(copy, task, f"second-{number}", clicks))
    return {
        "first_click_unopened_ms": round(statistics.median(unopened), 1),
        "first_click_opened_ms": round(statistics.median(opened), 1),
        "warm_click_ms": round(statistics.median(warm), 1),
        "first_click_ratio": round(statistics.median(a / b for a, b in zip(opened, warm, strict=True)), 3),
    }


def _picture(bench: Bench, number: int) -> tuple[Path, Clicks, Clicks]:
    """A picture that no server has seen, and a first click on each of two of its objects."""
    planned = bench.image(f"planned-{number}", number, WIDTH, HEIGHT)  # encoding it here must not help a server
    one, other = (clicks[:1] for clicks in clicks_on(bench, planned, number, (WIDTH, HEIGHT), 2))
    return bench.image(f"cold-{number}", number, WIDTH, HEIGHT), one, other


def _seconds(command: list[str], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - our own commands
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)
