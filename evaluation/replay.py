"""Sessions of real annotators, exported from the click log, to be replayed on a data set as the strategy `human`.

An export names images and not objects of a data set. A session belongs to the pair whose image has its file name and
size, and whose object has most of the session's positive clicks inside and negative ones outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pandas as pd

from evaluation.clicker import Mask, bounding_box
from evaluation.datasets import Pair
from worker.contract import Box, Click, Prompts

#: What an export must have; docs/click-log.md explains each.
COLUMNS = ("session", "seq", "kind", "prompt", "image", "width", "height", "x", "y", "positive", "x1", "y1")
#: A session is of an object that agrees with more than this share of its prompts.
AGREEMENT = 0.5

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype={"session": str, "prompt": str}),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype={"session": str, "prompt": str}),
    ".parquet": lambda path: pd.read_parquet(path, columns=list(COLUMNS)),
}


class ReplayError(ValueError):
    """Sessions that cannot be replayed; the message says why and what to do."""


@dataclass(frozen=True)
class Step:
    """One placed or moved prompt, and all prompts of the object then. `click`: for a box its top left corner."""

    click: Click
    prompts: Prompts


@dataclass(frozen=True)
class Recorded:
    """One object as an annotator did it. `image`: the file's name; `width`, `height`: pixels."""

    session: str
    image: str
    width: int
    height: int
    steps: tuple[Step, ...]


#: Sessions by (dataset, name) of their pair.
Recordings = dict[tuple[str, str], tuple[Recorded, ...]]


def read_sessions(path: Path) -> list[Recorded]:
    """All sessions of an export (CSV, JSON lines or Parquet), in the order of their keys. Raises ReplayError."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ReplayError(f"{path} is none of {', '.join(READERS)}: make it with `bald-sam clicks export`.")
    try:
        table = reader(path)
        table = table[list(COLUMNS)]
    except OSError as error:
        raise ReplayError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (KeyError, ValueError) as error:
        raise ReplayError(
            f"{path} is no export of the click log ({error}). Make it with `bald-sam clicks export`."
        ) from error
    found = []
    for key, rows in table.sort_values(["session", "seq"], kind="stable").groupby("session", sort=True):
        first = rows.iloc[0]
        steps = tuple(_steps(rows))
        if steps:
            found.append(
                Recorded(str(key), file_name(str(first["image"])), int(first["width"]), int(first["height"]), steps)
            )
    return found


def _steps(rows: pd.DataFrame) -> list[Step]:
    prompts: dict[str, Click | Box] = {}
    steps = []
    for row in rows.to_dict("records"):
        if row["kind"] == "deleted":
            prompts.pop(row["prompt"], None)
            continue
        corner = Click(x=row["x"], y=row["y"], positive=row["positive"])
        # A moved prompt keeps its place in the order.
        prompts[row["prompt"]] = (
            corner if pd.isna(row["x1"]) else Box(x0=corner.x, y0=corner.y, x1=row["x1"], y1=row["y1"])
        )
        clicks = tuple(each for each in prompts.values() if isinstance(each, Click))
        box = next((each for each in prompts.values() if isinstance(each, Box)), None)
        steps.append(Step(corner, Prompts(clicks=clicks, box=box)))
    return steps


def file_name(url: str) -> str:
    """The file's name in a task's image address: of an upload, of `/data/local-files/?d=...`, or of any URL."""
    parts = urlsplit(url)
    return unquote(parse_qs(parts.query).get("d", [parts.path])[0]).rpartition("/")[2]


def assign(sessions: Sequence[Recorded], pairs: Sequence[Pair]) -> Recordings:
    """The sessions of each pair that has any."""
    by_image: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_image.setdefault(_stored(pair.image.name), []).append(pair)
    masks: dict[tuple[str, str], Mask] = {}
    found: dict[tuple[str, str], list[Recorded]] = {}
    for session in sessions:
        name = _stored(session.image)
        # Label Studio puts eight hexadecimal digits before the name of an upload.
        candidates = by_image.get(name) or by_image.get(re.sub(r"^[0-9a-f]{8}-", "", name), [])
        best: tuple[float, float] = (AGREEMENT, 0.0)
        chosen: tuple[str, str] | None = None
        for pair in candidates:
            key = (pair.dataset, pair.name)
            if key not in masks:
                masks[key] = pair.read_mask()
            mask = masks[key]
            if mask.shape == (session.height, session.width):
                # Of objects that agree equally, one in another, the smaller one.
                fit = agreement(session.steps[-1].prompts, mask), -float(mask.mean())
                if fit > best and fit[0] > AGREEMENT:
                    best, chosen = fit, key
        if chosen is not None:
            found.setdefault(chosen, []).append(session)
    return {key: tuple(mine) for key, mine in found.items()}


def agreement(prompts: Prompts, truth: Mask) -> float:
    """Share of clicks with the sign of their pixel in `truth` (H x W bool); for a box, its IoU with the object's."""
    values = []
    if prompts.box is not None:
        rows, columns = bounding_box(truth)
        box = prompts.box
        across = min(box.x1, columns.stop) - max(box.x0, columns.start)
        down = min(box.y1, rows.stop) - max(box.y0, rows.start)
        both = max(across, 0.0) * max(down, 0.0)
        area = (box.x1 - box.x0) * (box.y1 - box.y0) + (columns.stop - columns.start) * (rows.stop - rows.start)
        values.append(both / (area - both))
    height, width = truth.shape
    for click in prompts.clicks:
        inside = truth[min(int(click.y), height - 1), min(int(click.x), width - 1)]
        values.append(float(inside == click.positive))
    return float(np.mean(values)) if values else 0.0


def _stored(name: str) -> str:
    """A file's name as Label Studio stores an upload: blanks are underscores, odd characters are gone."""
    return re.sub(r"[^\w.-]", "", name.strip().replace(" ", "_"))
