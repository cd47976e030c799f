"""Mathematics in text: what is an expression and what is prose, one spelling for equal LaTeX, equality of two texts."""

from __future__ import annotations

import re

from dmlr.judge import mathcheck
from dmlr.judge.extract import DENIES, MACRO
from dmlr.judge.quantities import EXACT, Tolerance, spelled

LATEX = re.compile(r"\\[A-Za-z]|\$[^$]+\$|\\[(\[]")
_FUNCTIONS = (
    "sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|lim|det|gcd|lcm|mod|arcsin|arccos|arctan|sinh|cosh|tanh|pi"
)
_WORD = re.compile(
    rf"(?<![A-Za-z0-9])(?!(?:{_FUNCTIONS})(?![A-Za-z]))(?:[A-Za-zÀ-ÿ]{{2,}}(?=[\s:,])|[A-Za-zÀ-ÿ]{{3,}}|[A-Za-z]+['’][a-z]+\s)"
    r"|(?<![A-Za-z])(?:[mckd]m|in|ft)[²³]|[\u0400-\u04ff\u3040-\u9fff]"
)
AND = re.compile(r"\s*,?\s*(?:[或和]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b(?!\s*\}))\s*")


def is_prose(text: str) -> bool:
    """Whether words surround the mathematics, or are all there is (names of functions are no words)."""
    return bool(_WORD.search(re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", MACRO.sub(" ", text))))


def looks_like_math(text: str) -> bool:
    """Whether a ground truth is better compared as an expression than as words."""
    return bool(
        LATEX.search(text)
        or re.search(r"[=<>^√π±≤≥≠×÷∞∅]|[)\]}]\s*$", text)
        or (not is_prose(text) and re.search(r"[-+*/,;|_]|\d:\d|\d[A-Za-z]|[A-Za-z0-9)]!", text))
    )


def formulas_in(text: str) -> list[str]:
    """Runs of an unmarked text that are mathematics and relate or combine something: "so y = 2" has "y = 2".

    Not those that the text denies; none of a text that is mathematics as a whole, or nearly: "x = 1 or x = 2".
    """
    if not is_prose(AND.sub(", ", text)):
        return []
    found, word, run = [], "", []  # a run of mathematics, and the word before it, which may deny it
    for token in [*text.split(), "end"]:
        prose = is_prose(f"{token} ")
        run += [] if prose else [token]
        if prose or token[-1] in ".;":
            if looks_like_math(formula := " ".join(run).strip(".,;:")) and not DENIES.search(word):
                found.append(formula)
            word, run = token if prose and token[-1] not in ".,;" else "", []
    return found


def latex_key(text: str) -> str:
    """Spelling variants of one LaTeX expression made equal; spaces between words and digits are kept."""
    text = MACRO.sub(r"\1", spelled(text))
    text = re.sub(r"\\left|\\right|\\[,;:! ()\[\]]|\$", "", text)
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", re.sub(r"\s+", " ", text.strip().rstrip(".").strip()))


def equal(truth: str, answer: str, tolerance: Tolerance = EXACT) -> bool | None:
    """Equality as mathematics, numbers within `tolerance` (6 decimals unless said); None when that cannot be told."""
    keys = latex_key(truth), latex_key(answer)
    if keys[0] == keys[1]:
        return True
    if all(re.fullmatch(r"\d+_\{?\d+\}?", key) for key in keys):
        return re.sub("[{}]", "", keys[0]) == re.sub("[{}]", "", keys[1])  # in a base, which the algebra would drop
    if all(re.fullmatch(r"[A-Za-z ]{3,}", key) for key in keys):
        # Words: an algebra system takes them for products of letters, in which their order does not count.
        return keys[0].casefold() == keys[1].casefold()
    if all(re.fullmatch(r"\d+(?::\d+){2,}", key) for key in keys):
        return False  # of 1:2:3 and 1:3:2 the algebra would make one quotient
    decimals = 6 if tolerance.decimals is None else tolerance.decimals
    return mathcheck.equal(as_latex(truth), as_latex(answer), decimals, tolerance.relative)


def as_latex(text: str) -> str:
    """An expression without dollars gets them (math-verify reads bare LaTeX as prose); prose stays prose."""
    text = text.strip()
    if is_prose(joined := AND.sub(", ", text)):
        return text
    text = spelled(joined)
    return text if not text or re.search(r"\$|\\\(|\\\[", text) else f"${text.rstrip('.')}$"
