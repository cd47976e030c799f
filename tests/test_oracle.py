"""The fast path against full recomputation: rewards, patches, latents of every iteration, and the answers."""

import pytest
import torch
from tiny import noise_image, tiny_vlm

from dmlr.config import Config
from dmlr.loop.optimize import initial_latents, optimize
from dmlr.loop.reference import Reference, eager
from dmlr.methods.answers import Question
from dmlr.methods.latent import append_latents, question_noise
from dmlr.prompts import Prompts

PROMPTS = Prompts()
QUESTIONS = [
    ("How many?", (112, 112)),
    ("Which colour is the shape that stands to the left of the big red star near the lower border?", (56, 140)),
    ("Is there a square?\nOptions:\nA. yes\nB. no", (140, 84)),
    ("?", (56, 56)),
]
BASE = {"num_thought_tokens": 4, "max_num_steps": 5, "lr": 0.02, "sigma": 0.05, "max_new_tokens": 6}
VARIANTS = {
    "paper": {},
    "released": {"reward": "logprob", "reward_position": "think_next", "accept_at": "candidate"},
    "every patch": {"initial_patch_count": None, "num_selected_patches": None, "max_total_patches": None},
    "group_end": {"reward_position": "group_end", "initial_patch_count": 1, "patch_increment": 1},
    "group_end, candidate": {"reward_position": "group_end", "accept_at": "candidate", "patch_increment": 1},
    "think_next": {"reward_position": "think_next"},
    "stride 2": {"visual_insert_stride": 2, "num_selected_patches": 3},
    "stride 3, odd cap": {"visual_insert_stride": 3, "num_thought_tokens": 7, "max_total_patches": 5},
    "late start": {"visual_injection_start_step": 2},
    "interval 2": {"visual_injection_interval": 2, "patch_increment": 1},
    "late start, interval, candidate": {
        "visual_injection_start_step": 1,
        "visual_injection_interval": 2,
        "accept_at": "candidate",
    },
    "uneven cap": {"max_total_patches": 6, "initial_patch_count": 1, "patch_increment": 1},
    "no patches": {"initial_patch_count": 0, "patch_increment": 0},
    "one think token": {"num_thought_tokens": 1, "num_selected_patches": 5},
    "visual start": {"visual_only": True},
    "exact gradient": {"use_auto_grad": True},
    "exact gradient, candidate": {"use_auto_grad": True, "accept_at": "candidate", "reward": "logprob"},
    "four samples": {"num_samples": 4},
    "two samples, candidate": {"num_samples": 2, "accept_at": "candidate", "reward_position": "think_next"},
    "last state": {"disable_best_reward": True},
    "early stop": {"reward_threshold": 0.12, "lr": 0.05},
    "no iterations": {"max_num_steps": 0},
}


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def encode(vlm, config, count):
    return [
        vlm.encode(
            PROMPTS.system,
            PROMPTS.latent_task(text, config.num_thought_tokens),
            [noise_image(i, *size)],
            config.num_thought_tokens,
        )
        for i, (text, size) in enumerate(QUESTIONS[:count])
    ]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_loop_equals_full_recomputation(vlm, name, batch):
    config = Config(**{**BASE, **VARIANTS[name]})
    encoded = encode(vlm, config, batch)
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)])
    prefix = vlm.prefill(encoded)
    start = initial_latents(vlm, prefix, config)
    trace = optimize(vlm, prefix, config, noise, torch.zeros(0, dtype=torch.long))
    append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
    answers = vlm.decode(prefix, config.max_new_tokens)

    oracle = eager(vlm)
    for row in range(batch):
        reference = Reference(oracle, encoded[row], config)
        expected = reference.run(start[row], noise[row])
        assert trace.start_reward[row].item() == pytest.approx(expected.start_reward, abs=1e-4)
        ran = [step for step in trace.steps if step.active[row]]
        assert len(ran) == len(expected.steps)
        for step, want in zip(ran, expected.steps, strict=True):
            assert step.reward[row].item() == pytest.approx(want.reward, abs=1e-4)
            assert step.explored[row].item() == pytest.approx(want.explored, abs=1e-4)
            assert step.tried.patches.tolist()[row] == want.patches
            assert step.accepted[row].item() == want.accepted
        assert trace.best_reward[row].item() == pytest.approx(expected.best_reward, abs=1e-4)
        assert trace.best_step[row].item() == expected.best_step
        torch.testing.assert_close(trace.final.latents[row], expected.best_latents, atol=1e-4, rtol=0)
        assert trace.final.patches.tolist()[row] == expected.best_patches
        ids = reference.decode(expected.best_latents, expected.best_patches, config.max_new_tokens)
        assert answers[row].text == vlm.tokenizer.decode(ids, skip_special_tokens=True)


