"""The embedded model through the same code as any other: parity with `generate` and with full recomputation.

Full-size versions of these are in dev/LOG.md; here a few examples keep them honest."""

from pathlib import Path

import pytest
import torch
from recomputed import equals_full_recomputation, noise_of
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from data.shapes.make import chance_level
from dmlr.config import Config, locate
from dmlr.data.examples import load_dataset, open_image
from dmlr.loop.optimize import optimize
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import prefill_latent
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from dmlr.prompts import Prompts
from notebooks.training.examine import accuracy, load_suite

SUITES = ("mathematics", "visual", "composition")


@pytest.fixture(scope="module")
def config():
    return Config.make("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def vlm(config):
    return VLM.load(config)


def questions(each):
    """The first `each` of every suite."""
    examples = [e for suite in SUITES for e in load_dataset(f"data/shapes/{suite}.json")[0][:each]]
    return [Question(e.idx, e.question, [open_image(e.image)]) for e in examples]


def test_it_is_a_plain_checkpoint_of_the_real_architecture(vlm):
    folder = Path(locate("data/models/shapes-vl"))
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is Qwen2_5_VLForConditionalGeneration
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 16 * 2**20
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")), "no pickles"
    assert (folder / "README.md").is_file()


def test_vanilla_equals_generate_token_by_token(vlm, config):
    """Nine questions, batched here, one by one in plain transformers."""
    plain = AutoModelForImageTextToText.from_pretrained(locate(config.model_name_or_path), dtype=torch.float32)
    prompts, asked = Prompts(), questions(3)
    answers = METHODS["vanilla"](vlm, asked, config)
    for question, answer in zip(asked, answers, strict=True):
        prompt = encode(vlm, prompts.system, prompts.task(question.text), question.images).prompt
        assert prompt == answer.prompt
        inputs = vlm.processor(
            text=[prompt], images=question.images, return_tensors="pt", return_mm_token_type_ids=True
        )
        out = plain.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer.text == vlm.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.num_new_tokens == len(new)


def test_loop_equals_full_recomputation(vlm, config):
    config = config.replace(max_num_steps=4, max_new_tokens=24)
    equals_full_recomputation(vlm, config, prefill_latent(vlm, questions(1), config, Prompts())[1])


@pytest.mark.slow
def test_it_sees_and_think_tokens_with_patches_cost_little(vlm, config):
    """A part of what its card says: 80 % in all, 25 points above a blind guess in each suite, and at most 3 points
    less (5 of these 180 questions) with four think tokens and two attended patches after each, also with noise of the
    embedding's RMS on them."""
    right = {}
    for suite in SUITES:
        records = load_suite("data/shapes", suite)
        for think, patches, noise in ((0, 0, 0), (4, 2, 0), (4, 2, 1)):
            found = accuracy(vlm, records[:60], config, think, patches, noise)["right"]
            right[suite, think, noise] = found.sum()
        assert right[suite, 0, 0] / 60 >= chance_level(records) + 0.25
        assert right[suite, 0, 0] / 60 < 0.97, "nothing left to gain"
    plain, *others = (sum(right[(suite, *setting)] for suite in SUITES) for setting in ((0, 0), (4, 0), (4, 1)))
    assert plain >= 0.8 * 180 and min(others) >= plain - 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_does_not_change_is_never_accepted(config, dtype):
    """Without a step and without patches every iteration scores the start again: by the same numerics, to the last
    bit, whether or not attention was looked at on the way."""
    config = config.replace(dtype=dtype, lr=0, initial_patch_count=0, patch_increment=0, max_num_steps=4)
    vlm, asked = VLM.load(config), questions(8)
    prefix, _ = prefill_latent(vlm, asked, config, Prompts())
    noise = noise_of(vlm, config, [question.idx for question in asked])
    trace = optimize(vlm, prefix, config, noise)
    assert len(asked) == 24 and not any(step.accepted.any() for step in trace.steps)
    assert all(torch.equal(step.reward, trace.start_reward) for step in trace.steps)
    assert not any(torch.equal(step.explored, trace.start_reward) for step in trace.steps), "nothing was explored"
