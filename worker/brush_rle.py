"""Label Studio's brush RLE: masks as the page and its SDK read and write them.

The stream packs RGBA values, row by row, most significant bit first. Header: number of values (32 bits), word size - 1
(5), four length sizes - 1 (4 each). Then tokens: kind (1: one value repeated, 0: values one by one), which length size
(2), length - 1 (that many bits), and one value or `length` values (word size each). Zero bits fill the last byte.
A mask sets all four channels of a pixel to 255 or 0; only the fourth, alpha, is read back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHANNELS = 4
WORD_BITS = 8
LENGTH_BITS = (3, 4, 8, 16)
HEADER_BITS = 32 + 5 + 4 * len(LENGTH_BITS)
LONGEST_RUN = 1 << LENGTH_BITS[-1]

#: A pixel belongs to a mask from this alpha on: the page smooths the edges of brush strokes.
HALF_COVERED = 128


def encode(mask: NDArray[np.bool_]) -> list[int]:
    """RLE of `mask`, bool (height, width): bytes as ints, equal to those of the SDK's `mask2rle(mask * 255)`.

    Raises as `encode_bytes`.
    """
    return list(encode_bytes(mask))


def encode_bytes(mask: NDArray[np.bool_]) -> bytes:
    """What `encode` returns, as bytes.

    Raises ValueError for another dtype or number of dimensions, for no pixels, and above 2**30 - 1 pixels.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"A mask is a bool array of shape (height, width), not {mask.dtype} {mask.shape}.")
    if not 0 < mask.size < 2**30:
        raise ValueError(f"A mask has between 1 and 2**30 - 1 pixels, not {mask.shape[1]} x {mask.shape[0]}.")
    pixels = mask.ravel()
    changes = _changes(pixels)
    bounds = np.concatenate(([0], changes, [pixels.size]))
    lengths = np.diff(bounds) * CHANNELS
    on = (np.arange(lengths.size) & 1).astype(bool) ^ pixels[0]
    # A run of four values or more is always a repeat token. What is left of a run too long for one keeps the longest
    # form, as in the SDK.
    size_index = np.digitize(lengths, [(1 << bits) + 1 for bits in LENGTH_BITS[:-1]])
    pieces = -(-lengths // LONGEST_RUN)
    if pieces.max() > 1:
        rest = lengths - (pieces - 1) * LONGEST_RUN
        on, size_index = np.repeat(on, pieces), np.repeat(size_index, pieces)
        lengths = np.full(on.size, LONGEST_RUN)
        lengths[np.cumsum(pieces) - 1] = rest
    length_bits = np.array(LENGTH_BITS)[size_index]
    codes = ((4 | size_index) << length_bits | (lengths - 1)) << WORD_BITS | np.where(on, 255, 0)
    widths = 3 + length_bits + WORD_BITS

    header = mask.size * CHANNELS
    header = header << 5 | (WORD_BITS - 1)
    for bits in LENGTH_BITS:
        header = header << 4 | (bits - 1)
    all_codes = np.concatenate(([header], codes)).astype(np.uint64)
    all_widths = np.concatenate(([HEADER_BITS], widths))
    return _pack(all_codes, all_widths)


def decode(rle: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Mask of an RLE, bool (height, width): pixels whose alpha is at least `HALF_COVERED`.

    Reads any word size up to 32 bits and any length sizes. Raises ValueError, in words, when the data is not an RLE,
    ends early, or holds another number of pixels than height x width.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise ValueError("A brush RLE is a list of integers from 0 to 255.") from error
    if len(data) * 8 < HEADER_BITS:
        raise ValueError(f"The brush RLE is cut off: {len(data)} bytes do not even hold its header.")
    header = int.from_bytes(data[:7], "big") >> (7 * 8 - HEADER_BITS)
    count = header >> 21
    word_bits = (header >> 16 & 31) + 1
    length_bits = tuple((header >> shift & 15) + 1 for shift in (12, 8, 4, 0))
    if height < 1 or width < 1 or count != height * width * CHANNELS:
        raise ValueError(f"The brush RLE holds {count} values; a mask of {width} x {height} pixels has 4 per pixel.")

    padded = data + bytes(16)
    starts = _token_starts(padded, len(data) * 8, word_bits, length_bits)
    kinds_and_sizes = _read(padded, starts, 3)
    repeated = kinds_and_sizes >= 4
    field_bits = np.array(length_bits)[kinds_and_sizes & 3]
    lengths = _read(padded, starts + 3, field_bits) + 1
    ends = np.cumsum(lengths)
    used = int(np.searchsorted(ends, count)) + 1
    if used > ends.size:
        raise ValueError(f"The brush RLE is cut off: {ends[-1] if ends.size else 0} of {count} values are there.")
    if ends[used - 1] != count:
        raise ValueError(f"The brush RLE is damaged: it holds {ends[used - 1]} values and says {count}.")
    starts, repeated, field_bits = starts[:used], repeated[:used], field_bits[:used]
    lengths, ends = lengths[:used], ends[:used]
    values = starts + 3 + field_bits
    if values[-1] + word_bits * (1 if repeated[-1] else lengths[-1]) > len(data) * 8:
        raise ValueError("The brush RLE is cut off in its last values.")

    # Pixel p is on when value 4 p + 3 says so, so a token that ends before value e ends before pixel e // 4.
    pixel_ends = ends // CHANNELS
    pixel_counts = np.diff(pixel_ends, prepend=0)
    on = repeated & (_read(padded, values, word_bits) >= HALF_COVERED)
    mask = np.repeat(on, pixel_counts)

    single = np.flatnonzero(~repeated & (pixel_counts > 0))
    if single.size:
        first_pixels = pixel_ends[single] - pixel_counts[single]
        pixels = _ranges(first_pixels, pixel_counts[single])
        token = np.repeat(single, pixel_counts[single])
        index = pixels * CHANNELS + (CHANNELS - 1) - (ends[token] - lengths[token])
        mask[pixels] = _read(padded, values[token] + index * word_bits, word_bits) >= HALF_COVERED
    return mask.reshape(height, width)


def _changes(pixels: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the pixels that differ from the one before. Compares eight at a time: most of a mask is flat."""
    size = pixels.size - 1
    whole = size - size % 8
    now, before = pixels[1 : 1 + whole].view(np.uint64), pixels[:whole].view(np.uint64)
    mixed = np.flatnonzero(now != before)
    within = np.flatnonzero((now[mixed] ^ before[mixed]).view(np.uint8))
    changes = mixed[within >> 3] * 8 + (within & 7)
    tail = np.flatnonzero(pixels[1 + whole :] != pixels[whole:size]) + whole
    positions: NDArray[np.int64] = np.concatenate((changes, tail)) + 1
    return positions


def _pack(codes: NDArray[np.uint64], widths: NDArray[np.int64]) -> bytes:
    """Codes of the given widths (1 to 63 bits) one after another, most significant bit first.

    As in the SDK, at least one zero bit follows the last code, and a whole zero byte where the codes fill their bytes.
    Works on 64-bit words: no code is longer than one, so each word takes the codes that start in it, and the low part
    of at most one code that started in the word before.
    """
    ends = np.cumsum(widths)
    starts = ends - widths
    words = np.zeros(int(ends[-1]) // 64 + 2, np.uint64)
    room = 64 - (starts & 63) - widths
    spills = np.flatnonzero(room < 0)
    high = codes << np.maximum(room, 0).astype(np.uint64) >> np.maximum(-room, 0).astype(np.uint64)
    word = starts >> 6
    firsts = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[firsts]] = np.bitwise_or.reduceat(high, firsts)
    words[word[spills] + 1] |= codes[spills] << (64 + room[spills]).astype(np.uint64)
    return words.astype(">u8").tobytes()[: int(ends[-1]) // 8 + 1]


def _token_starts(padded: bytes, bits: int, word_bits: int, length_bits: tuple[int, ...]) -> NDArray[np.int64]:
    """Bit positions of all tokens. Where a token would end is looked up, for every bit position, in one table.

    The padding of the last byte may read as one token more: the caller counts values.
    """
    # How far the next token is from one that starts with these three bits; 0: depends on its length field.
    steps = np.array([0] * 4 + [3 + field + word_bits for field in length_bits], np.uint8)
    window = np.arange(1 << 10, dtype=np.uint16)  # a byte and the two bits that follow
    table = np.stack([steps[window >> (7 - shift) & 7] for shift in range(8)], axis=1)
    bytes_ = np.frombuffer(padded, np.uint8).astype(np.uint16)
    step = table.view(np.uint64).ravel()[bytes_[:-1] << 2 | bytes_[1:] >> 6].tobytes()

    starts = []
    position = HEADER_BITS
    while position < bits:
        starts.append(position)
        jump = step[position]
        if not jump:
            byte, shift = position >> 3, position & 7
            head = int.from_bytes(padded[byte : byte + 4], "big") << shift & 0xFFFFFFFF
            field = length_bits[head >> 29 & 3]
            length = (head << 3 & 0xFFFFFFFF) >> (32 - field)
            jump = 3 + field + (length + 1) * word_bits
        position += jump
    return np.array(starts, np.int64)


def _read(padded: bytes, positions: NDArray[np.int64], widths: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Unsigned numbers of `widths` (1 to 32) bits at bit `positions`; 0 bits beyond the end."""
    windows: NDArray[np.uint64] = np.ndarray((len(padded) - 7,), ">u8", buffer=padded, strides=(1,))
    byte = np.minimum(positions >> 3, len(padded) - 8)
    aligned = windows[byte].astype(np.uint64) << (positions & 7).astype(np.uint64)
    numbers: NDArray[np.int64] = (aligned >> (64 - np.asarray(widths)).astype(np.uint64)).astype(np.int64)
    return numbers


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... for each of the starts, `counts` of them, one after another."""
    ends = np.cumsum(counts)
    ranges: NDArray[np.int64] = np.arange(int(ends[-1])) + np.repeat(starts - (ends - counts), counts)
    return ranges
