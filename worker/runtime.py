"""What a worker process keeps loaded: backbone, proposer, caches; built at first use, once."""

from __future__ import annotations

import logging
from functools import cached_property
from threading import Lock, RLock

import numpy as np
import redis
import torch
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.backbones import Backbone, build, zooms
from worker.byte_lru import ByteLRU
from worker.contract import Click, Prompts, RuntimeOptions
from worker.decode import LogitsCache, decode
from worker.embedding_folder import EmbeddingFolder
from worker.embeddings import EmbeddingCache
from worker.encode import encode
from worker.head.registry import HeadRegistry
from worker.preemption import give_way_within
from worker.proposer import Proposer

log = logging.getLogger(__name__)

#: Shares of the cache memory for the logits of earlier clicks, and for images where parts of them will be encoded; the
#: rest holds embeddings.
LOGITS_SHARE = 1 / 8
PIXELS_SHARE = 1 / 4
#: Heads that are kept loaded.
MAX_PROPOSERS = 64


class NotConfiguredError(RuntimeError):
    """A task ran before `configure`."""


class Runtime:
    """One backbone with its proposer and caches. Safe to use from several threads."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        cache_bytes = options.cache_mb << 20
        logits_bytes = int(cache_bytes * LOGITS_SHARE)
        client: redis.Redis | None = None
        if options.redis_url is not None:
            url = options.redis_url.get_secret_value()
            # Without its back-off of seconds: what Redis does not hold at once is quicker to compute.
            retry = Retry(NoBackoff(), 1)
            client = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=5, retry=retry)
        self.redis = client
        folder = None
        if options.embeddings_dir is not None:
            folder = EmbeddingFolder(options.embeddings_dir, int(options.embeddings_gb * 1e9))
        pixels_bytes = int(cache_bytes * PIXELS_SHARE) if zooms(options.backbone, options.zoom) else 0
        self.embeddings = EmbeddingCache(cache_bytes - logits_bytes - pixels_bytes, client, folder)
        self.pixels: ByteLRU[str, NDArray[np.uint8]] = ByteLRU(pixels_bytes)
        #: Images that could not be read again, and until when (monotonic seconds) nobody waits for them once more.
        self.out_of_reach: ByteLRU[str, float] = ByteLRU(1 << 16)
        self.logits: LogitsCache = ByteLRU(logits_bytes)
        #: Encoders need gigabytes for a moment: one image at a time, but for a click in the middle of a batch.
        self.encoding = RLock()
        self.heads = HeadRegistry(options.data_dir, client)
        self._building = RLock()
        self._proposers: dict[tuple[str, int], Proposer] = {}

    @property
    def backbone(self) -> Backbone:
        """The model. Raises ValueError or CheckpointError when it cannot be built; the next use tries again."""
        with self._building:
            return self._backbone

    @property
    def loaded_backbone(self) -> Backbone | None:
        """The model if it is loaded already."""
        return self.__dict__.get("_backbone")

    @property
    def proposer(self) -> Proposer:
        """Head, posterior and strategy of projects without a choice of their own. Raises as `proposer_of` does."""
        return self.proposer_of(None)

    def proposer_of(self, project: int | None) -> Proposer:
        """Head, posterior and strategy of a project: those in use now, so a head that was learnt meanwhile comes with
        the next click. A choice that does not fit this backbone, or cannot be read, is passed over; a head that the
        settings name is not. Raises ValueError when that one, or the strategy, cannot be used.
        """
        with self._building:
            asked = self.options.head
            if asked != "default":
                return self._proposer(asked, 0)
            in_use = self.heads.in_use()
            for choice in (in_use.of(project), in_use.of(None)):
                if choice.head is None:
                    break
                if choice.backbone != self._backbone.id:
                    continue
                try:
                    path = self.heads.path(choice.head)
                    return self._proposer(str(path), path.stat().st_mtime_ns)
                except (OSError, ValueError) as error:
                    log.error("The head %s of project %s is passed over: %s", choice.head, project, error)
            return self._proposer("shipped", 0)

    @cached_property
    def _backbone(self) -> Backbone:
        options = self.options
        made = build(
            options.backbone,
            checkpoint=options.checkpoint,
            device=options.device,
            data_dir=options.data_dir,
            precision=options.precision,
            zoom=options.zoom,
        )
        give_way_within(made.encoder)
        return made

    def _proposer(self, head: str, stamp: int) -> Proposer:
        """A proposer, kept: it holds a few kilobytes."""
        made = self._proposers.get((head, stamp))
        if made is None:
            options = self.options
            made = Proposer(self._backbone, head=head, strategy=options.strategy, data_dir=options.data_dir)
            if len(self._proposers) >= MAX_PROPOSERS:
                del self._proposers[next(iter(self._proposers))]
            self._proposers[head, stamp] = made
        return made

    @cached_property
    def on_processor(self) -> Runtime:
        """The same model on the processor, for work that the device has no memory for. Loaded at first use, kept."""
        return Runtime(self.options.model_copy(update={"device": "cpu"}))

    def free_memory(self) -> None:
        """Give back what can be computed again; for when the device runs out of memory."""
        self.embeddings.clear_memory()
        self.logits.clear()
        self.pixels.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()


_lock = Lock()
_options: RuntimeOptions | None = None
_runtime: Runtime | None = None


def configure(options: RuntimeOptions) -> None:
    """State what this process runs. Loads nothing; equal options keep what is loaded."""
    global _options, _runtime
    with _lock:
        if options != _options:
            _options, _runtime = options, None


def runtime() -> Runtime:
    """The runtime of this process. Raises NotConfiguredError before `configure`."""
    global _runtime  # noqa: PLW0603 - one runtime for each process is the point
    with _lock:
        if _options is None:
            raise NotConfiguredError("The worker was not configured; start it with `bald-sam worker`.")
        if _runtime is None:
            _runtime = Runtime(_options)
        return _runtime


def loaded() -> Runtime | None:
    """The runtime of this process if there is one already."""
    return _runtime


def warm_up() -> None:
    """Load everything and answer one click on a blank image, so that the first real click does not pay for it."""
    current = runtime()
    embedding = encode(current.backbone, np.full((64, 64, 3), 127, np.uint8))
    prompts = Prompts(clicks=(Click(x=32.0, y=32.0),))
    current.proposer.propose(decode(current.backbone, embedding, prompts), prompts)
