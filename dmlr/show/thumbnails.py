"""Small pictures for a page of many examples: one data URI per source, and cells outlined over it as vectors.

Knows nothing about examples or HTML. Nothing is downloaded: of a web address there is no thumbnail.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dmlr.data.images import ImageError, open_image

QUALITY = 72  # of WebP; at 224 pixels a photograph is then some 5 kB, a drawing 1 kB


@dataclass(frozen=True)
class Thumbnail:
    """`id` comes from the content, so that equal pictures have one; sizes in pixels."""

    id: str
    uri: str
    width: int
    height: int


def thumbnail(source: str | Path | Image.Image, largest: int = 224, folder: str | Path | None = None) -> Thumbnail:
    """An image as WebP, its longer side at most `largest` pixels.

    Relative paths lie under `folder`. Raises ImageError when the source cannot be read or lies on the web.
    """
    if not isinstance(source, Image.Image):
        if re.match(r"(?i)https?://", str(source)):
            raise ImageError(f"{source}: not downloaded for a thumbnail")
        if folder is not None and not re.match(r"(?i)(data|file):", str(source)):
            source = Path(folder) / source
    image = open_image(source)
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY)
    content = buffer.getvalue()
    uri = "data:image/webp;base64," + base64.b64encode(content).decode("ascii")
    return Thumbnail("image-" + hashlib.sha256(content).hexdigest()[:16], uri, *image.size)


def nested_cells(
    groups: Sequence[Sequence[int]], grid: tuple[int, int], size: tuple[int, int]
) -> Iterator[tuple[int, float, float, float, float]]:
    """Cells of a grid (height, width) over a picture of `size` (width, height): group, left, top, width, height each.

    A cell in several groups is smaller in each. Indices beyond the grid (a thumbnail's, another image's) are left out.
    """
    wide, high, used = size[0] / grid[1], size[1] / grid[0], Counter()
    for group, cells in enumerate(groups):
        for cell in (c for c in cells if 0 <= c < grid[0] * grid[1]):
            inset = min(0.05 + 0.1 * used[cell], 0.45)
            used[cell] += 1
            place = (cell % grid[1] + inset) * wide, (cell // grid[1] + inset) * high
            yield group, *place, (1 - 2 * inset) * wide, (1 - 2 * inset) * high


def outlines(groups: Sequence[Sequence[int]], grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, str]]:
    """`nested_cells` as SVG paths: (group, path) each."""
    paths: dict[int, str] = defaultdict(str)
    for group, left, top, wide, high in nested_cells(groups, grid, size):
        paths[group] += f"M{left:.4g} {top:.4g}h{wide:.4g}v{high:.4g}h{-wide:.4g}z"
    return list(paths.items())
