"""What travels between the web process and a worker: plain JSON, validated on both sides.

This module never imports torch; with `worker.brush_rle` it is all that `ml_backend` may import of `worker`.
Image coordinates are (x, y) in pixels of the original image as Label Studio shows it (after EXIF orientation), as
floats with the centre of the first pixel at (0.5, 0.5), like the percentages of Label Studio.
"""

from __future__ import annotations

import base64
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, SecretStr


class Queue(StrEnum):
    """RQ queues in the order in which a worker serves them."""

    INTERACTIVE = "interactive"
    EMBED = "embed"
    BATCH = "batch"
    TRAIN = "train"


#: Redis keys by which workers are known to live: a set of names, and for each name a key that expires unless renewed.
WORKERS_KEY = "bald-sam:workers"
WORKER_KEY = "bald-sam:worker:"

#: What became of the jobs of a queue: key + queue is a hash with a count of each outcome (`done`; `refused`: answered
#: with a Failure; `failed`: ended by a fault), with `last_OUTCOME`, when it last came (seconds since 1970), and with
#: `said_OUTCOME`, what was said then.
JOBS_KEY = "bald-sam:jobs:"
OUTCOMES = ("done", "refused", "failed")

#: A mask of more characters than LARGE_MASK travels beside its answer, whose `rle` is null then: key + job id holds the
#: base 64. In the answer RQ would put it into base 64 once more.
MASK_KEY = "bald-sam:mask:"
LARGE_MASK = 16_384

#: Where the choice of heads is: a file in the data directory, and a key in Redis for workers on other machines; and a
#: hash in Redis with the files of all heads.
HEADS_IN_USE_FILE = "heads/in-use.json"
HEADS_IN_USE_KEY = "bald-sam:heads:in-use"
HEAD_FILES_KEY = "bald-sam:heads:files"
#: How far the training of a project is: key + project holds JSON with `stage`, `done` and `total`.
PROGRESS_KEY = "bald-sam:progress:"

#: Dotted names of the functions that a worker may run; everything else in Redis is refused.
SEGMENT = "worker.tasks.segment"
EMBED = "worker.tasks.embed"
PRELABEL = "worker.batch.prelabel"
TRAIN = "evaluation.learning.train"
JOB_FUNCTIONS = frozenset({SEGMENT, EMBED, PRELABEL, TRAIN})


class NotQuickError(Exception):
    """Raised by a job function that was let through as quick and takes long: it has to wait for its turn, and nothing
    of it is done yet. See `worker.preemption`."""


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
    """One click to answer. `width`, `height`: pixels, as the page reports them; the mask gets exactly this size.

    `request`: id of the web request, for the logs.
    """

    image: ImageRef
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    prompts: Prompts
    session: str
    strategy: str = "default"
    propose: bool = True
    request: str | None = None


class EmbedJob(Message):
    """Images to encode ahead of the first click."""

    images: tuple[ImageRef, ...]


class ObjectPrompts(Message):
    """One object to segment: clicks and a box, or a rough mask (brush RLE of the item's size). `label`: its class."""

    prompts: Prompts = Prompts()
    brush: tuple[int, ...] = ()
    label: str | None = None


class Everything(Message):
    """Segment what is there without prompts: a click on each point of a grid, then what these filters leave.

    `min_iou`: predicted IoU; `min_stability`: IoU of the masks at logits of +1 and -1; None: what suits the backbone
    (worker.everything.LEAST). `max_overlap`: IoU with a better region; `min_area`, `max_area`: share of the image;
    `top`: the best so many.
    """

    points_per_side: int = Field(16, ge=1, le=64)
    min_iou: float | None = None
    min_stability: float | None = None
    max_overlap: float = 0.5
    min_area: float = 0.001
    max_area: float = 0.5
    top: int = Field(30, ge=1)
    label: str | None = None


class PrelabelItem(Message):
    """One image to pre-label. `key`: the caller's name of it. Prompts are in pixels of a `width` x `height` image;
    without these, of the image itself. The masks get the same size."""

    key: str
    image: ImageRef
    width: int | None = Field(None, gt=0)
    height: int | None = Field(None, gt=0)
    objects: tuple[ObjectPrompts, ...] = ()
    everything: Everything | None = None


class PrelabelOptions(Message):
    """How a batch is answered: outlines instead of masks, and whether a next click is proposed.

    `keep`: embeddings go into the caches that outlast the batch (Redis, folder), so that clicks find them there.
    `zoom`: objects with prompts are looked at from near, as in clicks, by a backbone that does so; else every object is
    decoded from the one embedding of its image.
    """

    polygons: bool = False
    propose: bool = True
    strategy: str = "default"
    keep: bool = False
    zoom: bool = False


class PrelabelJob(Message):
    """Images to pre-label, one after the other."""

    items: tuple[PrelabelItem, ...]
    options: PrelabelOptions = PrelabelOptions()


class Proposal(Message):
    """The suggested next click. `positive` is the answer the model expects; `score` is the strategy's (BALD: nats)."""

    x: float
    y: float
    positive: bool
    score: float
    strategy: str


def _to_text(rle: bytes) -> str:
    return base64.b64encode(rle).decode()


