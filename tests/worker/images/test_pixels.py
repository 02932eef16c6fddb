from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from worker.contract import RuntimeOptions
from worker.images.errors import ImageError
from worker.images.pixels import decode_image

OPTIONS = RuntimeOptions(data_dir=Path("unused"), max_image_megapixels=4)


def file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def picture(height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    decoded = decode_image(file(Image.fromarray(picture()), kind), OPTIONS)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, picture())


def test_lossy_formats_and_the_first_frame_of_a_gif() -> None:
    flat = np.full((16, 24, 3), 90, np.uint8)
    other = Image.fromarray(np.full((16, 24, 3), 200, np.uint8))
    for kind, how in [("JPEG", {}), ("WEBP", {}), ("GIF", {"save_all": True, "append_images": [other]})]:
        decoded = decode_image(file(Image.fromarray(flat), kind, **how), OPTIONS)
        assert decoded.shape == flat.shape
        assert np.abs(decoded.astype(int) - 90).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_picture(orientation: int, kind: str) -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # stored top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(file(image, kind, exif=exif.tobytes()), OPTIONS)
    height, width = (16, 32) if orientation < 5 else (32, 16)
    assert decoded.shape == (height, width, 3)
    bottom = orientation in (3, 4, 7, 8)
    right = orientation in (2, 3, 6, 7)
    quarter = decoded[height // 2 * bottom :, width // 2 * right :][: height // 2, : width // 2]
    assert quarter.mean() > 200 > 100 > decoded.mean()


def test_16_bit_grey_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256], [32768, 65535, 1000]], np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(file(Image.fromarray(values), kind), OPTIONS)
        assert np.array_equal(decoded[:, :, 0], values >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_grey_is_stretched(mode: str) -> None:
    values = np.array([[-1000.0, 0.0, 1000.0]])
    image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    assert decode_image(file(image, "TIFF"), OPTIONS)[0, :, 0].tolist() == [0, 127, 255]


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[1, 1] = (0, 0, 0, 128)
    decoded = decode_image(file(Image.fromarray(rgba)), OPTIONS)
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]
    assert abs(int(decoded[1, 1, 0]) - 127) <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode_image(file(palette, transparency=1), OPTIONS)[0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode)
    decoded = decode_image(file(image, "TIFF" if mode == "CMYK" else "PNG"), OPTIONS)
    assert decoded.shape == (6, 8, 3)
    assert decoded.min() == 255


@pytest.mark.parametrize("size", [(2001, 2000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(png_of_size(*size), OPTIONS)
    assert caught.value.status in (413, 422)
    assert "megapixels" in caught.value.error or "damaged" in caught.value.error


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_truncated_files_are_damaged_ones(kind: str) -> None:
    data = file(Image.fromarray(picture(200, 200)), kind)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 2], OPTIONS)
    assert caught.value.status in (415, 422)


@pytest.mark.parametrize(
    "data", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_other_formats_are_named_as_such(data: bytes) -> None:
    with pytest.raises(ImageError, match="JPEG, PNG") as caught:
        decode_image(data, OPTIONS)
    assert caught.value.status == 415


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]), st.data())
def test_mutated_files_give_pixels_or_an_image_error(kind: str, data: st.DataObject) -> None:
    body = bytearray(file(Image.fromarray(picture()), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(body), OPTIONS)
    except ImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3
