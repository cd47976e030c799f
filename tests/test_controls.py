"""Controls: each changes what it says of DMLR's result and nothing else."""

import dataclasses

import pytest
import torch
from recomputed import noise_of
from test_optimize import questions
from tiny import tiny_vlm

from dmlr.config import Config
from dmlr.data.boxes import touched
from dmlr.data.examples import Example
from dmlr.loop.optimize import initial_latents
from dmlr.loop.reference import Reference, eager
from dmlr.methods import METHODS, controls
from dmlr.methods.controls import CONTROLS, Batch
from dmlr.methods.latent import prefill_latent
from dmlr.model.encode import encode
from dmlr.prompts import Prompts
from dmlr.run.batches import partners

CONFIG = Config(num_thought_tokens=4, max_num_steps=4, lr=0.02, sigma=0.05, max_new_tokens=6, initial_patch_count=1)


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def asked():
    return questions(3)


def batch_of(vlm, asked, config=CONFIG):
    prefix, _ = prefill_latent(vlm, asked, config, Prompts())
    noise = noise_of(vlm, config, [question.idx for question in asked])
    return Batch(vlm, asked, prefix, config, noise, prefix.suffix_ids)


@pytest.fixture(scope="module")
def found(vlm, asked):
    found = batch_of(vlm, asked)
    assert not torch.equal(found.state.latents, found.start) and found.state.patches.count.any(), "nothing to change"
    return found


@pytest.mark.parametrize("name", ["displaced", "zero", "gaussian", "patches-only"])
def test_other_latents_with_the_same_patches(found, name):
    state = CONTROLS[name].change(found)
    assert state.patches is found.state.patches
    assert not torch.allclose(state.latents, found.state.latents)


@pytest.mark.parametrize("name", ["latents-only", "random-patches", "true-patches"])
def test_other_patches_with_the_same_latents(found, name):
    state = CONTROLS[name].change(found)
    assert state.latents is found.state.latents
    assert state.patches.tolist() != found.state.patches.tolist()


def test_displaced_and_gaussian_have_the_loops_size(found):
    ours, theirs = (latents - found.start for latents in (controls.displaced(found).latents, found.state.latents))
    torch.testing.assert_close(ours.norm(dim=2), theirs.norm(dim=2))
    assert torch.cosine_similarity(ours, theirs, dim=2).abs().max() < 0.6, "the direction is another one"
    sizes = [latents.pow(2).mean(dim=2).sqrt() for latents in (controls.gaussian(found).latents, found.state.latents)]
    torch.testing.assert_close(*sizes, rtol=0.5, atol=0)


def test_permuted_moves_every_think_token_with_its_patches(found):
    state, before = controls.permuted(found), found.state
    for row in range(3):
        groups = [
            [(tuple(z.tolist()), p) for z, p in zip(s.latents[row], s.patches.tolist()[row], strict=True)]
            for s in (before, state)
        ]
        assert sorted(groups[0]) == sorted(groups[1])
        moved = [a != b for a, b in zip(*groups, strict=True)]
        assert all(moved) or len({z for z, _ in groups[0]}) < 4, "think tokens that are alike may seem to stay"


def test_true_patches_lie_in_the_box_and_are_as_many_as_random_ones(found):
    true, drawn = controls.true_patches(found), controls.random_patches(found)
    for row, question in enumerate(found.questions):
        grid = encode(found.vlm, "", "?", question.images).patch_grid
        inside = touched(question.boxes, question.images[0].size, grid)
        for patches, others in zip(true.patches.tolist()[row], drawn.patches.tolist()[row], strict=True):
            assert inside[patches].all()
            assert len(patches) == min(len(others), inside.sum()) > 0


def test_an_oracle_without_its_truth_is_an_error(vlm, asked):
    for name, fields in {"true-patches": ["boxes"], "oracle-latents": ["solution"], "swapped": ["partner"]}.items():
        blind = [dataclasses.replace(asked[0], **dict.fromkeys(fields))]
        (answer,) = METHODS[name](vlm, blind, CONFIG)
        assert answer.error.startswith(f"ValueError: {name}: the dataset has no {fields[0]}")


def test_swapped_is_the_partners_result_behind_our_prompt(vlm, asked):
    answers, own = (METHODS[name](vlm, asked, CONFIG) for name in ("swapped", "dmlr"))
    for answer, mine, row in zip(answers, own, (-1, 0, 1), strict=True):  # whose partner that is
        torch.testing.assert_close(answer.reasoning.latents, own[row].reasoning.latents, atol=1e-5, rtol=0)
        assert answer.details["patches"] == own[row].reasoning.patches and answer.details["loop_of"] == asked[row].idx
        assert answer.prompt == mine.prompt
        assert answer.reasoning.start_reward == pytest.approx(mine.reasoning.start_reward, abs=1e-5)


def test_a_partner_is_another_question():
    examples = [Example(row=row, idx=row, question="How many?", solution="4" * (row != 2)) for row in range(7)]
    found = partners(examples)
    assert found.keys() == {0, 1, 3, 4, 5, 6} == {example.row for example in found.values()}
    assert all(row != example.row for row, example in found.items())


def test_controls_of_a_run_share_one_loop(vlm, asked, monkeypatch):
    METHODS["zero"](vlm, asked, CONFIG)
    monkeypatch.setattr(controls, "optimize", lambda *args, **kwargs: pytest.fail("the loop ran again"))
    assert [a.details["loop_of"] for a in METHODS["gaussian"](vlm, asked[1:], CONFIG)] == [1, 2]


def test_oracle_latents_make_the_truth_more_likely(vlm, asked):
    config = CONFIG.replace(max_num_steps=10, sigma=0.5, initial_patch_count=0, patch_increment=0)
    answers, oracle = METHODS["oracle-latents"](vlm, asked, config), eager(vlm)
    prefix, encoded = prefill_latent(vlm, asked, config, Prompts())
    starts = initial_latents(vlm, prefix, config)
    for question, answer, row, start in zip(asked, answers, encoded, starts, strict=True):
        truth, reference = torch.tensor(vlm.tokenizer.encode(question.solution)), Reference(oracle, row, config)
        chances = []
        for latents in (start, answer.reasoning.latents):
            with torch.no_grad():
                logits, *_ = reference.forward(latents, [[]] * 4, [*row.suffix_ids.tolist(), *truth.tolist()])
            before = logits[-len(truth) - 1 : -1].log_softmax(dim=1)
            chances.append(before.gather(1, truth[:, None]).mean().item())
        assert chances[1] > chances[0] + 0.1 and answer.details["oracle"]
