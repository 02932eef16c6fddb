from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.converter import brush
from numpy.typing import NDArray

from worker import brush_rle

Mask = NDArray[np.bool_]


def sdk(mask: Mask) -> list[int]:
    return brush.mask2rle(mask.astype(np.uint8) * 255)


def masks() -> Iterator[Mask]:
    """Empty, full, thin, round, striped and speckled masks of many sizes."""
    rng = np.random.default_rng(7)
    for height, width in [(1, 1), (1, 2), (1, 70_000), (70_000, 1), (9, 7), (64, 64), (300, 401), (512, 512)]:
        yield np.zeros((height, width), bool)
        yield np.ones((height, width), bool)
    for _ in range(190):
        height, width = rng.integers(1, 220, 2)
        yield rng.random((height, width)) < rng.choice([0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
    for length in (1, 2, 3, 4, 5, 63, 64, 65, 16_383, 16_384, 16_385, 32_768, 40_000):  # around each length size
        row = np.zeros((1, 3 * length + 1), bool)
        row[0, length : 2 * length] = True
        yield row
    yy, xx = np.mgrid[:3000, :4000]
    disc: Mask = (xx - 2100) ** 2 + (yy - 1400) ** 2 < 900**2
    yield disc
    yield disc ^ (rng.random(disc.shape) < 0.002)


def front_end_encode(
    values: Sequence[int], word: int = 8, sizes: tuple[int, int, int, int] = (3, 4, 8, 16)
) -> list[int]:
    """Slow writer of any valid stream: repeat tokens where a value repeats, else values one by one."""
    bits = f"{len(values):032b}{word - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)

    def token(kind: int, run: Sequence[int]) -> str:
        index = next(i for i, size in enumerate(sizes) if len(run) <= 1 << size)
        words = run[:1] if kind else run
        return f"{kind}{index:02b}{len(run) - 1:0{sizes[index]}b}" + "".join(f"{value:0{word}b}" for value in words)

    longest = 1 << max(sizes)
    sizes = tuple(sizes)
    start = 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] == values[start] and stop - start < longest:
            stop += 1
        if stop - start == 1:
            while stop < len(values) and values[stop] != values[stop - 1] and stop - start < longest:
                stop += 1
            bits += token(0, values[start:stop])
        else:
            bits += token(1, values[start:stop])
        start = stop
    bits += "0" * (-len(bits) % 8)
    return list(int(bits, 2).to_bytes(len(bits) // 8, "big"))


def test_bytes_equal_the_sdk_on_many_masks() -> None:
    count = 0
    for mask in masks():
        rle = brush_rle.encode(mask)
        assert rle == sdk(mask), mask.shape
        assert np.array_equal(brush_rle.decode(rle, *mask.shape), mask)
        count += 1
    assert count >= 200


def test_elements_are_plain_ints() -> None:
    assert all(type(byte) is int for byte in brush_rle.encode(np.eye(5, dtype=bool)))


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=60)))
def test_round_trip_and_equality(mask: Mask) -> None:
    rle = brush_rle.encode(mask)
    assert rle == sdk(mask)
    assert np.array_equal(brush_rle.decode(rle, *mask.shape), mask)


def test_a_view_of_a_larger_array_is_encoded_as_it_looks() -> None:
    large = np.random.default_rng(0).random((50, 60)) < 0.5
    for view in (large[3:40:2, 5:50:3], large.T, large[::-1]):
        assert brush_rle.encode(view) == sdk(np.ascontiguousarray(view))


def test_soft_edges_of_the_page_are_cut_at_half() -> None:
    alpha = np.array([[0, 127, 128, 255], [1, 200, 100, 254]], np.uint8)
    rle = front_end_encode(np.repeat(alpha.ravel(), 4).tolist())
    assert brush.decode_rle(rle).tolist() == np.repeat(alpha.ravel(), 4).tolist()
    assert np.array_equal(brush_rle.decode(rle, 2, 4), alpha >= 128)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 30).flatmap(
        lambda pixels: st.lists(st.sampled_from([0, 1, 127, 128, 200, 255]), min_size=4 * pixels, max_size=4 * pixels)
    ),
    st.integers(8, 32),
    st.tuples(*[st.integers(1, 15)] * 3, st.just(16)),
)
def test_any_header_and_literal_values(values: list[int], word: int, sizes: tuple[int, int, int, int]) -> None:
    rle = front_end_encode(values, word, sizes)
    expected = np.array(values[3::4]) >= 128
    assert np.array_equal(brush_rle.decode(rle, 1, len(values) // 4)[0], expected)


@given(hnp.arrays(bool, (7, 9)), st.data())
def test_truncation_is_an_error_in_words(mask: Mask, data: st.DataObject) -> None:
    rle = brush_rle.encode(mask)
    end = data.draw(st.integers(0, len(rle) - 2))
    with pytest.raises(ValueError, match="cut off"):
        brush_rle.decode(rle[:end], 7, 9)


@given(st.lists(st.integers(0, 255), max_size=200), st.integers(0, 20), st.integers(0, 20))
def test_noise_is_a_mask_or_a_value_error(noise: list[int], height: int, width: int) -> None:
    for data in (noise, list((height * width * 4).to_bytes(4, "big")) + noise):
        try:
            mask = brush_rle.decode(data, height, width)
        except ValueError:
            continue
        assert mask.shape == (height, width)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="4 x 5 pixels"):
        brush_rle.decode(brush_rle.encode(np.ones((4, 4), bool)), 5, 4)


@pytest.mark.parametrize("rle", [[256] * 20, [-1] * 20, ["a"] * 20, None, [1.5] * 20])
def test_what_is_no_list_of_bytes_is_refused(rle: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="list of integers"):
        brush_rle.decode(rle, 4, 4)


@pytest.mark.parametrize("mask", [np.zeros((0, 5), bool), np.zeros((3, 3), np.uint8), np.zeros(9, bool)])
def test_encode_refuses_what_is_no_mask(mask: Mask) -> None:
    with pytest.raises(ValueError, match="mask"):
        brush_rle.encode(mask)
