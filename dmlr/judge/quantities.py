"""Numbers in text, read exactly: signs, separators, decimal commas, fractions, powers, percent, currency and units."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dmlr.judge.extract import MACRO, plain, stated

_MAX_CHARACTERS = 400  # of a number: exact arithmetic on longer ones helps nobody
_LATEX_THOUSANDS = re.compile(r"(?<=\d)\s?(?:\{,\}|,\\[!,;:]|\\[,!;: ]|~)\s?(?=\d{3}(?!\d))")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d{1,20})\}")
_BLANK = r"[ \u00a0\u2009\u202f'’_]"
_SET_APART = re.compile(rf"(?<![\w.,])[1-9]\d{{0,2}}(?:{_BLANK}\d{{3}})+(?![\d/^]|{_BLANK}\d)")
_GROUPED = re.compile(  # 1,234 and 1.234,5
    r"(?<![\w.,])[1-9]\d{0,2}(?:(?:,\d{3})+(?!\d)|(?:\.\d{3})+(?=,\d)|(?:\.\d{3}){2,}(?!\.?\d))"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))(?!\d)")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(?=\d{2}(?!,?\d))|(?<![\d.,])(0|\d{4,}),(?=\d+(?!,?\d))")

_MONEY = r"(?:USD|EUR|GBP|US)?\s?\\?[$€£¥₹¢]|(?:USD|EUR|GBP)\s"
# In "5-3", "x - 3" and "- 3" at the head of a line the minus is no sign; in "it is - 3" it is.
_SIGN = r"(?P<sign>(?<![A-Za-z0-9)\]}%!])-(?=[\d.$€£¥₹\\])|\A-\s|(?i:minus|negative)\s+)"
_SIGN_APART = re.compile(
    r"(?i)((?:\b(?:is|are|be|get|gives|equals?|about|than|but|and|of)|['’]s|是|\\approx|[=:(€$£]|\bUSD)[^\S\n]*)-[^\S\n](?=[\d.$€£¥₹\\])"
)
_POWER = r"\^(?:-?\d{1,2}|\{-?\d{1,2}\})(?!\d)"
_NUMBER = (
    rf"(?:\+\s?|{_SIGN})?(?:{_MONEY})?\s?"
    rf"(?P<body>\d+\s+\d+\s*/\s*\d+(?!\.?\d)|\d+(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?![\dA-Za-z])|\s*/\s*\d+(?!\.?\d)"
    rf"|{_POWER})?|\.\d+)(?P<times>\s?(?:thousand|million|billion|trillion)\b|k\b|\s?\\(?:times|cdot)\s*10{_POWER})?"
)
_IN_PROSE = re.compile(rf"(?<![A-Za-z0-9_.,^{{}}\\]){_NUMBER}(?P<unit>\s*(?:\\?%|percent\b|pct\b))?")
# Digits that are no number by themselves: of (1, 12), of 2^n and 3^{1/2}, but not of the 20^{th}, and of items "2. ".
_WITHIN = re.compile(
    r"[\[({][^\[\](){}]*,[^\[\](){}]*[\])}]"
    rf"|(?<![\d.])\d[\d.]*(?!{_POWER})\^(?:[a-z]\b|\{{(?![a-z]{{2}})[^{{}}\\]*\}})"
    r"|(?:\n|\A(?=1[.)]\s))[^\w\n]*\d{1,2}[.)]\s+(?=\S)"
)
_UNIT = rf"[A-Za-zµμΩ\u4e00-\u9fff]+\.?(?:{_POWER})?(?:(?:[/ *]|\\cdot )[A-Za-z]+\.?(?:{_POWER})?){{0,3}}"
_SYMBOL = r"\\?%|\^\\circ(?: [CF])?|\\circ|\\Omega|\\?[$€£¥₹¢]|(?:st|nd|rd|th)\b|[\u4e00-\u9fff]+"
_ALONE = re.compile(rf"{_NUMBER}(?P<space>\s*)(?P<unit>{_SYMBOL}|{_UNIT})?")

_TIMES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = {
    alias: aliases.split()[0]
    for aliases in (
        *("% \\% percent pct percentage", "deg ^\\circ \\circ degree", "mm millimeter millimetre"),
        *("cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "in inch inches", "ft foot feet"),
        *("mg milligram", "g gram", "kg kilogram", "ml mL milliliter millilitre", "l L liter litre"),
        *("s sec second", "min minute", "h hr hour", "cm2", "m2", "cm3", "m3"),
    )
    for alias in aliases.split()
}


def _fraction(repeating: re.Match) -> str:
    whole, start, period = repeating.groups()
    digits = int(f"{whole}{start}{period}") - int(f"{whole}{start}" or 0)
    return str(Fraction(digits, 10 ** (len(start) + len(period)) - 10 ** len(start)))


_SYMBOLS = dict(
    pair.split()
    for pair in (
        r"≤ \le,≥ \ge,≠ \neq,≈ \approx,∈ \in,∪ \cup,∩ \cap,× \times,· \cdot,⋅ \cdot,± \pm,∓ \mp,∞ \infty,π \pi,"
        r"θ \theta,α \alpha,β \beta,∅ \emptyset,÷ /,– -,"
        r"⁄ /,∶ :,∠ \angle,△ \triangle,∥ \parallel,⊥ \perp,≅ \cong,∽ \sim"
    ).split(",")
)
_TRANSLATED = str.maketrans({symbol: macro + " " * macro[-1].isalpha() for symbol, macro in _SYMBOLS.items()})
_SPELLINGS = [
    (re.compile(r"(?<=\d)\s?(?=[¼-¾⅐-⅞])"), " "),
    (re.compile("[¼-¾⅐-⅞]"), lambda match: unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")),
    (re.compile("[⁰¹²³⁴-⁹]+"), lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
    (re.compile(r"\^\{(\d|\\circ)\}(?![A-Za-z])"), r"^\1"),
    (re.compile(r"(?:°|\^\{\\circ\})(?=[A-Za-z])"), r"^\\circ "),
    (re.compile("°"), r"^\\circ"),
    (_SIGN_APART, r"\1-"),
    (_LATEX_THOUSANDS, ""),
    (_SET_APART, lambda match: re.sub(r"\D", "", match[0])),
    (_REPEATING, _fraction),
    # one operation, in code and in handwriting
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|√\s*(\w+)"), r"\\sqrt{\1\2\3}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=[\w)}])\s*\*\s*(?=[\w(\\])"), r"\\cdot "),
    (re.compile(r"(?<=\d)\s+x\s+(?=\d)"), r"\\times "),
    (re.compile(r"(?<![A-Za-z\\])(pi|infty)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\\varnothing"), r"\\emptyset "),
    # what math-verify does not know: a system of equations, the set of all x that ..., an option with its text
    (re.compile(r"\\left\s*\\\{\s*(?=\\begin)|(?<=\})\s*\\right\s*\."), ""),
    (re.compile(r"\\begin\{(cases|array)\}(?:\{[lcr]\})?([^&]*?)\\end\{\1\}"), lambda m: m[2].replace(r"\\", ",")),
    (re.compile(r"\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?[A-Z]\}?\s*)?(?:\\mid|\\vert|[|:])(.*)\\\}"), r"\1"),
    (re.compile(r"\\text(?:bf|rm)?\s*\{\s*\(([A-E])\)\s*\}.*"), r"\1"),
]

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = dict(zip([*_SMALL, *_TENS, "half"], [*range(20), *range(20, 100, 10), Fraction(1, 2)], strict=True))
_IN_WORDS = re.compile(
    r"((?<![A-Za-z])(?:minus|negative)\s|(?<!\w)-\s?)?\b("
    rf"(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_SMALL[1:10])}))?|{'|'.join(_SMALL)}|half)\b(?!\s+(?:of|half)\b)"
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
    inexact = 2e-6 if 10**30 % b.denominator else 0.0  # no decimals write a third exactly
    if abs(a - b) <= Fraction(max(tolerance.relative, inexact)) * abs(b):
        return True
    if (decimals := tolerance.decimals) is None:
        return False
    # A value halfway between two roundings is rounded either way by honest programs: both are accepted.
    return abs(a - b) * 10**decimals <= Fraction(1, 2) or round(a, decimals) == round(b, decimals)


@lru_cache(1024)
def parse_number(text: str) -> Number | None:
    """The number that a text *is* (with currency, percent or unit, in dollars or not); None for anything more."""
    if len(text) > _MAX_CHARACTERS:
        return None
    text = spelled(MACRO.sub(r" \1", text)).strip().strip("$").strip()
    text = western(re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$|\\[;!:, ]|~", " ", text)).strip().rstrip(".").strip()
    if (match := _ALONE.fullmatch(text)) is None:
        return None
    unit = re.sub(r"(?<=[A-Za-z])\^\{?(\d)\}?", r"\1", match["unit"] or "").rstrip(".")
    name = _UNITS.get(unit) or _UNITS.get(unit.removesuffix("s"), "")
    # "2x" and "3 i" are expressions; a unit is known, a symbol, or a word or a capital after a space.
    word = match["space"] and re.match(r"[^\W\d_]{2}|[A-Z]|[a-zµμ][/ ]", unit)
    value = _value(match)
    if value is None or not (name or word or not unit or re.fullmatch(_SYMBOL, unit)):
        return None
    return Number(value, name == "%", "" if name == "%" else name)


def find_numbers(text: str) -> list[Number]:
    """Every number in prose, in order; digits inside words (H2O), exponents and subscripts are none."""
    return list(_found(western(spelled(text))).values())


def find_number(text: str, last: bool) -> Number | None:
    """The first or last number in prose that is not denied ("not 5"); None without one, or if it is one of several
    ("5 or 12").

    Members of a tuple, set or list in brackets, and powers that stand for no number, are not looked at. A number
    written as a word counts where there are no digits.
    """
    text = _WITHIN.sub(lambda match: " " * len(match[0]), western(spelled(text)))
    if not (found := _found(text)):
        return _number_in_words(text)
    match, alone = stated(text, list(found), last)
    return found[match] if match and (alone or all(map(found[match].matches, found.values()))) else None


def _found(text: str) -> dict[re.Match, Number]:
    values = {match: _value(match) for match in _IN_PROSE.finditer(text)}
    return {match: Number(value, bool(match["unit"])) for match, value in values.items() if value is not None}


def _number_in_words(text: str) -> Number | None:
    """The only number that a text writes in words, up to ninety-nine; "one" and "half" count where they stand alone."""
    text = re.sub(r"\b(?:one|a)[ -](?=half\b)", "", text.lower())
    if re.search(r"\d|hundred|thousand|million", text) or len(text) > _MAX_CHARACTERS:
        return None
    found = {
        sum(_WORDS[word] for word in re.split("[ -]", words)) * (-1 if sign else 1)
        for sign, words in _IN_WORDS.findall(text)
    }
    if not re.fullmatch(r"\W*(?:(?:minus|negative)\s)?\w+\W*", text):
        found -= {1, Fraction(1, 2)}
    return Number(Fraction(found.pop())) if len(found) == 1 else None


def spelled(text: str) -> str:
    """One spelling of mathematics: LaTeX for symbols and powers, thousands and signs not set apart, "½" as 1/2."""
    text = plain(text).translate(_TRANSLATED)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def western(text: str) -> str:
    """Numbers without separators, 1/2, and a decimal point: of 1,234.5 and 1 234,5 and 1.234,5 the same."""
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), divided(text))
    return _DECIMAL_COMMA.sub(r"\1\2.", text)


def divided(text: str) -> str:
    """Fractions of integers as 1/2, and after a whole number as 2 1/2."""
    return _FRACTION.sub(r"\1\3/\2\4", re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text))


def _value(match: re.Match) -> Fraction | None:
    if len(match["body"]) > _MAX_CHARACTERS:
        return None
    base, _, power = match["body"].partition("^")
    times, _, zeros = (match["times"] or "").partition("^")
    try:
        value = sum(Fraction(part) for part in re.sub(r"\s*/\s*", "/", base).split()) ** int(power.strip("{}") or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return (
        (-value if match["sign"] else value)
        * _TIMES.get(times.strip(), 1)
        * Fraction(10) ** int(zeros.strip("{}") or 0)
    )
