"""Questions about a scene, with their answers and rationales.

Three suites mirror the paper's task families: *mathematics* (count, sum, difference, comparison), *visual*
(existence, colour, left/right/above/below; yes/no questions come in pairs whose answers differ) and *composition*
(multiple choice, two hops). "Left of" compares columns, "above" compares rows, of the whole board;
"directly left of" means the next cell. *seek* asks what is known once the right object is looked at, or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from data.shapes.scenes import COLOURS, GRID, PLURALS, SHAPES, Scene, Thing

LETTERS = "ABCD"
ABSTENTION = "unknown"  # what an answer to a searching question may say instead of a colour
_STEP = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """A question with its truth. `asked` are the objects it is about; `choices` are the options' texts."""

    suite: str
    category: str
    prompt: str
    answer: str
    rationale: str
    asked: tuple[Thing, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def solution(self) -> str:
        if self.choices:
            return f"{self.answer}. {self.choices[LETTERS.index(self.answer)]}"
        return f"\\boxed{{{self.answer}}}"

    @property
    def response(self) -> str:
        """What the embedded model is taught to write."""
        return f"<think>{self.rationale}</think><answer>\\boxed{{{self.answer}}}</answer>"


Maker = Callable[[Scene, random.Random], list[Question]]


def _place(thing: Thing) -> str:
    return f"row {thing.row + 1} column {thing.col + 1}"


def _listed_places(name: str, things: list[Thing]) -> str:
    """'circles at row 1 column 2, row 3 column 4: 2'. Counts were never learned without the things counted."""
    return f"{name} at {', '.join(map(_place, things))}: {len(things)}" if things else f"{name}: 0"


def _a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _group(rng: random.Random, scene: Scene, present: float = 1.0) -> tuple[str, list[Thing]]:
    """A countable kind ('circles', 'red shapes', 'red circles') and its members; absent ones with 1 - `present`."""
    kind = rng.choice(("shape", "shape", "colour", "colour", "both"))
    seen = rng.random() < present
    colour = rng.choice([t.colour for t in scene.things] if seen else list(COLOURS))
    shape = rng.choice([t.shape for t in scene.matching(colour if kind == "both" else None)] if seen else list(SHAPES))
    if kind == "shape":
        return PLURALS[shape], scene.matching(shape=shape)
    if kind == "colour":
        return f"{colour} shapes", scene.matching(colour=colour)
    return f"{colour} {PLURALS[shape]}", scene.matching(colour, shape)


def _two_groups(rng: random.Random, scene: Scene) -> tuple[tuple[str, list[Thing]], tuple[str, list[Thing]]]:
    """Two disjoint kinds, both shapes or both colours."""
    if rng.random() < 0.5:
        a, b = rng.sample(SHAPES, 2) if rng.random() < 0.3 else _two_of([t.shape for t in scene.things], SHAPES, rng)
        return (PLURALS[a], scene.matching(shape=a)), (PLURALS[b], scene.matching(shape=b))
    a, b = _two_of([t.colour for t in scene.things], tuple(COLOURS), rng)
    return (f"{a} shapes", scene.matching(a)), (f"{b} shapes", scene.matching(b))


def _two_of(present: list[str], all_names: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    first = rng.choice(present)
    others = [n for n in present if n != first] or [n for n in all_names if n != first]
    return (first, rng.choice(others)) if rng.random() < 0.5 else (rng.choice(others), first)


def count(scene: Scene, rng: random.Random) -> list[Question]:
    name, things = _group(rng, scene, present=0.85)
    prompt, rationale = f"How many {name} are there?", f"{_listed_places(name, things)}."
    return [Question("mathematics", "count", prompt, str(len(things)), rationale, tuple(things))]


def total(scene: Scene, rng: random.Random) -> list[Question]:
    (a, xs), (b, ys) = _two_groups(rng, scene)
    n, m = len(xs), len(ys)
    prompt = f"How many {a} and {b} are there in total?"
    rationale = f"{_listed_places(a, xs)}, {_listed_places(b, ys)}, {n} + {m} = {n + m}."
    return [Question("mathematics", "sum", prompt, str(n + m), rationale, tuple(xs + ys))]


def difference(scene: Scene, rng: random.Random) -> list[Question]:
    (a, xs), (b, ys) = sorted(_two_groups(rng, scene), key=lambda g: -len(g[1]))
    n, m = len(xs), len(ys)
    if n == m:
        return []
    prompt = f"How many more {a} than {b} are there?"
    rationale = f"{_listed_places(a, xs)}, {_listed_places(b, ys)}, {n} - {m} = {n - m}."
    return [Question("mathematics", "difference", prompt, str(n - m), rationale, tuple(xs + ys))]


def comparison(scene: Scene, rng: random.Random) -> list[Question]:
    (a, xs), (b, ys) = _two_groups(rng, scene)
    n, m = len(xs), len(ys)
    if n == m:
        return []
    prompt, answer = f"Are there more {a} than {b}?", "Yes" if n > m else "No"
    sign = "<" if n < m else ">"
    rationale = f"{_listed_places(a, xs)}, {_listed_places(b, ys)}, {n} {sign} {m}."
    return [Question("mathematics", "comparison", prompt, answer, rationale, tuple(xs + ys))]


def colour_of(scene: Scene, rng: random.Random) -> list[Question]:
    unique = [t for t in scene.things if len(scene.matching(shape=t.shape)) == 1]
    if not unique:
        return []
    t = rng.choice(unique)
    rationale = f"{t.shape} at {_place(t)}: {t.colour}."
    return [Question("visual", "colour_of", f"What colour is the {t.shape}?", t.colour, rationale, (t,))]


def existence(scene: Scene, rng: random.Random) -> list[Question]:
    """A pair about one image: an object that is there, and one whose colour and shape are there but not together."""
    here = {(t.colour, t.shape) for t in scene.things}
    colours, shapes = sorted({c for c, _ in here}), sorted({s for _, s in here})
    absent = [(c, s) for c in colours for s in shapes if (c, s) not in here]
    unique = [t for t in scene.things if len(scene.matching(t.colour, t.shape)) == 1]
    if not absent or not unique:
        return []
    t, (colour, shape) = rng.choice(unique), rng.choice(absent)
    near = [t for t in absent if t[0] == unique[0].colour]
    if near and rng.random() < 0.3:
        colour, shape = rng.choice(near)
    other = f"{colour} {shape}"
    ask = "Is there {} in the image?"
    yes = Question("visual", "existence", ask.format(_a(t.name)), "Yes", f"{t.name} at {_place(t)}.", (t,))
    no = Question("visual", "existence", ask.format(_a(other)), "No", f"no {other}.")
    return [yes, no]


def relation(scene: Scene, rng: random.Random) -> list[Question]:
    """A pair about two objects: the question and its opposite (inverse relation, or objects swapped)."""
    unique = [t for t in scene.things if len(scene.matching(t.colour, t.shape)) == 1]
    if len(unique) < 2:
        return []
    a, b = rng.sample(unique, 2)
    word = rng.choice(list(_STEP))
    horizontal = word in ("left of", "right of")
    if (a.col == b.col) if horizontal else (a.row == b.row):
        return []

    def ask(x: Thing, y: Thing, word: str) -> Question:
        axis, p, q = ("column", x.col, y.col) if horizontal else ("row", x.row, y.row)
        answer = "Yes" if (p < q) == (word in ("left of", "above")) else "No"
        phrase = f"to the {word}" if horizontal else word
        sign = "<" if p < q else ">"
        rationale = f"{x.name}: {axis} {p + 1}, {y.name}: {axis} {q + 1}, {p + 1} {sign} {q + 1}."
        category = "left_right" if horizontal else "above_below"
        return Question("visual", category, f"Is the {x.name} {phrase} the {y.name}?", answer, rationale, (x, y))

    opposite = ask(b, a, word) if rng.random() < 0.5 else ask(a, b, _INVERSE[word])
    return [ask(a, b, word), opposite]


def neighbour(scene: Scene, rng: random.Random) -> list[Question]:
    """Two hops: find the anchor, then name the colour or shape of what lies in the next cell."""
    options = []
    for anchor in scene.things:
        names = []
        if len(scene.matching(shape=anchor.shape)) == 1:
            names.append(anchor.shape)
        if len(scene.matching(colour=anchor.colour)) == 1:
            names.append(f"{anchor.colour} shape")
        if len(scene.matching(anchor.colour, anchor.shape)) == 1:
            names.append(anchor.name)
        for word, (dr, dc) in _STEP.items():
            if names and (target := scene.at(anchor.row + dr, anchor.col + dc)):
                options.append((anchor, rng.choice(names), word, target))
    if not options:
        return []
    anchor, name, word, target = rng.choice(options)
    what = rng.choice(("colour", "shape"))
    truth, names = (target.colour, list(COLOURS)) if what == "colour" else (target.shape, list(SHAPES))
    choices = tuple(rng.sample([truth, *rng.sample([n for n in names if n != truth], 3)], 4))
    of = "Which colour is the shape" if what == "colour" else "Which shape is"
    prompt = f"{of} directly {word} the {name}?\n{_listed(choices)}"
    letter = LETTERS[choices.index(truth)]
    read = _read_out(choices, LETTERS.index(letter))
    rationale = f"{name} at {_place(anchor)}, directly {word} it: {target.name}. {read}."
    return [Question("composition", f"{what}_of_neighbour", prompt, letter, rationale, (anchor, target), choices)]


def seek(scene: Scene, rng: random.Random) -> list[Question]:
    """One hop, answered once the right object is looked at."""
    unique = [t for t in scene.things if len(scene.matching(shape=t.shape)) == 1]
    if not unique:
        return []
    t = rng.choice(unique)
    prompt = f"Look for the {t.shape}. What colour is it?"
    return [Question("seek", "seek", prompt, t.colour, f"{t.shape} at {_place(t)}: {t.colour}.", (t,))]


def cell_content(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: what lies in a cell."""
    thing = rng.choice(scene.things)
    row, col = (thing.row, thing.col) if rng.random() < 0.8 else (rng.randrange(GRID), rng.randrange(GRID))
    thing = scene.at(row, col)
    name = thing.name if thing else "nothing"
    asked = (thing,) if thing else ()
    return [Question("training", "cell", f"What is at row {row + 1} column {col + 1}?", name, f"{name}.", asked)]


def row_content(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: a dense caption of one row or column."""
    axis = rng.choice(("row", "col"))
    line = getattr(rng.choice(scene.things), axis)
    things = [t for t in scene.things if getattr(t, axis) == line]
    word, other, across = ("row", "column", "col") if axis == "row" else ("column", "row", "row")
    names = ", ".join(f"{other} {getattr(t, across) + 1} {t.name}" for t in things)
    prompt = f"What is in {word} {line + 1}?"
    return [Question("training", "caption", prompt, str(len(things)), f"{names}.", tuple(things))]


def whole_content(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: a dense caption of the image, in reading order."""
    names = ", ".join(f"{_place(t)} {t.name}" for t in scene.things)
    count = str(len(scene.things))
    return [Question("training", "describe", "What is in the image?", count, f"{names}.", scene.things)]


def places(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: where the members of a kind are, in reading order."""
    name, things = _group(rng, scene, present=0.95)
    prompt, rationale = f"Where are the {name}?", f"{_listed_places(name, things)}."
    return [Question("training", "places", prompt, str(len(things)), rationale, tuple(things))]


def option(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: which letter stands before a word. Nothing to see, but a skill that multiple choice needs."""
    choices = tuple(rng.sample(list(COLOURS) if rng.random() < 0.5 else SHAPES, 4))
    answer = rng.randrange(4)
    prompt, letter = f"Which option is {choices[answer]}?\n{_listed(choices)}", LETTERS[answer]
    return [Question("training", "option", prompt, letter, f"{_read_out(choices, answer)}.", (), choices)]


def repeat(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: words copied. Every token of the answer teaches to look up what followed the token before."""
    words = rng.sample([*COLOURS, *SHAPES], rng.randint(6, 12))
    return [Question("training", "repeat", f"Say it again: {' '.join(words)}.", words[-1], f"{' '.join(words)}.")]


def place(scene: Scene, rng: random.Random) -> list[Question]:
    """Training only: where the one member of a kind is."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.6 and len(scene.matching(thing.colour, thing.shape)) == 1:
        name = thing.name
    elif len(scene.matching(shape=thing.shape)) == 1:
        name = thing.shape
    else:
        return []
    prompt, rationale = f"Where is the {name}?", f"{name} at {_place(thing)}."
    return [Question("training", "place", prompt, thing.colour, rationale, (thing,))]


def _read_out(choices: tuple[str, ...], until: int) -> str:
    """'A red, B green: B'. From letter to word is learned in minutes; from word to letter was not in half an hour."""
    return ", ".join(f"{LETTERS[n]} {choices[n]}" for n in range(until + 1)) + f": {LETTERS[until]}"


def _listed(choices: tuple[str, ...]) -> str:
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
    return "\n".join(("Options:", *lines))


SUITES: dict[str, dict[str, Maker]] = {
    "mathematics": {"count": count, "sum": total, "difference": difference, "comparison": comparison},
    "visual": {"colour_of": colour_of, "existence": existence, "relation": relation},
    "composition": {"neighbour": neighbour},
}
# In training: makers and how often each is asked.
MIX = (
    (count, 2.0),
    (total, 1.0),
    (difference, 0.6),
    (comparison, 1.0),
    (colour_of, 0.8),
    (existence, 1.4),
    (relation, 1.2),
    (neighbour, 1.6),
    (option, 1.0),
    (place, 1.0),
    (places, 0.8),
)
# Training only: answers made of what is seen. Without many of them at first the image is hardly looked at.
DENSE = ((cell_content, 1.5), (row_content, 1.5), (whole_content, 0.6), (places, 2.0), (option, 1.0), (repeat, 1.5))