def _from_text(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return base64.b64decode(value, validate=True)
    if isinstance(value, list | tuple):
        try:
            return bytes(value)
        except TypeError as error:
            raise ValueError("a brush RLE holds integers from 0 to 255") from error
    raise ValueError("a brush RLE is a list of integers from 0 to 255, or these bytes in base 64")


#: The bytes of a brush RLE, which may be given as integers too; in JSON it is base 64, which is written and read a
#: hundred times faster than a list of numbers.
Rle = Annotated[bytes, PlainValidator(_from_text), PlainSerializer(_to_text, return_type=str, when_used="json")]


class SegmentResult(Message):
    """A mask as Label Studio brush RLE (row-major, height x width of the job) and what is worth asking next.

    `stopped` says in words why there is no proposal, where there is none. `timings`: milliseconds by stage.
    """

    kind: Literal["segment"] = "segment"
    width: int
    height: int
    rle: Rle
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


class Region(Message):
    """One pre-labelled object: a mask as brush RLE, or `rings`, its outlines in (x, y) percent of the image.

    `expected_iou`: of the mask under the posterior, between 0 and 1; `area`: pixels.
    """

    label: str | None = None
    rle: list[int] = Field(default_factory=list)
    rings: list[list[tuple[float, float]]] = Field(default_factory=list)
    area: int
    predicted_iou: float
    expected_iou: float


class PrelabelImage(Message):
    """What was found on one image. `confidence`: mean expected IoU of the regions, 0 when there is none; the least
    confident image is the one to look at first. `proposal`: the best next click of all regions."""

    key: str
    width: int
    height: int
    regions: tuple[Region, ...] = ()
    confidence: float = 0.0
    proposal: Proposal | None = None


class PrelabelFailure(Message):
    """An image that could not be pre-labelled, in words."""

    key: str
    error: str
    hint: str = ""


class PrelabelResult(Message):
    """One answer for each item of a `PrelabelJob`, in any order."""

    kind: Literal["prelabel"] = "prelabel"
    images: tuple[PrelabelImage, ...] = ()
    failed: tuple[PrelabelFailure, ...] = ()
    model_version: str


class LabelledObject(Message):
    """One submitted mask to learn from. `mask`: base64 of the zlib-packed brush RLE, of `height` x `width` pixels.

    `states`: the prompts after each click that the annotator made for it, as logged; empty where nothing was logged.
    """

    image: ImageRef
    region: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    mask: str
    states: tuple[Prompts, ...] = ()


class TrainJob(Message):
    """Learn a head for `project` from `objects` (those of one task share its image), judged on tasks held out in turn.

    `force`: use the new head even where it is not better, or another one is pinned. `notes`: kept with the head.
    """

    project: int
    objects: tuple[LabelledObject, ...]
    clicks: int = Field(15, ge=2)
    seed: int = 0
    force: bool = False
    notes: dict[str, str] = Field(default_factory=dict)


class TrainResult(Message):
    """A head that was trained, and what tasks held out in turn say. `auc`: mean area under IoU over clicks, 0 to 1.

    `used`: whether the project uses `head` from now on; `reason` says why, or why not, in words. `gain` is the mean
    paired difference of AUC to `before` (the head in use until now), `error` its standard error over images.
    `objects`: learnt from; `held_out` of them, on `images_held_out`, were played by what had not seen their task.
    """

    kind: Literal["train"] = "train"
    project: int
    head: str
    before: str
    used: bool
    reason: str
    auc: float
    auc_before: float
    gain: float
    error: float
    objects: int
    logged: int
    held_out: int
    images_held_out: int
    skipped: dict[str, str] = Field(default_factory=dict)
    seconds: float


class HeadChoice(Message):
    """Which head a project uses. `earlier`: those it used before, newest first; None stands for the shipped one.

    `digest`: start of the SHA-256 of the head's numbers; `backbone`: id of the one it was trained for.
    """

    head: str | None = None
    digest: str = ""
    backbone: str = ""
    pinned: bool = False
    earlier: tuple[str | None, ...] = ()


class HeadsInUse(Message):
    """The choice of each project (its number as text) and of all others (`default`). `revision` counts the changes."""

    revision: int = 0
    choices: dict[str, HeadChoice] = Field(default_factory=dict)

    def of(self, project: int | None) -> HeadChoice:
        """The choice that holds for a project."""
        return self.choices.get(str(project)) or self.choices.get("default") or HeadChoice()


class Failure(Message):
    """A job that could not be done, in words for a person: what is wrong and what to do. `status`: HTTP status."""

    kind: Literal["failure"] = "failure"
    error: str
    hint: str
    status: int = 500


def outcome_of(answer: object) -> tuple[str, str]:
    """Whether a job function that returned `answer` has `done` its work or `refused` it, and with which words."""
    if isinstance(answer, dict) and answer.get("kind") == "failure":
        return "refused", f"{answer.get('error', '')} {answer.get('hint', '')}".strip()
    return "done", ""


class RuntimeOptions(BaseModel):
    """What a worker process needs to know. The settings class fills it; the worker never reads the environment."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    data_dir: Path
    backbone: str = "tiny"
    checkpoint: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    zoom: str = "auto"
    head: str = "default"
    strategy: str = "default"
    redis_url: SecretStr | None = None
    label_studio_url: str | None = None
    label_studio_api_key: SecretStr | None = None
    local_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cache_mb: int = 512
    embeddings_dir: Path | None = None
    embeddings_gb: float = 20.0
    max_image_mb: int = 64
    max_image_megapixels: int = 100
    fetch_timeout_s: float = 20.0
