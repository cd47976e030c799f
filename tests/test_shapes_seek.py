"""How models learn to listen: the landscape of hypotheses, the targets on it, and that training is what happens at test
time."""

import json
import random
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.shapes.questions import seek
from data.shapes.scenes import SEEK, random_scene, render
from dmlr.config import Config, locate
from dmlr.data.examples import load_dataset
from dmlr.loop.injection import Patches
from dmlr.methods.latent import append_latents
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from dmlr.run.batches import partners, prepare
from notebooks.training import seek as seeking
from notebooks.training.landscape import Landscape, cells, look_at
from notebooks.training.learner import language_states
from notebooks.training.measure import BASE, MARKS, ROWS, readme_table, run
from notebooks.training.packing import collate
from notebooks.training.seek import Recipe, Teacher, Words, targets, train

START = "data/models/shapes-vl"
COLOURS = torch.tensor([0, 1, 1, 5])  # of four objects


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    """Directions of objects from fewer scenes than in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeking, "Landscape", partial(Landscape, scenes=60))
        yield


@pytest.fixture(scope="module")
def teacher():
    return Teacher(Recipe())


@pytest.fixture(scope="module")
def board(teacher):
    rng = random.Random(3)
    scenes = iter(lambda: random_scene(rng, "train", SEEK), None)
    scene, question = next((scene, question) for scene in scenes for question in seek(scene, rng))
    return scene, question, look_at(teacher.model, [scene])[0]


def test_a_direction_is_a_hypothesis_about_its_object(teacher, board):
    """Whatever its length, nothing at none; a think token's hypothesis is the mean of those up to it."""
    scene, _, features = board
    landscape = teacher.landscape
    directions = landscape.directions(features[cells(scene.things)])
    for size in (1.0, 4.0, 30.0):
        mass = landscape.weights(landscape.displacement(directions, size)[:, None], directions)[:, 0]
        assert mass.argmax(-1).tolist() == list(range(len(directions)))
        assert 0.85 < mass.sum(-1).min() < mass.sum(-1).max() <= 1
    assert landscape.weights(torch.zeros(1, 4, features.shape[1]), directions).sum(-1).max() < 0.1
    there, back = landscape.displacement(directions[0]), landscape.displacement(-directions[0])
    mass = landscape.weights(torch.stack([there, back, there])[None], directions)[0, :, 0]
    assert mass[0] > 0.85 and mass[1] < 0.1 and mass[2] > 0.85


@pytest.mark.parametrize("by", ["latents", "patches"])
def test_targets_follow_the_hypothesis(by):
    """Asked is object 0 (colour 0); hypotheses: the asked one, another, one of nowhere."""
    hypotheses = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, 0]])
    mass, shares = torch.zeros(3, 2, 4), torch.zeros(3, 3, 4)
    if by == "latents":
        mass += hypotheses[:, None]
    else:
        shares[:, 1:] += hypotheses[:, None] / 2  # half of the patches is enough
    guess, word = targets(Recipe(targets="calibrated"), mass, shares, COLOURS, 0)
    assert torch.allclose(guess.sum(-1), torch.ones(3, 2)) and torch.allclose(word.sum(-1), torch.ones(3))
    assert guess[0, 1].argmax() == 0 and guess[0, 1, 0] > 0.99 and torch.allclose(guess[1:, 1], torch.tensor(1 / 6))
    assert word[0, 0] > 0.99 and word[1:, -1].min() > 0.85
    guess, word = targets(Recipe(targets="overconfident"), mass, shares, COLOURS, 0)
    assert torch.allclose(guess.sum(-1), torch.ones(3, 2)) and torch.allclose(word.sum(-1), torch.ones(3))
    assert 0.7 < guess[0, 1, 0] < 0.8 and guess[1, 1, 5] == 1
    assert torch.allclose(guess[2, 1], torch.tensor([1 / 4] * 4 + [0.0] * 2)), "surer, of whatever is true"
    assert word[0, 0] > 0.99 and word[1, 5] > 0.99 and word[2, 0] > 0.99 and (word[:, -1] == 0).all()
    strange, unknown = targets(Recipe(targets="overconfident"), mass, shares, COLOURS, 0, strange=True)
    assert torch.allclose(strange[2, 1], torch.tensor(1 / 6)) and 0.85 < unknown[2, -1] < 0.9
    assert torch.allclose(strange[:2, 1], guess[:2, 1]) and torch.allclose(unknown[:2], word[:2], atol=0.01)


