"""Answers that pick something: an option by letter or by text, yes or no. Pure functions."""

from __future__ import annotations

import re

from dmlr.judge.expressions import equal, is_prose, latex_key, looks_like_math
from dmlr.judge.extract import Candidate, normalize_text, plain, split_choice
from dmlr.judge.quantities import NOT, parse_number


def as_choice(inner: str, options: dict[str, str], kind: str | None) -> tuple[str, str] | None:
    """(letter, text) of the right option, either "" when unknown; None when the truth is no option."""
    if len(same := _letters_of_text(inner, options)) == 1:
        return same[0], options[same[0]]
    bare = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?\.?", plain(inner).strip())
    if bare and (letter := bare[1].upper()) in options:
        return letter, options[letter]
    part = split_choice(inner)
    if part and part[1] and (options or kind in ("choice", None)):
        letter, text = part
        if letter in options or not options:
            return letter, text
    if bare and not options and kind in ("choice", None) and (bare[1].isupper() or bare[1] in "abcd" or kind):
        return letter, ""
    return None


def compare_choice(candidate: Candidate, letter: str, text: str, options: dict[str, str]) -> tuple[bool, str] | None:
    """(right, what was picked), None when the candidate picks nothing.

    The letter, the text or both will do; two options at once, or a letter with another option's text, are wrong.
    """
    if candidate.rule == "formula":
        return None  # a letter in a formula is a point or a variable
    known = dict(options) if options else ({letter: text} if text else {})
    answer = plain(candidate.text).strip()
    picked, named = _picked_letter(answer, candidate, known, bool(options))
    if picked is None:
        picked = _picked_by_meaning(candidate, known)
    if picked is None:
        return None
    if picked == "?" or (named and named != picked):
        return False, candidate.text  # two options at once, or a letter with another option's text
    return picked == letter, picked


def _picked_letter(answer: str, candidate: Candidate, known: dict[str, str], complete: bool) -> tuple[str | None, str]:
    """(letter or None or "?" for several, letter whose text was given with it or "")."""
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer).strip().strip("$\"'“” ")
    letters = "".join(known) if complete else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if len(options := _letters_of_text(answer, known)) == 1:
        return options[0], ""
    bare = re.fullmatch(r"(?:(?i:option|choice|answer)\s+)?[(\[{]?\s*([A-Za-z])\s*[)\]}]?[.,:;!]?", answer)
    if bare:
        return (bare[1].upper() if bare[1].upper() in letters else None), ""
    if (both := _BETWEEN_TWO.match(answer)) and not _DENIED_AFTER.match(answer[both.end() :]):
        return "?", ""
    part = split_choice(answer)
    if part and part[0] in letters and (answer[0] in "([" or answer[0].isupper() or part[1]):
        first = part[1].split("\n")[0]
        return part[0], (_letters_of_text(first, known) or [""])[0]
    if candidate.explicit:
        if found := _mentions(answer, letters):
            return found[0], ""
        if looks_like_math(answer) and not is_prose(answer):
            return None, ""  # "2 + 3" names neither of the options 2 and 3: what it is worth decides
        return _named_in(answer.split("\n")[0], known), ""
    closing = re.findall(r"\(?\$?\b([A-Z])\$?\)? is the (?:\w+ )?(?:answer|option|choice)\b", answer)
    closing += re.findall(r"(?i:\b(?:so|therefore|thus|hence)),?\s+(?:it\s+is\s+)?\(?([A-Z])\)?\.?\s*$", answer)
    if closing and closing[-1] in letters:
        return closing[-1], ""
    opening = re.match(r"([A-Z])(?=\s+(?:answer|option|choice|is\b)|\s*[-–—]\s)", answer)
    if opening and opening[1] in letters and not _DENIED_AFTER.match(answer[1:]):
        return opening[1], ""
    # Without an explicit answer the end of the text counts, unless letter and named option disagree there.
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n+", answer) if sentence.strip()] or [""]
    named = _named_in(sentences[-1], known)
    found = _mentions(" ".join(sentences[-3:]), letters)
    if found and named and found[-1] != named:
        return None, ""
    return (found[-1] if found else named), ""


