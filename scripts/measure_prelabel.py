"""How fast pre-labelling is, and what it costs an annotator: `python scripts/measure_prelabel.py WHAT`.

throughput  images per second of `prelabel`, against a bare loop of encode and decode over the same images in memory
clicks      median time of a click on a warm image, idle and while a batch runs (--redis: with one RQ worker)

Pictures are drawn; no Label Studio takes part. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import worker  # isort: skip  # noqa: F401 - before PyTorch: it says how PyTorch's threads wait, as in bald-sam itself
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from evaluation.scenes import draw
from ml_backend import processes
from ml_backend.jobs.in_process_runner import InProcessRunner
from ml_backend.jobs.runner import Runner
from worker import batch
from worker.contract import (
    Click,
    ImageRef,
    ObjectPrompts,
    PrelabelItem,
    PrelabelOptions,
    Prompts,
    RuntimeOptions,
    SegmentJob,
)
from worker.decode import decode
from worker.encode import encode
from worker.runtime import Runtime

SIZE = (480, 640)
CLICK = Click(x=320.0, y=240.0)


def pictures(folder: Path, count: int) -> list[tuple[Path, NDArray[np.uint8]]]:
    """JPEG files and their pixels."""
    made = []
    for seed in range(count):
        path = folder / f"{seed:04}.jpg"
        Image.fromarray(draw(seed, SIZE).image).save(path, quality=90)
        made.append((path, np.asarray(Image.open(path).convert("RGB"))))
    return made


def item(path: Path) -> PrelabelItem:
    """One click in the middle."""
    objects = (ObjectPrompts(prompts=Prompts(clicks=(CLICK,)), label="Object"),)
    return PrelabelItem(key=path.name, image=ImageRef(url=str(path)), objects=objects)


def random_checkpoint(backbone: str, folder: Path) -> Path | None:
    """Random weights of the real architecture for backbones whose weights are not here."""
    if backbone == "tiny":
        return None
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    path = folder / f"{backbone}.pth"
    torch.save(sam_model_registry[backbone]().state_dict(), path)
    return path


def options(folder: Path, backbone: str) -> RuntimeOptions:
    """Everything in `folder`, which is read from, too."""
    checkpoint = random_checkpoint(backbone, folder)
    return RuntimeOptions(data_dir=folder, backbone=backbone, checkpoint=checkpoint, local_roots=(folder,))


def throughput(backbone: str, count: int, repeats: int, propose: bool) -> dict[str, Any]:
    """Both ways in turns, `repeats` times; the medians count, on a busy machine the quickest (least disturbed)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = pictures(folder, count)
        current = Runtime(options(folder, backbone))
        model = current.backbone
        prompts = Prompts(clicks=(CLICK,))

        def bare() -> None:
            for _, pixels in made:
                decode(model, encode(model, pixels), prompts)

        def ours() -> None:
            items = [item(path) for path, _ in made]
            answers = list(batch.run(items, PrelabelOptions(propose=propose), current))
            assert all(getattr(answer, "regions", None) for answer in answers), answers

        for way in (bare, ours):  # memory, threads, first-time costs
            way()
        seconds: dict[str, list[float]] = {"bare": [], "prelabel": []}
        for _ in range(repeats):
            for key, way in (("bare", bare), ("prelabel", ours)):
                start = time.perf_counter()
                way()
                seconds[key].append(time.perf_counter() - start)
    rate = {key: count / statistics.median(values) for key, values in seconds.items()}
    return {
        "backbone": backbone,
        "images": count,
        "threads": torch.get_num_threads(),
        **{f"{key}_images_per_s": round(value, 3) for key, value in rate.items()},
        "ratio": round(rate["prelabel"] / rate["bare"], 3),
        "ratio_of_the_quickest": round(min(seconds["bare"]) / min(seconds["prelabel"]), 3),
        "ratios": [round(b / p, 3) for b, p in zip(seconds["bare"], seconds["prelabel"], strict=True)],
    }


