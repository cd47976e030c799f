"""Text to words, steps and word classes: where a token's text ends, and what the piece it lies in is called.

Pure functions on strings and spans. Knows nothing about models, or about which words any benchmark uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dmlr.config import ConfigError, locate

OTHER = "other"  # the class of a word that no pattern names
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")  # a run of letters and digits, or one sign
_HEAD = re.compile(r"\s*(?:<\w+>\s*)?")  # what a chain opens with: <think>
_TAILS = ("</think>", "<answer>", "\\boxed")  # where reasoning ends, if not with the words that the answer follows


class Span(NamedTuple):
    """A piece of a text: characters start to end."""

    start: int
    end: int


def token_ends(tokenizer, ids: Sequence[int]) -> list[int]:
    """Where each token's text ends in the decoded text.

    A token that holds a part of a character (byte-level tokenizers) ends where the last whole one does.
    """
    decoded = (tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids)))
    return [len(text.rstrip("�")) for text in decoded]


def words(text: str) -> list[Span]:
    """Runs of letters and digits, and single signs, in order."""
    return [Span(*match.span()) for match in _WORD.finditer(text)]


def places(text: str, ends: Sequence[int], spans: Sequence[Span]) -> list[int | None]:
    """For each token the span that holds its first character which is not blank; None where none does.

    ends: as `token_ends` gives them; spans: in order, without overlap.
    """
    found, at, start = [], 0, 0
    for end in ends:
        own = text[start:end]
        first = start + len(own) - len(own.lstrip())
        while at < len(spans) and spans[at].end <= first:
            at += 1
        found.append(at if at < len(spans) and spans[at].start <= first < end else None)
        start = end
    return found


def rationale(text: str, cue: str = "") -> Span:
    """The part of a chain that reasons: behind an opening tag, up to `cue` (what the answer follows).

    Without the cue up to `</think>`, `<answer>` or `\\boxed`, the first of these that there is, else to the end.
    """
    start = _HEAD.match(text).end()
    cuts = [text.find(mark, start) for mark in (cue, *_TAILS) if mark]
    return Span(start, next((cut for cut in cuts if cut >= 0), len(text)))


def steps(text: str, within: Span, ends: re.Pattern) -> list[Span]:
    """`within` cut behind every match of `ends`; a piece without a letter or digit belongs to the one before it."""
    cuts = [match.end() for match in ends.finditer(text, within.start, within.end)]
    found: list[Span] = []
    start = within.start
    for end in sorted({*cuts, within.end}):
        if end <= start:
            continue
        if re.search(r"\w", text[start:end]) or not found:
            found.append(Span(start, end))
        else:
            found[-1] = Span(found[-1].start, end)
        start = end
    return found if any(re.search(r"\w", text[a:b]) for a, b in found) else []


def read_classes(path: str | Path) -> dict[str, re.Pattern]:
    """Word classes of a YAML file: each line a name and a regular expression, case ignored; the first that fits counts.

    ConfigError says what else the file holds.
    """
    try:
        given = yaml.safe_load(Path(locate(str(path))).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"word classes {path}: {error}") from None
    if not isinstance(given, dict) or not given or not all(isinstance(value, str) for value in given.values()):
        raise ConfigError(f"word classes {path}: expected lines 'name: regular expression'")
    return {str(name): compiled(pattern, f"word classes {path}, {name}") for name, pattern in given.items()}


def compiled(pattern: str, what: str) -> re.Pattern:
    """The regular expression, or ConfigError that names it."""
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"{what}: {pattern!r} is no regular expression: {error}") from None


def class_of(text: str, word: Span, classes: Mapping[str, re.Pattern]) -> str:
    """The first class whose pattern fits the word from its start to its end; patterns may look behind it."""
    for name, pattern in classes.items():
        if pattern.fullmatch(text, word.start, word.end):
            return name
    return OTHER


def vocabulary(text: str) -> set[str]:
    """The words of a text, in lower case and without a plural s: to tell what a question already named."""
    return {singular(text[a:b]) for a, b in words(text)}


def singular(word: str) -> str:
    """'Crosses' → 'cross', 'rings' → 'ring': enough to see that a word was repeated, no grammar."""
    word = word.lower()
    return re.sub(r"(?<=ss)es$|(?<=[^s])s$", "", word)
