"""What the click log costs: `python scripts/measure_click_log.py --data DIR`.

Fills DIR with made-up clicks where they are not there yet (a million take some minutes and 3 GB), runs `bald-sam
clicks` on them for the report and each export, and prints a table. Then it times answers of the real application with
and without a click log, in turn, on a runner that answers at once.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from make_clicks import main as make_clicks

from ml_backend.app import create_app
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings
from worker import brush_rle
from worker.contract import EmbedJob, Proposal, SegmentJob, SegmentResult

HEIGHT, WIDTH, ROUNDS = 1200, 1800, 1000
COMMANDS = ("report", "parquet", "csv", "jsonl", "pointprompt")


def measure_command(data_dir: Path, what: str) -> str:
    """A row of the table: `bald-sam clicks` as a user runs it, start of Python included."""
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        out = Path(folder) / "clicks"
        arguments = ["clicks", "report"] if what == "report" else ["clicks", "export", "--format", what]
        program = "import sys; from ml_backend.cli import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", program, *arguments, "--out", str(out)]
        began = time.perf_counter()
        sys.stdout.flush()
        child = os.posix_spawn(
            command[0],
            command,
            os.environ | {"BALD_SAM_DATA_DIR": str(data_dir)},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
        _, status, used = os.wait4(child, 0)
        wall = time.perf_counter() - began
        if status:
            sys.exit(f"{what} failed with status {os.waitstatus_to_exitcode(status)}")
        size = sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*.json"))) / 1e6
    cpu = used.ru_utime + used.ru_stime
    return f"| {what} | {wall:.1f} s | {cpu:.1f} s | {used.ru_maxrss / 1024:.0f} MB | {size:.1f} MB |"


class AtOnce:
    """A runner that answers each job with the same mask."""

    def __init__(self) -> None:
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        mask = ((columns - 900) / 500) ** 2 + ((rows - 600) / 350) ** 2 < 1
        self.rle, self.area = brush_rle.encode(mask), int(mask.sum())

    def segment(self, job: SegmentJob, *, deadline_s: float) -> SegmentResult:
        """The mask and a proposal."""
        return SegmentResult(
            width=WIDTH,
            height=HEIGHT,
            rle=self.rle,
            area=self.area,
            predicted_iou=0.9,
            proposal=Proposal(x=400.0, y=300.0, positive=True, score=0.2, strategy="bald"),
            model_version="none",
            timings={"decode": 1.0},
        )

    def embed(self, job: EmbedJob) -> None:
        """Nothing."""

    def status(self) -> dict[str, Any]:
        """For /health."""
        return {"runner": "at once", "workers": []}

    def close(self) -> None:
        """Nothing."""


def measure_answers() -> str:
    """Medians of /predict with and without a click log, one after the other, and of their differences."""
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    body: dict[str, Any] = {
        "tasks": [{"id": 1, "data": {"image": "/data/upload/1/picture.jpg"}, "drafts": []}],
        "project": "1.1",
        "label_config": recommended_config(["Object"]),
        "params": {"context": {"result": []}},
    }
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        apps = {
            on: create_app(Settings(_env_file=None, data_dir=Path(folder), click_log=on), AtOnce())  # type: ignore[call-arg]
            for on in times
        }
        clients = {on: app.test_client() for on, app in apps.items()}
        for number in range(ROUNDS + 20):
            prompt = {**size, "value": {"x": 50.0, "y": 50.0, "width": 0.5, "labels": []}, "is_positive": True}
            prompt |= {"id": f"p{number}", "from_name": "kp", "to_name": "image", "type": "keypoint"}
            one = copy.deepcopy(body)
            one["params"]["context"]["result"] = [prompt]
            data = json.dumps(one)
            for on in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                # Read and closed at once: what the log does after the answer has left counts too.
                answer = clients[on].post("/predict", data=data, content_type="application/json", buffered=True)
                spent = 1000 * (time.perf_counter() - began)
                if answer.status_code != 200:
                    sys.exit(answer.text)
                if number >= 20:
                    times[on].append(spent)
            time.sleep(0.005)
        log = apps[True].extensions["bald_sam_clicks"]
        log.flush()
        written = log.counts.written
        log.close()
    with_log, without = (statistics.median(times[on]) for on in (True, False))
    more = statistics.median(a - b for a, b in zip(times[True], times[False], strict=True))
    return (
        f"{ROUNDS} answers: {without:.2f} ms without a log, {with_log:.2f} ms with, difference in pairs {more:+.2f} ms "
        f"({written} written)"
    )


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder for the made-up click log.")
    parser.add_argument("--clicks", type=int, default=1_000_000)
    parser.add_argument("--only", choices=(*COMMANDS, "answers"), help="Measure one thing.")
    options = parser.parse_args()
    if options.only != "answers":
        if not (options.data / "clicks.sqlite").is_file():
            partial = options.data.with_name(options.data.name + ".part")
            shutil.rmtree(partial, ignore_errors=True)
            make_clicks(partial, options.clicks)
            partial.rename(options.data)
        print("| | time | of it on the processor | memory | written |\n|---|---|---|---|---|")
        for what in [options.only] if options.only else COMMANDS:
            print(measure_command(options.data, what), flush=True)
    if options.only in (None, "answers"):
        print(measure_answers())


if __name__ == "__main__":
    main()