def test_variants_are_not_vacuous(vlm):
    """The matrix above must contain acceptances, rejections, growth and an early stop, or it proves little."""
    seen = set()
    for variant in VARIANTS.values():
        config = Config(**{**BASE, **variant})
        noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(4)])
        trace = optimize(vlm, vlm.prefill(encode(vlm, config, 4)), config, noise, torch.zeros(0, dtype=torch.long))
        seen |= {f"accepted {bool(a)}" for step in trace.steps for a in step.accepted}
        seen |= {f"patches {sum(map(len, row))}" for row in trace.final.patches.tolist()}
        if any(not a for step in trace.steps for a in step.active):
            seen.add("stopped early")
    assert {"accepted True", "accepted False", "patches 0", "patches 16", "stopped early"} <= seen


@pytest.mark.parametrize("accept_at", ["updated", "candidate"])
@pytest.mark.parametrize("position", ["think", "think_next", "group_end"])
def test_best_reward_is_that_of_the_state_that_earned_it(vlm, accept_at, position):
    config = Config(**BASE, accept_at=accept_at, reward_position=position)
    encoded = encode(vlm, config, 4)
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(4)])
    trace = optimize(vlm, vlm.prefill(encoded), config, noise, torch.zeros(0, dtype=torch.long))
    for row in range(4):
        reference = Reference(eager(vlm), encoded[row], config)
        with torch.no_grad():
            again, _ = reference.reward(trace.scored.latents[row], trace.scored.patches.tolist()[row])
        assert float(again) == pytest.approx(trace.best_reward[row].item(), abs=1e-5)
        if accept_at == "updated":
            torch.testing.assert_close(trace.scored.latents[row], trace.final.latents[row])
            assert trace.scored.patches.tolist()[row] == trace.final.patches.tolist()[row]
            assert trace.best_reward[row] >= trace.start_reward[row]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("position", ["think", "group_end"])
def test_half_precision_loop_is_the_same_within_rounding(dtype, tolerance, position):
    """Every state that the loop tried in half precision has, recomputed in full in float32 with the same weights, the
    reward that the loop saw, and the first patches are the most attended ones, up to the tolerance."""
    config = Config(**{**BASE, "reward_position": position})
    half, exact = tiny_vlm(), tiny_vlm()
    half.model.to(dtype)
    exact.model.load_state_dict(half.model.state_dict())  # the rounded weights
    encoded = encode(exact, config, 4)
    noise = torch.stack([question_noise(half, Question(i, "", []), config) for i in range(4)])
    trace = optimize(half, half.prefill(encoded), config, noise, torch.zeros(0, dtype=torch.long))
    seen = []
    for row in range(4):
        reference = Reference(eager(exact), encoded[row], config)
        with torch.no_grad():
            again, attention = reference.reward(half.embed(torch.full((4,), half.think_id)).float(), [[]] * 4)
            rewards = [
                float(reference.reward(step.tried.latents[row], step.tried.patches.tolist()[row])[0])
                for step in trace.steps
            ]
        columns = len(encoded[row].image_columns)
        torch.testing.assert_close(
            trace.start_attention[row, :, :columns], torch.tensor(attention), atol=tolerance, rtol=0
        )
        assert trace.start_reward[row].item() == pytest.approx(float(again), abs=tolerance)
        seen += [(step.reward[row].item(), want) for step, want in zip(trace.steps, rewards, strict=True)]
    assert [found for found, _ in seen] == pytest.approx([want for _, want in seen], abs=tolerance)
    assert max(abs(found - want) for found, want in seen) > 0, "nothing was rounded: this tested float32"
