"""A real worker process with job functions that do what the job's session says, for tests of the queue.

usage: queue_worker.py REDIS_URL [NAME]
"""

from __future__ import annotations

import base64
import logging
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from worker import preemption


def segment(job: dict[str, Any]) -> dict[str, Any]:
    """Session `sleep:2` sleeps, `encode:2` does so as an encode does, `hang` cannot be interrupted, `raise` raises,
    `fail` fails in words, `die` kills the process, `mask:100000` answers with so many bytes of a mask, others just
    answer."""
    verb, _, value = job["session"].partition(":")
    if verb == "sleep":
        time.sleep(float(value))
    if verb == "encode":
        preemption.before_long_work()
        end = time.monotonic() + float(value.partition(":")[0])
        while time.monotonic() < end:
            time.sleep(0.01)
            preemption.give_way()
    if verb == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)
    if verb == "raise":
        raise RuntimeError("a secret of the worker")
    if verb == "die":
        os._exit(9)
    if verb == "fail":
        return {"kind": "failure", "error": "No.", "hint": "Try this.", "status": 422}
    x = job["prompts"]["clicks"][0]["x"]
    return {
        "width": job["width"],
        "height": job["height"],
        "rle": base64.b64encode(bytes(i % 251 for i in range(int(value) if verb == "mask" else 3))).decode(),
        "area": int(x),
        "predicted_iou": 0.5,
        "model_version": str(os.getpid()),
    }


def embed(job: dict[str, Any]) -> dict[str, Any]:
    for image in job["images"]:
        verb, _, value = image["url"].partition(":")
        if verb == "sleep":
            time.sleep(float(value))
        elif verb == "note":
            with Path(value).open("a") as file:
                file.write("embedded\n")
    return {"kind": "embed", "done": len(job["images"])}


def prelabel(job: dict[str, Any]) -> dict[str, Any]:
    """Each item's key says what to do, as a session does; `long:10:...` works 10 s and lets others through."""
    images = []
    for item in job["items"]:
        verb, _, rest = item["key"].partition(":")
        if verb == "sleep":
            time.sleep(float(rest.partition(":")[0]))
        if verb == "long":
            end = time.monotonic() + float(rest.partition(":")[0])
            while time.monotonic() < end:
                time.sleep(0.01)
                preemption.give_way()
            logging.getLogger(__name__).info("long done")
        if verb == "raise":
            raise RuntimeError("a secret of the worker")
        if verb == "die":
            os._exit(9)
        if verb == "fail":
            return {"kind": "failure", "error": "No.", "hint": "Try this.", "status": 503}
        images.append({"key": item["key"], "width": 4, "height": 3})
    return {"kind": "prelabel", "images": images, "failed": [], "model_version": str(os.getpid())}


def warm_up() -> None:
    """Loads nothing; fails in words as long as the file that BROKEN names is there."""
    broken = os.environ.get("BROKEN")
    if broken and Path(broken).exists():
        raise ValueError("The head is damaged. Choose another.")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """`hang-once:PATH` hangs the first time, which the file remembers; `fail` fails in words; others just answer."""
    verb, _, value = job["notes"].get("do", "").partition(":")
    if verb == "fail":
        return {"kind": "failure", "error": "Too few.", "hint": "Annotate more.", "status": 422}
    if verb == "hang-once" and not Path(value).exists():
        Path(value).touch()
        time.sleep(600)
    words = {"head": "project-3-v1", "before": "shipped", "reason": "it is used from now on."}
    figures = dict.fromkeys(("auc", "auc_before", "gain", "error", "seconds"), 0.5)
    counts = dict.fromkeys(("objects", "logged", "held_out", "images_held_out"), 4)
    return {"kind": "train", "project": job["project"], "used": True, **words, **figures, **counts}


def install() -> None:
    """Put the functions where the allow-list has them."""
    tasks, runtime = types.ModuleType("worker.tasks"), types.ModuleType("worker.runtime")
    tasks.segment, tasks.embed = segment, embed  # type: ignore[attr-defined]
    runtime.configure, runtime.warm_up = lambda options: None, warm_up  # type: ignore[attr-defined]
    runtime.loaded = lambda: None  # type: ignore[attr-defined]
    batch = types.ModuleType("worker.batch")
    batch.prelabel = prelabel  # type: ignore[attr-defined]
    sys.modules["worker.tasks"], sys.modules["worker.runtime"], sys.modules["worker.batch"] = tasks, runtime, batch
    learning = types.ModuleType("evaluation.learning")
    learning.train = train  # type: ignore[attr-defined]
    sys.modules["evaluation.learning"] = learning


if __name__ == "__main__":
    from worker import contract, heartbeat, process

    logging.basicConfig(level=logging.INFO)
    install()
    process.LOAD_AGAIN_S, heartbeat.HUNG_S = 0.2, 0.5
    process.work(
        contract.RuntimeOptions.model_validate({"data_dir": ".", "redis_url": sys.argv[1]}),
        name=sys.argv[2] if len(sys.argv) > 2 else None,
    )
