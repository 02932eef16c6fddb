"""Where the decoder's low-resolution map lies on the image.

Original coordinates: (x, y) in pixels of the original image. Low-resolution: (col, row) in cells of the decoder's
output, which covers the padded input. Both are continuous, the centre of the first pixel or cell at (0.5, 0.5),
so `int(col)` is the cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from worker.contract import Prompts


@dataclass(frozen=True)
class Window:
    """A part of an image: columns x0 <= x < x1 and rows y0 <= y < y1, whole pixels of the original image."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to cut it out of an array."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def covers(self, other: Window) -> bool:
        """Whether the other one lies in it."""
        return self.x0 <= other.x0 and self.y0 <= other.y0 and self.x1 >= other.x1 and self.y1 >= other.y1

    def scaled(self, size: tuple[int, int], to: tuple[int, int]) -> Window:
        """The same part of an image of `to` instead of `size` (height, width), at least a pixel of it."""
        along_x, along_y = to[1] / size[1], to[0] / size[0]
        x0, y0 = min(round(self.x0 * along_x), to[1] - 1), min(round(self.y0 * along_y), to[0] - 1)
        return Window(x0, y0, max(round(self.x1 * along_x), x0 + 1), max(round(self.y1 * along_y), y0 + 1))


@dataclass(frozen=True)
class Frame:
    """How the image lies in the low-resolution map. Sizes are (height, width).

    `window`: the part of the image that was encoded, None for all of it; `input_size`: what it was resized to;
    `padded_size`: what that was padded to, see `Backbone.padded_size`.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    lowres_size: tuple[int, int]
    padded_size: tuple[int, int]
    window: Window | None = None

    @property
    def seen(self) -> Window:
        """The part of the image that was encoded."""
        return self.window or Window(0, 0, self.original_size[1], self.original_size[0])

    @property
    def _scale(self) -> tuple[float, float]:
        """Cells per original pixel, (x, y)."""
        (height, width), (input_height, input_width) = self.seen.size, self.input_size
        (rows, columns), (padded_height, padded_width) = self.lowres_size, self.padded_size
        return input_width / width * columns / padded_width, input_height / height * rows / padded_height

    def to_lowres(self, x: float, y: float) -> tuple[float, float]:
        """Original (x, y) to low-resolution (col, row)."""
        scale_x, scale_y = self._scale
        return (x - self.seen.x0) * scale_x, (y - self.seen.y0) * scale_y

    def to_original(self, col: float, row: float) -> tuple[float, float]:
        """Low-resolution (col, row) to original (x, y)."""
        scale_x, scale_y = self._scale
        return col / scale_x + self.seen.x0, row / scale_y + self.seen.y0

    def visible(self, prompts: Prompts) -> Prompts:
        """`prompts` without clicks outside the window, its border included."""
        seen = self.seen
        clicks = tuple(c for c in prompts.clicks if seen.x0 <= c.x <= seen.x1 and seen.y0 <= c.y <= seen.y1)
        return prompts if len(clicks) == len(prompts.clicks) else Prompts(clicks=clicks, box=prompts.box)

    @property
    def width(self) -> float:
        """Columns of the map that hold the image, the last perhaps in part."""
        return self.input_size[1] * self.lowres_size[1] / self.padded_size[1]

    @property
    def valid(self) -> tuple[int, int]:
        """(rows, cols): the leading part of the map whose cells touch the image; the rest is padding."""
        (height, width), (rows, columns) = self.input_size, self.lowres_size
        padded_height, padded_width = self.padded_size
        return math.ceil(height * rows / padded_height), math.ceil(width * columns / padded_width)
