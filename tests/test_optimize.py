"""The gradient estimate, the noise, independence of rows, and what happens when a reward is no number."""

import dataclasses

import pytest
import torch
from tiny import noise_image, tiny_vlm

from dmlr.config import Config
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import example_noise, initial_latents
from dmlr.loop.score import scorer
from dmlr.methods import METHODS, Question
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.prompts import Prompts

PROMPTS = Prompts()


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def one(vlm, config):
    encoded = encode(vlm, PROMPTS.system, PROMPTS.latent_task("How many?", 4), [noise_image(3)], 4)
    prefix = vlm.prefill([encoded])
    return prefix, initial_latents(vlm, prefix, config)


@pytest.mark.parametrize("reward", ["entropy", "logprob"])
@pytest.mark.parametrize("position", ["think", "think_next", "group_end"])
def test_exact_gradient_equals_finite_differences(reward, position):
    vlm = tiny_vlm()
    vlm.model.double()
    config = Config(reward=reward, reward_position=position)
    prefix, latents = one(vlm, config)
    latents = latents.double()
    patches = Patches(torch.tensor([[[1, 2], [3, 0], [5, 0], [7, 8]]]), torch.tensor([[2, 1, 1, 2]]))
    score = scorer(vlm, prefix, config)
    gradient = score(latents[:, None], patches, with_gradient=True).gradient
    generator = torch.Generator().manual_seed(0)
    uphill = gradient / gradient.norm()
    small = 4e-5 / gradient.norm().item()  # a change that float32 layers resolve, clear of kinks where the top k change
    for _ in range(5):
        random = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
        direction = uphill + random / random.norm()
        sides = [score((latents + e * direction)[:, None], patches).reward.item() for e in (small, -small)]
        assert (sides[0] - sides[1]) / (2 * small) == pytest.approx((gradient * direction).sum().item(), rel=2e-3)


def test_reinforce_points_along_the_exact_gradient(vlm, record_property):
    """(8): mean of R(T + xi) xi / sigma^2 over many samples against the gradient. Antithetic pairs cancel R(T)."""
    config = Config(sigma=0.0005, max_num_steps=30, num_samples=128)  # 1920 antithetic pairs
    prefix, latents = one(vlm, config)
    none = Patches.none(1, 4, latents.device)
    score = scorer(vlm, prefix, config)
    gradient = score(latents[:, None], none, with_gradient=True).gradient
    noise = example_noise(config, "cosine", latents.shape[2]) * config.sigma
    total = torch.zeros_like(latents)
    for xi in noise:
        reward = score(latents[:, None] + xi, none, with_attention=False).reward
        total += (reward[..., None, None] * xi).sum(dim=1) / config.sigma**2
    estimate = total / noise.shape[:2].numel()
    cosine = torch.nn.functional.cosine_similarity(estimate.flatten(), gradient.flatten(), dim=0).item()
    record_property("cosine", cosine)
    assert cosine > 0.9
    assert estimate.norm().item() == pytest.approx(gradient.norm().item(), rel=0.25)


def test_noise_depends_on_seed_and_idx_only_and_comes_in_antithetic_pairs():
    config = Config(max_num_steps=5)
    noise = example_noise(config, 7, 8)
    assert torch.equal(noise[:3], example_noise(config.replace(max_num_steps=3), 7, 8))
    assert not torch.equal(noise, example_noise(config, 8, 8))
    assert not torch.equal(noise, example_noise(config.replace(seed=43), 7, 8))
    assert abs(example_noise(config.replace(max_num_steps=50), 0, 64).std().item() - 1) < 0.02
    pairs = example_noise(config.replace(num_samples=6), 7, 8)
    assert pairs.shape == (5, 6, 4, 8)
    assert torch.equal(pairs[:, 0::2], -pairs[:, 1::2]) and not torch.equal(pairs[:, 0], pairs[:, 2])


