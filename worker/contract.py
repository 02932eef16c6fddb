"""What travels between the web process and a worker: plain JSON, validated on both sides.

This module never imports torch; with `worker.brush_rle` it is all that `ml_backend` may import of `worker`.
Image coordinates are (x, y) in pixels of the original image as Label Studio shows it (after EXIF orientation), as
floats with the centre of the first pixel at (0.5, 0.5), like the percentages of Label Studio.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class Queue(StrEnum):
    """RQ queues in the order in which a worker serves them."""

    INTERACTIVE = "interactive"
    EMBED = "embed"
    BATCH = "batch"
    TRAIN = "train"


#: Redis keys by which workers are known to live: a set of names, and for each name a key that expires unless renewed.
WORKERS_KEY = "bald-sam:workers"
WORKER_KEY = "bald-sam:worker:"

#: Dotted names of the functions that a worker may run; everything else in Redis is refused.
SEGMENT = "worker.tasks.segment"
EMBED = "worker.tasks.embed"
JOB_FUNCTIONS = frozenset({SEGMENT, EMBED})


class Message(BaseModel):
    """Base of everything that travels: immutable, and an unknown field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Click(Message):
    """One point prompt: (x, y) in pixels of the original image, positive = inside the object."""

    x: float
    y: float
    positive: bool = True


class Box(Message):
    """One box prompt: two corners in pixels of the original image, x0 < x1 and y0 < y1."""

    x0: float
    y0: float
    x1: float
    y1: float


class Prompts(Message):
    """Everything the annotator has given for one object, in the order in which it was given."""

    clicks: tuple[Click, ...] = ()
    box: Box | None = None


class ImageRef(Message):
    """Where an image is: the task's own value (relative upload, local file, http(s), s3-style) and who owns it."""

    url: str
    task: int | None = None
    project: int | None = None


class SegmentJob(Message):
    """One click to answer. `width`, `height`: pixels, as the page reports them; the mask gets exactly this size."""

    image: ImageRef
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    prompts: Prompts
    session: str
    strategy: str = "default"
    propose: bool = True


class EmbedJob(Message):
    """Images to encode ahead of the first click."""

    images: tuple[ImageRef, ...]


class Proposal(Message):
    """The suggested next click. `positive` is the answer the model expects; `score` is the strategy's (BALD: nats)."""

    x: float
    y: float
    positive: bool
    score: float
    strategy: str


class SegmentResult(Message):
    """A mask as Label Studio brush RLE (row-major, height x width of the job) and what is worth asking next.

    `stopped` says in words why there is no proposal, where there is none. `timings`: milliseconds by stage.
    """

    kind: Literal["segment"] = "segment"
    width: int
    height: int
    rle: list[int]
    area: int
    predicted_iou: float
    proposal: Proposal | None = None
    stopped: str | None = None
    model_version: str
    timings: dict[str, float] = Field(default_factory=dict)


class EmbedResult(Message):
    """How many images of an `EmbedJob` are in the cache now, and why the others are not (by URL)."""

    kind: Literal["embed"] = "embed"
    done: int
    failed: dict[str, str] = Field(default_factory=dict)


class Failure(Message):
    """A job that could not be done, in words for a person: what is wrong and what to do. `status`: HTTP status."""

    kind: Literal["failure"] = "failure"
    error: str
    hint: str
    status: int = 500


class RuntimeOptions(BaseModel):
    """What a worker process needs to know. The settings class fills it; the worker never reads the environment."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    data_dir: Path
    backbone: str = "tiny"
    checkpoint: Path | None = None
    device: str = "auto"
    head: str = "default"
    strategy: str = "default"
    redis_url: SecretStr | None = None
    label_studio_url: str | None = None
    label_studio_api_key: SecretStr | None = None
    local_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cache_mb: int = 512
    max_image_mb: int = 64
    max_image_megapixels: int = 100
    fetch_timeout_s: float = 20.0
