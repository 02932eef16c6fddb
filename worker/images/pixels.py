"""Pixels of a fetched image, as a browser shows them to the annotator."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from worker.contract import RuntimeOptions
from worker.images.errors import ImageError

#: Longest side to shortest: scaled down for an encoder, nothing would be left of the shortest.
MAX_RATIO = 400
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# The limit of the settings decides, in words, and before pixels are decoded: Pillow's own would refuse what is allowed.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, options: RuntimeOptions) -> NDArray[np.uint8]:
    """Image as uint8 (height, width, 3) RGB: EXIF orientation applied, first frame, transparency over white.

    16-bit values keep their high byte, as in a browser. Raises ImageError for another format, a damaged file, and more
    than `options.max_image_megapixels`, which is checked before any pixel is decoded.
    """
    too_many = ImageError(
        f"The image has more than {options.max_image_megapixels} megapixels.",
        "Use a smaller image, or raise BALD_SAM_MAX_IMAGE_MEGAPIXELS.",
        413,
    )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > options.max_image_megapixels * 1_000_000:
                raise too_many
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ImageError(
                    f"The image has {image.width} x {image.height} pixels: too narrow.", "Cut it into pieces.", 422
                )
            image.load()
            return _rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            "The file is not an image that can be read.", "Use JPEG, PNG, WebP, BMP, GIF or TIFF.", 415
        ) from None
    except Exception as error:  # a hostile file can make a decoder raise anything
        raise ImageError(
            f"The image is damaged ({type(error).__name__}).", "Open the task's image in a browser and replace it.", 422
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a browser ignores a broken EXIF block
        return image


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits. Unsigned 16-bit ones keep the high byte; others, which no browser shows, are
    stretched from their least to their greatest value."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    if low >= 0 and 255 < high <= 65535 and values.dtype.kind == "i":
        return (numbers / 256).astype(np.uint8)
    return ((numbers - low) * (255.0 / (high - low)) if high > low else numbers.clip(0, 255)).astype(np.uint8)
