"""Object boxes on the grid of image tokens: which patches an object touches, and how much attention lies on them.

Pure functions. A box is (left, top, right, bottom) in pixels of the record's image. Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
Grid = tuple[int, int]  # (height, width) in image tokens


class BoxError(ValueError):
    """`boxes` of a record that are none; the message says what they are."""


def boxes_of(meta: Mapping[str, Any]) -> list[Box] | None:
    """The boxes of a record; None where it says nothing, empty where what is asked about is not in the image.

    BoxError for what is no list of four numbers each.
    """
    given = meta.get("boxes")
    if given is None:
        return None
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise BoxError(f"boxes: expected a list of [left, top, right, bottom], found {given!r}")
    for box in given:
        numbers = isinstance(box, Sequence) and len(box) == 4 and all(_is_number(value) for value in box)
        if not numbers or not (box[0] < box[2] and box[1] < box[3]):
            raise BoxError(
                f"boxes: expected [left, top, right, bottom] with left < right and top < bottom, found {box!r}"
            )
    return [tuple(map(float, box)) for box in given]


def touched(boxes: Sequence[Box], size: tuple[int, int], grid: Grid) -> np.ndarray:
    """Patches that a box touches, bool [grid height × grid width], row-major. size: (width, height) in pixels.

    The image is taken as covered evenly by the grid, whatever size the model saw it in.
    """
    inside = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        columns = slice(max(0, math.floor(left / size[0] * grid[1])), max(0, math.ceil(right / size[0] * grid[1])))
        rows = slice(max(0, math.floor(top / size[1] * grid[0])), max(0, math.ceil(bottom / size[1] * grid[0])))
        inside[rows, columns] = True
    return inside.ravel()


def share_inside(attention: np.ndarray, inside: np.ndarray) -> float:
    """Share of the attention over the image, [..., N], that lies on the patches `inside` [N]; nan without attention.

    Rows with more attention on the image count for more. Attention alike everywhere gives `inside.mean()`: chance.
    """
    mass = np.nansum(np.asarray(attention, dtype=float).reshape(-1, len(inside)), axis=0)
    return float(mass[inside].sum() / mass.sum()) if mass.sum() > 0 else math.nan


def share_kept(patches: Sequence[Sequence[int]], inside: np.ndarray) -> float:
    """Share of the kept patches (lists per think token) that are `inside` [N]; nan where none was kept."""
    kept = [patch for row in patches for patch in row if patch < len(inside)]
    return float(np.mean(inside[kept])) if kept else math.nan


def centre(box: Box, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """(row, column) from 0 of the cell in which the box's centre lies."""
    across, down = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    return min(grid[0] - 1, max(0, int(down * grid[0]))), min(grid[1] - 1, max(0, int(across * grid[1])))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
