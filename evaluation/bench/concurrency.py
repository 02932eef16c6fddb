"""Several annotators on one worker, and clicks while a batch runs."""

from __future__ import annotations

import statistics
import threading
import time
from itertools import cycle
from typing import Any

import numpy as np
import redis
from PIL import Image
from rq import Queue as RqQueue
from rq.serializers import JSONSerializer

from evaluation.bench.click import CLICKS, clicks_of
from evaluation.bench.server import Page, Server, has_redis, shared
from evaluation.bench.setup import Bench, scene, summary
from evaluation.clicker import Mask, human_like_click
from worker.backbones import Backbone
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
from worker.decode import Decoded, decode_next
from worker.embeddings import Embedding, encode_resized, resize
from worker.masks import to_mask
from worker.zoom import Look, looker

WIDTH, HEIGHT = 1024, 1024
ANNOTATORS = (1, 2, 4, 8, 16)
#: Seconds between an answer and the next click: drawn evenly from this range.
THINK_S = (0.5, 2.0)
#: Objects that an annotator clicks on before the first one comes again, and clicks on each.
OBJECTS, CLICKS_EACH = 6, 4
Clicks = list[tuple[float, float, bool]]  # (x %, y %, positive)


def measure(bench: Bench) -> dict[str, Any]:
    """`concurrency`: by number of annotators p50, p95 (ms) and fairness, the largest median by the smallest; and
    `background`: clicks over RQ while the same worker pre-labels, beside clicks while it does not."""
    name = bench.backbones[0]
    found: dict[str, Any] = {"concurrency": {}}
    counts = ANNOTATORS if not bench.quick else ANNOTATORS[:2]
    seconds = float(bench.count(30, 1))
    server = shared(bench, name)
    bench.say(f"concurrency: {name}, what {max(counts)} annotators click on")
    sessions = _sessions(bench, name, max(counts))
    _encode_all(bench, server, max(counts))
    for count in counts:
        bench.say(f"concurrency: {name}, {count} annotators")
        times = _annotate(bench, server, sessions[:count], seconds)
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


def _image_of(bench: Bench, annotator: int) -> Any:
    return bench.image(f"annotator-{annotator}", annotator, WIDTH, HEIGHT)


def _sessions(bench: Bench, name: str, count: int) -> list[list[Clicks]]:
    """By annotator the clicks on some objects of their picture, as the human-like user makes them there."""
    backbone, found = bench.build(name), []
    for annotator in range(count):
        image, labels = _image_of(bench, annotator), scene(annotator, HEIGHT, WIDTH).labels
        embedding, look = bench.encoded(backbone, image), looker(backbone, np.array(Image.open(image)))
        rng = np.random.default_rng(annotator)
        numbers = np.resize(rng.permutation(np.arange(1, labels.max() + 1)), bench.count(OBJECTS, 1))
        found.append([_clicks_on(labels == number, backbone, embedding, look, rng) for number in numbers])
    return found


def _clicks_on(truth: Mask, backbone: Backbone, embedding: Embedding, look: Look, rng: np.random.Generator) -> Clicks:
    before: Decoded | None = None
    prompts, mask = Prompts(), np.zeros(truth.shape, bool)
    while len(prompts.clicks) < CLICKS_EACH and (click := human_like_click(truth, mask, prompts.clicks, rng)):
        prompts = Prompts(clicks=(*prompts.clicks, click))
        before = decode_next(backbone, embedding, prompts, before, look)
        mask = to_mask(before.logits, before.frame, prompts)
    return [(100 * click.x / WIDTH, 100 * click.y / HEIGHT, click.positive) for click in prompts.clicks]


def _encode_all(bench: Bench, server: Server, count: int) -> None:
    with server.page() as page:
        for annotator in range(count):
            page.click(_image_of(bench, annotator), annotator, f"warm-{annotator}", list(CLICKS[:1]))


def _annotate(bench: Bench, server: Server, sessions: list[list[Clicks]], seconds: float) -> list[list[float]]:
    """Milliseconds of each annotator's clicks."""
    count = len(sessions)
    times: list[list[float]] = [[] for _ in range(count)]
    failed: list[Exception] = []
    until = time.monotonic() + seconds

    def annotate(number: int) -> None:
        rng = np.random.default_rng((count, number))
        time.sleep(rng.uniform(0, THINK_S[1]))
        try:
            with server.page() as page:
                turns = (
                    (done, clicks[: last + 1])
                    for done, clicks in enumerate(cycle(sessions[number]))
                    for last in range(len(clicks))
                )
                while time.monotonic() < until or not times[number]:
                    done, given = next(turns)
                    session = f"{count}-{number}-{done}"
                    times[number].append(page.click(_image_of(bench, number), number, session, given))
                    time.sleep(rng.uniform(*THINK_S))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=annotate, args=(number,)) for number in range(count)]
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
        page.click(image, 0, "warm", list(CLICKS[:1]))
    idle = _clicks(page, quiet, "idle", rounds)
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
        busy = _clicks(page, crowded, "busy", rounds)
        left = queue.count
        queue.empty()  # type: ignore[no-untyped-call]
    return {
        "idle": summary(idle),
        "busy": summary(busy),
        "encode_ms": round(encode_ms, 1),
        "added_p50_encodes": round((statistics.median(busy) - statistics.median(idle)) / encode_ms, 3),
        "added_max_encodes": round((max(busy) - statistics.median(idle)) / encode_ms, 3),
        "ran_throughout": left > 0,
    }


def _clicks(page: Page, image: Any, session: str, rounds: int) -> list[float]:
    rng = np.random.default_rng(0)
    times = []
    for turn in range(rounds):
        done, last = divmod(turn, len(CLICKS))
        times.append(page.click(image, 0, f"{session}-{done}", clicks_of(done + 1)[: last + 1]))
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
