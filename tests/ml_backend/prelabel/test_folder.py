"""A folder to a file of tasks: with the real model, and with a batch that stops in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ml_backend.jobs.failures import JobFailed
from ml_backend.prelabel.batch import Summary
from ml_backend.prelabel.folder import FolderRun, folder_config, prelabel_folder
from ml_backend.prelabel.prompts import read_csv
from worker import brush_rle
from worker.contract import PrelabelFailure, PrelabelImage, PrelabelItem, PrelabelOptions, Region

BALD_SAM = [sys.executable, "-m", "ml_backend.cli", "prelabel"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for number in range(6):
        pixels = np.full((60, 80, 3), 40, np.uint8)
        pixels[20:40, 30:50] = (200, 120, 40 + number)
        Image.fromarray(pixels).save(images / ("sub" if number > 3 else ".") / f"{number}.png")
    rows = [f"{'sub/' if n > 3 else ''}{n}.png,40,30,1,Cell" for n in range(6)]
    (tmp_path / "p.csv").write_text("\n".join(["image,x,y,positive,label", *rows]) + "\n")
    return tmp_path


class StopsAfter:
    """Answers so many images, then ends as if it were killed; fails the images in `bad`."""

    def __init__(self, count: int, bad: tuple[str, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.asked: list[str] = []

    def prelabel(self, items: Iterable[PrelabelItem], options: PrelabelOptions) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number >= self.count:
                raise JobFailed("No worker takes batch jobs.", "Start one.", 503)
            self.asked.append(item.key)
            if item.key in self.bad:
                yield PrelabelFailure(key=item.key, error="Damaged.", hint="Replace it.")
                continue
            rle = brush_rle.encode(np.ones((60, 80), bool))
            region = Region(label="Cell", rle=rle, area=4800, predicted_iou=0.5, expected_iou=0.25)
            yield PrelabelImage(key=item.key, width=80, height=60, regions=(region,), confidence=0.25)


def run_of(folder: Path, **changes: Any) -> FolderRun:
    values: dict[str, Any] = {
        "folder": folder / "images",
        "out": folder / "tasks.json",
        "prompts": read_csv((folder / "p.csv").read_text(), "p.csv"),
        "controls": folder_config(["Cell"], polygons=False),
        "options": PrelabelOptions(),
        "version": "bald-sam-tiny",
        "url": "/data/local-files/?d={path}",
    }
    return FolderRun(**{**values, **changes})


def do(run: FolderRun, batch: StopsAfter, **options: Any) -> Summary:
    return prelabel_folder(run, batch, observe=lambda _: None, **options)


def test_it_goes_on_where_it_was_stopped(folder: Path) -> None:
    first = StopsAfter(2)
    with pytest.raises(JobFailed):
        do(run_of(folder), first)
    assert not (folder / "tasks.json").exists()
    second = StopsAfter(100)
    summary = do(run_of(folder), second)
    assert (summary.total, summary.already, summary.done) == (6, 2, 4)
    assert sorted(first.asked + second.asked) == sorted(f"{'sub/' if n > 3 else ''}{n}.png" for n in range(6))
    tasks = json.loads((folder / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks][4:] == [f"/data/local-files/?d=images/sub/{n}.png" for n in (4, 5)]
    assert all(len(task["predictions"]) == 1 for task in tasks)
    assert not (folder / "tasks.json.partial").exists()
    other = StopsAfter(100)
    do(run_of(folder, version="bald-sam-other"), other)
    assert len(other.asked) == 6


def test_failures_stay_until_they_are_tried_again(folder: Path) -> None:
    summary = do(run_of(folder), StopsAfter(100, bad=("1.png",)))
    assert summary.failed == {"1.png": "Damaged. Replace it."}
    assert len(json.loads((folder / "tasks.json").read_text())) == 5
    again = StopsAfter(100)
    assert do(run_of(folder), again).failed == {"1.png": "Damaged. Replace it."}
    assert again.asked == []
    assert do(run_of(folder), again, retry_failed=True).failed == {}
    assert again.asked == ["1.png"]
    assert len(json.loads((folder / "tasks.json").read_text())) == 6


def command(folder: Path, *more: str) -> list[str]:
    return [*BALD_SAM, "--images", str(folder / "images"), "--out", str(folder / "tasks.json"), *more]


def test_the_command_killed_and_run_again(folder: Path) -> None:
    """The real model, kill -9 as soon as the first image is noted; then a polygon run of the same folder."""
    csv = ("--prompts", str(folder / "p.csv"))
    with subprocess.Popen(command(folder, *csv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        journal = folder / "tasks.json.partial"
        while process.poll() is None and not (journal.exists() and '"done"' in journal.read_text()):
            time.sleep(0.005)
        process.kill()
    done = subprocess.run(command(folder, *csv, "--json"), capture_output=True, text=True, check=True, timeout=300)
    summary = json.loads(done.stdout)
    assert summary["done"] + summary["already_done"] == 6
    tasks = json.loads((folder / "tasks.json").read_text())
    assert len(tasks) == 6
    (made,) = tasks[0]["predictions"]
    assert made["model_version"] == "bald-sam-tiny"
    brush, *rest = made["result"]
    assert brush["value"]["brushlabels"] == ["Cell"]
    mask = brush_rle.decode(brush["value"]["rle"], 60, 80)
    assert mask[30, 40]
    assert 0 < made["score"] <= 1
    assert all(one["from_name"] == "next" and one["dynamic"] for one in rest)

    outlines = command(folder, *csv, "--format", "polygon", "--no-proposal")
    polygon = subprocess.run(outlines, capture_output=True, text=True, check=True, timeout=300)
    assert "6 of 6 images pre-labelled" in polygon.stdout
    (made,) = json.loads((folder / "tasks.json").read_text())[0]["predictions"]
    assert {one["type"] for one in made["result"]} == {"polygonlabels"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "nowhere", "--out", "x.json"], "no folder"),
        (["--images", "IMAGES"], "--out"),
        ([], "--project"),
        (["--images", "IMAGES", "--project", "1"], "--project"),
        (["--images", "IMAGES", "--out", "x.json", "--view", "1"], "--view is for --project"),
        (["--images", "IMAGES", "--out", "x.json", "--prompts", "p.xml"], "neither a .csv"),
        (["--images", "IMAGES", "--out", "x.json", "--prompts", "p.csv", "--top", "3"], "--top is for"),
        (["--project", "1"], "address or the key"),
        (["--project", "1", "--tasks", "a"], "address or the key"),
    ],
)
def test_one_line_says_what_to_do(folder: Path, arguments: list[str], said: str) -> None:
    from click.testing import CliRunner

    from ml_backend.cli import main

    named = [str(folder / "images") if one == "IMAGES" else one for one in arguments]
    found = CliRunner().invoke(main, ["prelabel", *named])
    assert found.exit_code == 2
    assert said in found.output
    assert len(found.output.splitlines()) == 1
