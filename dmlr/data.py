"""Dataset file -> checked examples, and a table of what is wrong with a file.

A dataset file is a JSON list of objects with `prompt`, `solution`, `image_path` and `idx`; every other key is
kept as `meta`. A row that cannot be used becomes a fatal `Problem` and the other rows go on. The module knows
nothing about models: images are opened by `open_image`, one at a time, when the run needs them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmlr.config import locate
from dmlr.extract import normalize_text, parse_options, split_choice, unbox
from dmlr.images import ImageError, local_path, open_image, shorten

# A literal backslash-n, unless it begins a LaTeX command (\neq, \nu, ...) or follows another backslash.
_LITERAL_NEWLINE = re.compile(
    r"(?<!\\)\\n(?!(?:e|eq|eg|u|i|abla|ot|otin|mid|leq|geq|less|gtr|parallel|exists|sub|sup|subseteq|supseteq|cong|sim|"
    r"atural|earrow|warrow|ewline|oindent|onumber|ormalsize|ewcommand|prec|succ|rightarrow|leftarrow)(?![A-Za-z]))"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class DatasetError(ValueError):
    """A dataset file that cannot be used at all; the message names the file and the reason."""


@dataclass(frozen=True)
class Example:
    """One usable row. `row` is the record's key, `idx` the seed of the example's noise."""

    row: int
    idx: int | str
    question: str
    solution: str
    image: str | None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row, or with the file (row None). A fatal one makes its row unusable."""

    row: int | None
    idx: int | str | None
    kind: str
    message: str
    fatal: bool = False


def load_dataset(path: str | Path) -> tuple[list[Example], list[Problem]]:
    """Usable examples in file order, and the problems found without opening any image.

    Raises DatasetError when the file is missing, is not valid JSON (NaN and Infinity included), or is not a
    list with at least one element. Relative image paths are looked up in the file's folder, then in the
    working folder. A null or absent `image_path` is a text-only question, unless it is absent in this row
    and present in others: that row has lost its image.
    """
    rows = list(_rows(path))
    problems = [problem for _, notes in rows for problem in notes.problems]
    return [example for example, notes in rows if example and not notes.fatal], problems


def _rows(path: str | Path) -> Iterator[tuple[Example | None, _Notes]]:
    """Each row with its problems, as an Example also when it is unusable for the lack of its image alone."""
    path, rows = _read(path)
    has_images = any(isinstance(row, dict) and row.get("image_path") for row in rows)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        notes = _Notes(number)
        if not isinstance(row, dict):
            notes.add("not_an_object", f"expected an object with prompt and solution, found {type(row).__name__}", True)
            yield None, notes
            continue
        idx = _checked_idx(row, seen, notes)
        question = _checked_prompt(row, notes)
        solution = _checked_solution(row, notes)
        usable = not notes.fatal
        image = _checked_image(row, path.parent, has_images, notes)
        meta = {k: v for k, v in row.items() if k not in ("prompt", "solution", "image_path", "idx")}
        yield (Example(number, idx, question, solution, image, meta) if usable else None), notes


class _Notes:
    """Collects the problems of one row."""

    def __init__(self, row: int, idx: int | str | None = None) -> None:
        self.row, self.idx, self.problems = row, idx, []

    def add(self, kind: str, message: str, fatal: bool = False) -> None:
        self.problems.append(Problem(self.row, self.idx, kind, message, fatal))

    @property
    def fatal(self) -> bool:
        return any(problem.fatal for problem in self.problems)


