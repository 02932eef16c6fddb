"""From a mask and a proposal to the results that Label Studio shows."""

from __future__ import annotations

import hashlib
from typing import Any

from ml_backend.labeling_config import LabelingConfig
from ml_backend.prompts import Session
from worker.contract import SegmentResult

#: Diameter of the ring, percent of the image width, as Label Studio draws keypoints.
RING_WIDTH = 0.8


def stable_id(*parts: object) -> str:
    """Ten hexadecimal digits that depend on `parts` alone; region ids of Label Studio have ten characters."""
    # JSON may carry half a surrogate pair in an id; it is hashed like any other text.
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()[:10]


def mask_id(project: object, task: object, session: Session) -> str:
    """Id of the mask of one object: the same for each click on it, another for the next object.

    The page replaces a region whose id it knows, so two objects must never share one.
    """
    return stable_id(project, task, session.ids[0])


def build(result: SegmentResult, session: Session, config: LabelingConfig, region_id: str) -> list[dict[str, Any]]:
    """The brush region, and the ring of the proposal if there is one and the config has a control for it."""
    common: dict[str, Any] = {
        "to_name": config.image,
        "original_width": session.width,
        "original_height": session.height,
        "image_rotation": 0,
    }
    if session.item_index is not None:
        common["item_index"] = session.item_index
    value: dict[str, Any] = {"format": "rle", "rle": result.rle}
    if session.label is not None and config.mask.tag == "brushlabels":
        value["brushlabels"] = [session.label]
    regions = [
        {
            **common,
            "id": region_id,
            "from_name": config.mask.name,
            "type": config.mask.tag,
            "value": value,
            "score": result.predicted_iou,
        }
    ]
    proposal = result.proposal
    if proposal is not None and config.proposal is not None:
        clicks = [(c.x, c.y, c.positive) for c in session.prompts.clicks]
        regions.append(
            {
                **common,
                "id": stable_id(region_id, "next", session.ids, clicks, session.prompts.box),
                "from_name": config.proposal.name,
                "type": config.proposal.tag,
                "value": {
                    "x": 100 * proposal.x / session.width,
                    "y": 100 * proposal.y / session.height,
                    "width": RING_WIDTH,
                    config.proposal.tag: [config.next_label(proposal.positive)],
                },
                "score": proposal.score,
                # Marks a temporary region: accepting or rejecting the mask deletes it, and it is never saved.
                "dynamic": True,
            }
        )
    return regions
