"""One image source -> one RGB image that every supported vision tower accepts, or one clear error."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import anyio
import numpy as np
from anyio.from_thread import start_blocking_portal
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200  # beyond it the Qwen2-VL family refuses an image (qwen-vl-utils, smart_resize)
MAX_IMAGE_PIXELS = 178_956_970  # twice Pillow's warning level: above it lies a decompression bomb
MAX_DOWNLOAD = 64 * 2**20  # bytes
_DOWNLOAD_SECONDS = 60  # in all: a server may drip its headers and bytes


class ImageError(ValueError):
    """An image that cannot be read or that no supported vision tower accepts; the message names it."""


@dataclass(frozen=True)
class ImageFile:
    """An image's file, read but not decoded, and the name that messages give it."""

    name: str
    content: bytes


def local_path(source: str) -> str:
    """The path in a file:// URL; any other text as it is."""
    return unquote(urlparse(source).path) if source.lower().startswith("file://") else source


def shorten(text: str, limit: int = 120) -> str:
    """At most `limit` characters, for messages."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def without_password(source: str) -> str:
    """A URL without the user and password in it; any other text as it is. For records and messages."""
    return re.sub(r"(?i)(https?://)[^/?#\s]*@", r"\1", source)


def open_image(source: str | Path | ImageFile | Image.Image, most: int | None = None) -> Image.Image:
    """An RGB image from a path, file:// or http(s) URL, `data:image/...;base64,` string, image file or PIL image.

    Transparency is laid on white, 16-bit greyscale is scaled to 8 bit, EXIF orientation is applied. Raises
    ImageError when the source cannot be read, is no image, is truncated or damaged as far as the format can tell, has
    more than `most` pixels (none: MAX_IMAGE_PIXELS) or pixels that are no number, or has sides that differ by more than
    MAX_ASPECT_RATIO times.
    """
    name, image, most = "image", source, most or MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixel limit below decides
            if not isinstance(source, Image.Image):
                file = source if isinstance(source, ImageFile) else read_image_file(source)
                name = file.name
                image = Image.open(io.BytesIO(file.content))
                if image.format == "PNG":  # whose checksums loading does not look at
                    image.verify()
                    image = Image.open(io.BytesIO(file.content))
            shape, sides = f"{image.width} x {image.height}", sorted(image.size)
            if sides[0] * sides[1] > most:
                raise ImageError(f"{name}: {shape} pixels are more than {most} (decompression bomb?)")
            if sides[1] > MAX_ASPECT_RATIO * sides[0]:
                raise ImageError(f"{name}: {shape}: sides differ by more than {MAX_ASPECT_RATIO} times; crop or pad")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError(f"{name}: too large to open safely ({error})") from None
    except Exception as error:  # decoders raise many types (OSError, SyntaxError, struct.error, zlib.error)
        raise ImageError(f"{name}: cannot be read as an image ({error})") from None


def read_image_file(source: str | Path) -> ImageFile:
    """The file behind a path, URL or data string, not decoded. ImageError when it cannot be read."""
    source = str(source)
    name = shorten(without_password(source))
    try:
        if source.lower().startswith("data:"):
            content = base64.b64decode(re.sub(r"\s", "", source.partition(",")[2]), validate=True)
        elif re.match(r"(?i)https?://", source):
            content = _download(source)
        elif not (content := Path(local_path(source)).read_bytes()):
            raise ValueError("the file is empty (0 bytes)")
    except binascii.Error as error:
        raise ImageError(f"{name}: not valid base64 ({error})") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    return ImageFile(name, content)


def _download(url: str) -> bytes:
    """What a server sends. ValueError for nothing, too much, or not in time."""
    try:
        urlparse(url).port  # noqa: B018 (raises; the client finds it while it connects, and says nothing)
    except ValueError as error:
        raise ValueError(f"cannot be fetched ({error})") from None
    # A thread with an event loop of its own: notebooks already run one in this thread.
    with start_blocking_portal() as portal:
        return portal.call(_fetch, url)


async def _fetch(url: str) -> bytes:
    import httpx2

    content = bytearray()
    try:
        with anyio.fail_after(_DOWNLOAD_SECONDS):
            async with (
                httpx2.AsyncClient(follow_redirects=True, timeout=None) as client,
                client.stream("GET", url) as response,
            ):
                response.raise_for_status()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_DOWNLOAD:
                        raise ValueError(f"larger than {MAX_DOWNLOAD >> 20} MiB")
    except TimeoutError:
        raise ValueError(f"not fetched within {_DOWNLOAD_SECONDS} seconds") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = without_password(f"{type(error).__name__}: {error}").split("\n")[0]
        raise ValueError(f"cannot be fetched ({reason})") from None
    return bytes(content)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are no number, NaN or infinite")
        top = 255 if values.max(initial=0) <= 255 and not image.mode.startswith("I;16") else 65535
        if image.mode == "F" and values.max(initial=0) <= 1:
            top = 1
        return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
