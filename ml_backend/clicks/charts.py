"""Drawings of the report: SVG text and embedded PNG, no script, nothing from outside."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Series:
    """Points with intervals: (x, mean, low, high); `tone` is a colour class of the page."""

    name: str
    tone: str
    points: Sequence[tuple[float, float, float, float]]


def interval_plot(series: Sequence[Series], *, x_label: str, y_label: str, width: int = 560, height: int = 260) -> str:
    """Means with error bars over whole numbers, one line a series; empty text without points."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    xs = sorted({point[0] for one in drawn for point in one.points})
    lows = [point[2] for one in drawn for point in one.points]
    highs = [point[3] for one in drawn for point in one.points]
    ticks = nice_ticks(min(0.0, *lows), max(highs))
    left, right, top, bottom = 52, 12, 14, 40
    span_x = max(xs[-1] - xs[0], 1.0)

    def px(x: float) -> float:
        return left + 14 + (x - xs[0]) / span_x * (width - left - right - 28)

    def py(y: float) -> float:
        return top + (ticks[-1] - y) / (ticks[-1] - ticks[0]) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{escape(y_label)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 7}" y="{py(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    parts += [f'<text class="tick" x="{px(x):.1f}" y="{height - 22}" text-anchor="middle">{x:g}</text>' for x in xs]
    middle = (left + width) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for index, one in enumerate(drawn):
        shift = (index - (len(drawn) - 1) / 2) * 7
        line = " ".join(f"{px(x) + shift:.1f},{py(mean):.1f}" for x, mean, _, _ in one.points)
        parts.append(f'<g class="{one.tone}"><polyline class="line" points="{line}"/>')
        for x, mean, low, high in one.points:
            at = px(x) + shift
            parts.append(f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>')
            title = f"{escape(one.name)}: {mean:.3f} ({low:.3f} to {high:.3f})"
            parts.append(f'<circle cx="{at:.1f}" cy="{py(mean):.1f}" r="4"><title>{title}</title></circle>')
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def difference_plot(rows: Sequence[tuple[str, float, float, float]], width: int = 1080) -> str:
    """Relative differences with intervals, percent: (name, mean, low, high); a line marks zero."""
    if not rows:
        return ""
    height = 34 * len(rows) + 44
    limit = max(abs(value) for row in rows for value in row[1:]) * 1.1 or 1.0
    ticks = [tick for tick in nice_ticks(-limit, limit) if -limit <= tick <= limit]
    left, right = 150, 16

    def px(value: float) -> float:
        return left + (value + limit) / (2 * limit) * (width - left - right)

    parts = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="Difference between the arms">']
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="8" y2="{height - 34}"/>')
        parts.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{height - 18}" text-anchor="middle">{_signed(tick)} %</text>'
        )
    for index, (name, mean, low, high) in enumerate(rows):
        y = 25 + 34 * index
        sure = "good" if high < 0 else "bad" if low > 0 else "unsure"
        parts.append(f'<text class="name" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        title = f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"
        parts.append(
            f'<g class="{sure}"><line class="bar wide" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{px(mean):.1f}" cy="{y}" r="5.5"><title>{title}</title></circle></g>'
        )
    parts.append("</svg>")
    return "".join(parts)


def heat_map(counts: NDArray[np.int64], tone: tuple[int, int, int]) -> str:
    """Data address of a PNG: counts (rows, columns) over the image frame, smoothed; transparent to `tone` (RGB)."""
    cell = 8
    heat = np.kron(counts.astype(np.float64), np.ones((cell, cell)))
    reach = np.arange(-2 * cell, 2 * cell + 1)
    kernel = np.exp(-0.5 * (reach / (0.75 * cell)) ** 2)
    for axis in (0, 1):
        heat = np.apply_along_axis(np.convolve, axis, heat, kernel, mode="same")
    pixels = np.empty((*heat.shape, 4), np.uint8)
    pixels[..., :3] = tone
    pixels[..., 3] = np.round(np.sqrt(heat / max(1e-9, float(heat.max()))) * 235)
    return png(pixels)


def silhouettes(before: NDArray[np.bool_], final: NDArray[np.bool_], longest: int = 240) -> str:
    """Data address of a PNG of two masks of one shape: both grey, only final green, only before red."""
    step = max(1, -(-max(before.shape) // longest))
    before, final = before[::step, ::step], final[::step, ::step]
    pixels = np.zeros((*before.shape, 4), np.uint8)
    pixels[before & final] = (120, 130, 150, 190)
    pixels[~before & final] = (46, 160, 100, 210)
    pixels[before & ~final] = (222, 92, 84, 210)
    return png(pixels)


def png(pixels: NDArray[np.uint8]) -> str:
    """Data address of an RGBA image, uint8 (height, width, 4)."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 4)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / wanted
    power = 10.0 ** np.floor(np.log10(raw))
    step = float(next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999))
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [round(index * step, 10) for index in range(first, last + 1)]


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _short(value: float) -> str:
    return f"{value:g}"
