"""Image columns of the hub -> the one image file of a dataset row. Bytes in, bytes out; nothing is written here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dmlr.data.images import ImageError, open_image

_KEPT = {"PNG": ".png", "JPEG": ".jpg"}


def image_bytes(value: Any) -> list[bytes]:
    """The encoded images in a column's value: {bytes, path}, a list of those, or null. ImageError for another."""
    values = value if isinstance(value, list) else [value]
    found = [item.get("bytes") if isinstance(item, dict) else item for item in values]
    found = [item for item in found if item is not None]
    if not all(isinstance(item, bytes) for item in found):
        raise ImageError(f"its image is {type(found[0]).__name__}, not an encoded file")
    return found


def encode_image(images: list[bytes]) -> tuple[bytes, str]:
    """(file content, suffix) of one image, kept as it is when it is PNG or JPEG, or of several side by side.

    ImageError when one cannot be read.
    """
    opened = []
    for content in images:
        try:
            image = Image.open(io.BytesIO(content))
        except Exception as error:  # not an image, or a damaged one: decoders raise many types
            raise ImageError(f"its image cannot be read ({type(error).__name__}: {error})") from None
        opened.append((image.format, open_image(image)))
    if len(opened) == 1 and opened[0][0] in _KEPT:
        return images[0], _KEPT[opened[0][0]]
    image = opened[0][1] if len(opened) == 1 else side_by_side([image for _, image in opened])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), ".png"


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """One image of several, top-aligned on white, each under its caption "Image 1", "Image 2", ...

    A dataset row has a single image, and so have the methods that pick patches from it.
    """
    size = max(14, max(image.height for image in images) // 20)
    font = ImageFont.load_default(size)
    caption, gap = 2 * size, size
    # A narrow picture still needs room for its caption.
    widths = [max(image.width, 5 * size) for image in images]
    canvas = Image.new(
        "RGB", (sum(widths) + gap * (len(images) - 1), caption + max(image.height for image in images)), "white"
    )
    draw, left = ImageDraw.Draw(canvas), 0
    for number, (image, width) in enumerate(zip(images, widths, strict=True), 1):
        draw.text((left, size // 3), f"Image {number}", fill="black", font=font)
        canvas.paste(image, (left, caption))
        left += width + gap
    return canvas
