"""Is an answer right? Rules by kind of ground truth, the same for every method; never by substring.

A verdict says which rule decided. "unparsed" means that the rules found no answer that they can compare: it counts
against accuracy but is told apart from a wrong answer, and it is what a further judge may be asked about.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmlr.judge.choice import as_choice, compare_choice, compare_yes_no
from dmlr.judge.expressions import AND, LATEX, equal, formulas_in, is_prose, looks_like_math
from dmlr.judge.extract import DENIES, MACRO, Candidate, as_text, candidates, normalize_text, options_of, unbox
from dmlr.judge.quantities import Number, Tolerance, divided, find_number, find_numbers, parse_number

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
    rule, compare = _comparison(unbox(truth), options_of(choices, question), kind, tolerance, question)
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
        return min(max(int(float(precision)), 0), 15)
    except (TypeError, ValueError, OverflowError):
        return None


def _share(tolerance: Any) -> float:
    return float(tolerance) if isinstance(tolerance, int | float) and 0 < tolerance < 1 else 0.0


def _clip(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _comparison(truth: str, options: dict[str, str], kind: str | None, tolerance: Tolerance, question: str | None):
    """(name of the rule, compare) for the kind of this ground truth; compare(candidate) -> (right, answer) | None."""
    kind = _KIND.get(as_text(kind).strip().lower())
    if (choice := as_choice(truth, options, kind)) is not None:
        return "choice", lambda c: compare_choice(c, *choice, options)
    if (word := normalize_text(truth)) in ("yes", "no", "true", "false") and kind != "math":
        return "yesno", lambda c: compare_yes_no(c, word, as_text(question)[-MAX_CHARACTERS:])
    if kind == "list" or (kind != "math" and re.fullmatch(r"\[.*\S.*\]", truth, re.DOTALL)):
        return "list", lambda c: _compare_list(c, truth, tolerance)
    if kind != "text" and (number := parse_number(truth)) is not None:
        return "number", lambda c: _compare_number(c, number, truth, tolerance)
    if kind in ("math", "number") or (kind is None and looks_like_math(truth)):
        return "math", lambda c: _compare_math(c, truth, tolerance)
    return "text", lambda c: _compare_text(c, truth)


def _compare_list(candidate: Candidate, truth: str, tolerance: Tolerance):
    """Item by item, in order; where all are numbers, prose may name them: "between 2007 and 2008"."""
    text, expected = candidate.text, _items(truth)
    literal = re.findall(r"\[[^\[\]]*\]", text)
    answer: list = _items(literal[-1] if literal else text)
    if all(parse_number(item) for item in expected):
        if len(answer) != len(expected) or not all(parse_number(item) for item in answer):
            answer = find_numbers(text)
        if not candidate.explicit and len(answer) != len(expected):
            return None
    elif not literal and not candidate.explicit and is_prose(text):
        return None
    if not answer:
        return None
    right = len(answer) == len(expected) and all(map(_same_item, answer, expected, [tolerance] * len(answer)))
    return right, text


def _items(text: str) -> list[str]:
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if text.startswith("["):  # as Python writes it: quotes keep the comma of '1,200'
            return [str(item) for item in ast.literal_eval(text)]
    return [part.strip("'\"") for part in re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+", text.strip("[](){} .")) if part]


def _same_item(answer: str | Number, expected: str, tolerance: Tolerance) -> bool:
    a, b = answer if isinstance(answer, Number) else parse_number(answer), parse_number(expected)
    return a.matches(b, tolerance) if a and b else normalize_text(str(answer)) == normalize_text(expected)


_ASSIGNED = re.compile(r"[$\s]*(?:so\s+)?(?:\\?[A-Za-z∠][\w\\{}()'∠ ]{0,20})?[=≈]\s*([^=]+)")


def _assigned(text: str) -> str:
    """The right side of "BC = 5", or the text itself."""
    assigned = None if DENIES.search(text) else _ASSIGNED.fullmatch(text)
    return assigned[1].strip("$ ") if assigned else text


def _compare_number(candidate: Candidate, truth: Number, shown: str, tolerance: Tolerance):
    text = candidate.text
    if is_prose(words := MACRO.sub(r"\1", text)):  # math-verify would not see the sign before a fraction
        text = words if re.search(r"(?<!\\)\$|\\[(\[]", words) else divided(words)
    answer = parse_number(text) or parse_number(_assigned(text))
    if answer is None and re.fullmatch(r"[-+−]?\d+,\d+\.?", text):
        answer = parse_number(text.replace(",", "."))  # where one number is asked for: a decimal comma
    if answer is None and (LATEX.search(text) or not is_prose(text)):
        value = shown if truth.percent or truth.unit else str(truth.value)
        if (right := equal(value, text, tolerance)) is not None:
            return right, text
    if answer is None and is_prose(text):
        # "The answer is 12 because ..." gives its number first, a derivation or a worked text gives it last.
        answer = find_number(text, last=not candidate.explicit or "=" in text)
    return None if answer is None else (answer.matches(truth, tolerance), text)


_JOINT = re.compile(r",(?!\d{3}(?!\d))\s*(?![^{}()\[\]]*[})\]])|\\cup\b|∪|" + AND.pattern)
_LABEL = re.compile(r"_\{?\d\}?(?=\s*=)|(?<![\w\\])[A-Z]['′]?\s*(?=(?:\\left)?\([^()]*,[^()]*\))")


def _compare_math(candidate: Candidate, truth: str, tolerance: Tolerance):
    text = candidate.text
    if is_prose(MACRO.sub(r"\1", truth)) and (outcome := _compare_text(candidate, truth)) and outcome[0]:
        return outcome
    if is_prose(text) and not LATEX.search(text) and (formulas := formulas_in(text)):
        text = formulas[0 if candidate.explicit else -1]
    right = _same(truth, text, tolerance)
    if not right:  # several answers, in order
        parts = [_JOINT.split(part.strip("$ ")) for part in (truth, text[: len(truth) + _SHOWN])]
        if len(parts[0]) == len(parts[1]) > 1:
            right = all(_same(*pair, tolerance) for pair in zip(*parts, strict=True)) or right
    return None if right is None else (right, candidate.text)


def _same(truth: str, text: str, tolerance: Tolerance) -> bool | None:
    """Equality as mathematics, where one side only may name its parts: BC = 5, x_1 = 2, P(1, 2)."""
    if ("=" in truth) != ("=" in text):
        truth, text = _assigned(truth), _assigned(text)
    if bool(_LABEL.search(truth)) != bool(_LABEL.search(text)):
        truth, text = _LABEL.sub("", truth), _LABEL.sub("", text)
    return equal(truth, text, tolerance)


# "The capital is Paris": what the only sentence, or the last one, says of its subject.
_COPULA = re.compile(
    r"(?:^|[.!?,;\n])(?:(?!\b(?:not|no)\b|n['’]t\b)[^.!?,;\n])*?"
    r"(?:\b(?:is|are|was|were|says|reads)|['’]s)\s+(?!not\b)((?:(?:in|on|at|to)\s)?([^.!?\n]+))[.!]?\s*$"
)


def _compare_text(candidate: Candidate, truth: str):
    """Other words in an explicit or a short answer are wrong, though a reader may take them for the same; prose that
    merely does not equal the truth says nothing."""
    text, expected = candidate.text, _as_words(truth)
    said = _COPULA.search(text)
    if expected in map(_as_words, (text, *(said.groups() if said else ()))):
        return True, text
    if candidate.rule != "formula" and (candidate.explicit or len(text.split()) <= max(3, len(expected.split()))):
        return False, text
    return None


def _as_words(text: str) -> str:
    return normalize_text(re.sub(r",?\s+and\s+|,\s*", ", ", re.sub(r"\s*:\s*", ":", text)))
