"""The embedded models through the same code as any other: parity with `generate` and with full recomputation, and a
part of what their cards say.

Full-size versions of these are in dev/LOG.md; here a few examples keep them honest."""

from functools import cache

import pytest
import torch
from recomputed import equals_full_recomputation, noise_of
from transformers import AutoModelForImageTextToText

from data.shapes.make import chance_level
from data.shapes.questions import SUITES
from dmlr.config import Config, locate, root
from dmlr.data.examples import load_dataset, open_image
from dmlr.loop.optimize import optimize
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import prefill_latent
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from notebooks.training.examine import accuracy, load_suite

VL, QWEN3 = "data/models/shapes-vl", "data/models/shapes-vl-qwen3"
FOLDERS = sorted((root() / "data/models").glob("shapes-*"))


@cache
def loaded(model, **more):
    config = Config.make("demo", model_name_or_path=model, device="cpu", **{"dtype": "float32", **more})
    return VLM.load(config), config


def questions(each):
    """The first `each` of every suite."""
    examples = [e for suite in SUITES for e in load_dataset(f"data/shapes/{suite}.json")[0][:each]]
    return [Question(e.idx, e.question, [open_image(e.image)]) for e in examples]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_a_plain_checkpoint_of_a_real_architecture(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.models.qwen")
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 16 * 2**20
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")), "no pickles"
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("model", [VL, QWEN3])
def test_vanilla_equals_generate_token_by_token(model):
    """Nine questions, batched here, one by one in plain transformers."""
    (vlm, config), asked, prompts = loaded(model), questions(3), Prompts()
    plain = AutoModelForImageTextToText.from_pretrained(locate(model), dtype=torch.float32)
    for question, answer in zip(asked, METHODS["vanilla"](vlm, asked, config), strict=True):
        prompt = encode(vlm, prompts.system, prompts.task(question.text), question.images).prompt
        assert prompt == answer.prompt
        options = {"return_tensors": "pt", "return_mm_token_type_ids": True}
        inputs = vlm.processor(text=[prompt], images=question.images, **options)
        out = plain.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer.text == vlm.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.num_new_tokens == len(new)


@pytest.mark.parametrize(("model", "deep"), [(VL, False), (QWEN3, False), (QWEN3, True)])
def test_loop_equals_full_recomputation(model, deep):
    vlm, config = loaded(model, deep_patches=deep)
    config = config.replace(max_num_steps=4, max_new_tokens=24)
    equals_full_recomputation(vlm, config, prefill_latent(vlm, questions(1), config, Prompts())[1])


@pytest.mark.slow
def test_it_sees_and_think_tokens_with_patches_cost_little():
    """A part of what its card says: 80 % in all, 25 points above a blind guess in each suite, and at most 3 points
    less (5 of these 180 questions) with four think tokens and two attended patches after each, also with noise of the
    embedding's RMS on them."""
    (vlm, config), settings = loaded(VL), ((0, 0, 0), (4, 2, 0), (4, 2, 1))
    right = dict.fromkeys(settings, 0)
    for suite in SUITES:
        records = load_suite("data/shapes", suite)
        found = {setting: accuracy(vlm, records[:60], config, *setting)["right"].sum() for setting in settings}
        assert chance_level(records) + 0.25 <= found[settings[0]] / 60 < 0.97, "it sees, and something is left to gain"
        right = {setting: right[setting] + found[setting] for setting in settings}
    plain, *others = right.values()
    assert plain >= 0.8 * 180 and min(others) >= plain - 5


def test_the_qwen3_sees_and_its_deep_features_reach_the_answers():
    """Answers above a blind guess, some of which change without what the vision tower's inner blocks add."""
    vlm, config = loaded(QWEN3)
    for suite in SUITES:
        records = load_suite("data/shapes", suite)
        found = accuracy(vlm, records[:24], config)
        assert found["right"].mean() >= chance_level(records) + 0.15, suite
    flat = VLM.load(config)
    features = flat.family.features
    flat.family.features = lambda *given: (lambda seen, deep: (seen, [0 * level for level in deep]))(*features(*given))
    changed = accuracy(flat, records[:24], config)["answer"] != found["answer"]
    assert changed.sum() >= 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_does_not_change_is_never_accepted(dtype):
    """Without a step and without patches every iteration scores the start again: by the same numerics, to the last
    bit, whether or not attention was looked at on the way."""
    (vlm, config), asked = loaded(VL, dtype=dtype), questions(8)
    config = config.replace(lr=0, initial_patch_count=0, patch_increment=0, max_num_steps=4)
    prefix, _ = prefill_latent(vlm, asked, config, Prompts())
    noise = noise_of(vlm, config, [question.idx for question in asked])
    trace = optimize(vlm, prefix, config, noise)
    assert len(asked) == 24 and not any(step.accepted.any() for step in trace.steps)
    assert all(torch.equal(step.reward, trace.start_reward) for step in trace.steps)
    assert not any(torch.equal(step.explored, trace.start_reward) for step in trace.steps), "nothing was explored"
