"""Controls: each changes what it says of DMLR's result and nothing else."""

import dataclasses

import pytest
import torch
from test_optimize import questions
from tiny import tiny_vlm

from dmlr.config import Config
from dmlr.data.boxes import touched
from dmlr.data.examples import Example
from dmlr.methods import METHODS, controls
from dmlr.methods.controls import CONTROLS, loop_result
from dmlr.run.batches import partners

CONFIG = Config(num_thought_tokens=4, max_num_steps=4, lr=0.02, sigma=0.05, max_new_tokens=6, initial_patch_count=1)


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def asked():
    return questions(3)


@pytest.fixture(scope="module")
def found(vlm, asked):
    found = loop_result(vlm, asked, CONFIG)
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


def test_displaced_is_as_far_from_the_start(found):
    ours, theirs = (latents - found.start for latents in (controls.displaced(found).latents, found.state.latents))
    torch.testing.assert_close(ours.norm(dim=2), theirs.norm(dim=2))
    assert torch.cosine_similarity(ours, theirs, dim=2).abs().max() < 0.6, "the direction is another one"


def test_gaussian_has_the_size_of_each_think_token(found):
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
    for row, (question, encoded) in enumerate(zip(found.questions, found.encoded, strict=True)):
        inside = touched(question.boxes, question.images[0].size, encoded.patch_grid)
        for patches, others in zip(true.patches.tolist()[row], drawn.patches.tolist()[row], strict=True):
            assert inside[patches].all()
            assert len(patches) == min(len(others), inside.sum()) > 0


def test_an_oracle_without_its_truth_is_an_error(vlm, asked):
    for name, fields in {"true-patches": ["boxes"], "oracle-latents": ["solution"], "swapped": ["partner"]}.items():
        blind = [dataclasses.replace(asked[0], **dict.fromkeys(fields))]
        (answer,) = METHODS[name](vlm, blind, CONFIG)
        assert answer.error.startswith(f"ValueError: {name}: the dataset has no {fields[0]}")


def test_swapped_is_the_partners_result_behind_our_prompt(vlm, asked):
    answers = METHODS["swapped"](vlm, asked, CONFIG)
    partners = METHODS["dmlr"](vlm, [q.partner() for q in asked], CONFIG)
    vanillas = METHODS["dmlr"](vlm, asked, CONFIG)
    for answer, partner, own, question in zip(answers, partners, vanillas, asked, strict=True):
        torch.testing.assert_close(answer.reasoning.latents, partner.reasoning.latents, atol=1e-5, rtol=0)
        assert answer.details["patches"] == partner.reasoning.patches
        assert answer.details["loop_of"] == question.partner().idx
        assert answer.prompt == own.prompt and answer.reasoning.start_reward == pytest.approx(
            own.reasoning.start_reward, abs=1e-5
        )


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
    answers = METHODS["oracle-latents"](vlm, asked, config)
    found = loop_result(vlm, asked, config)
    score = controls.truth_score(vlm, found.prefix, asked)
    latents = torch.stack([a.reasoning.latents for a in answers])
    before, after = (score(z[:, None], found.retrieval.nothing).reward for z in (found.start, latents))
    assert (after > before + 0.1).all()
    assert all(a.details["oracle"] for a in answers)


def test_the_truths_gradient_is_that_of_finite_differences():
    vlm = tiny_vlm()
    vlm.model.double()
    asked = questions(2)
    found = loop_result(vlm, asked, CONFIG)
    score, latents = controls.truth_score(vlm, found.prefix, asked), found.start.double()
    gradient = score(latents[:, None], found.state.patches, with_gradient=True).gradient
    direction = gradient / gradient.norm(dim=(1, 2), keepdim=True)
    up, down = (score((latents + e * direction)[:, None], found.state.patches).reward[:, 0] for e in (1e-5, -1e-5))
    torch.testing.assert_close((up - down) / 2e-5, gradient.norm(dim=(1, 2)), rtol=1e-2, atol=0, check_dtype=False)
