"""Annotators who click without a pause, and a ledger of what they got.

Every answer is compared with the one that the undisturbed service gave to the same clicks on the same picture.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from evaluation.scenes import draw
from ml_backend.labeling_config import recommended_config

#: Objects have this many clicks. An annotator clicks again this long after a refusal, seconds.
CLICKS = 4
THINK_AGAIN_S = 0.5
CONFIG = recommended_config(["Object"])
TIMEOUT_S = 100.0  # Label Studio's


@dataclass
class Ledger:
    """What the annotators got. `strange` and `wrong` must stay empty."""

    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    strange: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused_seconds: list[float] = field(default_factory=list)
    #: (session, refused again and again until it was answered): how long the annotator had to come back, seconds.
    waits: list[float] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pictures:
    """Drawn scenes in a folder, the clicks on them, and the answers that are right."""

    def __init__(self, folder: Path, count: int = 4, size: tuple[int, int] = (480, 640)) -> None:
        """`size`: (height, width) in pixels."""
        self.size = size
        self.paths = [folder / f"scene-{number}.png" for number in range(count)]
        for number, path in enumerate(self.paths):
            Image.fromarray(draw(number, size).image).save(path)
        self.right: dict[tuple[int, int], str] = {}

    def learn(self, url: str) -> None:
        """Ask the undisturbed service for every answer."""
        for picture in range(len(self.paths)):
            for count in range(1, CLICKS + 1):
                answer = post(url, self.body(picture, count, f"calm-{picture}", picture))
                answer.raise_for_status()
                self.right[picture, count] = essence(answer.json())

    def body(self, picture: int, count: int, session: str, task: int) -> dict[str, Any]:
        """The request of the `count`-th click of an object."""
        dice = random.Random(picture)
        height, width = self.size
        size = {"original_width": width, "original_height": height, "image_rotation": 0}
        common = {**size, "from_name": "kp", "to_name": "image", "type": "keypoint", "origin": "manual"}
        prompts = [
            {
                **common,
                "id": f"{session}-{number}",
                "is_positive": number % 3 != 2,
                "value": {"x": dice.uniform(10, 90), "y": dice.uniform(10, 90), "width": 0.5, "labels": []},
            }
            for number in range(count)
        ]
        return {
            "tasks": [{"id": task, "data": {"image": str(self.paths[picture])}, "drafts": []}],
            "project": "1.1",
            "label_config": CONFIG,
            "params": {"context": {"result": prompts}},
        }


def post(url: str, body: dict[str, Any]) -> requests.Response:
    """One click."""
    return requests.post(f"{url}/predict", json=body, timeout=TIMEOUT_S)


def essence(answer: dict[str, Any]) -> str:
    """Digest of what must be the same whenever the same clicks are given: the mask and the proposal."""
    regions = [{key: region[key] for key in ("value", "type")} for region in answer["results"][0]["result"]]
    return hashlib.sha256(json.dumps(regions, sort_keys=True).encode()).hexdigest()


def annotate(url: str, pictures: Pictures, ledger: Ledger, who: int, stop: threading.Event) -> None:
    """Click object after object until `stop`; the object that was begun is finished."""
    dice = random.Random(who)
    number = 0
    while not stop.is_set():
        number += 1
        picture, session = dice.randrange(len(pictures.paths)), f"{who}-{number}"
        ledger.unfinished.add(session)
        for count in range(1, CLICKS + 1):
            _click(url, pictures, ledger, (picture, count), session, 1000 * (who + 1) + number)
        ledger.unfinished.discard(session)


def _click(url: str, pictures: Pictures, ledger: Ledger, asked: tuple[int, int], session: str, task: int) -> None:
    """One click, repeated as a person would repeat it until there is a mask."""
    first = time.monotonic()
    while True:
        began = time.monotonic()
        try:
            answer = post(url, pictures.body(*asked, session, task))
        except requests.RequestException as error:
            with ledger.lock:
                ledger.strange.append(f"{session}: {type(error).__name__}")
            time.sleep(THINK_AGAIN_S)
            continue
        now = time.monotonic()
        if answer.status_code == 200:
            with ledger.lock:
                ledger.answered += 1
                ledger.seconds.append(now - began)
                ledger.waits.append(now - first)
                if essence(answer.json()) != pictures.right[asked]:
                    ledger.wrong.append(f"{session}: click {asked[1]} on picture {asked[0]}")
            return
        with ledger.lock:
            words = _words(answer)
            if answer.status_code in (503, 504) and words:
                ledger.refused[words] += 1
                ledger.refused_seconds.append(now - began)
            else:
                ledger.strange.append(f"{session}: {answer.status_code} {answer.text[:200]}")
        time.sleep(THINK_AGAIN_S)


def _words(answer: requests.Response) -> str | None:
    """Error and hint of a refusal, or None where there are none."""
    try:
        body = answer.json()
        return f"{answer.status_code} {body['error']} {body['hint']}" if body["error"] and body["hint"] else None
    except (ValueError, KeyError):
        return None
