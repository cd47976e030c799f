"""Which letter three scorers of lmms-eval 0.7.3 read from an answer, in our own words; test_lmms_eval.py holds them
against the originals after `make lmms-eval`."""

import re
from itertools import pairwise

LETTERS = "ABCD"


def mmvp(said):
    """Of A and B in either case, brackets left out: all there is, or the first word; else what follows "answer is" or
    "option"; else the end of the first word that ends so; else the first character."""
    words = said.upper().split()
    bare = [word.strip("()") for word in words]
    if not words:
        return ""
    first = re.match(r"\(?([AB])\)?(?:\.|$)", words[0])
    triples = zip(bare, bare[1:], bare[2:], strict=False)
    after = [word for one, two, word in triples if (one, two) == ("ANSWER", "IS")]
    after = after or [word for one, word in pairwise(bare) if one.endswith("OPTION")]
    after = [word[0] for word in after if word[:1] in ("A", "B")]
    ends = [word[-1] for word in bare if word[-1:] in ("A", "B")]
    return next(iter([first[1]] if first else after or ends), words[0][0] if words[0][0] in "AB" else "")


def scienceqa(said):
    """All there is, in either case; or a capital at the very start with a full stop behind it."""
    said = said.strip()
    return said.upper() if len(said) == 1 else said[0] if re.match(r"[A-Z]\.", said) else ""


def mmstar(said):
    """Of A to D: the start, if no letter follows; else the end, if no letter stands before; else what comes last behind
    "answer is" and its like; else the last (A), A., A:, A) or "A ", in this order; else the last one anywhere."""
    said = said.strip()
    for mark in ",.!?;:'\"":
        said = said.strip(mark)
    ways = [r"^([A-D])(?![^\W\d_])", r"(?<![^\W\d_])([A-D])$"]
    if phrase := re.search(r"(?:answer|choice|option) is|(?:i|my) (?:choose|select|pick)", said, re.IGNORECASE):
        behind = {letter: said.find(letter, phrase.end()) for letter in LETTERS}
        if max(behind.values()) >= 0 and not any(re.search(way, said) for way in ways):
            return max(behind, key=behind.get)
    for way in (*ways, r"\(([A-D])\)", r"([A-D])\.", r"([A-D]):", r"([A-D])\)", r"([A-D]) ", r"([A-D])"):
        if found := re.findall(way, said):
            return found[-1]
    return ""


SCORERS = {"mmvp": mmvp, "scienceqa": scienceqa, "mmstar": mmstar}