def questions(count):
    sizes = [(112, 112), (56, 112), (84, 56), (112, 84), (56, 56), (140, 56)]
    plain = [Question(i, f"Question {'?' * (3 * i)}", [noise_image(i, *sizes[i % 6])]) for i in range(count)]
    return [
        dataclasses.replace(q, partner=lambda i=i: plain[i - 1], boxes=[[9, 9, 40, 20 + 4 * i]], solution="4" * (1 + i))
        for i, q in enumerate(plain)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_does_not_depend_on_its_neighbours(vlm, method):
    budgets = {"rationale_tokens": 9, "rationale_answer_tokens": 7, "scene_graph_tokens": 9, "consistency_samples": 3}
    config = Config(
        max_num_steps=4, lr=0.02, sigma=0.05, max_new_tokens=8, icot_newlines=1, ltpo_steps=3, ulr_steps=7, **budgets
    )
    asked = questions(6)
    together = METHODS[method](vlm, asked, config)
    backwards = METHODS[method](vlm, asked[::-1], config)[::-1]
    alone = [METHODS[method](vlm, [q], config)[0] for q in asked]
    for ways in zip(together, backwards, alone, strict=True):
        rewards, others = zip(*(told(answer) for answer in ways), strict=True)
        assert others[0] == others[1] == others[2]
        assert rewards[0] == pytest.approx(rewards[2], abs=1e-5)


def told(answer):
    """Its rewards, and all else that it says."""
    others, steps = [answer.text, answer.prompt, answer.details, answer.num_new_tokens], []
    if answer.reasoning:
        steps = answer.reasoning.steps
        decisions = [[step[name] for name in ("is_new_best", "patch_count", "patch_budget")] for step in steps]
        others += [answer.reasoning.patches, decisions]
    return [step["reward"] for step in steps], others


def test_nan_reward_costs_one_record(vlm, monkeypatch):
    """An image whose features are not finite makes one error; its neighbours are answered as if it were not there."""
    config = Config(max_num_steps=3, max_new_tokens=6)
    asked = questions(3)
    fine = METHODS["dmlr"](vlm, asked, config)

    def poisoned(vlm, system, task, images, count=0):
        encoded = encode(vlm, system, task, images, count)
        if images[0] is asked[1].images[0]:
            broken = {**encoded.image_inputs, "pixel_values": encoded.image_inputs["pixel_values"] * float("nan")}
            encoded = dataclasses.replace(encoded, image_inputs=broken)
        return encoded

    monkeypatch.setattr("dmlr.methods.latent.encode", poisoned)
    answers = METHODS["dmlr"](vlm, asked, config)
    assert answers[1].stop_reason == "error" and "not a finite number" in answers[1].error
    assert [answers[i].text for i in (0, 2)] == [fine[i].text for i in (0, 2)]


def test_self_score_is_used_and_leaves_the_prefix_alone(vlm, monkeypatch):
    """`disable_conf_reward`: the reward is a number that the model says, here made by a stub tokenizer reply."""
    config = Config(disable_conf_reward=True, max_num_steps=2, max_new_tokens=6)
    plain = METHODS["dmlr"](vlm, questions(2), config)
    assert all(0 <= step["reward"] <= 1 for a in plain for step in a.reasoning.steps)
    replies = iter([".1", "0.2", "0.5", "1", "0.9", "2.0", "0.3", "nothing", "0.7", "0.4"])

    def scored(vlm, prefix, max_new_tokens):
        return [dataclasses.replace(d, text=next(replies)) for d in decode(vlm, prefix, max_new_tokens)]

    monkeypatch.setattr("dmlr.loop.score.decode", scored)
    first, second = METHODS["dmlr"](vlm, questions(2), config)
    assert [first.reasoning.start_reward, second.reasoning.start_reward] == pytest.approx([0.1, 0.2])
    assert [s["explored_reward"] for s in first.reasoning.steps] == pytest.approx([0.5, 0.3])
    assert [s["reward"] for s in second.reasoning.steps] == pytest.approx([0.0, 0.4])  # "2.0" is out of range
    assert first.reasoning.best_reward == pytest.approx(0.9)


def test_visual_only_starts_from_the_image(vlm):
    prefix, latents = one(vlm, Config(visual_only=True))
    runs = prefix.images[0].view(4, 4, -1).mean(dim=1)  # sixteen image tokens, four think tokens
    torch.testing.assert_close(latents[0], runs)
