"""What a notebook shows: a figure with its caption, a table, sentences, a gallery of questions and answers.

Whatever a dataset or a model says is escaped; images are embedded, so a page needs no other file. Knows nothing about
what a figure or a table shows.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import display
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from dmlr.data.images import ImageError, open_image
from dmlr.show.gallery import CHANGES
from dmlr.show.plots import TOKEN_COLOURS, Grid, nested_cells
from dmlr.show.style import gallery_script, table, template


def png(picture: Figure | Image.Image) -> bytes:
    """A PNG of at most 256 colours, a third of the size."""
    if isinstance(picture, Figure):
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png", dpi=150)
        picture = Image.open(drawn)
    buffer = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: Figure | Image.Image) -> str:
    """`png` as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


# In a notebook: what a code host shows without running anything, with a text where HTML is not shown.


def show(picture: Figure | Image.Image, caption: str, alt: str | None = None) -> None:
    """Displays a figure as a PNG, its caption below; `alt` says in words what it shows, where the caption does not."""
    width = round(picture.get_figwidth() * 84) if isinstance(picture, Figure) else picture.size[0]
    content = base64.b64encode(png(picture)).decode("ascii")
    about = {"alt": alt or caption, "width": width}
    display({"image/png": content, "text/plain": alt or caption}, metadata={"image/png": about}, raw=True)
    _display(Markup('<p class="caption"><em>{}</em></p>').format(caption), caption)


def show_table(frame: pd.DataFrame, caption: str = "", otherwise: str = "") -> None:
    """Displays a table (see `table`); of one without rows the sentence `otherwise`."""
    if len(frame):
        _display(table(frame, caption), "\n".join(filter(None, [frame.to_string(index=False), caption])))
    else:
        say(otherwise)


def say(*sentences: str) -> None:
    """Displays sentences that a run has computed, each a paragraph."""
    _display(Markup("").join(Markup("<p>{}</p>").format(sentence) for sentence in sentences), "\n".join(sentences))


def fold(title: str, frame: pd.DataFrame) -> None:
    """Displays a table that opens when its title is clicked."""
    html = Markup("<details><summary>{}</summary>{}</details>").format(title, Markup(table(frame)))
    _display(html, f"{title}\n{frame.to_string(index=False, header=any(frame.columns))}")


def settings(facts: Mapping[str, Any]) -> None:
    """Displays the settings and the provenance of a run, folded away."""
    fold("Settings and machine of this run", pd.DataFrame(facts.items(), columns=["", ""]).astype(str))


def _display(html: str, text: str) -> None:
    display({"text/html": str(html), "text/plain": text}, raw=True)


# galleries


def gallery(cards: Sequence[Mapping[str, Any]], most: int = 1000) -> str:
    """HTML of cards as `gallery.cards` makes them, every text escaped; from two on with a search box and filters.

    An image is embedded once; one that cannot be read is named instead. The patches that the chosen method kept are
    outlined on a card's first image. Cards beyond `most` are counted and left out.
    """
    stored: dict[str, dict[str, Any]] = {}
    shown = [dict(card) | _pictures(card, stored) for card in cards[:most]]
    return template("gallery.html.j2").render(
        cards=shown,
        images={image["id"]: image for image in stored.values()}.values(),
        filters=_filters(shown) if len(shown) > 1 else [],
        left_out=len(cards) - len(shown),
        drawn=sorted({method for card in shown for picture in card["pictures"] for method in picture["kept"]}),
        colours=TOKEN_COLOURS,
        script=Markup(gallery_script()),
    )


def thumbnail(source: str, largest: int = 224) -> dict[str, Any]:
    """An image as WebP, its longer side at most `largest` pixels: id (of the content), uri, width and height.

    Raises ImageError when it cannot be read or lies on the web: nothing is downloaded.
    """
    if re.match(r"(?i)https?://", source):
        raise ImageError(f"{source}: not downloaded for a thumbnail")
    image = open_image(source)
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=72)  # a photograph is then some 5 kB, a drawing 1 kB
    content = buffer.getvalue()
    name, uri = hashlib.sha256(content).hexdigest()[:16], base64.b64encode(content).decode("ascii")
    size = {"width": image.width, "height": image.height}
    return {"id": f"image-{name}", "uri": f"data:image/webp;base64,{uri}", **size}


def outlines(groups: Sequence[Sequence[int]], grid: Grid, size: tuple[int, int]) -> dict[int, str]:
    """`nested_cells` as an SVG path for each group that has any."""
    paths: dict[int, str] = {}
    for group, left, top, wide, high in nested_cells(groups, grid, size):
        paths[group] = f"{paths.get(group, '')}M{left:.4g} {top:.4g}h{wide:.4g}v{high:.4g}h{-wide:.4g}z"
    return paths


def _pictures(card: Mapping[str, Any], stored: dict[str, dict[str, Any]]) -> dict[str, list]:
    """What a card shows of its images; `stored` has the thumbnail of every image that was read before."""
    pictures, unread = [], []
    for position, source in enumerate(card["images"]):
        try:
            image = stored[source] = stored.get(source) or thumbnail(source)
        except ImageError as error:
            unread.append(f"no image: {error}")
            continue
        drawn = {method: kept for method, kept in enumerate(card["kept"]) if kept and position == 0}
        names = ", ".join(card["methods"][method] for method in drawn)
        alt = f"Image of example {card['idx']}" + (f"; outlined are the patches kept by {names}" if names else "")
        size = image["width"], image["height"]
        kept = {method: outlines(*patches, size) for method, patches in drawn.items()}
        pictures.append(image | {"alt": alt, "kept": kept})
    return {"pictures": pictures, "unread": unread}


def _filters(cards: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[tuple[Any, str]]]]:
    """Name, label and options of the select boxes that tell these cards apart: method, change, dataset, category."""
    boxes, methods = [], cards[0]["methods"]
    if len(methods) > 2:
        boxes.append(("method", f"{methods[0]} against", list(enumerate(methods))[1:]))
    if changes := {change for card in cards for change in card["changes"]}:
        label = f"From {methods[0]} to {methods[1]}" if len(methods) == 2 else "Outcome"
        boxes.append(("change", label, [("", "all outcomes"), *((c, c) for c in CHANGES if c in changes)]))
    for name, plural in (("dataset", "all datasets"), ("category", "all categories")):
        values = sorted({str(card[name]) for card in cards if card[name]})
        boxes += [(name, name.capitalize(), [("", plural), *zip(values, values, strict=True)])] * (len(values) > 1)
    return boxes
