"""Fill a click log with made-up clicks, to measure reports and exports: `make_clicks.py DIR 1000000`.

The numbers are drawn at random and say nothing about annotators; shapes and sizes are those of real logs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from ml_backend.clicks.events import pack_rle
from ml_backend.clicks.schema import answers, clicks, final_masks, make_engine, masks, migrate, objects
from worker import brush_rle

CLICKS_PER_OBJECT = 4
WIDTH, HEIGHT = 1280, 854
LABELS = ("Car", "Wheel", "Person", "Dog", "Leaf")
START = 1_790_000_000.0


def some_masks(count: int, rng: np.random.Generator) -> list[bytes]:
    """Packed RLE of ellipses."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    found = []
    for _ in range(count):
        x, y, a, b = rng.uniform(300, 900), rng.uniform(250, 600), rng.uniform(60, 250), rng.uniform(60, 200)
        found.append(pack_rle(brush_rle.encode(((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 < 1)))
    return found


def some_objects(
    first: int, count: int, pool: list[bytes], rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """Rows of all tables for objects `first`, `first` + 1, ..."""
    rows: dict[str, list[dict[str, Any]]] = {"objects": [], "answers": [], "masks": [], "final_masks": [], "clicks": []}
    for id_ in range(first, first + count):
        show = bool(rng.integers(2))
        started = START + id_ * 20.0
        user = int(rng.integers(1, 13))
        amount = int(rng.integers(CLICKS_PER_OBJECT - 2, CLICKS_PER_OBJECT + 3))
        iou, x, y = 0.0, rng.uniform(100, WIDTH - 100), rng.uniform(100, HEIGHT - 100)
        prompts: list[dict[str, Any]] = []
        proposal: dict[str, Any] = {}
        sums: dict[str, Any] = dict.fromkeys(
            f"{what}_{level}" for level in (85, 90, 95) for what in ("clicks", "seconds")
        )
        moment = started
        for number in range(1, amount + 1):
            positive = bool(rng.random() < 0.7)
            followed = bool(proposal) and show and rng.random() < 0.55
            if followed:
                x, y, positive = proposal["proposal_x"], proposal["proposal_y"], bool(rng.random() < 0.8)
            elif number > 1:
                x, y = (
                    float(np.clip(x + rng.normal(0, 90), 1, WIDTH - 1)),
                    float(np.clip(y + rng.normal(0, 70), 1, HEIGHT - 1)),
                )
            gained = (1 - iou) * float(rng.beta(3, 3) if followed or number == 1 else rng.beta(2, 4))
            iou += gained
            answered = moment + float(rng.lognormal(-1.2, 0.4))
            key = id_ * 10 + number
            prompts.append({"id": f"p{key}", "x": x, "y": y, "positive": positive, "x1": None, "y1": None})
            matched = bool(proposal) and positive == proposal["proposal_positive"]
            distance = float(np.hypot(x - proposal["proposal_x"], y - proposal["proposal_y"])) if proposal else None
            shared = {
                "predicted_iou": min(0.99, iou + 0.05),
                "area": 40000,
                "changed_px": int(gained * 40000),
                "iou_to_final": iou,
            }
            times = {
                "queue_ms": float(rng.gamma(2, 4)),
                "encode_ms": 0.0 if number > 1 else float(rng.gamma(4, 40)),
                "decode_ms": float(rng.gamma(9, 10)),
            }
            model = {"strategy": "bald" if id_ % 3 else "entropy", "model_version": "tiny-000000000000"}
            rows["clicks"].append(
                {
                    "id": key,
                    "object": id_,
                    "seq": number,
                    "kind": "placed",
                    "click": number,
                    "prompt": f"p{key}",
                    "answer": key,
                    "time": moment,
                    "think_s": 2.0 if number > 1 else None,
                    "x": x,
                    "y": y,
                    "positive": positive,
                    "origin": "suggested" if followed and matched else "human",
                    "proposal_shown": bool(proposal) and show,
                    **(proposal or dict.fromkeys(("proposal_x", "proposal_y", "proposal_positive", "proposal_score"))),
                    "distance_px": distance,
                    "followed": bool(followed) if proposal else None,
                    "sign_matched": matched if proposal else None,
                    "delta_iou": gained,
                    "answer_ms": (answered - moment) * 1000,
                    **shared,
                    **times,
                    **model,
                }
            )
            proposal = {
                "proposal_x": rng.uniform(1, WIDTH - 1),
                "proposal_y": rng.uniform(1, HEIGHT - 1),
                "proposal_positive": bool(rng.integers(2)),
                "proposal_score": float(rng.exponential(0.2)),
            }
            rows["answers"].append(
                {
                    "id": key,
                    "event": f"{key:032x}",
                    "object": id_,
                    "received": moment,
                    "answered": answered,
                    "prompts": json.dumps(prompts),
                    "proposal_shown": show,
                    "proposal_strategy": model["strategy"],
                    "radius_px": 0.008 * WIDTH,
                    "timings": "{}",
                    **proposal,
                    **shared,
                    **times,
                    **model,
                }
            )
            rows["masks"].append({"answer": key, "rle": pool[key % len(pool)]})
            for level in (85, 90, 95):
                if iou >= level / 100 and sums[f"clicks_{level}"] is None:
                    sums[f"clicks_{level}"], sums[f"seconds_{level}"] = number, answered - started
            moment = answered + float(rng.lognormal(0.4, 0.5))
        rows["objects"].append(
            {
                "id": id_,
                "session": f"{id_ % 3 + 1}:{id_ // 10}:p{id_ * 10 + 1}",
                "project": id_ % 3 + 1,
                "task": id_ // 10,
                "mask_id": f"{id_:010x}",
                "image": f"/data/upload/1/{id_ // 10:08x}-picture.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "arm": "show" if show else "hide",
                "arm_mode": "mixed",
                "arm_unit": "object",
                "arm_seed": 0,
                "label": LABELS[int(rng.integers(len(LABELS)))],
                "user_id": user,
                "user_email": f"user{user}@example.com",
                "started": started,
                "last": answered,
                "clicks": amount,
                "seconds": answered - started,
                "outcome": "submitted",
                "annotation": id_ // 10,
                "lead_time": 60.0,
                "last_iou": iou,
                "stale": False,
                "strategy": "bald" if id_ % 3 else "entropy",
                "model_version": "tiny-000000000000",
                **sums,
            }
        )
        rows["final_masks"].append({"object": id_, "rle": pool[id_ % len(pool)]})
    return rows


def main(folder: Path, wanted: int) -> None:
    """Make about `wanted` clicks in `folder`/clicks.sqlite."""
    rng = np.random.default_rng(0)
    engine = make_engine(None, folder)
    migrate(engine)
    pool = some_masks(200, rng)
    first, made = 1, 0
    while made < wanted:
        rows = some_objects(first, 5000, pool, rng)
        rows["clicks"] = rows["clicks"][: wanted - made]
        with engine.begin() as connection:
            for table in (objects, answers, masks, final_masks, clicks):
                connection.execute(insert(table), rows[table.name])
        first, made = first + 5000, made + len(rows["clicks"])
    print(f"{made} clicks in {folder / 'clicks.sqlite'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("clicks", type=int)
    options = parser.parse_args()
    main(options.folder, options.clicks)
