"""Numbers in text, read exactly: signs, separators, decimal commas, fractions, percent, currency and units."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from dmlr.judge.extract import plain

_MAX_CHARACTERS = 400  # of a number: exact arithmetic on longer ones helps nobody
_VULGAR = "".join(chr(c) for c in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)))
_POWERS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_BLANK = r"[ \u00a0\u2009\u202f'’_]"
_BODY = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"  # 1,234.5
    rf"|[1-9]\d{{0,2}}(?:{_BLANK}\d{{3}})+(?![\d/]|{_BLANK}\d)(?:[.,]\d+)?"  # 1 234,5
    r"|[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})(?!\.?\d)"  # 1.234,5
    r"|\d+,\d{2}(?![\d,])|0,\d+(?![\d,])"  # 2,74; "1,2" is rather a list
    rf"|\d+\s+\d+/\d+(?!\.?\d)|\d+[{_POWERS}]+"  # 1 1/2, 10²
    rf"|\d+(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?![\dA-Za-z]))?(?:\s?[{_VULGAR}]|\s*/\s*\d+(?!\.?\d))?|\.\d+|[{_VULGAR}])"
    r"(?P<times>\s?(?:thousand|million|billion|trillion)\b|k\b)?"
)
_TIMES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SIGN = r"(?P<sign>[-+–]\s?|(?i:minus|negative)\s+)?"
_MONEY = r"[$€£¥₹¢]"
_CURRENCY = rf"(?:(?:USD|EUR|GBP|US)?\s?\\?{_MONEY}|(?:USD|EUR|GBP)\s)?"
_NUMBER = re.compile(rf"(?<![A-Za-z0-9_.,^{{}}\\]){_SIGN}{_MONEY}?\s?(?P<body>{_BODY})(?P<pct>\s*\\?%)?")
_POWER = r"(?:[²³]|\^\{?-?\d\}?)?"
_UNIT = (
    rf"(?:\\?%|°|\^\\circ|\^\{{\\circ\}}|\\circ|\\Omega|\\?{_MONEY}"
    rf"|[A-Za-zµμΩ°\u4e00-\u9fff]+\.?{_POWER}(?:[/ ·*][A-Za-z]+\.?{_POWER}){{0,3}})"
)
_PURE = re.compile(rf"{_SIGN}{_CURRENCY}\s?(?P<body>{_BODY})(?P<space>\s*)(?P<unit>{_UNIT})?")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textrm|operatorname|mbox)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<=\d)\s?(?:\{,\}|,\\[!,;:]|\\[,!;: ]|~)\s?(?=\d{3}(?!\d))")  # LaTeX's ways to write them
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d{1,20})\}")

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
        "cm2": "cm2",
        "m2": "m2",
        "cm3": "cm3",
        "m3": "m3",
    }.items()
    for alias in aliases.split()
}
_LETTER_UNITS = "JNVKWΩ"  # after a space: "5 V" is a voltage, "5 x" a product

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = {word: 10 * (i + 2) for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}
_IN_WORDS = re.compile(
    rf"(?i)\b(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(_ONES[1:10])}))?|({'|'.join(reversed(_ONES))}))\b"
    r"(?!\s+(?:of|half)\b)"
)


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
    text = _spelled(_TEXT_MACRO.sub(r" \1", text)).strip().strip("$").strip()
    text = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$|\\[;!:, ]|~", " ", text).strip().rstrip(".").strip()
    if match := REPEATING.fullmatch(text):
        return Number(repeating(match))
    match = _PURE.fullmatch(text)
    if match is None:
        return None
    unit = re.sub(r"(?<=[A-Za-z])\^\{?(\d)\}?", r"\1", match["unit"] or "").strip().rstrip(".")
    unit = unit.replace("²", "2").replace("³", "3")
    # "2x" and "3 i" are expressions; a unit is known, or a word of two letters at least after a space.
    unknown = unit and unit not in _UNITS and not re.fullmatch(rf"\\Omega|\\?{_MONEY}|[\u4e00-\u9fff]+", unit)
    if unknown and not (match["space"] and (len(unit) > 1 or unit in _LETTER_UNITS)):
        return None
    value = _value(match, match["sign"])
    name = _UNITS.get(unit, "")
    return None if value is None else Number(value, name == "%", "" if name == "%" else name)


def repeating(match: re.Match) -> Fraction:
    """The value of a decimal with a period, as REPEATING finds it."""
    whole, start, period = match.groups()
    tail = len(start) + len(period)
    return Fraction(int(f"{whole}{start}{period}") - int(f"{whole}{start}" or 0), 10**tail - 10 ** len(start))


def number_in_words(text: str) -> Number | None:
    """The only number of a text that writes it as a word, up to ninety-nine; "one" counts only where it stands alone.

    None with digits, or with several numbers.
    """
    if re.search(r"\d|(?i:hundred|thousand|million)", text) or len(text) > _MAX_CHARACTERS:
        return None
    if part := re.fullmatch(r"(?i)\W*(?:(?:one|a)[- ])?(half|third|quarter)\W*", text):
        return Number(Fraction(1, {"half": 2, "third": 3, "quarter": 4}[part[1].lower()]))
    found = set()
    for tens, ones, small in _IN_WORDS.findall(text):
        value = _TENS.get(tens.lower(), 0) + (_ONES.index(ones.lower()) if ones else 0)
        found.add(_ONES.index(small.lower()) if small else value)
    alone = re.fullmatch(r"\W*\w+\W*", text)
    found -= set() if alone else {1}
    return Number(Fraction(found.pop())) if len(found) == 1 else None


def find_numbers(text: str) -> list[Number]:
    """Every number in prose, in order; digits inside words (H2O), exponents and subscripts are none."""
    return [number for number, _, _ in _spans(_spelled(text))]


def find_number(text: str, last: bool) -> Number | None:
    """The first or last number in prose that is not denied ("not 5"); None without one, or if it is one of several
    ("5 or 12").

    Members of a tuple, set or list in brackets are not looked at.
    """
    text = _BRACKETS.sub(_blank_tuple, _spelled(text))
    spans = _spans(text)
    said = [i for i, (_, start, _) in enumerate(spans) if not _DENIED.search(text[max(0, start - 24) : start])]
    if not said:
        return None
    at = said[-1 if last else 0]
    number, start, end = spans[at]
    if at > 0 and _JOIN.fullmatch(text[spans[at - 1][2] : start]):
        return None
    if not last and at + 1 < len(spans) and _JOIN.fullmatch(text[end : spans[at + 1][1]]):
        return None
    return number


def _spelled(text: str) -> str:
    """Plain characters, and LaTeX's thousands separators as commas."""
    return THOUSANDS.sub(",", plain(text))


