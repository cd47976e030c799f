"""One image source -> one RGB image that every supported vision tower accepts, or one clear error."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT_RATIO = 200  # beyond it the Qwen2-VL family refuses an image (qwen-vl-utils, smart_resize)
MAX_IMAGE_PIXELS = 178_956_970  # twice Pillow's warning level: above it lies a decompression bomb
_MAX_DOWNLOAD = 64 * 2**20


class ImageError(ValueError):
    """An image that cannot be read or that no supported vision tower accepts; the message names it."""


def local_path(source: str) -> str:
    """The path in a file:// URL; any other text as it is."""
    return unquote(urlparse(source).path) if source.lower().startswith("file://") else source


def shorten(text: str, limit: int = 120) -> str:
    """At most `limit` characters, for messages."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """An RGB image from a path, file:// or http(s) URL, `data:image/...;base64,` string or PIL image.

    Transparency is laid on white, 16-bit greyscale is scaled to 8 bit, EXIF orientation is applied. Raises
    ImageError when the source cannot be read, is no image, is truncated, has more than MAX_IMAGE_PIXELS
    pixels, or has sides that differ by more than MAX_ASPECT_RATIO times.
    """
    name = shorten(str(source)) if not isinstance(source, Image.Image) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixel limit below decides
            image = source if isinstance(source, Image.Image) else Image.open(_open_bytes(str(source), name))
            _check_size(image, name)
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


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels are more than {MAX_IMAGE_PIXELS} (decompression bomb?)")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{name}: {width} x {height}: sides differ by more than {MAX_ASPECT_RATIO} times; crop or pad")


def _open_bytes(source: str, name: str) -> io.BytesIO:
    if source.lower().startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(re.sub(r"\s", "", source.partition(",")[2]), validate=True))
        except binascii.Error as error:
            raise ImageError(f"{name}: not valid base64 ({error})") from None
    if re.match(r"(?i)https?://", source):
        return io.BytesIO(_download(source, name))
    try:
        content = Path(local_path(source)).read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not content:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    return io.BytesIO(content)


def _download(url: str, name: str) -> bytes:
    import requests

    try:
        with requests.get(url, timeout=30, stream=True) as response:
            response.raise_for_status()
            content = b""
            for chunk in response.iter_content(1 << 16):
                content += chunk
                if len(content) > _MAX_DOWNLOAD:
                    raise ImageError(f"{name}: larger than {_MAX_DOWNLOAD >> 20} MiB")
            return content
    except requests.RequestException as error:
        raise ImageError(f"{name}: cannot be fetched ({type(error).__name__}: {error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 255 if values.max(initial=0) <= 255 and not image.mode.startswith("I;16") else 65535
        if image.mode == "F" and values.max(initial=0) <= 1:
            top = 1
        return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
