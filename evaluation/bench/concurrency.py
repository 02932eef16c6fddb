"""Several annotators on one worker, and clicks while a batch runs."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from itertools import count as numbers
from typing import Any

import numpy as np
import redis
from rq import Queue as RqQueue
from rq.serializers import JSONSerializer

from evaluation.bench.clicks import CLICKS_EACH, MIDDLE, Clicks, clicks_on
from evaluation.bench.server import Page, Server, has_redis, shared
from evaluation.bench.setup import Bench, summary
from worker.contract import (
    PRELABEL,
    Click,
    ImageRef,
    ObjectPrompts,
    PrelabelItem,
    PrelabelJob,
    Prompts,
    Queue,
)
from worker.encode import encode_resized, resize

WIDTH, HEIGHT = 1024, 1024
ANNOTATORS = (1, 2, 4, 8, 16)
#: Seconds between an answer and the next click: drawn evenly from this range.
THINK_S = (0.5, 2.0)
#: Objects of a picture that annotators click on.
OBJECTS = 6


def measure(bench: Bench) -> dict[str, Any]:
    """`concurrency`: by number of annotators p50, p95 (ms) and fairness, the largest median by the smallest; and
    `background`: clicks over RQ while the same worker pre-labels, beside clicks while it does not.

    Annotators click on one object of a picture and go on to the next picture, as in a labelling stream: what differs
    between them is how they are served, not what they have before them.
    """
    name = bench.backbones[0]
    found: dict[str, Any] = {"concurrency": {}}
    counts = ANNOTATORS if not bench.quick else ANNOTATORS[:2]
    seconds = float(bench.count(30, 1))
    server = shared(bench, name)
    bench.say(f"concurrency: {name}, what {max(counts)} annotators click on")
    sessions = [
        clicks_on(bench, _image(bench, picture), picture, (WIDTH, HEIGHT), bench.count(OBJECTS, 1))
        for picture in range(max(counts))
    ]
    _encode_all(bench, server, max(counts))
    come = 0
    for count in counts:
        bench.say(f"concurrency: {name}, {count} annotators")
        times = _annotate(bench, server, sessions, range(come, come + count), seconds)
        come += count
        medians = [statistics.median(own) for own in times]
        found["concurrency"][str(count)] = {
            **summary([spent for own in times for spent in own]),
            "fairness": round(max(medians) / min(medians), 3),
        }
    if has_redis():
        bench.say(f"clicks beside a batch: {name}")
        server = shared(bench, name, queue=True)
        with server.page() as page:
            found["background"] = _beside_a_batch(bench, name, server, page)
    return found


def _image(bench: Bench, picture: int) -> Any:
    return bench.image(f"annotated-{picture}", picture, WIDTH, HEIGHT)


def _encode_all(bench: Bench, server: Server, count: int) -> None:
    with server.page() as page:
        for picture in range(count):
            page.click(_image(bench, picture), picture, f"warm-{picture}", MIDDLE)


def _stream(sessions: list[list[Clicks]], annotator: int) -> Iterator[tuple[int, str, Clicks]]:
    """(picture, session, clicks so far) without end. Each annotator starts with a picture and an object of their own:
    a part that somebody else looked at is encoded already."""
    for done in numbers():
        picture = (annotator + done) % len(sessions)
        objects = sessions[picture]
        clicks = objects[(annotator + done // len(sessions)) % len(objects)]
        yield from ((picture, f"{annotator}-{done}", clicks[: last + 1]) for last in range(len(clicks)))


def _annotate(
    bench: Bench, server: Server, sessions: list[list[Clicks]], annotators: range, seconds: float
) -> list[list[float]]:
    """Milliseconds of each annotator's clicks."""
    times: list[list[float]] = [[] for _ in annotators]
    failed: list[Exception] = []
    until = time.monotonic() + seconds

    def annotate(annotator: int, mine: list[float]) -> None:
        rng = np.random.default_rng(annotator)
        time.sleep(rng.uniform(0, THINK_S[1]))
        try:
            with server.page() as page:
                for picture, session, given in _stream(sessions, annotator):
                    mine.append(page.click(_image(bench, picture), picture, session, given))
                    time.sleep(rng.uniform(*THINK_S))
                    if time.monotonic() >= until:
                        return
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=annotate, args=one) for one in zip(annotators, times, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return times


def _beside_a_batch(bench: Bench, name: str, server: Server, page: Page) -> dict[str, Any]:
    rounds = bench.count(30 if name == "tiny" else 8, 2)
    # The same picture twice, of other bytes: the same clicks, and no part that they look at is encoded already.
    quiet, crowded = (bench.image(beside, 0, WIDTH, HEIGHT) for beside in ("beside-nothing", "beside-a-batch"))
    for image in (quiet, crowded):
        page.click(image, 0, "warm", MIDDLE)
    clicked = clicks_on(bench, quiet, 0, (WIDTH, HEIGHT), -(-rounds // CLICKS_EACH))
    idle = _clicks(page, quiet, "idle", clicked)
    encode_ms = _encode_ms(bench, name)
    # Enough images for all clicks: a click may take as long as an encode, and a second lies between two.
    count = max(2, int(rounds * (1000 + 2 * encode_ms) / max(encode_ms, 1)))
    different = bench.count(24, 6)
    items = [
        PrelabelItem(
            key=str(number),
            image=ImageRef(url=str(bench.image(f"batch-{number % different}", number % different, WIDTH, HEIGHT))),
            objects=(ObjectPrompts(prompts=Prompts(clicks=(Click(x=WIDTH / 2, y=HEIGHT / 2),))),),
        )
        for number in range(count)
    ]
    with redis.Redis.from_url(str(server.redis_url)) as client:
        queue = RqQueue(str(Queue.BATCH), connection=client, serializer=JSONSerializer)
        # In parts, as `bald-sam prelabel` does.
        for start in range(0, count, 4):
            part = PrelabelJob(items=tuple(items[start : start + 4]))
            queue.enqueue_call(PRELABEL, args=(part.model_dump(mode="json"),), timeout=3600, result_ttl=60)
        time.sleep(min(1.0, encode_ms / 1000))
        busy = _clicks(page, crowded, "busy", clicked)
        left = queue.count
        queue.empty()  # type: ignore[no-untyped-call]
    # The same click on the same picture: some look at a new part of it, which takes longer than an encode.
    more = [beside - alone for beside, alone in zip(busy, idle, strict=True)]
    return {
        "idle": summary(idle),
        "busy": summary(busy),
        "encode_ms": round(encode_ms, 1),
        "added_p50_encodes": round(statistics.median(more) / encode_ms, 3),
        "added_max_encodes": round(max(more) / encode_ms, 3),
        "ran_throughout": left > 0,
    }


def _clicks(page: Page, image: Any, session: str, clicked: list[Clicks]) -> list[float]:
    rng = np.random.default_rng(0)
    times = []
    for done, clicks in enumerate(clicked):
        for last in range(len(clicks)):
            times.append(page.click(image, 0, f"{session}-{done}", clicks[: last + 1]))
            time.sleep(rng.uniform(0.2, 0.8))
    return times


def _encode_ms(bench: Bench, name: str) -> float:
    backbone = bench.build(name)
    pixels = resize(backbone, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    times = []
    for _ in range(bench.count(3, 2)):
        began = time.perf_counter()
        encode_resized(backbone, pixels, (HEIGHT, WIDTH))
        times.append(1000 * (time.perf_counter() - began))
    return min(times)
