"""What oracle tests of several models share: a batch through loop and decoding, and every row again in full."""

from __future__ import annotations

import pytest
import torch

from dmlr.loop.optimize import initial_latents, optimize
from dmlr.loop.reference import Reference, eager
from dmlr.methods.answers import Question
from dmlr.methods.latent import append_latents, question_noise
from dmlr.model.decode import decode


def noise_of(vlm, config, idxs):
    """[B, T, M, L, D] of the examples with these numbers."""
    return torch.stack([question_noise(vlm, Question(idx, "", []), config) for idx in idxs])


def assert_close(found, want, share):
    """Apart by at most a share of the spread of what is wanted: zeros, or any other constant, are not close."""
    found, want = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (found, want))
    apart, spread = (found - want).abs().max().item(), (want.max() - want.min()).item()
    assert apart <= share * spread, f"{apart:.2g} apart, of a spread of {spread:.2g}"


def equals_full_recomputation(vlm, config, encoded):
    """Rewards, patches and decisions of every iteration, the state that is decoded and its answer; gives the trace."""
    noise, prefix = noise_of(vlm, config, range(len(encoded))), vlm.prefill(encoded)
    start = initial_latents(vlm, prefix, config)
    trace = optimize(vlm, prefix, config, noise)
    append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
    answers, oracle = decode(vlm, prefix, config.max_new_tokens), eager(vlm)
    for row, answer in enumerate(answers):
        reference = Reference(oracle, encoded[row], config)
        expected = reference.run(start[row], noise[row])
        ran = [step for step in trace.steps if step.active[row]]
        assert len(ran) == len(expected.steps)
        for step, want in zip(ran, expected.steps, strict=True):
            assert step.tried.patches.tolist()[row] == want.patches
            assert step.accepted[row].item() == want.accepted
        rewards = [trace.start_reward[row], *(r[row] for step in ran for r in (step.reward, step.explored))]
        wanted = [expected.start_reward, *(r for step in expected.steps for r in (step.reward, step.explored))]
        if ran:
            assert_close(rewards, wanted, 1e-3)
        # one minus an entropy of nearly one: a few of its last bits
        assert rewards[0].item() == pytest.approx(expected.start_reward, rel=1e-4, abs=1e-6)
        assert trace.best_reward[row].item() == pytest.approx(expected.best_reward, rel=1e-3)
        assert trace.best_step[row].item() == expected.best_step
        assert_close(trace.final.latents[row], expected.best_latents, 1e-3)
        assert trace.final.patches.tolist()[row] == expected.best_patches
        assert answer.ids == reference.decode(expected.best_latents, expected.best_patches, config.max_new_tokens)
    return trace
