"""From a mask and a proposal to the results that Label Studio shows."""

from __future__ import annotations

import hashlib
from typing import Any

from ml_backend.labeling_config import Control, LabelingConfig
from ml_backend.prompts import Session
from worker.contract import Proposal, SegmentResult

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
    value: dict[str, Any] = {"format": "rle", "rle": list(result.rle)}
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
        identity = stable_id(region_id, "next", session.ids, clicks, session.prompts.box)
        regions.append(proposal_region(proposal, config, config.proposal, common, identity))
    return regions


def proposal_region(
    proposal: Proposal, config: LabelingConfig, control: Control, common: dict[str, Any], identity: str
) -> dict[str, Any]:
    """The ring of a proposal; `common` states the image's size, and what else every region of it has."""
    return {
        **common,
        "id": identity,
        "from_name": control.name,
        "type": control.tag,
        "value": {
            "x": 100 * proposal.x / common["original_width"],
            "y": 100 * proposal.y / common["original_height"],
            "width": RING_WIDTH,
            control.tag: [config.next_label(proposal.positive)],
        },
        "score": proposal.score,
        # Marks a temporary region: accepting or rejecting the mask deletes it, and it is never saved.
        "dynamic": True,
    }
