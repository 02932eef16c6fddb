"""A click, from the request to the last byte of the answer, beside the bare decoder and the stock way."""

from __future__ import annotations

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_studio_sdk.converter import brush
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor

from evaluation.bench.clicks import Clicks, clicks_on
from evaluation.bench.server import Page, Server, has_redis, shared
from evaluation.bench.setup import SIZES, Bench, published, summary, synchronise
from worker.backbones import Backbone
from worker.encode import Embedding, encode

#: Of the drawn scene that is clicked on.
SEED = 3
#: Before each click, milliseconds: what a server does after an answer (the click log) does not count for the next one.
PAUSE_MS = 100


class Stock:
    """The published code, in this process: what Label Studio's SAM example runs for a click once the image is set."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.predictor = SamPredictor(published(backbone) if backbone.name in sam_model_registry else backbone.sam)
        self._mask_input: Tensor | None = None

    def look_at(self, embedding: Embedding) -> None:
        """Set the image, which is encoded already."""
        predictor, self._mask_input = self.predictor, None
        predictor.features = embedding.features.float()
        predictor.original_size, predictor.input_size = embedding.original_size, embedding.input_size
        predictor.is_image_set = True

    def decoder(self, clicks: Clicks) -> float:
        """Milliseconds of prompt encoder and mask decoder alone, fed the logits of the click before."""
        predictor, sam = self.predictor, self.predictor.model
        points, labels = self._points(clicks)
        mask_input = self._mask_input if len(clicks) > 1 else None
        began = time.perf_counter()
        with torch.no_grad():
            given = predictor.transform.apply_coords(points, predictor.original_size)
            where = torch.as_tensor(given, dtype=torch.float32, device=predictor.device)[None]
            what = torch.as_tensor(labels, dtype=torch.int, device=predictor.device)[None]
            sparse, dense = sam.prompt_encoder(points=(where, what), boxes=None, masks=mask_input)
            logits, _ = sam.mask_decoder(
                image_embeddings=predictor.features,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=len(clicks) == 1,
            )
        synchronise(self._backbone)
        spent = 1000 * (time.perf_counter() - began)
        self._mask_input = logits[:, :1]
        return spent

    def answer(self, clicks: Clicks) -> float:
        """Milliseconds of `SamPredictor.predict`, with its mask at full size, and the SDK's `mask2rle`."""
        points, labels = self._points(clicks)
        began = time.perf_counter()
        masks, _, _ = self.predictor.predict(point_coords=points, point_labels=labels, multimask_output=False)
        brush.mask2rle(masks[0].astype(np.uint8) * 255)  # type: ignore[no-untyped-call]
        return 1000 * (time.perf_counter() - began)

    def _points(self, clicks: Clicks) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        height, width = self.predictor.original_size
        points = np.array([(x / 100 * width, y / 100 * height) for x, y, _ in clicks])
        return points, np.array([int(positive) for _, _, positive in clicks])


def measure(bench: Bench) -> dict[str, Any]:
    """`click` and `stages`, by backbone and size: milliseconds; `click_ratio`, see `_ratios`; `proposal_share`: the
    proposal by the bare decoder with the same prompts, median over clicks, the largest of all sizes'. All are noted
    after each backbone and size."""
    found: dict[str, Any] = {"click": {}, "stages": {}, "click_ratio": {}, "proposal_share": {}}
    for name in bench.backbones:
        clicks: dict[str, Any] = {}
        stages: dict[str, Any] = {}
        ratios: dict[str, Any] = {}
        with ExitStack() as stack:
            servers, backbone = _started(bench, name)
            pages = {way: stack.enter_context(server.page()) for way, server in servers.items()}
            stock = Stock(backbone)
            for number, size in enumerate(bench.sizes, 1):
                bench.say(f"clicks: {name}, {size}")
                image = bench.image(f"click-{size}", SEED, *SIZES[size])
                clicked = clicks_on(bench, image, SEED, SIZES[size], 1 + bench.count(12 if name == "tiny" else 8, 1))
                stock.look_at(_padded(bench, backbone, image))
                times, parts = _one(pages, stock, image, number, clicked, bench.count(PAUSE_MS, 20) / 1000)
                clicks[size] = {way: summary(spent) for way, spent in times.items()}
                stages[size] = {stage: summary(spent) for stage, spent in parts.items() if max(spent) > 0}
                ratios[size] = _ratios(times, parts)
                found["click"][name], found["stages"][name], found["click_ratio"][name] = clicks, stages, ratios
                found["proposal_share"][name] = max(one["proposal_to_decoder"] for one in ratios.values())
                bench.note("click", found)
    return found