def _read(path: str | Path) -> tuple[Path, list]:
    path = Path(locate(str(path)))
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise DatasetError(f"dataset file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"dataset file {path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise DatasetError(f"dataset file {path}: nested too deeply to be a list of objects") from None
    except ValueError as error:
        raise DatasetError(f"dataset file {path}: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise DatasetError(f"dataset file {path}: expected a JSON list of objects, found {type(rows).__name__}")
    if not rows:
        raise DatasetError(f"dataset file {path}: the list is empty")
    return path, rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _checked_idx(row: dict, seen: dict[str, int], notes: _Notes) -> int | str:
    number, idx = notes.row, row.get("idx")
    if isinstance(idx, float) and idx.is_integer():
        idx = int(idx)
    if idx is None:
        notes.add("idx_missing", f"no idx: its position {number} is used")
        idx = number
    elif isinstance(idx, bool) or not isinstance(idx, int | str) or idx == "":
        notes.add("idx_invalid", f"idx must be an integer or a string, found {idx!r}", True)
        return number
    notes.idx = idx
    first = seen.setdefault(str(idx), number)
    if first != number:
        notes.add("idx_doubled", f"idx {idx!r} is already taken by row {first}", True)
    return idx


def _checked_prompt(row: dict, notes: _Notes) -> str:
    prompt = row.get("prompt")
    if prompt is None:
        notes.add("prompt_missing", "no prompt", True)
        return ""
    if not isinstance(prompt, str) or not prompt.strip():
        notes.add("prompt_empty", "the prompt is empty" if isinstance(prompt, str) else "the prompt is not text", True)
        return ""
    text = _LITERAL_NEWLINE.sub("\n", prompt)
    if text != prompt:
        notes.add("literal_newline", "the prompt holds a literal backslash-n; it is read as a new line")
    if _CONTROL.search(text):
        notes.add("control_characters", "the prompt holds control characters")
    return text


def _checked_solution(row: dict, notes: _Notes) -> str:
    solution = row.get("solution")
    if solution is None:
        notes.add("solution_missing", "no solution: the row cannot be judged")
        return ""
    text = solution if isinstance(solution, str) else str(solution)
    if not text.strip():
        notes.add("solution_empty", "the solution is empty: the row cannot be judged")
        return ""
    if _CONTROL.search(text):
        notes.add("control_characters", "the solution holds control characters")
    return text


def _checked_image(row: dict, folder: Path, has_images: bool, notes: _Notes) -> str | None:
    source = row.get("image_path")
    if source is None and ("image_path" in row or not has_images):
        return None
    if source is None or source == "":
        notes.add("image_missing", "names no image, but other rows do (write null for a question without one)", True)
        return None
    if not isinstance(source, str):
        notes.add("image_invalid", f"image_path must be text, found {type(source).__name__}", True)
        return None
    if re.match(r"(?i)https?://|data:", source):
        return source
    local = Path(local_path(source))
    for candidate in (folder / local, local):
        try:
            if candidate.is_file():
                return str(candidate)
        except (OSError, ValueError):  # a name too long, or with a NUL
            break
    notes.add("image_missing", f"image file {shorten(source)!r} is neither in {folder} nor in the working folder", True)
    return source


# ------------------------------------------------------------------------------------- checking a file


def check_dataset(path: str | Path) -> list[Problem]:
    """Everything that is wrong with a dataset file, images opened and solutions held against the options.

    Raises DatasetError as load_dataset does. The order is that of the rows.
    """
    problems: list[Problem] = []
    first: dict[tuple, Example] = {}
    for example, notes in _rows(path):
        if example is not None:
            _check_image(example, notes)
            _check_solution(example, notes)
            _check_twin(example, first.setdefault((example.question, example.image), example), notes)
        problems += sorted(notes.problems, key=lambda problem: not problem.fatal)
    return problems


def _check_twin(example: Example, twin: Example, notes: _Notes) -> None:
    if twin is example:
        return
    if normalize_text(twin.solution) == normalize_text(example.solution):
        notes.add("row_doubled", f"the same question and image as row {twin.row}")
    else:
        notes.add("rows_contradict", f"the question and image of row {twin.row} with another solution")


def _check_image(example: Example, notes: _Notes) -> None:
    if example.image is None or notes.fatal or example.image.lower().startswith(("http://", "https://")):
        return  # a check stays on this machine
    try:
        open_image(example.image)
    except ImageError as error:
        notes.add("image_unreadable", str(error), True)


def _check_solution(example: Example, notes: _Notes) -> None:
    answer = unbox(example.solution)
    if not answer:
        if example.solution.strip():
            notes.add("solution_unparsable", f"nothing in the solution {shorten(example.solution)!r} is an answer")
        return
    if answer.count("{") != answer.count("}"):
        notes.add("solution_unparsable", f"braces do not match in the solution {shorten(answer)!r}")
    choices = example.meta.get("choices")
    if isinstance(choices, list) and choices:
        options = {chr(65 + i): str(choice) for i, choice in enumerate(choices[:26])}
    else:
        options = parse_options(example.question)
    if not options:
        return
    texts = {letter: normalize_text(text) for letter, text in options.items()}
    doubled = sorted({text for text in texts.values() if list(texts.values()).count(text) > 1})
    if doubled:
        notes.add("options_doubled", f"options with the same text: {shorten(', '.join(doubled))!r}")
    if any(not text for text in texts.values()):
        notes.add("options_empty", "an option has no text")
    _check_choice(answer, options, texts, notes)


def _check_choice(answer: str, options: dict[str, str], texts: dict[str, str], notes: _Notes) -> None:
    part, whole = split_choice(answer), normalize_text(answer) in texts.values()
    shown = shorten(answer)
    by_accident = re.match(r"([A-H])[.):]?\s", answer)
    if whole and by_accident and texts.get(by_accident[1]) != normalize_text(answer):
        notes.add(
            "option_like_letter", f"the solution {shown!r} is an option's text that begins like a letter by accident"
        )
    elif part and part[0] not in options:
        notes.add(
            "letter_not_an_option", f"the solution {shown!r} names a letter that is not among {', '.join(options)}"
        )
    elif part and part[1] and normalize_text(part[1]) != texts[part[0]]:
        notes.add(
            "option_text_differs", f"option {part[0]} reads {shorten(options[part[0]])!r}, the solution {shown!r}"
        )
    elif not part and len(answer) == 1 and answer.isalpha() and not whole and answer.upper() not in options:
        notes.add("letter_not_an_option", f"the solution {shown!r} is not among {', '.join(options)}")
    elif not part and not whole and not (len(answer) == 1 and answer.upper() in options):
        notes.add("solution_not_an_option", f"the solution {shown!r} is neither a letter nor the text of an option")


def report(problems: list[Problem], examples_each: int = 3) -> str:
    """Problems by kind, most frequent first, fatal kinds on top: count, then the first few rows."""
    if not problems:
        return "no problems found"
    kinds = defaultdict(list)
    for problem in problems:
        kinds[(not problem.fatal, problem.kind)].append(problem)
    lines = []
    for (harmless, kind), found in sorted(kinds.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        lines.append(f"{len(found):6d}  {kind}{'' if harmless else '  (row unusable)'}")
        for problem in found[:examples_each]:
            where = "file" if problem.row is None else f"row {problem.row}"
            seed = "" if problem.idx is None or problem.idx == problem.row else f" (idx {problem.idx})"
            lines.append(f"          {where}{seed}: {problem.message}")
        if len(found) > examples_each:
            lines.append(f"          and {len(found) - examples_each} more")
    return "\n".join(lines)


def main_check(argv: Sequence[str] | None = None) -> int:
    """`FILE...` -> a report each. Returns 0 without problems, 1 with some, 2 when a file cannot be used at all."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or any(argument.startswith("-") for argument in argv):
        print("usage: check FILE...   (dataset files: JSON lists of {prompt, solution, image_path, idx})")
        return 0 if argv in (["-h"], ["--help"]) else 2
    status = 0
    for path in argv:
        try:
            problems = check_dataset(path)
        except DatasetError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        unusable = len({problem.row for problem in problems if problem.fatal})
        print(f"{path}: {len(problems)} problems, {unusable} unusable rows\n{report(problems)}")
        status = max(status, 1 if problems else 0)
    return status
