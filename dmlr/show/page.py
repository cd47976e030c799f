"""What a notebook shows: a figure with its caption, a table, sentences, a gallery of questions and answers.

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
from IPython.display import display
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from dmlr.data.images import ImageError
from dmlr.show.gallery import CHANGES
from dmlr.show.plots import TOKEN_COLOURS
from dmlr.show.style import TEMPLATES, gallery_script
from dmlr.show.thumbnails import Thumbnail, outlines, thumbnail


def png(picture: Figure | Image.Image, largest: int | None = None) -> bytes:
    """A PNG of at most 256 colours, a third of the size; `largest` limits the longer side of an image in pixels."""
    if isinstance(picture, Figure):
        drawn = io.BytesIO()
        picture.savefig(drawn, format="png", dpi=150)
        picture = Image.open(drawn)
    picture = picture.convert("RGB")
    if largest and max(picture.size) > largest:
        picture.thumbnail((largest, largest))
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: Figure | Image.Image, largest: int | None = None) -> str:
    """`png` as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(picture, largest)).decode("ascii")


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

    body = Markup("").join(row("td", [visible(str(cell)) for cell in cells]) for cells in frame.itertuples(index=False))
    note = Markup("<caption>{}</caption>").format(caption) if caption else ""
    head = Markup("<thead>{}</thead>").format(row("th", list(frame.columns))) if any(frame.columns) else ""
    return str(Markup("<table>{}{}<tbody>{}</tbody></table>").format(note, head, body))


def gallery(
    cards: Sequence[Mapping[str, Any]], folder: Path | None = None, largest: int = 224, most: int = 1000
) -> str:
    """HTML cards, every text escaped; from two cards on with a search box and filters.

    A card: idx, question, truth, answers [name, text, right, note] and, where it has them, what gallery.cards gives:
    dataset, category, image or images (PIL images or paths, relative ones under `folder`), methods, changes, and kept,
    the patches that are outlined on the first image for the method chosen. An image is embedded once, `largest` pixels
    wide or high; one that cannot be read is named instead. Cards beyond `most` are counted and left out.
    """
    shown, pictures = [], {}
    for card in cards[:most]:
        shown.append({**card, **_pictures(card, pictures, folder, largest)})
        changes = card.get("changes") or []
        shown[-1] |= {"change": changes[0] if len(changes) == 1 else "", "changes": "|".join(changes)}
    return _template("gallery.html.j2").render(
        cards=shown,
        images={one.id: one for one in pictures.values() if isinstance(one, Thumbnail)}.values(),
        filters=_filters(shown) if len(shown) > 1 else [],
        left_out=len(cards) - len(shown),
        drawn=sorted({position for card in shown for picture in card["pictures"] for position, _ in picture["kept"]}),
        colours=TOKEN_COLOURS,
        script=Markup(gallery_script()),
    )


def visible(value: Any) -> Any:
    """Text with its control characters as the symbols that stand for them (␛ for ESC); anything else as it is."""
    return _CONTROL.sub(lambda match: _SYMBOLS[match[0]], value) if type(value) is str else value


_SYMBOLS = {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"} | {"\x7f": "␡"}
_CONTROL = re.compile(f"[{re.escape(''.join(_SYMBOLS))}]")


def _template(name: str) -> jinja2.Template:
    folder = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=folder, autoescape=True, finalize=visible).get_template(name)


def _pictures(
    card: Mapping[str, Any], known: dict[Any, Thumbnail | str], folder: Path | None, largest: int
) -> dict[str, list]:
    """What a card shows of its images; `known` has every image that was read before, or why it could not be."""
    sources = card.get("images") or ([card["image"]] if card.get("image") is not None else [])
    pictures, unread = [], []
    for position, source in enumerate(sources):
        key = id(source) if isinstance(source, Image.Image) else str(source)
        if key not in known:
            try:
                known[key] = thumbnail(source, largest, folder)
            except ImageError as error:
                known[key] = f"no image: {error}"
        image = known[key]
        if isinstance(image, str):
            unread.append(image)
            continue
        size = (image.width, image.height)
        kept = [
            (method, [(token % len(TOKEN_COLOURS), line) for token, line in outlines(*drawn, size)])
            for method, drawn in enumerate(card.get("kept") or [])
            if drawn and position == 0
        ]
        names = ", ".join(card["methods"][method] for method, _ in kept)
        alt = f"Image of example {card['idx']}" + (f"; outlined are the patches kept by {names}" if names else "")
        pictures.append({"id": image.id, "width": size[0], "height": size[1], "alt": alt, "kept": kept})
    return {"pictures": pictures, "unread": unread}


def _filters(cards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The select boxes that tell these cards apart: method, change, dataset, category."""

    def select(name: str, label: str, values: Sequence[str], everything: str) -> dict[str, Any]:
        return {"name": name, "label": label, "options": [("", everything), *((v, v) for v in values)]}

    changes = {change for card in cards for change in card["changes"].split("|") if change}
    methods = next((card["methods"] for card in cards if card.get("methods")), [])
    boxes = []
    if changes and len(methods) > 2:
        options = [(str(i), name) for i, name in enumerate(methods) if i]
        boxes.append({"name": "method", "label": f"{methods[0]} against", "options": options})
    if changes:
        label = f"From {methods[0]} to {methods[1]}" if len(methods) == 2 else "Outcome"
        boxes.append(select("change", label, [change for change in CHANGES if change in changes], "all outcomes"))
    for name, plural in (("dataset", "all datasets"), ("category", "all categories")):
        values = sorted({str(card[name]) for card in cards if card.get(name)})
        boxes += [select(name, name.capitalize(), values, plural)] if len(values) > 1 else []
    return boxes
