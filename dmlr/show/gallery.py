"""Records of a run -> cards -> HTML: every question with each method's answer, what was gained or lost first.

Whatever a dataset or a model says is escaped; images are embedded, so a page needs no other file. Whether an answer is
right is the judge's.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from dmlr.data.images import ImageError, open_image
from dmlr.show.plots import TOKEN_COLOURS, Grid, nested_cells
from dmlr.show.style import gallery_script, template
from dmlr.stats.outcomes import is_right, outcome

# What becomes of an answer from the first method to another, by right before and after; in this order they are shown.
_NAMES = {(False, True): "gained", (True, False): "lost", (False, False): "both wrong", (True, True): "both right"}
CHANGES = (*_NAMES.values(), "not judged")  # the last where either has no verdict


def cards(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A card per example of every dataset: what is gained or lost by any method first, else as in the datasets.

    results: by (dataset, method), as evaluate.run gives them; every method is compared with the first.
    A card: dataset, idx, category, question, truth, images, methods, changes [one per method after the first], kept
    {position of a method: (patches, grid)} and answers [name, text, right, note, change].
    """
    methods = list(dict.fromkeys(method for _, method in results))
    examples: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for (dataset, method), result in results.items():
        for record in result["entries"]:
            # By row as well: a row that never became an example may have no data_idx.
            examples.setdefault((dataset, record.get("row"), record["data_idx"]), {})[method] = record
    made = [_card(dataset, records, methods) for (dataset, *_), records in examples.items()]
    return sorted(made, key=lambda card: min((CHANGES.index(c) for c in card["changes"]), default=0) > 1)


def _card(dataset: str, records: Mapping[str, Mapping[str, Any]], methods: list[str]) -> dict[str, Any]:
    record = next(iter(records.values()))
    paths = record.get("image_path") or []
    right = {method: is_right(one) for method, one in records.items()}
    before = right.get(methods[0])
    changes = {method: _NAMES.get((before, right.get(method)), "not judged") for method in methods[1:]}
    kept = {m: records[method] for m, method in enumerate(methods) if any(records.get(method, {}).get("patches") or [])}
    return {
        "dataset": dataset,
        "idx": record["data_idx"],
        "category": record.get("category"),
        "question": record["question"],
        "truth": record.get("ground_truth") or "not given",
        "images": [paths] if isinstance(paths, str) else paths,
        "methods": methods,
        "changes": list(changes.values()),
        "kept": {m: (one["patches"], one["patch_grid"]) for m, one in kept.items() if one.get("patch_grid")},
        "answers": [
            _answer(method, records[method]) | {"change": changes.get(method) if len(methods) > 2 else None}
            for method in methods
            if method in records
        ],
    }


def _answer(method: str, record: Mapping[str, Any]) -> dict[str, Any]:
    counted = outcome(record)
    notes = [] if counted in ("correct", "wrong") else [counted.replace("_", " ")]
    notes += [record["rule"]] if record.get("rule") else []
    if record.get("initial_reward") is not None and record.get("best_reward") is not None:
        notes.append(f"reward {record['initial_reward']:.4f} → {record['best_reward']:.4f}")
    text = record.get("error") or record.get("model_output") or ""
    return {"name": method, "text": text, "right": is_right(record), "note": " · ".join(notes)}


def html(cards: Sequence[Mapping[str, Any]], most: int = 1000) -> str:
    """Cards in HTML, every text escaped; from two on with a search box and filters.

    An image is embedded once; one that cannot be read is named instead. The patches that the chosen method kept are
    outlined on a card's first image. Cards beyond `most` are counted and left out.
    """
    look = cache(thumbnail)
    shown = [dict(card) | _pictures(card, look) for card in cards[:most]]
    pictures = [picture for card in shown for picture in card["pictures"]]
    return template("gallery.html.j2").render(
        cards=shown,
        images={picture["id"]: picture for picture in pictures}.values(),
        filters=_filters(shown) if len(shown) > 1 else [],
        left_out=len(cards) - len(shown),
        drawn=sorted({method for picture in pictures for method in picture["kept"]}),
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
    uri = f"data:image/webp;base64,{base64.b64encode(content).decode('ascii')}"
    name = f"image-{hashlib.sha256(content).hexdigest()[:16]}"
    return {"id": name, "uri": uri, "width": image.width, "height": image.height}


def outlines(groups: Sequence[Sequence[int]], grid: Grid, size: tuple[int, int]) -> dict[int, str]:
    """`nested_cells` as an SVG path for each group that has any."""
    paths: dict[int, str] = {}
    for group, left, top, wide, high in nested_cells(groups, grid, size):
        paths[group] = f"{paths.get(group, '')}M{left:.4g} {top:.4g}h{wide:.4g}v{high:.4g}h{-wide:.4g}z"
    return paths


def _pictures(card: Mapping[str, Any], look: Callable[[str], dict[str, Any]]) -> dict[str, list]:
    """What a card shows of its images; `look` gives an image's thumbnail."""
    pictures, unread = [], []
    for position, source in enumerate(card["images"]):
        try:
            image = look(source)
        except ImageError as error:
            unread.append(f"no image: {error}")
            continue
        drawn = card["kept"] if position == 0 else {}
        names = ", ".join(card["methods"][method] for method in drawn)
        alt = f"Image of example {card['idx']}" + (f"; outlined are the patches kept by {names}" if names else "")
        kept = {m: outlines(*patches, (image["width"], image["height"])) for m, patches in drawn.items()}
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