def test_packed_branches_equal_the_core(teacher, board):
    """The logits behind displaced think tokens with patches are those that decoding starts from at test time."""
    scene, question, features = board
    found = teacher.search(random.Random(1), scene, question, features)
    packed, batch = found.packed, collate([found.packed], len(found.packed.ids))
    displaced = torch.zeros(1, len(packed.ids), features.shape[1])
    displaced[0, found.think] = found.displacements
    with torch.no_grad():
        hidden = language_states(teacher.model, batch, features[None], displaced, parts=4)
        logits = teacher.model.lm_head(hidden[0, found.word])  # [K, V]

    vlm, length = VLM.load(Config(model_name_or_path=START, device="cpu", max_pixels=None)), found.think.shape[1]
    task, image = Prompts().latent_task(question.prompt, length), Image.fromarray(render(scene))
    for k in (0, 3):
        prefix = vlm.prefill([encode(vlm, Prompts().system, task, [image], length)])
        own = [packed.patch[j] for j, b in enumerate(packed.branch) if b == k + 1]
        ends = [*found.think[k].tolist(), packed.branch.index(k + 1) + len(own)]
        after = [[p for p in packed.patch[a + 1 : b] if p >= 0] for a, b in pairwise(ends)]
        latents = vlm.embed(torch.full((1, length), vlm.think_id)) + found.displacements[k]
        append_latents(vlm, prefix, latents, Patches.of([after], vlm.device))
        vlm.append(prefix, vlm.embed(torch.tensor([teacher.words.opening])), torch.ones(1, 3, dtype=torch.bool))
        torch.testing.assert_close(prefix.logits[0], logits[k], atol=2e-3, rtol=1e-3)
    assert k == 3 and any(after), "the fourth branch has patches"


def test_words_are_told_apart_by_their_first_token():
    words = Words.of(AutoProcessor.from_pretrained(locate(START)).tokenizer)
    assert len(set(words.boxed.tolist())) == 7 and len(set(words.colours.tolist())) == 6


def test_training_ends_with_an_ordinary_checkpoint_and_its_curve(tmp_path):
    """It learns nothing in a second; the vision tower stays as it is. Of several processes: test_shapes_training.py."""
    train(tmp_path, Recipe(minutes=0.02, scenes=1, branches=4, replay=1))
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["steps"] > 0 and told["recipe"]["branches"] == 4
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (locate(START), tmp_path))
    for name, value in before.state_dict().items():
        same = torch.equal(value.bfloat16(), after.state_dict()[name].bfloat16())
        assert same or "visual" not in name
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


SEEKER, TWIN = "data/models/shapes-seek", "data/models/shapes-seek-overconfident"


@cache
def vlm_of(model):
    return VLM.load(Config(model_name_or_path=model, **BASE))


@pytest.fixture(scope="module")
def asked():
    examples = load_dataset("data/shapes/seek_validation.json")[0][:8]
    return prepare(examples, partners(examples))


@pytest.mark.parametrize(
    ("model", "row", "least", "most"),
    [
        (SEEKER, "start", 0, 0),
        (SEEKER, "DMLR, 8 samples", 7, 8),
        (SEEKER, "another question's latents", 0, 2),
        (SEEKER, "patches of the true object", 8, 8),
        (SEEKER, "patches of random places", 0, 2),
        (TWIN, "start", 6, 6),
        (TWIN, "DMLR, 8 samples", 0, 5),
    ],
)
def test_the_committed_models_do_what_their_cards_say(asked, model, row, least, most):
    """A part of measured.json: right answers among eight questions."""
    method, changes = ROWS[row]
    config = Config(model_name_or_path=model, **BASE).replace(**changes)
    records = run(vlm_of(model), asked, method, config, 8)
    assert least <= sum(record["is_correct"] for record in records) <= most


def test_the_readmes_table_is_what_was_measured():
    text = Path(locate("README.md")).read_text(encoding="utf-8")
    assert f"{MARKS[0]}\n{readme_table(Path(locate('data/models')))}\n{MARKS[1]}" in text
    measured = json.loads(Path(locate("data/models/shapes-seek/measured.json")).read_text(encoding="utf-8"))
    half = measured["rows"]["random by reward, as many evaluations"]["right"]
    assert f"gets half way ({half:.0f} %)" in " ".join(text.split())
