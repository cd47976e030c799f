"""HTML pieces of a page: a figure with its caption, a table, a gallery of questions and answers.

Whatever a dataset or a model says is escaped; images are embedded, so a page needs no other file. Knows nothing about
what a figure or a table shows.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image


def data_uri(picture: Figure | Image.Image, largest: int | None = None) -> str:
    """A PNG data URI; `largest` limits the longer side of an image in pixels."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=160)
    else:
        if largest and max(picture.size) > largest:
            picture = picture.copy()
            picture.thumbnail((largest, largest))
        picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def show(picture: Figure | Image.Image, caption: str, alt: str | None = None) -> None:
    """Displays a figure with its caption; `alt` says in words what it shows, where the caption does not."""
    from IPython.display import HTML, display

    width = round(picture.get_figwidth() * 84) if isinstance(picture, Figure) else picture.size[0]
    image = '<img src="{}" alt="{}" width="{}" style="max-width:100%;height:auto">'
    html = Markup(f"<figure>{image}<figcaption>{{}}</figcaption></figure>")
    display(HTML(str(html.format(data_uri(picture), alt or caption, width, caption))))


def table(frame: pd.DataFrame, caption: str = "") -> str:
    """An HTML table, every cell escaped; columns of numbers (also as text, "81.2%") are set flush right.

    Columns without names give a table without a head.
    """
    number = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( ?%| points)?( (–|to) [-+−]?\d[\d.]* ?%?)?|–|nan|")
    columns = [frame.iloc[:, i].astype(str) for i in range(frame.shape[1])]
    right = [bool(len(frame)) and all(map(number.fullmatch, column)) for column in columns]

    def row(tag: str, cells: Sequence[Any]) -> Markup:
        styles = [Markup(' class="number" style="text-align:right"') if r else "" for r in right]
        return Markup("<tr>{}</tr>\n").format(
            Markup("").join(Markup("<{0}{1}>{2}</{0}>").format(tag, s, c) for s, c in zip(styles, cells, strict=True))
        )

    body = Markup("").join(row("td", [str(cell) for cell in cells]) for cells in frame.itertuples(index=False))
    note = Markup("<caption>{}</caption>").format(caption) if caption else ""
    head = Markup("<thead>{}</thead>").format(row("th", list(frame.columns))) if any(frame.columns) else ""
    return str(Markup("<table>{}{}<tbody>{}</tbody></table>").format(note, head, body))


def gallery(cards: Sequence[Mapping[str, Any]], folder: Path | None = None, largest: int = 224) -> str:
    """HTML cards, every text escaped. A card: idx, question, truth, category, image, answers [name, text, right, note].

    `image` is a PIL image or a path (relative ones under `folder`); an image that cannot be read is left out.
    """
    shown = [{**card, "image": _thumbnail(card.get("image"), folder, largest)} for card in cards]
    templates = Path(__file__).resolve().parents[1] / "reports" / "template"
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(templates), autoescape=True)
    return env.get_template("gallery.html.j2").render(cards=shown)


def _thumbnail(image: Any, folder: Path | None, largest: int) -> str | None:
    if image is None or isinstance(image, Image.Image):
        return data_uri(image, largest) if image else None
    try:
        with Image.open(Path(folder or ".") / image) as opened:
            return data_uri(opened.convert("RGB"), largest)
    except OSError:
        return None