@contextlib.contextmanager
def served(folder: Path, backbone: str, redis: bool) -> Iterator[Runner]:
    """A runner: everything in this process, or a Redis and one worker process."""
    chosen = options(folder, backbone)
    if not redis:
        runner: Runner = InProcessRunner(chosen)
        yield runner
        runner.close()
        return
    from ml_backend.jobs.rq_runner import RqRunner

    port = processes.free_port()
    url = f"redis://127.0.0.1:{port}"
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL
    )
    environment = os.environ | {
        "BALD_SAM_DATA_DIR": str(folder),
        "BALD_SAM_BACKBONE": backbone,
        "BALD_SAM_CHECKPOINT": str(chosen.checkpoint or ""),
        "BALD_SAM_LOCAL_ROOTS": str(folder),
    }
    worker_process = subprocess.Popen(
        [sys.executable, "-m", "ml_backend.cli", "worker", "--redis-url", url],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        runner = RqRunner(url)
        while not any(one["state"] == "ready" for one in runner.status()["workers"]):
            time.sleep(0.2)
        yield runner
        runner.close()
    finally:
        for process in (worker_process, server):
            process.terminate()
            process.wait(30)


def clicks(backbone: str, count: int, pause_s: float, redis: bool) -> dict[str, Any]:
    """`count` clicks on an image that is encoded already, `pause_s` apart, idle and during a batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [path for path, _ in pictures(folder, 24)]
        with served(folder, backbone, redis) as runner:

            def click(number: int) -> float:
                where = Click(x=100.0 + 7 * (number % 60), y=90.0 + 5 * (number % 60))
                job = SegmentJob(
                    image=ImageRef(url=str(paths[0])),
                    width=SIZE[1],
                    height=SIZE[0],
                    prompts=Prompts(clicks=(where,)),
                    session=str(number),
                )
                start = time.perf_counter()
                runner.segment(job, deadline_s=90)
                taken = time.perf_counter() - start
                time.sleep(pause_s)
                return 1000 * taken

            for number in range(3):
                click(number)
            idle = [click(number) for number in range(count)]
            stop, done = threading.Event(), 0

            def work() -> None:
                nonlocal done

                def endless() -> Iterator[PrelabelItem]:
                    number = 0
                    while not stop.is_set():
                        number += 1
                        yield item(paths[1 + number % (len(paths) - 1)])

                for _ in runner.prelabel(endless(), PrelabelOptions()):
                    done += 1

            thread = threading.Thread(target=work)
            thread.start()
            while done < (2 if backbone == "tiny" else 1):
                time.sleep(0.1)
            before, start = done, time.perf_counter()
            busy = [click(1000 + number) for number in range(count)]
            rate = (done - before) / (time.perf_counter() - start)
            stop.set()
            thread.join()
    return {
        "backbone": backbone,
        "mode": "one RQ worker" if redis else "embedded",
        "clicks": count,
        "pause_s": pause_s,
        "idle_median_ms": round(statistics.median(idle), 1),
        "batch_median_ms": round(statistics.median(busy), 1),
        "ratio": round(statistics.median(busy) / statistics.median(idle), 3),
        "idle_p95_ms": round(float(np.percentile(idle, 95)), 1),
        "batch_p95_ms": round(float(np.percentile(busy, 95)), 1),
        "batch_images_per_s_meanwhile": round(rate, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "clicks"])
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--count", type=int, default=60, help="images, or clicks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-proposal", action="store_true")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two clicks")
    parser.add_argument("--redis", action="store_true")
    chosen = parser.parse_args()
    if chosen.what == "throughput":
        found = throughput(chosen.backbone, chosen.count, chosen.repeats, not chosen.no_proposal)
    else:
        found = clicks(chosen.backbone, chosen.count, chosen.pause, chosen.redis)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
