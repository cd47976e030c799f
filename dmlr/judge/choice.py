"""Answers that pick something: an option by letter or by text, yes or no. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import ascii_uppercase

from dmlr.judge.expressions import equal, is_prose, looks_like_math
from dmlr.judge.extract import DENIES, MACRO, Candidate, normalize_text, plain, split_choice, stated
from dmlr.judge.quantities import parse_number

_BARE = re.compile(r"(?:(?i:option|choice|answer)\s+)?[(\[{]?\s*([A-Za-z])\s*[)\]}]?[.,:;!]?")
# A letter that stands alone; not the article "A" or the pronoun "I" before a word that is no part of a statement.
_MENTION = re.compile(
    r"(?<![A-Za-z0-9'’\\_^$-])(?:\(([A-Za-z])\)|([A-Z])(?![A-Za-z0-9'’_^-])"
    r"(?:(?<![AI])|(?!\s+[a-z])|(?=\s+(?:is|are|because|since|as|answer|option|choice|and|or|which|with|for)\b)))"
)

_OPENING = re.compile(r"[A-Z](?:\s+(?:is the|answer|option|choice)\b|\s*[-–—]\s)")


def as_choice(inner: str, options: dict[str, str], kind: str | None) -> tuple[str, str] | None:
    """(letter, text) of the right option, either "" when unknown; None when the truth is no option."""
    if letter := _letter_of_text(inner, options):
        return letter, options[letter]
    bare = _BARE.fullmatch(plain(inner).strip())
    if bare and bare[1].upper() in options:
        return bare[1].upper(), options[bare[1].upper()]
    part = split_choice(inner)
    if part and part[1] and (part[0] in options or (not options and kind in ("choice", None))):
        return part
    if bare and not options and (kind == "choice" or (kind is None and (bare[1].isupper() or bare[1] in "abcd"))):
        return bare[1].upper(), ""
    return None


def compare_choice(candidate: Candidate, letter: str, text: str, options: dict[str, str]) -> tuple[bool, str] | None:
    """(right, what was picked), None when the candidate picks nothing.

    The letter, the text or both will do; two options at once, or a letter with another option's text, are wrong.
    """
    known = options or ({letter: text} if text else {})
    picked = _picked(candidate, known, "".join(options) or ascii_uppercase)
    return None if picked is None else (picked == letter, picked or candidate.text)


def chosen(found: Iterable[Candidate], options: dict[str, str]) -> str | None:
    """What the most explicit candidate that picks anything picks: an option's letter, or its words where it picks
    several; None where none picks, or there are no options."""
    picks = ((candidate, _picked(candidate, options, "".join(options))) for candidate in found if options)
    return next((picked or candidate.text for candidate, picked in picks if picked is not None), None)


def _picked(candidate: Candidate, known: dict[str, str], letters: str) -> str | None:
    """The letter of the option that is picked, "" for several at once, None for none."""
    if candidate.rule == "formula":
        return None  # a letter in a formula is a point or a variable
    answer = MACRO.sub(r"\1", plain(candidate.text)).strip().strip("$\"'“” ")
    if letter := _letter_of_text(answer, known):
        return letter
    if bare := _BARE.fullmatch(answer.split("\n")[0].strip()):
        return bare[1].upper() if bare[1].upper() in letters else None
    if (part := split_choice(answer)) and part[0] in letters:
        named = _letter_of_text(part[1].split("\n")[0], known)
        return part[0] if named in (None, part[0]) else ""
    # An explicit answer says first what it picks, and so does "B is the ..."; else the end of the text counts.
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", answer) if part.strip()] or [""]
    first = candidate.explicit or _OPENING.match(answer)
    said = answer if first else " ".join(sentences[-3:])
    mentions = [match for match in _MENTION.finditer(said) if (match[1] or match[2]).upper() in letters]
    mention, alone = stated(said, mentions, last=not first)
    if mention:
        return (mention[1] or mention[2]).upper() if alone else ""
    # No letter: yes or no in a sentence, an equal expression ("2 + 3" names neither of the options 2 and 3), a text.
    words = {normalize_text(text): letter for letter, text in known.items()}
    two = set(words) in ({"yes", "no"}, {"true", "false"})
    if two and (outcome := compare_yes_no(candidate, next(iter(words)))):
        return words[outcome[1]]
    if candidate.explicit and looks_like_math(answer) and not is_prose(answer):
        return _only(letter for letter, text in known.items() if text and equal(text, answer))
    last = answer.split("\n")[0] if candidate.explicit else sentences[-1]
    return _named_in(re.split(r"\b(?:so|thus|hence|therefore)\b", last)[-1], known) or _named_in(last, known)


def _letter_of_text(answer: str, known: dict[str, str]) -> str | None:
    """The option whose whole text this is: as it stands, else normalised, else by numeric value."""
    if not (texts := {letter: text for letter, text in known.items() if text.strip()}):
        return None
    normal, number = normalize_text(answer), parse_number(answer)
    values = {letter: parse_number(text) for letter, text in texts.items()} if number else {}
    return (
        _only(letter for letter, text in texts.items() if text.strip() == answer.strip())
        or _only(letter for letter, text in texts.items() if normalize_text(text) == normal)
        or _only(letter for letter, value in values.items() if value and value.matches(number))
    )


def _only(letters: Iterable[str]) -> str | None:
    found = list(letters)
    return found[0] if len(found) == 1 else None


def _named_in(sentence: str, known: dict[str, str]) -> str | None:
    """The only option whose text occurs, as whole words, in a sentence that denies nothing; None otherwise."""
    if DENIES.search(sentence):
        return None
    words = f" {_words(sentence)} "
    inside = {letter: text for letter, t in known.items() if (text := _words(t)) and f" {text} " in words}
    # "dark red" names that option, not also "red".
    return _only(key for key, t in inside.items() if not any(t != o and f" {t} " in f" {o} " for o in inside.values()))


def _words(text: str) -> str:
    """Words between single spaces; a fraction is one, so the 2 in it is no option's text."""
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\^?\{?\\circ\}?|°|\\(?![A-Za-z])", "", text))
    text = re.sub(r"(?<!\s)\s+(?=[{}])|(?<=\{)\s+", "", text)
    return normalize_text(re.sub(r"[^\w.%/\\{}^-]+", " ", text))


