"""Numbers in text, read exactly: thousands separators, decimal commas, fractions, percent, currency and units."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from dmlr.judge.extract import plain

_MAX_CHARACTERS = 400  # of a number: exact arithmetic on longer ones helps nobody
_VULGAR = "".join(chr(c) for c in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)))
_BODY = (
    r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|\s?,\\!\s?)\d{3})+(?!\d)(?:\.\d+)?"  # 1,234.5 and LaTeX's ways to write it
    r"|\d+,\d{2}(?![\d,])|0,\d+(?![\d,])"  # 2,74; "1,2" is rather a list
    rf"|\d+(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?![\dA-Za-z]))?(?:\s?[{_VULGAR}]|\s*/\s*\d+(?![\d.]))?|\.\d+|[{_VULGAR}])"
)
_NUMBER = re.compile(rf"(?<![A-Za-z0-9_.,^{{}}\\])(?P<sign>[-+]\s?)?[$€£¥₹]?\s?(?P<body>{_BODY})(?P<pct>\s*\\?%)?")
_CURRENCY = r"(?:\\?\$|[€£¥₹])?"
_UNIT = (
    r"(?:\\?%|°|\^\\circ|\^\{\\circ\}|\\circ|\\?\$|[€£¥₹]|[A-Za-zµμΩ°\u4e00-\u9fff]+[²³]?(?:[/ ][A-Za-z]+[²³]?){0,3})"
)
_PURE = re.compile(rf"(?P<sign>[-+]\s?)?{_CURRENCY}\s?(?P<body>{_BODY})(?P<space>\s*)(?P<unit>{_UNIT})?")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textrm|operatorname|mbox)\s*\{([^{}]*)\}")

_UNITS = {
    alias: name
    for name, aliases in {
        "%": "% \\% percent pct percentage",
        "deg": "° ^\\circ ^{\\circ} \\circ degree degrees deg",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "in": "in inch inches",
        "ft": "ft foot feet",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "ml": "ml mL milliliter milliliters millilitre millilitres",
        "l": "l L liter liters litre litres",
        "s": "s sec second seconds",
        "min": "min minute minutes",
        "h": "h hr hour hours",
        "cm2": "cm² cm2",
        "m2": "m² m2",
        "cm3": "cm³ cm3",
        "m3": "m³ m3",
    }.items()
    for alias in aliases.split()
}


@dataclass(frozen=True)
class Tolerance:
    """How far equal numbers may lie apart: rounded to `decimals` places, or by the share `relative` of the truth."""

    decimals: int | None = None
    relative: float = 0.0


EXACT = Tolerance()


@dataclass(frozen=True)
class Number:
    """An exact value; `percent` when a % followed it; `unit` the canonical name of a known unit, else ""."""

    value: Fraction
    percent: bool = False
    unit: str = ""

    def matches(self, truth: Number, tolerance: Tolerance = EXACT) -> bool:
        """Same number: exactly, when both are rounded (half away from zero, and half to even), or near enough.

        10 and 10 % are taken as the same, and so are 0.335 and 33.5 %; 5 cm and 5 m are not.
        """
        if self.unit and truth.unit and self.unit != truth.unit:
            return False
        pairs = [(self.value, truth.value)]
        if self.percent != truth.percent:
            pairs += [(n.value / 100 if n.percent else n.value for n in (self, truth))]
        return any(_same(a, b, tolerance) for a, b in pairs)


def _same(a: Fraction, b: Fraction, tolerance: Tolerance) -> bool:
    if abs(a - b) <= Fraction(tolerance.relative) * abs(b):
        return True
    decimals = tolerance.decimals
    if decimals is None:
        return a == b
    # A value halfway between two roundings is rounded either way by honest programs: both are accepted.
    return a == b or abs(a - b) * 10**decimals <= Fraction(1, 2) or round(a, decimals) == round(b, decimals)


def parse_number(text: str) -> Number | None:
    """The number that a text *is* (with currency, percent or unit, in dollars or not); None for anything more."""
    if len(text) > _MAX_CHARACTERS:
        return None
    text = plain(_TEXT_MACRO.sub(r" \1", text)).strip().strip("$").strip()
    text = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$|\\[;!: ]|(?<!\d)\\,|\\,(?!\d)|~", " ", text).strip().rstrip(".").strip()
    match = _PURE.fullmatch(text)
    if match is None:
        return None
    unit = (match["unit"] or "").strip()
    # "2x" and "3 i" are expressions; a unit is known, or a word of two letters at least after a space.
    unknown = unit and unit not in _UNITS and not re.fullmatch(r"\\?\$|[€£¥₹]|[\u4e00-\u9fff]+", unit)
    if unknown and (len(unit) < 2 or not match["space"]):
        return None
    value = _value(match["body"], match["sign"])
    name = _UNITS.get(unit, "")
    return None if value is None else Number(value, name == "%", "" if name == "%" else name)


def find_numbers(text: str) -> list[Number]:
    """Every number in prose, in order; digits inside words (H2O), exponents and subscripts are none."""
    return [number for number, _, _ in _spans(plain(text))]


def find_number(text: str, last: bool) -> Number | None:
    """The first or last number in prose that is not denied ("not 5"); None without one, or if it is one of several
    ("5 or 12").

    Members of a tuple, set or list in brackets are not looked at.
    """
    text = _BRACKETS.sub(_blank_tuple, plain(text))
    spans = _spans(text)
    said = [i for i, (_, start, _) in enumerate(spans) if not _DENIED.search(text[max(0, start - 20) : start])]
    if not said:
        return None
    at = said[-1 if last else 0]
    number, start, end = spans[at]
    if at > 0 and _JOIN.fullmatch(text[spans[at - 1][2] : start]):
        return None
    if not last and at + 1 < len(spans) and _JOIN.fullmatch(text[end : spans[at + 1][1]]):
        return None
    return number


_DENIED = re.compile(r"(?i)(?:\b(?:not|neither|nor)|n['’]t)(?:\s+(?:be|equal\s+to))?[\s*$]*$")
_BRACKETS = re.compile(r"[\[({][^\[\](){}]*[\])}]")


def _blank_tuple(match: re.Match) -> str:
    return " " * len(match[0]) if re.search(r",(?!\d{3}(?!\d))", match[0]) else match[0]


_JOIN = re.compile(r"[*$\s]*(?:,|,?\s*\b(?:and|or)\b)[*$\s]*")


def _spans(text: str) -> list[tuple[Number, int, int]]:
    found = []
    for match in _NUMBER.finditer(text):
        # In "5-3" or "x - 3" the minus is an operator, not a sign.
        before = text[max(0, match.start() - 8) : match.start()].rstrip()[-1:]
        sign = "" if before and (before.isalnum() or before in ")]") and match["sign"] else match["sign"]
        if (value := _value(match["body"], sign)) is not None:
            found.append((Number(value, bool(match["pct"])), match.start(), match.end()))
    return found


def _value(body: str, sign: str | None) -> Fraction | None:
    digits = re.sub(r"\{,\}|\\[,!]|\s*,\\!\s*", ",", body)
    digits = re.sub(r",+", ",", digits)
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits) and not digits.startswith("0,"):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".").replace(" ", "")
    if len(digits) > _MAX_CHARACTERS:
        return None
    try:
        if digits[-1] in _VULGAR:
            part = Fraction(unicodedata.numeric(digits[-1])).limit_denominator(1000)
            value = part + (int(digits[:-1]) if digits[:-1] else 0)
        else:
            value = Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if sign and sign.strip() == "-" else value
