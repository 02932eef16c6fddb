"""An image, or a part of one, to its embedding; and an embedding to bytes and back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional as F

from worker.backbones import Backbone
from worker.frame import Window
from worker.mirror import mirrored_pixels
from worker.precision import running_in
from worker.preemption import until_computed

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