# ----------------------------------------------------------------------------------------------- yes, no

_SAYS = {
    "yes": "yes yep yeah true correct right indeed oui ja sí si sim да はい 네 예 是 是的 对 对的 對 正确",
    "no": "no nope false incorrect wrong non nein não нет いいえ 아니요 아니오 否 不 不是 不对 没有",
}
_SAID = {word: meaning for meaning, words in _SAYS.items() for word in words.split()}
_STATED = re.compile(
    r"(?i)(?:^|[:\"'({]\s*|(?<!not )(?<!n't )\b(?:is|so|think|say)\s+|,\s*|[.!?\n]\s*)"
    r"(yes|no|true|false)(?=[.,;!\"')}\n]|\s*$)"
)
_QUESTION = re.compile(
    r"(?i)(?:^|[.:?!\n]\s*)(?:is|are|was|were|do|does|did|can|could|has|have|will)\s+([^?\n]{3,200})\?"
)
_QUOTE = "[\"“”'‘’]"
_QUOTED = re.compile(rf"{_QUOTE}([^\"“”'‘’]+){_QUOTE}[.?!]*$")
_HEDGED = re.compile(
    r"(?i)\b(?:may|might|maybe|perhaps|possibly|cannot|can't|unclear|unsure|unable|if|whether|or|but)\b"
)
_LITTLE = re.compile(r"\b(?:a|an|the|this|that|these|those|there|any|some|is|are|was|were|do|does|did|has|have|be)\b")


def compare_yes_no(candidate: Candidate, truth: str, question: str = "") -> tuple[bool, str] | None:
    """(right, "yes") when the candidate says one of the two words as its answer, None otherwise.

    "No dog is seen" is a sentence about dogs, "No, ..." and "... is no." are answers; and so is a sentence that says
    what the question asks, word by word, or denies just that.
    """
    names = {"yes": "yes", "no": "no"} if truth in ("yes", "no") else {"yes": "true", "no": "false"}
    text = plain(candidate.text).strip()
    opening = re.match(r"\W*([^\W\d_]+)(?!\s+(?:or|and)\s)(\s*[,.;:!\n–—-]|\W*$|\s+(?:it|they|he|she|there)\s)?", text)
    said = opening and (opening[2] is not None or candidate.explicit) and _SAID.get(opening[1].lower())
    if not said:
        words = _STATED.findall(text)
        said = _SAID[words[-1].lower()] if words else _said_of(text, question)
    return (names[said] == truth, names[said]) if said else None


def _said_of(text: str, question: str) -> str | None:
    """What a sentence answers to a question of which it repeats the words ("yes"), or denies them ("no")."""
    asked = _QUESTION.findall(question)
    if not asked or len(text) > 300 or _HEDGED.search(text) or DENIES.search(asked[-1]):
        return None
    denied = bool(DENIES.search(text))
    words, repeated = _stems(asked[-1]), _stems(text)
    if quoted := _QUOTED.search(asked[-1].strip()):
        if f" {normalize_text(quoted[1])} " in f" {normalize_text(re.sub(_QUOTE, '', text))} ":
            return "no" if denied else "yes"
        return "no" if _QUOTED.search(text) and not denied else None
    return ("no" if denied else "yes") if repeated == words else None


def _stems(text: str) -> list[str]:
    """Words that carry meaning, in order, without plural and verb endings."""
    text = _LITTLE.sub(" ", DENIES.sub(" ", text.casefold().replace("n't", " not")))
    return [re.sub(r"(?<=\w\w)e?s$", "", word) for word in re.findall(r"[^\W_]+", text)]
