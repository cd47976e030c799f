"""`python -m dmlr check FILE`: everything that is wrong with a dataset file, found before a run finds out.

Reads the file as a run would (`examples.py`) and then looks closer: images are opened, solutions held against the
options named in the question, rows against each other, and the file looked at as a whole.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dmlr.data.examples import Example, Problem, read_dataset
from dmlr.data.images import ImageError, open_image, shorten
from dmlr.judge.choice import as_choice
from dmlr.judge.extract import normalize_text, options_of, split_choice, unbox

MANY = 20  # questions whose first option is never right: by chance, with two options each, once in a million files
MESSAGES, ROWS = 3, 8  # of a kind, and of a message, that a report names


def check_dataset(path: str | Path) -> list[Problem]:
    """Everything that is wrong with a dataset file, images opened and solutions held against the options.

    Raises DatasetError as load_dataset does. Problems of the whole file come first, then those of its rows in order.
    """
    return check_examples(*read_dataset(path))


def check_examples(examples: list[Example], problems: list[Problem]) -> list[Problem]:
    """`check_dataset` of a file as `read_dataset` gives it."""
    unusable = {problem.row for problem in problems if problem.fatal}
    first: dict[tuple, Example] = {}
    found = list(problems)
    for example in examples:
        twin = first.setdefault((example.question, example.images), example)
        images = () if example.row in unusable else _unreadable(example)
        for kind, message in (*images, *_of_solution(example), *_of_twin(example, twin)):
            found.append(Problem(example.row, example.idx, kind, message, fatal=kind == "image_unreadable"))
    found.sort(key=lambda problem: (problem.row, not problem.fatal))
    return _of_file(examples, found) + found


def _of_file(examples: list[Example], problems: list[Problem]) -> list[Problem]:
    """What shows in no row alone: no image is there at all, the first option is never right."""
    found = []
    lost = [problem for problem in problems if problem.kind == "image_missing"]
    if len(lost) > 1 and len(lost) == sum(len(example.images) for example in examples):
        message = f"none of the {len(lost)} images is there: put them where the paths lead, or start in their folder"
        found.append(Problem(None, None, "images_elsewhere", message))
    asked = [(unbox(example.solution), options) for example in examples if (options := _options(example))]
    chosen = [right[0] for answer, options in asked if answer and (right := as_choice(answer, options, "choice"))]
    if len(chosen) >= MANY and "A" not in chosen:
        empty = sum(not answer for answer, _ in asked)
        message = f"none of {len(chosen)} solutions is the first option"
        message += f", and {empty} are empty: was answer index 0 taken for none?" if empty else ""
        found.append(Problem(None, None, "first_option_never", message))
    return found


def _options(example: Example) -> dict[str, str]:
    return options_of(example.meta.get("choices"), example.question)


def _of_twin(example: Example, twin: Example) -> Iterator[tuple[str, str]]:
    if twin is example:
        return
    if normalize_text(twin.solution) == normalize_text(example.solution):
        yield "row_doubled", f"the same question and image as row {twin.row}"
    else:
        yield "rows_contradict", f"the question and image of row {twin.row} with another solution"


def _unreadable(example: Example) -> Iterator[tuple[str, str]]:
    for source in example.images:
        if not source.lower().startswith(("http://", "https://")):  # a check stays on this machine
            try:
                open_image(source)
            except ImageError as error:
                yield "image_unreadable", str(error)


def _of_solution(example: Example) -> Iterator[tuple[str, str]]:
    answer, options = unbox(example.solution), _options(example)
    if not answer:
        if example.solution.strip():
            yield "solution_unparsable", f"nothing in the solution {shorten(example.solution)!r} is an answer"
        return
    if answer.count("{") != answer.count("}"):
        yield "solution_unparsable", f"braces do not match in the solution {shorten(answer)!r}"
    if not options:
        return
    texts = {letter: normalize_text(text) for letter, text in options.items()}
    doubled = [text for text in options.values() if list(texts.values()).count(normalize_text(text)) > 1]
    if doubled and len(set(doubled)) == len(doubled):
        alike = " and ".join(map(repr, map(shorten, doubled)))
        yield "options_alike", f"options that differ in case or punctuation alone: {alike}"
    elif doubled:
        yield "options_doubled", f"options with the same text: {shorten(doubled[0])!r}"
    if not all(texts.values()):
        yield "options_empty", "an option has no text"

    part, whole = split_choice(answer), normalize_text(answer) in texts.values()
    letter = part[0] if part else answer.upper() if len(answer) == 1 and answer.isalpha() else None
    by_accident, shown = re.match(r"([A-H])[.):]?\s", answer), f"the solution {shorten(answer)!r}"
    if whole and by_accident and texts.get(by_accident[1]) != normalize_text(answer):
        yield "option_like_letter", f"{shown} is an option's text that begins like a letter by accident"
    elif letter and letter not in options and (part or not whole):
        yield "letter_not_an_option", f"{shown} names a letter that is not among {', '.join(options)}"
    elif part and part[1] and normalize_text(part[1]) != texts[letter]:
        yield "option_text_differs", f"option {letter} reads {shorten(options[letter])!r}, {shown}"
    elif not letter and not whole:
        yield "solution_not_an_option", f"{shown} is neither a letter nor the text of an option"


def report(problems: list[Problem]) -> str:
    """Problems by kind: the file's own, then kinds that make rows unusable, then the most frequent.

    A kind is its count and a few messages; what is said of many rows alike is said once, with the rows.
    """
    kinds = defaultdict(list)
    for problem in problems:
        kinds[(problem.row is not None, not problem.fatal, problem.kind)].append(problem)
    lines = []
    for (_, harmless, kind), group in sorted(kinds.items(), key=lambda item: (*item[0][:2], -len(item[1]), item[0][2])):
        lines.append(f"{len(group):6d}  {kind}{'' if harmless else '  (row unusable)'}")
        alike = defaultdict(list)  # rows, by what is said of them
        for problem in group:
            alike[problem.message].append(problem.row)
        for message, rows in list(alike.items())[:MESSAGES]:
            more = f" and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
            where = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:ROWS]))}{more}: "
            lines.append(f"          {'' if rows[0] is None else where}{message}")
        if len(alike) > MESSAGES:
            lines.append(f"          and {len(alike) - MESSAGES} more")
    return "\n".join(lines) or "no problems found"


def summary(examples: list[Example], problems: list[Problem]) -> str:
    """One line: how many rows a run can use, and how many of the others it could not judge."""
    unusable = {problem.row for problem in problems if problem.fatal}
    silent = {problem.row for problem in problems if problem.kind in ("solution_missing", "solution_empty")}
    rows = unusable | {example.row for example in examples}
    return f"{len(rows)} rows: {len(unusable)} unusable, {len(silent)} without a solution; {len(problems)} problems"
