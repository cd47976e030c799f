"""The embedded Qwen3-VL: DeepStack with trained weights. Its card says what it can do; a part of that is held here."""

import pytest
import torch
from PIL import Image

from data.shapes.make import chance_level
from data.shapes.questions import SUITES
from dmlr.config import Config
from dmlr.data.examples import load_dataset, open_image
from dmlr.loop.optimize import initial_latents, optimize
from dmlr.loop.reference import Reference, eager
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import question_noise
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from notebooks.training.examine import accuracy, load_suite

FOLDER = "data/models/shapes-vl-qwen3"


@pytest.fixture(scope="module")
def config():
    return Config.make("demo", model_name_or_path=FOLDER, device="cpu")


@pytest.fixture(scope="module")
def vlm(config):
    return VLM.load(config)


def test_it_answers_above_a_blind_guess(vlm, config):
    for suite in SUITES:
        records = load_suite("data/shapes", suite)
        assert accuracy(vlm, records[:24], config)["right"].mean() >= chance_level(records) + 0.15, suite


def test_its_deep_features_reach_the_answers(vlm, config):
    """Without what the vision tower's inner blocks add, answers change."""
    records = load_suite("data/shapes", "composition", 24)
    whole = accuracy(vlm, records, config)["answer"]
    flat = VLM.load(config)
    features = flat.family.features
    flat.family.features = lambda *given: (lambda seen, deep: (seen, [0 * level for level in deep]))(*features(*given))
    changed = (accuracy(flat, records, config)["answer"] != whole).sum()
    assert changed >= 3, changed


@pytest.mark.parametrize("deep_patches", [False, True])
def test_loop_equals_full_recomputation(config, deep_patches):
    config = config.replace(deep_patches=deep_patches, max_num_steps=4)
    vlm, prompts = VLM.load(config), Prompts()
    asked = load_dataset("data/shapes/composition.json")[0][:2]
    encoded = [encode(vlm, prompts.system, prompts.latent_task(e.question, 4), [open_image(e.image)], 4) for e in asked]
    noise = torch.stack([question_noise(vlm, Question(e.idx, "", []), config) for e in asked])
    prefix = vlm.prefill(encoded)
    start = initial_latents(vlm, prefix, config)
    trace = optimize(vlm, prefix, config, noise, torch.zeros(0, dtype=torch.long))
    for row in range(2):
        expected = Reference(eager(vlm), encoded[row], config).run(start[row], noise[row])
        assert [step.reward[row].item() for step in trace.steps] == pytest.approx(
            [step.reward for step in expected.steps], abs=1e-4
        )
        assert trace.final.patches.tolist()[row] == expected.best_patches


def test_text_and_two_images_are_answered(vlm, config):
    questions = [Question(0, "How many stars are there?", []), Question(1, "?", [Image.new("RGB", (168, 168))] * 2)]
    for answer in METHODS["dmlr"](vlm, questions, config):
        assert answer.error is None and answer.num_new_tokens