def _padded(bench: Bench, backbone: Backbone, image: Path) -> Embedding:
    """The embedding that the published code makes: of the padded square."""
    if backbone.grain is None:
        return bench.encoded(backbone, image)
    return encode(replace(backbone, grain=None), np.array(Image.open(image)))


def _started(bench: Bench, backbone: str) -> tuple[dict[str, Server], Backbone]:
    """The servers by way, and the same model in this process; they start beside each other."""
    queues = {"embedded": False}
    if has_redis():
        queues["rq"] = True
    else:
        bench.say("redis-server is not installed: clicks over RQ are not measured")
    bench.checkpoint(backbone)  # all of them read it
    with ThreadPoolExecutor() as pool:
        starting = {way: pool.submit(shared, bench, backbone, queue=queue) for way, queue in queues.items()}
        model = bench.build(backbone)
        return {way: server.result() for way, server in starting.items()}, model


def _ratios(times: dict[str, list[float]], stages: dict[str, list[float]]) -> dict[str, float]:
    """Medians, over clicks, of ratios within one click: the whole request to the bare decoder with the same prompts,
    the stock way to the request, the proposal (head, posterior, map, candidates) to the bare decoder and to our own
    decoding; and the difference of the medians over RQ and embedded, milliseconds."""

    def ratio(above: list[float], below: list[float]) -> float:
        return round(float(np.median(np.array(above) / np.array(below))), 3)

    found = {
        "request_to_decoder": ratio(times["embedded"], times["decoder"]),
        "stock_to_request": ratio(times["stock"], times["embedded"]),
        "proposal_to_decoder": ratio(stages["propose"], times["decoder"]),
        "proposal_to_own_decode": ratio(stages["propose"], stages["decode"]),
    }
    if "rq" in times:
        found["rq_more_ms"] = round(float(np.median(times["rq"]) - np.median(times["embedded"])), 2)
    return found


def _one(
    pages: dict[str, Page], stock: Stock, image: Path, task: int, clicked: list[Clicks], pause_s: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of all ways on one image, in turn, and of the stages of `embedded`, after each click on an object
    of `clicked` but the first, which warms up."""
    times: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, list[float]] = defaultdict(list)
    before = {way: page.stages() for way, page in pages.items()}
    for turn, clicks in enumerate(clicked):
        session = f"s{task}-{turn}"
        for count in range(1, len(clicks) + 1):
            given = clicks[:count]
            for way in (*pages, "decoder", "stock"):
                if not turn and way == "stock" and count > 1:
                    continue  # the decoder has warmed up what they share, and a mask of noise takes the SDK seconds
                time.sleep(pause_s)
                if way in pages:
                    spent = pages[way].click(image, task, session, given)
                    after = pages[way].stages()
                    parts = {stage: after[stage] - before[way].get(stage, 0.0) for stage in after}
                    before[way] = after
                    if turn and way == "embedded":
                        for stage, part in parts.items():
                            stages[stage].append(part)
                        stages["http_and_json"].append(spent - sum(parts.values()))
                else:
                    spent = stock.decoder(given) if way == "decoder" else stock.answer(given)
                if turn:
                    times[way].append(spent)
    return times, stages
