"""Kill workers and Redis under a service that eight annotators use: `python scripts/measure_reliability.py WHAT`.

kills      kill -9 of random workers at random moments; every request must be answered right or refused in words
clicks     kill the one worker that carries a click, with another alive and with none; how long the answer takes
redis      kill Redis and start it again, empty; no other process may be started again (--workers 0: the embedded mode)

Exit status 1 if an answer was wrong or strange, or if a session is stuck.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reliability.annotators import CLICKS, Ledger, Pictures, annotate, post
from reliability.service import Service, pid_of, wait_for


@contextmanager
def annotators(service: Service, pictures: Pictures, count: int) -> Iterator[Ledger]:
    """Load during the block; after it all that was begun has been finished."""
    ledger, stop = Ledger(), threading.Event()
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(annotate, service.url, pictures, ledger, who, stop) for who in range(count)]
        try:
            yield ledger
        finally:
            stop.set()
            for one in running:
                one.result()


def kills(service: Service, pictures: Pictures, count: int, people: int, every_s: float, seed: int) -> dict[str, Any]:
    """`count` kills at random moments, of workers that have loaded their model; one in ten takes all at once, those
    that are just starting too."""
    dice = random.Random(seed)
    states: Counter[str] = Counter()
    with annotators(service, pictures, people) as ledger:
        done = 0
        while done < count:
            time.sleep(dice.expovariate(1 / every_s))
            known = _states(service)
            alive = service.alive()
            loaded = [worker for worker in alive if known.get(worker.pid, "starting") != "starting"]
            if not loaded:
                continue
            victims = (alive if dice.random() < 0.1 else [dice.choice(loaded)])[: count - done]
            service.kill(*[victim.pid for victim in victims])
            states.update(known.get(victim.pid, "starting") for victim in victims)
            done += len(victims)
        wait_for(service.ready)
    return {"kills": done, "killed while": dict(states), **summary(service, ledger)}


def restarts(
    service: Service, pictures: Pictures, count: int, people: int, every_s: float, seed: int
) -> dict[str, Any]:
    """`count` times Redis is killed and, after up to a second and a half, started empty."""
    dice = random.Random(seed)
    starts = service.starts
    with annotators(service, pictures, people) as ledger:
        for _ in range(count):
            time.sleep(dice.expovariate(1 / every_s))
            service.redis.kill()
            time.sleep(dice.uniform(0, 1.5))
            service.redis.start()
        time.sleep(every_s)
        wait_for(service.ready)
    untouched = service.starts == starts and service.server_is_the_same()
    return {"restarts of Redis": count, "no process started again": untouched, **summary(service, ledger)}


def clicks(service: Service, photo: Pictures, count: int) -> dict[str, Any]:
    """Kill the worker in mid-click: `count` times with another one alive, `count` times with none."""
    helped, refused, back, strange = [], [], [], []
    for trial in range(2 * count):
        alone = trial >= count
        wait_for(service.ready)
        with service.nobody_is_started_again(), ThreadPoolExecutor(1) as pool:
            if alone:
                service.kill(*[worker.pid for worker in service.alive()[1:]])
                wait_for(lambda: len(service.status()["workers"]) == 1)
            body = photo.body(0, 1 + trial % CLICKS, f"trial-{trial}", trial)
            answer = pool.submit(post, service.url, body)
            while not (running := service.status()["running"]) and not answer.done():
                time.sleep(0.005)
            if not running:
                strange.append(f"trial {trial} was too quick to be killed")
                continue
            service.kill(pid_of(running[0]["worker"]))
            killed = time.monotonic()
            response = answer.result()
            (refused if alone else helped).append(time.monotonic() - killed)
            if response.status_code != (503 if alone else 200):
                strange.append(f"trial {trial}: {response.status_code} {response.text[:200]}")
        if alone:
            wait_for(lambda: any(worker["state"] == "ready" for worker in service.status()["workers"]))
            began = time.monotonic()
            post(service.url, body).raise_for_status()
            back.append(time.monotonic() - began)
    return {
        "answered by another worker, s after the kill": spread(helped),
        "refused for want of workers, s after the kill": spread(refused),
        "answered once a worker is back, s": spread(back),
        "strange": strange,
    }


def summary(service: Service, ledger: Ledger) -> dict[str, Any]:
    """The ledger as numbers, after a last look at what is left in the queues."""
    status = service.status() if service.workers else {"queues": {}, "running": []}
    return {
        "answered": ledger.answered,
        "refused in words": dict(ledger.refused),
        "strange": ledger.strange,
        "wrong masks": ledger.wrong,
        "stuck sessions": sorted(ledger.unfinished),
        "left in the queue": status["queues"].get("interactive", 0),
        "answered after, s": spread(ledger.seconds),
        "refused after, s": spread(ledger.refused_seconds),
        "mask at last after, s": spread(ledger.waits),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile and greatest of times in seconds."""
    if not values:
        return {}
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "count": len(ordered),
        "median": round(statistics.median(values), 2),
        "p99": round(p99, 2),
        "max": round(ordered[-1], 2),
    }


def _states(service: Service) -> dict[int, str]:
    """By process id: starting, ready or carrying a click, as Redis knows it."""
    status = service.status()
    busy = {running["worker"] for running in status["running"]}
    return {
        pid_of(worker["name"]): "in mid-click" if worker["name"] in busy else worker["state"]
        for worker in status["workers"]
    }


def main() -> None:
    """Start the service, disturb it, print what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "clicks", "redis"))
    parser.add_argument("--count", type=int, default=50, help="kills, trials of each kind, or restarts")
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between two disturbances")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A photograph of twelve megapixels takes long enough to be killed in the middle of it.
        pictures = Pictures(folder, 1, (3000, 4000)) if asked.what == "clicks" else Pictures(folder)
        with Service(folder, workers=asked.workers) as service:
            pictures.learn(service.url)
            began = time.monotonic()
            if asked.what == "clicks":
                found = clicks(service, pictures, asked.count)
            else:
                do = kills if asked.what == "kills" else restarts
                found = do(service, pictures, asked.count, asked.annotators, asked.every, asked.seed)
            found["seconds"] = round(time.monotonic() - began)
    print(json.dumps(found, indent=1))
    bad = any(found.get(key) for key in ("strange", "wrong masks", "stuck sessions", "left in the queue"))
    sys.exit(1 if bad or found.get("no process started again") is False else 0)


if __name__ == "__main__":
    main()