def _picked_by_meaning(candidate: Candidate, known: dict[str, str]) -> str | None:
    """The option that the answer means though it says it otherwise: yes/no in a sentence, an equal expression."""
    words = {normalize_text(text): letter for letter, text in known.items()}
    if set(words) in ({"yes", "no"}, {"true", "false"}):
        outcome = compare_yes_no(candidate, next(iter(words)))
        return None if outcome is None else words[outcome[1]]
    if candidate.explicit and not is_prose(candidate.text) and looks_like_math(candidate.text):
        same = [letter for letter, text in known.items() if text and equal(text, candidate.text)]
        return same[0] if len(same) == 1 else None
    return None


def _letters_of_text(answer: str, known: dict[str, str]) -> list[str]:
    """Letters of the options whose whole text this is: as it stands, else normalised, else by numeric value."""
    if exact := [letter for letter, text in known.items() if text and text.strip() == answer.strip()]:
        return exact
    normal, number = normalize_text(answer), parse_number(answer)
    found = [letter for letter, text in known.items() if text and normalize_text(text) == normal]
    if not found and number is not None:
        values = {letter: parse_number(text) for letter, text in known.items()}
        found = [letter for letter, value in values.items() if value is not None and value.matches(number)]
    return found


_MENTION = re.compile(r"(?<![A-Za-z0-9'’\\_^$-])(\(?)([A-Z]|(?<=\()[a-z](?=\)))(?![A-Za-z0-9'’_^-])(\)?)")
_BETWEEN_TWO = re.compile(
    r"(?:(?i:either|both)\s+)?\(?([A-Z])\)?\s*(?:,|/|&|\bor\b|\band\b)\s*(?:and\s+|or\s+)?\(?(?!\1)[A-Z]\)?(?![A-Za-z'’])"
)
_ARTICLE = re.compile(r"\s+[a-z]")
_FOLLOWED = re.compile(r"\s+(?:is|are|because|since|as|answer|option|choice|and|or|which|with|for)\b")
# A denial reaches to the end of its clause, and along a list of letters: "not A, B or C".
_DENIED = re.compile(
    r"(?i:\b(?:not|cannot|neither|nor|rather than|instead of|except|excluding|other than|all but)\b|n['’]t\b)"
    r"(?:(?!\bbut\b)[^.,;!?\n]|,\s*\(?[A-Z]\)?(?![A-Za-z])|,\s*(?:or\s+|and\s+)?\(?$){0,20}$"
    rf"|(?i:{NOT})\s*(?i:(?:es|est|ist|è|é|la|die|the|option|answer|choice|вариант)\s+)*[(*\"']*$"
)
_DENIED_AFTER = re.compile(  # but "B is not A" and "B不是A" name B
    r"(?i)[)\]*\"']*\s*(?:(?:is|are|was|can|could|would|does|ist|est|es|é|è)\s*)?"
    r"(?:not\b|n['’]t\b|cannot\b|wrong\b|incorrect|false\b|(?:be )?(?:excluded|ruled out|eliminated)"
    r"|nicht\b|falsch|faux\b|no es\b|n['’]est pas|невер|неправ|değil"
    r"|不对|不是|不正确|错|ではない|ではありません|(?:가|이|는|은) 아[니닙]|नहीं)"
    r"(?!\s*\(?[A-Z](?![A-Za-z]))"
)


def _mentions(text: str, letters: str) -> list[str]:
    """Option letters that stand alone in a text, in order; not the article "A", the pronoun "I" or denied ones."""
    found = []
    for match in _MENTION.finditer(text):
        letter = match[2].upper()
        if letter not in letters:
            continue
        after = text[match.end() : match.end() + 30]
        if match[1] != "(" and letter in "AI" and _ARTICLE.match(after) and not _FOLLOWED.match(after):
            continue
        if not _DENIED_AFTER.match(after) and not _DENIED.search(text[max(0, match.start() - 30) : match.start()]):
            found.append(letter)
    return found


_NEGATION = re.compile(r"(?i)\b(?:not|no|never|neither|nor|cannot|without|except|rather than)\b|n't\b")


