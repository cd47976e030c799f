"""The embedded benchmark: true answers, disjoint splits, and files that the code makes again."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shapes import make
from data.shapes.make import all_suites, chance_level
from data.shapes.questions import SUITES
from data.shapes.scenes import CELL, GRID, SIDE, random_scene, render
from dmlr.config import locate
from dmlr.data.check import check_dataset
from dmlr.data.examples import load_dataset
from dmlr.judge import judge
from dmlr.run.verdicts import verdict_of
from notebooks.training.packing import ask

FOLDER = Path(locate("data/shapes"))
SEEK = ("seek", "seek_validation")


@pytest.fixture(scope="module")
def drawn():
    return dict(all_suites())


def records(suite):
    return json.loads((FOLDER / f"{suite}.json").read_text())


def test_committed_suites_are_what_the_code_makes(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "all_suites", drawn.items)
    sizes = make.write_suites(tmp_path)
    assert min(sizes.values()) == sizes["seek_validation"] == 160
    assert min(size for suite, size in sizes.items() if suite != "seek_validation") >= 320
    for suite in sizes:
        assert (tmp_path / f"{suite}.json").read_text() == (FOLDER / f"{suite}.json").read_text()
    made, kept = ({path.name for path in (folder / "images").glob("*.png")} for folder in (tmp_path, FOLDER))
    assert made == kept
    for name in made:
        one, two = (np.asarray(Image.open(folder / "images" / name)) for folder in (tmp_path, FOLDER))
        assert np.array_equal(one, two)


def test_scenes_of_splits_and_suites_are_disjoint(drawn):
    """By the hash of the content: a drawn scene belongs to one split only, and the suites use the test split."""
    rng = random.Random(0)
    train = {random_scene(rng, "train").key() for _ in range(2000)}
    scenes = [scene for _, of_suite in drawn.values() for scene in of_suite.values()]
    test = {scene.key() for scene in scenes}
    assert len(train) > 1900 and not train & test and len(test) == len(scenes)
    assert all(scene.split() == "test" for scene in scenes)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        random_scene(rng, "validation")


@pytest.mark.parametrize("suite", [*SUITES, *SEEK])
def test_suites_are_balanced_clean_and_judgeable(suite):
    rows = records(suite)
    assert not [p for p in check_dataset(FOLDER / f"{suite}.json") if p.fatal]
    assert chance_level(rows) < {"mathematics": 0.3, "visual": 0.5, "composition": 0.26}.get(suite, 0.2)
    examples, _ = load_dataset(FOLDER / f"{suite}.json")
    for example in examples:
        assert judge(example.solution, example.solution, question=example.question).status == "correct"


@pytest.mark.parametrize("suite", SEEK)
def test_a_searching_question_has_one_object_and_an_abstention_that_is_not_right(drawn, suite):
    for example in load_dataset(FOLDER / f"{suite}.json")[0]:
        meta, name = example.meta, Path(example.image).name
        scene = drawn[suite][1][f"images/{name}"]
        shape = example.question.removeprefix("Look for the ").removesuffix(". What colour is it?")
        (thing,) = (t for t in scene.things if t.shape == shape)
        assert meta["boxes"] == [thing.box] and example.solution == f"\\boxed{{{thing.colour}}}"
        said = verdict_of(example, meta["response"], "eos_token"), verdict_of(example, "\\boxed{unknown}", "eos_token")
        assert [(v["is_correct"], v["abstained"]) for v in said] == [(True, False), (False, True)]


def test_pairs_have_different_answers():
    pairs = defaultdict(list)
    for row in records("visual"):
        if "pair_id" in row:
            pairs[row["pair_id"]].append(row)
    assert len(pairs) >= 100
    for pair in pairs.values():
        assert len({row["solution"] for row in pair}) == 2 and len({row["image_path"] for row in pair}) == 1


def test_answers_are_true_of_the_scene(drawn):
    """Counts and neighbours worked out again from the symbolic scene, without the code that made the question."""
    _, scenes = drawn["mathematics"]
    for row in records("mathematics"):
        things, prompt = scenes[row["image_path"]].things, row["prompt"]
        if row["category"] == "count":
            words = prompt.removeprefix("How many ").removesuffix(" are there?").split()
            names = [f"{t.colour} {t.shape} {t.shape}s {t.shape}es shapes".split() for t in things]
            assert row["solution"] == f"\\boxed{{{sum(all(w in n for w in words) for n in names)}}}"
            assert len(row["boxes"]) == int(row["solution"][7:-1])
    _, scenes = drawn["composition"]
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for row in records("composition"):
        cells = {(t.row, t.col): t for t in scenes[row["image_path"]].things}
        ax, ay = row["boxes"][0][0] // CELL, row["boxes"][0][1] // CELL
        word = next(w for w in steps if w in row["prompt"].split("\n")[0])
        target = cells[ay + steps[word][0], ax + steps[word][1]]
        text = row["solution"].split(". ")[1]
        assert text == (target.colour if row["category"].startswith("colour") else target.shape)


def test_an_object_is_drawn_inside_its_box():
    rng = random.Random(1)
    for _ in range(20):
        scene = random_scene(rng, "train")
        image = render(scene).astype(int)
        assert image.shape == (SIDE, SIDE, 3)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= SIDE and thing.cell == (y0 + y1) // 2 // CELL * GRID + (x0 + x1) // 2 // CELL
            colourful = np.ptp(image, axis=2) > 60
            assert colourful[y0:y1, x0:x1].any()
            top, left = thing.row * CELL, thing.col * CELL
            cell = colourful[top : top + CELL, left : left + CELL].copy()
            cell[y0 - top : y1 - top + 1, x0 - left : x1 - left + 1] = False
            assert not cell.any()


def test_training_questions_cover_every_kind():
    rng = random.Random(2)
    seen = Counter(q.category for _ in range(200) for q in ask(random_scene(rng, "train"), rng, 8, dense=0.5))
    wanted = {row["category"] for suite in SUITES for row in records(suite)}
    wanted |= {"cell", "caption", "describe", "places", "place", "option", "repeat"}
    assert set(seen) == wanted and min(seen.values()) > 10
