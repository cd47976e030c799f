"""The embedded benchmark: scenes of coloured shapes, rendered images, questions with true answers and object boxes.

A scene is symbolic (which shape of which colour lies in which cell of a 6 x 6 board); everything else follows from
it and a seed. A cell is 28 x 28 pixels, the area of one merged visual token of Qwen2.5-VL, so that a box and a
patch mean the same thing. A scene belongs to the train or the test split by the hash of its symbolic content:
no scene can be in both.

This module knows nothing about models. Questions are in `questions.py`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

GRID = 6  # cells per side
CELL = 28  # pixels per cell side: 2 x 2 vision patches of 14 pixels, one merged token
SIDE = GRID * CELL
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 40),
    "purple": (135, 55, 175),
    "orange": (245, 130, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {"cross": "crosses"} | {s: s + "s" for s in SHAPES if s != "cross"}


@dataclass(frozen=True)
class Thing:
    """One object: its cell (from 0), what it is, and how it is drawn (radius and offset in pixels)."""

    row: int
    col: int
    colour: str
    shape: str
    radius: int = 11
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> int:
        """Index of the merged visual token that the object lies under, in row-major order."""
        return self.row * GRID + self.col

    @property
    def box(self) -> list[int]:
        """Pixel box [x0, y0, x1, y1], ends excluded."""
        x, y = self.col * CELL + CELL // 2 + self.dx, self.row * CELL + CELL // 2 + self.dy
        return [x - self.radius, y - self.radius, x + self.radius, y + self.radius]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, and the grey level of the board."""

    things: tuple[Thing, ...]
    grey: int = 205

    def key(self) -> str:
        """Canonical text of the symbolic content: same objects in the same cells, same key."""
        return ";".join(f"{t.row},{t.col},{t.colour},{t.shape}" for t in sorted(self.things, key=lambda t: t.cell))

    def split(self) -> str:
        """'test' for one scene in eight, else 'train': decided by the content alone."""
        return "test" if hashlib.sha256(self.key().encode()).digest()[0] < 32 else "train"

    def at(self, row: int, col: int) -> Thing | None:
        return next((t for t in self.things if (t.row, t.col) == (row, col)), None)

    def matching(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        return [t for t in self.things if colour in (None, t.colour) and shape in (None, t.shape)]


@dataclass(frozen=True)
class Difficulty:
    """How hard scenes are: how many objects, how many distinct colours and shapes, how small, how far off centre."""

    min_things: int = 8
    max_things: int = 16
    min_kinds: int = 3
    max_kinds: int = 6
    min_radius: int = 3
    max_radius: int = 9
    jitter: int = 4
    clustered: float = 0.6  # share of objects placed beside another one, so that neighbours exist


EASY = Difficulty(5, 10, 2, 5, 8, 12, 2)  # what learning begins with; the defaults are the benchmark's
SEEK = Difficulty(6, 10, 4, 6, 6, 11, 3)  # boards of searching questions: fewer objects, none of them tiny


def _draw_scene(rng: random.Random, hard: Difficulty) -> Scene:
    colours = rng.sample(list(COLOURS), rng.randint(hard.min_kinds, hard.max_kinds))
    shapes = rng.sample(SHAPES, rng.randint(hard.min_kinds, hard.max_kinds))
    cells: list[tuple[int, int]] = []
    for _ in range(rng.randint(hard.min_things, hard.max_things)):
        free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in cells]
        beside = [(r, c) for r, c in free if any(abs(r - a) + abs(c - b) == 1 for a, b in cells)]
        cells.append(rng.choice(beside if beside and rng.random() < hard.clustered else free))
    things = []
    for row, col in sorted(cells):
        radius = rng.randint(hard.min_radius, hard.max_radius)
        room = min(hard.jitter, CELL // 2 - radius)  # an object never leaves its cell
        dx, dy = rng.randint(-room, room), rng.randint(-room, room)
        things.append(Thing(row, col, rng.choice(colours), rng.choice(shapes), radius, dx, dy))
    return Scene(tuple(things), grey=rng.randint(190, 220))


def random_scene(rng: random.Random, split: str, hard: Difficulty | None = None) -> Scene:
    """A scene of the given split ('train' or 'test'), by drawing until the content's hash says so."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', found {split!r}")
    while True:
        scene = _draw_scene(rng, hard or Difficulty())
        if scene.split() == split:
            return scene


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners on the unit disc."""
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "triangle":
        return [(0, -0.95), (0.95, 0.85), (-0.95, 0.85)]
    if shape == "cross":
        a, b = 0.95, 0.33
        arm = [(-b, -a), (b, -a), (b, -b)]  # the upper one, then turned by 90 degrees each
        return arm + [(-y, x) for x, y in arm] + [(-x, -y) for x, y in arm] + [(y, -x) for x, y in arm]
    if shape == "star":
        radii = (1.0, 0.42)
        return [(radii[i % 2] * sin(i * pi / 5), -radii[i % 2] * cos(i * pi / 5)) for i in range(10)]
    raise ValueError(f"no outline for {shape!r}")


@cache
def _mask(shape: str, radius: int, dx: int, dy: int) -> np.ndarray:
    """Coverage of one cell by the shape, antialiased by drawing eight times larger: [CELL, CELL] in 0..1."""
    zoom = 8
    big = Image.new("L", (CELL * zoom, CELL * zoom), 0)
    draw = ImageDraw.Draw(big)
    x, y, r = (CELL / 2 + dx) * zoom, (CELL / 2 + dy) * zoom, radius * zoom
    if shape in ("circle", "ring"):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
        if shape == "ring":
            draw.ellipse([x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55], fill=0)
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _outline(shape)], fill=255)
    small = big.resize((CELL, CELL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@cache
def _light() -> np.ndarray:
    """Soft light over the board, [SIDE, SIDE, 3]: warmer to the right, cooler to the bottom.

    It tells places apart: Qwen's vision tower has no absolute positions, and a small one learns "row 2 column 5"
    from the light within minutes.
    """
    ramp = np.linspace(-18, 18, SIDE, dtype=np.float32)
    light = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
    light[:, :, 0] += ramp[None, :]
    light[:, :, 2] += ramp[:, None]
    return light


def render(scene: Scene) -> np.ndarray:
    """The image as RGB bytes, [SIDE, SIDE, 3]."""
    image = _light() + scene.grey
    for thing in scene.things:
        top, left = thing.row * CELL, thing.col * CELL
        cell = image[top : top + CELL, left : left + CELL]
        cover = _mask(thing.shape, thing.radius, thing.dx, thing.dy)[:, :, None]
        cell += cover * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - cell)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
