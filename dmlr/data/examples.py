"""Dataset file -> usable examples, and the problems of the rows on the way.

A dataset file is a JSON list of objects with `prompt`, `solution`, `image_path` (one, or a list of them) and `idx`;
every other key is kept as `meta`. A row that cannot be used becomes a fatal `Problem` and the other rows go on. The
module knows nothing about models: images are opened by `open_image`, one at a time, when the run needs them; `check.py`
looks closer.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmlr.config import locate
from dmlr.data.images import ImageError, local_path, open_image, shorten

__all__ = ["DatasetError", "Example", "ImageError", "Problem", "load_dataset", "open_image", "read_dataset"]

# A literal backslash-n, unless it begins a LaTeX command (\neq, \nu, ...) or follows another backslash.
_LITERAL_NEWLINE = re.compile(
    r"(?<!\\)\\n(?!(?:e|eq|eg|u|i|abla|ot|otin|mid|leq|geq|less|gtr|parallel|exists|sub|sup|subseteq|supseteq|cong|sim|"
    r"atural|earrow|warrow|ewline|oindent|onumber|ormalsize|ewcommand|prec|succ|rightarrow|leftarrow)(?![A-Za-z]))"
)
_HALF = re.compile("[\ud800-\udfff]")
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
    images: tuple[str, ...] = ()  # sources, in the order in which the model sees them
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The first image: the one that figures show."""
        return self.images[0] if self.images else None


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

    Raises DatasetError when the file is missing, is not valid JSON (NaN and Infinity included), or is not a list with
    at least one element. Relative image paths are looked up in the file's folder, then in the working folder. A null
    or absent `image_path` is a text-only question; where other rows have one, a row that lacks it has lost its image.
    """
    examples, problems = read_dataset(path)
    unusable = {problem.row for problem in problems if problem.fatal}
    return [example for example in examples if example.row not in unusable], problems


def read_dataset(path: str | Path) -> tuple[list[Example], list[Problem]]:
    """As `load_dataset`, with the examples that are unusable for the lack of their images alone."""
    path = Path(locate(str(path)))
    rows, examples, problems = _read(path), [], []
    has_images = any(isinstance(row, dict) and row.get("image_path") for row in rows)
    seen: dict[str, int] = {}
    for number, content in enumerate(rows):
        row = _Row(number, content, problems)
        if not isinstance(content, dict):
            kind = type(content).__name__
            row.note("not_an_object", f"expected an object with prompt and solution, found {kind}", True)
            continue
        _mend_characters(row)
        parts = _idx(row, seen), _prompt(row), _solution(row), _images(row, path.parent, has_images)
        meta = {k: v for k, v in row.content.items() if k not in ("prompt", "solution", "image_path", "idx")}
        if None not in parts:
            examples.append(Example(number, *parts, meta))
    return examples, problems


@dataclass
class _Row:
    """A row as it is read, and where its problems go, which name its idx as soon as it is known."""

    number: int
    content: Any
    problems: list[Problem]
    idx: int | str | None = None

    def note(self, kind: str, message: str, fatal: bool = False) -> None:
        self.problems.append(Problem(self.number, self.idx, kind, message, fatal))


def _read(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object)
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start})"
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
    else:
        if isinstance(rows, list) and rows:
            return rows
        reason = "the list is empty" if rows == [] else f"expected a JSON list of objects, found {type(rows).__name__}"
    raise DatasetError(f"dataset file {path}: {reason}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float | str:
    """A number that no float can hold (1e999) stays as it is written, instead of becoming infinite."""
    return text if math.isinf(float(text)) else float(text)


class _KeysTwice(dict):
    """An object of the file that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _KeysTwice(row)


def _mend_characters(row: _Row) -> None:
    """Makes of it text that can be written: JSON may hold half of a character (\\ud83d), no file or page can."""
    if isinstance(row.content, _KeysTwice):
        row.note("key_doubled", "a key is there twice: its last value counts")
    text = json.dumps(row.content, ensure_ascii=False)
    if _HALF.search(text):
        row.note("half_characters", "holds half of a character (a lone surrogate); it is read as a question mark")
        row.content = json.loads(text.encode("utf-8", "replace"))


def _idx(row: _Row, seen: dict[str, int]) -> int | str | None:
    """None for a row that cannot be used, here and below."""
    idx = row.content.get("idx")
    idx = int(idx) if isinstance(idx, float) and idx.is_integer() else idx
    if idx is None:
        row.note("idx_missing", "no idx: its position is used")
        idx = row.number
    elif isinstance(idx, bool) or not isinstance(idx, int | str) or idx == "":
        row.note("idx_invalid", f"idx must be an integer or a string, found {idx!r}", True)
        return None
    row.idx = idx
    if (first := seen.setdefault(str(idx), row.number)) != row.number:
        row.note("idx_doubled", f"idx {idx!r} is already taken by row {first}", True)
        return None
    return idx


def _prompt(row: _Row) -> str | None:
    prompt = row.content.get("prompt")
    if prompt is None:
        row.note("prompt_missing", "no prompt", True)
        return None
    if not isinstance(prompt, str) or not prompt.strip():
        row.note("prompt_empty", f"the prompt is {'empty' if isinstance(prompt, str) else 'not text'}", True)
        return None
    text = _LITERAL_NEWLINE.sub("\n", prompt)
    if text != prompt:
        row.note("literal_newline", "the prompt holds a literal backslash-n; it is read as a new line")
    return _checked_text("prompt", text, row)


def _solution(row: _Row) -> str:
    solution = row.content.get("solution")
    if solution is not None and (text := str(solution)).strip():
        return _checked_text("solution", text, row)
    kind, what = ("missing", "no solution") if solution is None else ("empty", "the solution is empty")
    row.note(f"solution_{kind}", f"{what}: the row cannot be judged")
    return ""


def _checked_text(name: str, text: str, row: _Row) -> str:
    if _CONTROL.search(text):
        row.note("control_characters", f"the {name} holds control characters")
    return text


def _images(row: _Row, folder: Path, has_images: bool) -> tuple[str, ...]:
    """Sources of the images, found or not."""
    sources = row.content.get("image_path")
    if sources is None and ("image_path" in row.content or not has_images):
        return ()
    if sources is None or sources == "":
        row.note("image_missing", "names no image, but other rows do (write null for a question without one)", True)
        return ()
    images = [_image(source, folder, row) for source in (sources if isinstance(sources, list) else [sources])]
    return tuple(source for source in images if source)


def _image(source: Any, folder: Path, row: _Row) -> str | None:
    if not isinstance(source, str) or not source:
        kind = type(source).__name__
        row.note("image_invalid", f"image_path must be text or a list of texts, found {kind}", True)
        return None
    if re.match(r"(?i)https?://|data:", source):
        return source
    with contextlib.suppress(OSError, ValueError):  # of a name too long, or with a NUL
        local = Path(local_path(source))
        if there := next(filter(Path.is_file, (folder / local, local)), None):
            return str(there)
    message = f"image file {shorten(source)!r} is neither in {folder} nor in the working folder"
    row.note("image_missing", message, True)
    return source
