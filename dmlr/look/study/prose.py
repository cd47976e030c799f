"""What numbers say, in words: sentences that an interval decides, lists of them, and text shaded by a value.

HTML pieces are escaped. Knows nothing about what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dmlr.stats.bootstrap import Estimate

MORE, LESS = "214,120,20", "11,111,164"  # shades of values above and below zero


def numbers(found: Estimate, unit: str = "", percent: bool = False, style: str = "+.3g") -> str:
    """'+1.9 nats [+1.4, +2.45]'; of shares in points; without an interval where there is none."""
    scale, tail = (100, " points") if percent else (1, f" {unit}" if unit else "")
    if math.isnan(found.value):
        return "–"
    value, low, high = (f"{scale * number:{style}}" for number in (found.value, found.low, found.high))
    return f"{value}{tail}" if math.isnan(found.low) else f"{value}{tail} [{low}, {high}]"


def compared(first: str, second: str, measure: str, found: Estimate, unit: str = "", percent: bool = False) -> str:
    """What a difference says, `measure` of first minus that of second."""
    if math.isnan(found.value) or math.isnan(found.low):
        return f"{measure}, {first} against {second}: too little to compare."
    told = numbers(found, unit, percent)
    if found.sign:
        return f"{measure} is {'higher' if found.sign > 0 else 'lower'} for {first} than for {second}: {told}."
    return f"{measure}, {first} against {second}: {told}; the interval includes zero, so this run cannot tell."


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as an HTML list."""
    items = (Markup("<li>{}</li>").format(sentence) for sentence in sentences)
    return str(Markup("<ul>{}</ul>").format(Markup("").join(items)))


def shaded(passages: Sequence[Mapping[str, Any]], most: float, caption: str) -> str:
    """Texts as an HTML figure, every piece shaded by its value; one of `most` or more gets the full colour.

    A passage: title, note and pieces, each (text, value); a value of None leaves a piece as it is. The number stands
    below its piece unless it is nearly zero.
    """
    cell = Markup(
        '<span style="display:inline-block;vertical-align:top;text-align:center;border-radius:3px;line-height:1.3;'
        'padding:0 2px;{}">{}<br><small style="font-size:0.62rem">{}</small></span>'
    )
    blocks = []
    for passage in passages:
        pieces = []
        for text, value in passage["pieces"]:
            if value is None or abs(value) < 0.02 * most:
                pieces.append(Markup('<span style="white-space:pre-wrap">{}</span>').format(text))
                continue
            strength = 0.75 * min(1.0, abs(value) / most)
            style = f"background:rgba({MORE if value > 0 else LESS},{strength:.2f})"
            pieces.append(cell.format(style, text, f"{value:+.2f}"))
        head = Markup("<b>{}</b> ({})").format(passage["title"], passage["note"])
        blocks.append(Markup('<div style="margin:0.7rem 0">{}<br>{}</div>').format(head, Markup("").join(pieces)))
    style = "font-family:system-ui,sans-serif;font-size:0.85rem;line-height:2.1"
    body = Markup('<div style="{}">{}</div>').format(style, Markup("").join(blocks))
    return str(Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(body, caption))
