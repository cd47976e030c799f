"""Mathematics in text: what is an expression and what is prose, one spelling for equal LaTeX, equality of two texts."""

from __future__ import annotations

import re

from dmlr.judge import mathcheck
from dmlr.judge.extract import plain
from dmlr.judge.quantities import EXACT, Tolerance

LATEX = re.compile(r"\\[A-Za-z]|\$[^$]+\$|\\[(\[]")
_MACRO = re.compile(r"\\(?:text|mathrm|textrm|mathbf|textbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTIONS = (
    "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|lim|det|gcd|lcm|mod|arcsin|arccos|arctan|sinh|cosh|tanh|pi"
)
_WORD = re.compile(
    rf"(?<![A-Za-z0-9])(?!(?:{_FUNCTIONS})(?![A-Za-z]))(?:[A-Za-zÀ-ÿ]{{2,}}(?=[\s:,])|[A-Za-zÀ-ÿ]{{3,}})"
    r"|[\u0400-\u04ff\u3040-\u9fff]"
)

_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b(?!\s*\}))\s*")


def is_prose(text: str) -> bool:
    """Whether words surround the mathematics, or are all there is (names of functions are no words)."""
    return bool(_WORD.search(_MACRO.sub(" ", text)))


def looks_like_math(text: str) -> bool:
    """Whether a ground truth is better compared as an expression than as words."""
    return bool(
        LATEX.search(text)
        or re.search(r"[=<>^√π±]|\d\s*[-+*/]\s*\d|[)\]}]\s*$", text)
        or (not is_prose(text) and re.search(r"[-+*/,;|_]|\d[A-Za-z]|[A-Za-z0-9)]!", text))
    )


def latex_key(text: str) -> str:
    """Spelling variants of one LaTeX expression made equal; spaces between words and digits are kept."""
    text = re.sub(r"\\(?:text|mathrm|textrm|mathbf|textbf|operatorname)\s*\{([^{}]*)\}", r"\1", plain(text))
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\$|\\\(|\\\)|\\\[|\\\]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", re.sub(r"\s+", " ", text.strip().rstrip(".").strip()))


def equal(truth: str, answer: str, tolerance: Tolerance = EXACT) -> bool | None:
    """Equality as mathematics, numbers within `tolerance` (6 decimals unless said); None when that cannot be told."""
    keys = latex_key(truth), latex_key(answer)
    if keys[0] == keys[1]:
        return True
    if all(re.fullmatch(r"[A-Za-z ]{3,}", key) for key in keys):
        # Words: an algebra system takes them for products of letters, in which their order does not count.
        return keys[0].casefold() == keys[1].casefold()
    decimals = 6 if tolerance.decimals is None else tolerance.decimals
    return mathcheck.equal(as_latex(truth), as_latex(answer), decimals, tolerance.relative)


def as_latex(text: str) -> str:
    """An expression without dollars gets them (math-verify reads bare LaTeX as prose); prose stays prose."""
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text.strip()).replace("°", "^\\circ ")
    joined = _AND.sub(", ", text)
    text = text if is_prose(joined) else joined
    if not text or is_prose(text) or re.search(r"\$|\\\(|\\\[|\\boxed|\\begin\{align", text):
        return text
    return f"${text.rstrip('.')}$"
