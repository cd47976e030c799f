"""What a notebook shows: a figure with its caption, a table, sentences; and as text where HTML is not shown.

A code host shows it without running anything. Knows nothing about what a figure or a table shows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import display
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from dmlr.show.style import table


def encoded(picture: Figure | Image.Image) -> str:
    """A PNG of at most 256 colours, a third of the size, in base 64."""
    if isinstance(picture, Figure):
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png", dpi=150)
        picture = Image.open(drawn)
    buffer = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def data_uri(picture: Figure | Image.Image) -> str:
    """The picture as a PNG in a data URI."""
    return "data:image/png;base64," + encoded(picture)


def show(picture: Figure | Image.Image, caption: str, alt: str | None = None) -> None:
    """Displays a figure as a PNG, its caption below; `alt` says in words what it shows, where the caption does not."""
    width = round(picture.get_figwidth() * 84) if isinstance(picture, Figure) else picture.width
    about = {"alt": alt or caption, "width": width}
    shown = {"image/png": encoded(picture), "text/plain": alt or caption}
    display(shown, metadata={"image/png": about}, raw=True)
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