NOT = (  # words that deny what follows, in the languages that models answer in
    r"(?:(?<![\w])(?:not|neither|nor|never|cannot|nicht|kein|pas|non|no|não|nao|niet|geen|nie|hindi|ne|не|нет)(?!\w)"
    r"|n['’]t(?!\w)|rather than|instead of|không phải|không|değil|ليس|وليس|ليست"
    r"|不是|不选|不選|不为|不能|并非|並非|而非|不會|不会)"
)
_DENIED = re.compile(rf"(?i){NOT}(?:\s+(?:be|equal\s+to|think|believe|(?:it|that)(?:['’]s|\s+is)))*[\s*$]*$")
_BRACKETS = re.compile(r"[\[({][^\[\](){}]*[\])}]")


def _blank_tuple(match: re.Match) -> str:
    return " " * len(match[0]) if re.search(r",(?!\d{3}(?!\d))", match[0]) else match[0]


_JOIN = re.compile(r"[*$\s]*(?:,|,?\s*\b(?:and|or|et|ou|und|oder|y|o|e|и|или)\b|[和或、])[*$\s]*")
# In "5-3", "x - 3" and "8 cm - 3 cm" the minus is an operator, not a sign; at the start of a line it is a bullet.
_OPERAND = re.compile(r"(?:\d[^\s,;:]*|[)\]}%°!]|(?<![\w'’])[A-Za-z])\s+$|[A-Za-z\d)\]}%°]$")
_UNIT_BEFORE = re.compile(r"\d\s?[A-Za-z]{1,12}\s+$")


def _spans(text: str) -> list[tuple[Number, int, int]]:
    found = []
    for match in _NUMBER.finditer(text):
        sign, before = match["sign"], text[max(0, match.start() - 24) : match.start()]
        bullet = sign in ("- ", "+ ", "– ") and "\n" in text and re.search(r"(?:^|\n)\s*$", before)
        apart = sign and sign[-1].isspace() and _UNIT_BEFORE.search(before)
        if sign and (bullet or apart or _OPERAND.search(before)):
            sign = ""
        if (value := _value(match, sign)) is not None:
            found.append((Number(value, bool(match["pct"])), match.start(), match.end()))
    return found


def _value(match: re.Match, sign: str | None) -> Fraction | None:
    body, times = match["body"], (match["times"] or "").strip()
    digits = re.sub(r"\s+(?=\d+/)", "+", body.removesuffix(match["times"] or ""))
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits) and not digits.startswith("0,"):
        digits = digits.replace(",", "")
    if re.fullmatch(r"\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})", digits):
        digits = digits.replace(".", "")
    digits = re.sub(_BLANK, "", digits.replace(",", "."))
    if len(digits) > _MAX_CHARACTERS:
        return None
    try:
        if digits[-1] in _VULGAR:
            part = Fraction(unicodedata.numeric(digits[-1])).limit_denominator(1000)
            value = part + (int(digits[:-1]) if digits[:-1] else 0)
        elif digits[-1] in _POWERS:
            base, power = re.fullmatch(rf"(\d+)([{_POWERS}]+)", digits).groups()
            value = Fraction(int(base)) ** int("".join(str(_POWERS.index(p)) for p in power[:3]))
        else:
            value = sum(Fraction(part) for part in digits.split("+"))
    except (ValueError, ZeroDivisionError):
        return None
    negative = sign and sign.strip().lower() in ("-", "–", "minus", "negative")
    return (-value if negative else value) * _TIMES.get(times, 1)
