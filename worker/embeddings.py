"""Image to embedding, and where embeddings are kept: process memory, then Redis, then encode."""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread

import numpy as np
import numpy.typing as npt
import torch
from redis import Redis, RedisError
from safetensors import SafetensorError
from safetensors.torch import load, save
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from worker.backbones import Backbone
from worker.byte_lru import ByteLRU
from worker.embedding_folder import EmbeddingFolder
from worker.frame import Window
from worker.mirror import mirrored_pixels
from worker.precision import running_in
from worker.preemption import before_long_work, until_computed

log = logging.getLogger(__name__)

#: Redis keeps an embedding for a working day, and forgets which image lies behind a URL sooner.
EMBEDDING_TTL_S = 8 * 3600
URL_TTL_S = 3600
#: Longest wait for another process that encodes the same image; after that this one encodes it too. Its claim ends by
#: itself when the process is killed: it is renewed as long as it encodes.
ENCODE_WAIT_S = 60.0
CLAIM_MS = 2000
RENEW_S = 0.5
PREFIX = "bald-sam:"
#: A damaged number would be a wrong mask.
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Embedding:
    """features: (1, C, h, w) float16, of a part of an image (2, C, h, w), see `worker.mirror`; colours: (3, 4h, 4w)
    uint8 RGB, the padded input at the size of the mask logits; both on the backbone's device. `window`: the part of the
    image that was encoded, None for all of it. Sizes are (height, width), as in `SamPredictor`; `input_size` is that of
    the part.

    Half precision halves what a cached image takes.
    """

    features: Tensor
    colours: Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    window: Window | None = None

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return self.features.numel() * self.features.element_size() + self.colours.numel()

    def to(self, device: torch.device) -> Embedding:
        """The same on another device."""
        return replace(self, features=self.features.to(device), colours=self.colours.to(device))


def encode(backbone: Backbone, image: npt.NDArray[np.uint8]) -> Embedding:
    """Encode an RGB image (H, W, 3), uint8, as `SamPredictor.set_image` does, but for the precision."""
    height, width = image.shape[:2]
    return encode_resized(backbone, resize(backbone, image), (height, width))


def encode_window(
    backbone: Backbone, image: npt.NDArray[np.uint8], window: Window, original_size: tuple[int, int]
) -> Embedding:
    """Encode a part of an RGB image (H, W, 3), uint8, as if it were the image, and its mirror image. The array may be
    smaller than the original image, of `original_size` (height, width), in whose pixels `window` is."""
    height, width = image.shape[:2]
    part = image[window.scaled(original_size, (height, width)).slices]
    encoded = encode_resized(backbone, resize(backbone, np.ascontiguousarray(part)), original_size, twice=True)
    return replace(encoded, window=window)


