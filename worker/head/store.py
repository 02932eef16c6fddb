"""Heads on disk: NAME.safetensors holds the numbers, NAME.json what is needed to understand and reproduce them."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from worker.head.features import feature_names
from worker.head.kernel import Reach
from worker.head.linear import LinearPosterior, sam_centred
from worker.head.registry import HeadRegistry

log = logging.getLogger(__name__)

FORMAT = "bald-sam linear head 1"
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "tiny-head.safetensors"


@dataclass(frozen=True)
class Head:
    """A linear head and its posterior.

    `shows`: "sam" when the mask that is returned is SAM's own, "head" when it is the head's.
    `stop`: strategy name -> expected gain (`acquisition.stopping`) under which no click is proposed.
    `reach`: how far a click speaks for places like its own.
    `unseen_by`: where its objects were divided into folds, for each fold the posterior of all other objects.
    """

    id: str
    posterior: LinearPosterior
    backbone: str
    shows: str = "sam"
    stop: dict[str, float] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)
    notes: dict[str, Any] = field(default_factory=dict)
    unseen_by: tuple[LinearPosterior, ...] = ()

    def unseen(self, fold: int) -> Head:
        """The head that has not seen the objects of a fold, to be judged on them."""
        return replace(self, posterior=self.unseen_by[fold]) if self.unseen_by else self


def save_head(head: Head, path: Path) -> None:
    """Write PATH (safetensors) and, beside it, the JSON of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "backbone": head.backbone,
        "features": list(head.posterior.names),
        "shows": head.shows,
        "stop": head.stop,
        "reach": asdict(head.reach),
        "notes": head.notes,
    }
    kept = {"": head.posterior} | {f"fold_{fold}_": one for fold, one in enumerate(head.unseen_by)}
    tensors = {f"{which}mean": one.mean.cpu().contiguous() for which, one in kept.items()}
    tensors |= {f"{which}factor": one.factor.cpu().contiguous() for which, one in kept.items()}
    save_file(tensors, path, {"format": FORMAT})
    path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")


def load_head(path: Path) -> Head:
    """Read a head. Raises ValueError, saying what to do, when it is missing, damaged or of another format."""
    remedy = "Train one with `bald-sam train`, or choose another with `bald-sam heads list`."
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path)
        if description["format"] != FORMAT:
            raise ValueError(f"the format is {description['format']!r}")
        names = tuple(description["features"])
        posterior = LinearPosterior(names, tensors["mean"], tensors["factor"])
        unseen_by: list[LinearPosterior] = []
        while (which := f"fold_{len(unseen_by)}_") + "mean" in tensors:
            unseen_by.append(LinearPosterior(names, tensors[which + "mean"], tensors[which + "factor"]))
        reach = Reach(**description.get("reach", {}))  # heads of before had the one that is the default
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"The head at {path} cannot be read ({error}). {remedy}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Head(
        id=f"{path.parent.name if path.stem == 'head' else path.stem}-{digest}",
        posterior=posterior,
        backbone=description["backbone"],
        shows=description["shows"],
        stop=description["stop"],
        reach=reach,
        notes=description["notes"],
        unseen_by=tuple(unseen_by),
    )


def prior_head(backbone_id: str, channels: int) -> Head:
    """The head of a backbone without a trained one: centred on SAM, learning from the session's clicks alone."""
    return Head(id="prior", posterior=sam_centred(feature_names(channels)), backbone=backbone_id)


def find_head(name: str, *, backbone_id: str, channels: int, data_dir: Path) -> Head:
    """The head that `name` means for a backbone.

    `none`: the prior, SAM's mask. `default`: the one chosen with `bald-sam heads use`, else the shipped one, else (or
    where those were trained for another backbone) the prior. `shipped`: the same without a choice. Otherwise a name
    under data_dir/heads or a path: that head, or ValueError when it is missing or does not fit the backbone's features.
    """
    fallback = prior_head(backbone_id, channels)
    if name == "none":
        return fallback
    if name in ("default", "shipped"):
        chosen = chosen_head(data_dir) if name == "default" else None
        candidates = [path for path in (chosen, SHIPPED) if path is not None and path.is_file()]
        for path in candidates:
            head = load_head(path)
            if head.backbone == backbone_id and head.posterior.names == fallback.posterior.names:
                return head
            log.info("The head %s was trained for %s, not for %s.", path, head.backbone, backbone_id)
        log.info("No trained head fits %s: proposals start from a prior centred on SAM.", backbone_id)
        return fallback
    path = Path(name) if name.endswith(".safetensors") else data_dir / "heads" / name / "head.safetensors"
    head = load_head(path)
    if head.posterior.names != fallback.posterior.names:
        raise ValueError(
            f"The head at {path} has {len(head.posterior.names)} features, {backbone_id} gives "
            f"{len(fallback.posterior.names)}. Train one for this backbone with `bald-sam train`."
        )
    if head.backbone != backbone_id:
        log.warning("The head %s was trained for %s and is used with %s.", path, head.backbone, backbone_id)
    return head


def chosen_head(data_dir: Path) -> Path | None:
    """The head that `bald-sam heads use NAME` made the default of all projects, if any."""
    registry = HeadRegistry(data_dir)
    name = registry.in_use().of(None).head
    return None if name is None else registry.folder / name / "head.safetensors"


def channels_of(sam: Any) -> int:
    """Channels of the decoder's up-scaled embedding: an eighth of the transformer's width (16 for tiny, 32 for SAM)."""
    width: int = sam.mask_decoder.transformer_dim
    return width // 8


def on_device(head: Head, device: torch.device) -> Head:
    """The same head with its tensors on `device`."""
    return replace(head, posterior=head.posterior.to(device))
