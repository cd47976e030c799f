"""Is an answer right? Rules by kind of ground truth, the same for every method; never by substring.

A verdict says which rule decided. "unparsed" means that the rules found no answer that they can compare: it counts
against accuracy but is told apart from a wrong answer, and it is what a further judge may be asked about.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmlr.judge.choice import as_choice, compare_choice, compare_yes_no
from dmlr.judge.expressions import LATEX, equal, formulas_in, is_prose, looks_like_math
from dmlr.judge.extract import Candidate, as_text, candidates, normalize_text, options_of, unbox
from dmlr.judge.quantities import Number, Tolerance, find_number, find_numbers, number_in_words, parse_number

MAX_CHARACTERS = 20_000  # of a prediction, its end, where answers stand; and of a ground truth
_SHOWN = 300

_KINDS = {
    "choice": "choice mcq multi_choice multiple_choice multiple-choice",
    "yesno": "yesno yes_no yes/no bool boolean",
    "number": "number integer int float numeric",
    "math": "math latex free_form expression",
    "list": "list",
    "text": "text string free_text",
}
_KIND = {alias: kind for kind, aliases in _KINDS.items() for alias in aliases.split()}
_YES_NO = {"yes", "no", "true", "false"}


@dataclass(frozen=True)
class Verdict:
    """`status`: correct, wrong or unparsed (judge_failed is for judges that can fail); `answer`: as found."""

    status: str
    rule: str
    answer: str


def judge(
    prediction: str | None,
    ground_truth: Any,
    *,
    choices: Sequence[Any] | Mapping[str, Any] | None = None,
    kind: str | None = None,
    precision: float | None = None,
    relative_tolerance: float | None = None,
    question: str | None = None,
) -> Verdict:
    """Compare a model's output with the ground truth. Raises nothing; any text is answered within seconds.

    `choices` are the option texts in order (else they are read from `question`); `kind` is a hint (_KINDS), needed
    only where the ground truth's form is not enough; `precision` is the number of decimals that count; a number
    within `relative_tolerance` (a share of the truth) counts as equal, where a benchmark says so. The most
    explicit part of the prediction that can be read as this kind of answer decides, the others are not looked at.
    """
    truth = _tidy(as_text(ground_truth))
    if not truth.strip():
        return Verdict("unparsed", "no_ground_truth", "")
    found = candidates(_tidy(as_text(prediction)))
    if not found:
        return Verdict("unparsed", "no_answer", "")
    tolerance = Tolerance(_decimals(precision), _share(relative_tolerance))
    compare, rule = _comparison(truth, options_of(choices, question), kind, tolerance, question)
    decided = ((candidate, outcome) for candidate in found if (outcome := compare(candidate)) is not None)
    if rule == "text":  # "The answer is 42" may be all of the truth, or 42 may: any part that equals it will do
        decided = sorted(decided, key=lambda pair: not pair[1][0])
    for candidate, (right, answer) in decided:
        return Verdict("correct" if right else "wrong", f"{rule}:{candidate.rule}", _clip(answer))
    return Verdict("unparsed", rule, _clip(found[0].text))


def _tidy(text: str) -> str:
    """The text's end, long runs of blanks shortened: patterns with two neighbouring blanks would take n² steps."""
    return re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[^\S\n]{3,}", "  ", text))[-MAX_CHARACTERS:]


def _decimals(precision: Any) -> int | None:
    try:
        return None if precision is None else min(max(int(float(precision)), 0), 15)
    except (TypeError, ValueError, OverflowError):
        return None


def _share(tolerance: Any) -> float:
    return float(tolerance) if isinstance(tolerance, int | float) and 0 < tolerance < 1 else 0.0


def _clip(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _comparison(truth: str, options: dict[str, str], kind: str | None, tolerance: Tolerance, question: str | None):
    """(compare, name of the rule) for the kind of this ground truth; compare(candidate) -> (right, answer) | None."""
    kind = _KIND.get(as_text(kind).strip().lower())
    inner = unbox(truth)
    if (choice := as_choice(inner, options, kind)) is not None:
        letter, text = choice
        return (lambda c: compare_choice(c, letter, text, options)), "choice"
    if (word := normalize_text(inner)) in _YES_NO and kind != "math":
        asked = as_text(question)[-MAX_CHARACTERS:]
        return (lambda c: compare_yes_no(c, word, asked)), "yesno"
    if kind == "list" or (kind != "math" and _as_list(inner) is not None):
        return (lambda c: _compare_list(c, inner, tolerance)), "list"
    number = parse_number(inner)
    if kind != "text" and number is not None:
        return (lambda c: _compare_number(c, number, inner, tolerance)), "number"
    if kind in ("math", "number") or (kind is None and looks_like_math(inner)):
        return (lambda c: _compare_math(c, inner, tolerance)), "math"
    return (lambda c: _compare_text(c, inner)), "text"


# ------------------------------------------------------------------------------------------------ lists


def _as_list(text: str) -> list | None:
    if not re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL) or len(text) > 10_000:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return value if isinstance(value, list) and value else None