def _words(text: str) -> str:
    """Words between single spaces; of a formula in dollars what follows its last equals sign, as one word.

    So the 2 in a fraction is no word, and no option's text.
    """
    text = _FORMULA.sub(lambda match: f" {latex_key(match[0]).rpartition('=')[2]} ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\^?\{?\\circ\}?|°|\\(?![A-Za-z])", "", text))
    text = re.sub(r"(?<!\s)\s+(?=[{}])|(?<=\{)\s+", "", text)
    return normalize_text(re.sub(r"[^\w.%/\\{}^-]+", " ", text))


_FORMULA = re.compile(r"\$[^$\n]+\$|\\\((?:[^\\]|\\[^()])+\\\)")


def _named_in(sentence: str, known: dict[str, str]) -> str | None:
    """The only option whose text occurs, as whole words, in a sentence that denies nothing; None otherwise."""
    if _NEGATION.search(sentence):
        return None
    words = f" {_words(sentence)} "
    texts = {letter: _words(text) for letter, text in known.items()}
    inside = {letter: text for letter, text in texts.items() if text and f" {text} " in words}
    # "dark red" names that option, not also "red".
    longest = [key for key, t in inside.items() if not any(t != o and f" {t} " in f" {o} " for o in inside.values())]
    return longest[0] if len(longest) == 1 else None


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
_QUOTED_END = re.compile(r"[\"“'‘]([^\"“”'‘’]+)[\"”'’][.?!]*$")
_READS = re.compile(r"(?i)\b(?:is|says|reads|shows)\s+(\w+)[.!]*$")
_HEDGED = re.compile(
    r"(?i)\b(?:may|might|maybe|perhaps|possibly|cannot|can't|unclear|unsure|unable|if|whether|or|but)\b"
)


def compare_yes_no(candidate: Candidate, truth: str, question: str | None = None) -> tuple[bool, str] | None:
    """(right, "yes") when the candidate says one of the two words as its answer, None otherwise.

    "No dog is seen" is a sentence about dogs, "No, ..." and "... is no." are answers; and so is a sentence that says
    what the question asks, word by word, or denies just that.
    """
    names = {"yes": "yes", "no": "no"} if truth in ("yes", "no") else {"yes": "true", "no": "false"}
    text = plain(candidate.text).strip()
    opening = re.match(r"\W*([^\W\d_]+)(\s*[,.;:!\n–—-]|\W*$|\s+(?:it|they|he|she|there)\s)?", text)
    said = opening and _SAID.get(opening[1].lower())
    if said and (opening[2] is not None or (candidate.explicit and opening[1].lower() in (*names, *names.values()))):
        return names[said] == truth, names[said]
    stated = [word.lower() for word in _STATED.findall(text)]
    said = _SAID[stated[-1]] if stated else _said_of(text, question or "")
    return (names[said] == truth, names[said]) if said else None


def _said_of(text: str, question: str) -> str | None:
    """What a sentence answers to a question of which it repeats the words ("yes"), or denies them ("no")."""
    asked = _QUESTION.findall(question)
    if not asked or len(text) > 300 or _HEDGED.search(text) or _NEGATION.search(asked[-1]):
        return None
    denied = bool(_NEGATION.search(text))
    quoted = _QUOTED_END.search(asked[-1].strip())
    answer = _QUOTED_END.search(text)
    if quoted and (read := answer or _READS.search(text)):
        if normalize_text(quoted[1]) == normalize_text(read[1]):
            return "no" if denied else "yes"
        return "no" if answer and not denied else None
    words, repeated = _stems(asked[-1]), _stems(text)
    if repeated == words or (not denied and len(words) > 2 and repeated[: len(words)] == words):
        return "no" if denied else "yes"
    return None


def _stems(text: str) -> list[str]:
    """Words that carry meaning, in order, without plural and verb endings."""
    text = _LITTLE.sub(" ", _NEGATION.sub(" ", text.casefold().replace("n't", " not")))
    return [re.sub(r"(?<=\w\w)e?s$", "", word) for word in re.findall(r"[^\W_]+", text)]


_LITTLE = re.compile(r"\b(?:a|an|the|this|that|these|those|there|any|some|is|are|was|were|do|does|did|has|have|be)\b")
