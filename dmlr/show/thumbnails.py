"""Small pictures for a page of many examples: one data URI per source, and cells outlined over it as vectors.

Knows nothing about examples or HTML. Nothing is downloaded: of a web address there is no thumbnail.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
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


def outlines(groups: Sequence[Sequence[int]], grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, str]]:
    """Cells of a grid (height, width) over a picture of `size` (width, height) as SVG paths: (group, path) each.

    A cell in several groups gets nested outlines. Indices beyond the grid (a second image's) are left out.
    """
    cell_w, cell_h = size[0] / grid[1], size[1] / grid[0]
    used: dict[int, int] = {}
    paths = []
    for group, cells in enumerate(groups):
        path = ""
        for cell in (c for c in cells if 0 <= c < grid[0] * grid[1]):
            inset = min(0.05 + 0.1 * used.get(cell, 0), 0.45)
            used[cell] = used.get(cell, 0) + 1
            left, top = (cell % grid[1] + inset) * cell_w, (cell // grid[1] + inset) * cell_h
            wide, high = (1 - 2 * inset) * cell_w, (1 - 2 * inset) * cell_h
            path += f"M{left:.4g} {top:.4g}h{wide:.4g}v{high:.4g}h{-wide:.4g}z"
        if path:
            paths.append((group, path))
    return paths
