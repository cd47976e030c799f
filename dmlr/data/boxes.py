"""Object boxes on the grid of image tokens. A box is (left, top, right, bottom) in pixels of the record's image.

Pure functions. Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
Grid = tuple[int, int]  # (height, width) in image tokens


class BoxError(ValueError):
    """`boxes` of a record that are none; the message says what they are."""


def checked_boxes(given: Any) -> list[Box]:
    """The `boxes` of a record, empty where what is asked about is not in the image. BoxError for what is no list of
    four numbers each."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise BoxError(f"boxes: expected a list of [left, top, right, bottom], got {given!r}")
    for box in given:
        numbers = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        if not numbers or not all(map(math.isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise BoxError(
                f"boxes: expected [left, top, right, bottom] with left < right and top < bottom, got {box!r}"
            )
    return [tuple(map(float, box)) for box in given]


def touched(boxes: Sequence[Box], size: tuple[int, int], grid: Grid) -> np.ndarray:
    """Patches that a box touches, bool [grid height * grid width], row-major. size: (width, height) in pixels.

    The image is taken as covered evenly by the grid, whatever size the model saw it in.
    """
    inside = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        columns = slice(max(0, math.floor(left / size[0] * grid[1])), max(0, math.ceil(right / size[0] * grid[1])))
        rows = slice(max(0, math.floor(top / size[1] * grid[0])), max(0, math.ceil(bottom / size[1] * grid[0])))
        inside[rows, columns] = True
    return inside.ravel()


def distance(boxes: Sequence[Box], size: tuple[int, int], grid: Grid) -> np.ndarray:
    """From each patch's centre to that of the nearest box, in patches, [grid height * grid width], row-major."""
    down, across = np.mgrid[: grid[0], : grid[1]] + 0.5
    centres = [((b[1] + b[3]) / 2 / size[1] * grid[0], (b[0] + b[2]) / 2 / size[0] * grid[1]) for b in boxes]
    away = [np.hypot(down - y, across - x) for y, x in centres]
    return np.min(away or [np.full(grid, np.inf)], axis=0).ravel()