_COMMA_OR_AND = re.compile(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+")


def _compare_list(candidate: Candidate, truth: str, tolerance: Tolerance):
    expected = _as_list(truth) or [part for part in _COMMA_OR_AND.split(truth.strip("[](){} ")) if part]
    literal = re.findall(r"\[[^\[\]]*\]", candidate.text)
    answer = (_as_list(literal[-1]) if literal else None) or None
    numeric = all(parse_number(str(item)) for item in expected)
    if answer is None and (candidate.explicit or not (is_prose(candidate.text) or candidate.text.startswith("("))):
        answer = [part for part in _COMMA_OR_AND.split(candidate.text.strip("[](){} .")) if part]
    if numeric and (answer is None or not all(parse_number(str(item)) for item in answer)):
        numbers = find_numbers(candidate.text)
        answer = numbers if candidate.explicit or len(numbers) == len(expected) else None
    if not answer:
        return None
    right = len(answer) == len(expected) and all(
        _same_item(a, e, tolerance) for a, e in zip(answer, expected, strict=True)
    )
    return right, candidate.text


def _same_item(answer: Any, expected: Any, tolerance: Tolerance) -> bool:
    a = answer if isinstance(answer, Number) else parse_number(str(answer))
    b = parse_number(str(expected))
    if a is not None and b is not None:
        return a.matches(b, tolerance)
    return normalize_text(str(answer)) == normalize_text(str(expected))


# ------------------------------------------------------------------------------ numbers and expressions

_ASSIGNED = re.compile(r"[$\s]*(?:so\s+)?\\?[A-Za-z∠][\w\\{}()'∠ ]{0,20}[=≈]\s*([^=]+)")


def _compare_number(candidate: Candidate, truth: Number, shown: str, tolerance: Tolerance):
    assigned = _ASSIGNED.fullmatch(candidate.text)
    answer = parse_number(candidate.text) or (parse_number(assigned[1]) if assigned else None)
    if answer is None and re.fullmatch(r"[-+−]?\d+,\d+\.?", candidate.text):
        answer = parse_number(candidate.text.replace(",", "."))  # where one number is asked for: a decimal comma
    if answer is not None:
        return answer.matches(truth, tolerance), candidate.text
    prose = is_prose(candidate.text)
    if LATEX.search(candidate.text) or not prose:
        value = shown if truth.percent or truth.unit else str(truth.value)
        if (right := equal(value, candidate.text, tolerance)) is not None:
            return right, candidate.text
    if not prose or candidate.rule == "boxed":
        return None
    # "The answer is 12 because ..." gives its number first, a derivation or a worked text gives it last.
    answer = find_number(candidate.text, last=not candidate.explicit or "=" in candidate.text)
    answer = answer or number_in_words(candidate.text)
    return None if answer is None else (answer.matches(truth, tolerance), candidate.text)


def _compare_math(candidate: Candidate, truth: str, tolerance: Tolerance):
    text = candidate.text
    if is_prose(text) and not LATEX.search(text) and (formulas := formulas_in(text)):
        text = formulas[0 if candidate.explicit else -1]
    right = equal(truth, text, tolerance)
    if not right and tolerance.relative:  # several answers, each within the tolerance, in order
        parts = [_TOP_COMMA.split(part) for part in (truth, text[: len(truth) + _SHOWN])]
        if len(parts[0]) == len(parts[1]) > 1 and all(equal(*pair, tolerance) for pair in zip(*parts, strict=True)):
            right = True
    return None if right is None else (right, candidate.text)


_TOP_COMMA = re.compile(r",(?!\d{3}(?!\d))\s*(?![^{}()\[\]]*[})\]])")


# ------------------------------------------------------------------------------------------------- text


def _compare_text(candidate: Candidate, truth: str):
    expected, answer = _as_words(truth), _as_words(candidate.text)
    stated = _COPULA.search(candidate.text)
    if answer == expected or (stated and _as_words(stated[1]) == expected):
        return True, candidate.text
    # An explicit answer in other words may still mean the same only to a reader; in rules it is wrong. Prose that
    # merely does not equal the truth says nothing.
    if candidate.rule == "formula":
        return None
    if candidate.explicit or len(candidate.text.split()) <= max(3, len(expected.split())):
        return False, candidate.text
    return None


# "The capital is Paris": what the only sentence, or the last one, says of its subject.
_COPULA = re.compile(
    r"(?:^|[.!?\n])(?:(?!\b(?:not|no)\b|n['’]t\b)[^.!?\n])*?"
    r"(?:\b(?:is|are|was|were|says|reads)|['’]s)\s+([^.!?\n]+)[.!]?\s*$"
)


def _as_words(text: str) -> str:
    return normalize_text(re.sub(r",?\s+and\s+|,\s*", ", ", re.sub(r"\s*:\s*", ":", text)))