def resize(backbone: Backbone, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image (H, W, 3) as the encoder wants it, uint8, its longer side `backbone.image_size`."""
    resized: npt.NDArray[np.uint8] = ResizeLongestSide(backbone.image_size).apply_image(image)
    return resized


def encode_resized(
    backbone: Backbone, resized: npt.NDArray[np.uint8], original_size: tuple[int, int], *, twice: bool = False
) -> Embedding:
    """Encode what `resize` returned, with `twice` its mirror image too; `original_size`: (height, width) of the image
    before."""
    with torch.inference_mode():
        pixels = torch.as_tensor(resized, device=backbone.device).permute(2, 0, 1).contiguous()[None]
        views = mirrored_pixels(pixels) if twice else pixels
        with running_in(backbone.precision, backbone.device):
            rows, columns = backbone.padded_size((pixels.shape[-2], pixels.shape[-1]))
            features = backbone.encoder(backbone.sam.preprocess(views)[..., :rows, :columns])
    # A copy outside inference mode: whoever fits a head on decoder features may need gradients.
    features = features.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
    colours = _colours(pixels, (rows, columns), features)
    until_computed(backbone.device)  # clicks read it on a stream of their own
    height, width = resized.shape[:2]
    return Embedding(features, colours, original_size, (height, width))


def _colours(pixels: Tensor, padded_size: tuple[int, int], features: Tensor) -> Tensor:
    """(1, 3, h, w) uint8, padded and averaged to four times the resolution of `features`."""
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels[0].float(), (0, padded_size[1] - width, 0, padded_size[0] - height))
    return F.adaptive_avg_pool2d(padded, (4 * features.shape[-2], 4 * features.shape[-1])).round().to(torch.uint8)


class EmbeddingCache:
    """Embeddings by content: key = SHA-256 of the image's bytes + ":" + the backbone's `embedding_id`.

    Memory is bounded in bytes; Redis (optional, shared by all workers) by time; a folder (optional) in bytes. What is
    broken or gone is computed again, and a Redis that does not answer only costs time. One image is encoded once,
    however many ask for it.
    """

    def __init__(self, max_bytes: int, redis: Redis | None = None, folder: EmbeddingFolder | None = None) -> None:
        self._folder = folder
        self._memory: ByteLRU[str, Embedding] = ByteLRU(max_bytes)
        self._urls: ByteLRU[str, tuple[str, float]] = ByteLRU(1 << 20)
        self._redis = redis
        self._flights: dict[str, tuple[Lock, int]] = {}
        self._flights_lock = Lock()

    @staticmethod
    def key(data: bytes, backbone: Backbone) -> str:
        """Key of an image file's content for this backbone."""
        return f"{hashlib.sha256(data).hexdigest()}:{backbone.embedding_id}"

    @property
    def size(self) -> int:
        """Bytes held in this process's memory."""
        return self._memory.size

    def usage(self) -> dict[str, int]:
        """How full this process's memory is, see `ByteLRU.usage`."""
        return self._memory.usage()

    def clear_memory(self) -> None:
        """Forget what this process holds; Redis keeps its own."""
        self._memory.clear()

    def key_of_url(self, url: str, backbone: Backbone) -> str | None:
        """The key of an image that was fetched from this URL within the last hour, or None."""
        name = f"{url} {backbone.embedding_id}"
        known = self._urls.get(name)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        found = self._from_redis(_url_name(name))
        return found.decode(errors="replace") if found else None

    def remember_url(self, url: str, backbone: Backbone, key: str) -> None:
        """Note which image lies behind a URL, so that it need not be fetched again soon."""
        name = f"{url} {backbone.embedding_id}"
        self._urls.put(name, (key, time.monotonic() + URL_TTL_S), len(name) + len(key) + 200)
        self._to_redis(_url_name(name), key.encode(), URL_TTL_S)

    def get(self, key: str, device: torch.device, *, remember: bool = True) -> Embedding | None:
        """The embedding from memory, Redis or the folder, or None. What is read enters the memory if to `remember`."""
        embedding = self._memory.get(key)
        if embedding is not None:
            return embedding
        found = self._read(key, self._from_redis(PREFIX + "embedding:" + key), "Redis", self._drop_embedding)
        if found is None and self._folder is not None:
            found = self._read(key, self._folder.get(key), "the folder", self._folder.drop)
        if found is None:
            return None
        embedding = found.to(device)
        if remember:
            self._memory.put(key, embedding, embedding.size)
        return embedding

    @staticmethod
    def _read(key: str, data: bytes | None, where: str, drop: Callable[[str], None]) -> Embedding | None:
        if data is None:
            return None
        try:
            return from_bytes(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            log.warning("Dropped a broken embedding from %s (%s: %s); it is computed again.", where, key[:12], error)
            drop(key)
            return None

    def _drop_embedding(self, key: str) -> None:
        self._drop_from_redis(PREFIX + "embedding:" + key)

    def put(self, key: str, embedding: Embedding, *, remember: bool = True) -> None:
        """Keep an embedding in memory (unless not to `remember`), in Redis and in the folder."""
        if remember:
            self._memory.put(key, embedding, embedding.size)
        if self._redis is not None or self._folder is not None:
            data = to_bytes(embedding)
            self._to_redis(PREFIX + "embedding:" + key, data, EMBEDDING_TTL_S)
            if self._folder is not None:
                self._folder.put(key, data)

    def get_or_encode(self, key: str, device: torch.device, compute: Callable[[], Embedding]) -> Embedding:
        """The embedding, computed by `compute` if nobody has it; concurrent callers for one key share one call. Raises
        NotQuickError where it is not in memory and only quick work is let through."""
        embedding = self._memory.get(key)
        if embedding is not None:
            return embedding
        before_long_work()
        with self._flight(key):
            embedding = self.get(key, device) or self._wait_for_other_process(key, device)
            if embedding is None:
                try:
                    with self._renewing(key):
                        embedding = compute()
                    self.put(key, embedding)
                finally:
                    self._drop_from_redis(PREFIX + "encoding:" + key)
            return embedding

    def window_or_encode(self, key: str, window: Window, compute: Callable[[], Embedding | None]) -> Embedding | None:
        """The embedding of a part of the image under `key`, as `get_or_encode`, but in this process's memory alone: it
        is of use for one object. None where `compute` finds that it cannot be had."""
        part = f"{key}@{window.x0},{window.y0},{window.x1},{window.y1}"
        embedding = self._memory.get(part)
        if embedding is not None:
            return embedding
        before_long_work()
        with self._flight(part):
            embedding = self._memory.get(part)
            if embedding is None:
                embedding = compute()
                if embedding is not None:
                    self._memory.put(part, embedding, embedding.size)
            return embedding

    def _wait_for_other_process(self, key: str, device: torch.device) -> Embedding | None:
        """Claim the encoding of an image in Redis, or wait for the process that has; None: this process encodes."""
        deadline = time.monotonic() + ENCODE_WAIT_S
        while self._redis is not None and time.monotonic() < deadline:
            try:
                if self._redis.set(PREFIX + "encoding:" + key, b"1", px=CLAIM_MS, nx=True):
                    return self.get(key, device)
            except RedisError as error:
                _say_redis_failed(error)
                return None
            time.sleep(0.02)
            embedding = self.get(key, device)
            if embedding is not None:
                return embedding
        return None

    @contextmanager
    def _renewing(self, key: str) -> Iterator[None]:
        """Keep the claim on an image during the block."""
        if self._redis is None:
            yield
            return
        client, done = self._redis, Event()

        def renew() -> None:
            while not done.wait(RENEW_S):
                with suppress(RedisError):
                    client.pexpire(PREFIX + "encoding:" + key, CLAIM_MS)

        Thread(target=renew, name="bald-sam-claim", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    @contextmanager
    def _flight(self, key: str) -> Iterator[None]:
        with self._flights_lock:
            lock, users = self._flights.get(key, (Lock(), 0))
            self._flights[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._flights_lock:
                lock, users = self._flights[key]
                if users == 1:
                    del self._flights[key]
                else:
                    self._flights[key] = (lock, users - 1)

    def _from_redis(self, name: str) -> bytes | None:
        try:
            data = self._redis.get(name) if self._redis is not None else None
            return data if isinstance(data, bytes) else None
        except RedisError as error:
            _say_redis_failed(error)
            return None

    def _to_redis(self, name: str, value: bytes, ttl_s: int) -> None:
        try:
            if self._redis is not None:
                self._redis.set(name, value, ex=ttl_s)
        except RedisError as error:
            _say_redis_failed(error)

    def _drop_from_redis(self, name: str) -> None:
        try:
            if self._redis is not None:
                self._redis.delete(name)
        except RedisError as error:
            _say_redis_failed(error)


def to_bytes(embedding: Embedding) -> bytes:
    """An embedding as safetensors, bit for bit: an answer must not depend on which cache it came from."""
    sizes = torch.tensor([embedding.original_size, embedding.input_size], dtype=torch.int64)
    features, colours = embedding.features.cpu().contiguous(), embedding.colours.cpu().contiguous()
    data = save({"features": features, "colours": colours, "sizes": sizes})
    return data + zlib.crc32(data).to_bytes(CHECKSUM_BYTES)


def from_bytes(data: bytes) -> Embedding:
    """The inverse of `to_bytes`, on the CPU. Raises SafetensorError, KeyError or ValueError for anything else."""
    data, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if zlib.crc32(data).to_bytes(CHECKSUM_BYTES) != checksum:
        raise ValueError("the checksum is wrong")
    tensors = load(data)
    features, colours, sizes = tensors["features"], tensors["colours"], tensors["sizes"]
    if features.ndim != 4 or colours.ndim != 3 or sizes.shape != (2, 2):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (features, colours, sizes))
        raise ValueError(f"shapes {shapes} are not those of an embedding")
    (height, width), (input_height, input_width) = sizes.tolist()
    return Embedding(features, colours, (height, width), (input_height, input_width))


def _url_name(name: str) -> str:
    return PREFIX + "url:" + hashlib.sha256(name.encode()).hexdigest()


def _say_redis_failed(error: Exception) -> None:
    log.warning("Redis did not answer the embedding cache (%s); going on without it.", error)
