"""From a pre-labelled image to the prediction that Label Studio imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import defusedxml.ElementTree

from ml_backend.errors import ConfigError
from ml_backend.labeling_config import LabelingConfig
from ml_backend.regions import proposal_region, stable_id
from worker.contract import PrelabelImage

#: What every model version of ours begins with.
VERSION_PREFIX = "bald-sam-"


@dataclass(frozen=True)
class Controls:
    """Names, tags and labels of the controls that regions and the proposal go to."""

    config: LabelingConfig
    #: (name, labels) of the polygon control; None: brush regions.
    polygon: tuple[str, str, tuple[str, ...]] | None = None

    def label(self, wanted: str | None) -> str | None:
        """The label of a region: the wanted one if there is such a label, else the first one."""
        if self.polygon is not None:
            _, _, labels = self.polygon
            return wanted if wanted in labels else next(iter(labels), None)
        if self.config.mask.tag != "brushlabels":
            return None
        return (self.config.mask.label(wanted) if wanted else None) or next(iter(self.config.mask.labels), None)


def controls_of(label_config: str, config: LabelingConfig, *, polygons: bool) -> Controls:
    """Where the regions of a project go. Raises ConfigError that names the XML to add for polygons."""
    if not polygons:
        return Controls(config)
    for element in defusedxml.ElementTree.fromstring(label_config).iter():
        tag = element.tag.lower() if isinstance(element.tag, str) else ""
        attributes = {name.lower(): value for name, value in element.attrib.items()}
        targets = [name.strip() for name in attributes.get("toname", "").split(",")]
        if tag in ("polygon", "polygonlabels") and config.image in targets and attributes.get("name"):
            labels = tuple(
                child.get("alias") or child.get("value") or ""
                for child in element.iter()
                if isinstance(child.tag, str) and child.tag.lower() == "label" and child.get("value")
            )
            return Controls(config, (attributes["name"], tag, labels))
    raise ConfigError(
        "The labelling config has no polygon control.",
        f'Add <PolygonLabels name="polygon" toName="{config.image}" smart="false"><Label value="Object"/>'
        "</PolygonLabels>, or leave --format at brush.",
    )


def prediction(image: PrelabelImage, controls: Controls, version: str, *, unlabelled: bool = False) -> dict[str, Any]:
    """`{"model_version", "score", "result"}` of one image.

    `score` is the confidence: ascending order of the prediction score puts the most uncertain task first, which is also
    what Label Studio's uncertainty sampling does. `unlabelled`: regions without a label of their own get none.
    """
    config = controls.config
    common: dict[str, Any] = {
        "to_name": config.image,
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
    }
    result: list[dict[str, Any]] = []
    for number, region in enumerate(image.regions):
        label = None if unlabelled and region.label is None else controls.label(region.label)
        labels = [label] if label is not None else []
        score = round(region.expected_iou, 4)
        if controls.polygon is not None:
            name, tag, _ = controls.polygon
            values: list[dict[str, Any]] = [
                {"points": [[round(x, 4), round(y, 4)] for x, y in ring], "closed": True} for ring in region.rings
            ]
        else:
            name, tag = config.mask.name, config.mask.tag
            values = [{"format": "rle", "rle": region.rle}]
        for part, value in enumerate(values):
            if tag.endswith("labels"):
                value[tag] = labels
            identity = stable_id(version, image.key, number, part)
            result.append({**common, "id": identity, "from_name": name, "type": tag, "value": value, "score": score})
    if image.proposal is not None and config.proposal is not None:
        identity = stable_id(version, image.key, "next")
        result.append(proposal_region(image.proposal, config, config.proposal, common, identity))
    return {"model_version": version, "score": round(image.confidence, 4), "result": result}
