"""One update on several processes is the update on the mean of their gradients; a state is continued or refused."""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from data.shapes.scenes import EASY
from dmlr.prompts import Prompts
from notebooks.training.learner import Learner, Recipe, orthogonal, update
from notebooks.training.packing import Phase, collate, pack
from notebooks.training.parts import build_tokenizer, wordings

RECIPE = Recipe(hidden=64, layers=1, noise=0.0)
PHASE = Phase(3, 0.5, 0.3, 0.05, EASY)


def batch_of(seed):
    """A batch, the same for the same seed, and how many tokens there are."""
    texts = [
        p.system + p.latent_task("How many red stars are there?", n) for p in wordings(Prompts()) for n in range(9)
    ]
    tokenizer = build_tokenizer(texts, 600)
    made = pack(random.Random(seed), [Prompts()], tokenizer, PHASE.questions, PHASE.latent, PHASE.dense, PHASE.hard)
    return collate([made], 640), len(tokenizer)


def updated(rank=0, recipe=RECIPE):
    batch, size = batch_of(rank)
    learner = Learner(size, recipe, torch.device("cpu"))
    learner.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(0))
    return learner


def gradients(rank):
    """Those of the first update of a process that is alone, before they are clipped."""
    kept, clip = [], torch.nn.utils.clip_grad_norm_
    try:
        torch.nn.utils.clip_grad_norm_ = lambda parameters, most: kept.extend(
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
        )
        updated(rank)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    return kept


def one_process(rank, meeting, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save([p.detach() for p in updated(rank).parameters], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_update_of_their_mean_gradient(tmp_path):
    torch.multiprocessing.spawn(one_process, ((tmp_path / "meeting").as_uri(), tmp_path), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, first, second))
    mean = [(a + b) / 2 for a, b in zip(gradients(0), gradients(1), strict=True)]
    learner = Learner(batch_of(0)[1], RECIPE, torch.device("cpu"))
    start = [p.detach().clone() for p in learner.parameters]
    for parameter, gradient in zip(learner.parameters, mean, strict=True):
        parameter.grad = gradient
    update(learner.parameters, learner.optimizers, 1e-3)
    moved = [p.detach() - s for p, s in zip(learner.parameters, start, strict=True)]
    by_two = [p - s for p, s in zip(first, start, strict=True)]
    for expected, found in zip(moved, by_two, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0.05)


def test_an_update_is_nearly_orthogonal():
    for shape in ((24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.slow
def test_a_state_is_continued_or_refused(tmp_path):
    learner = updated()
    learner.save_state(tmp_path, {"step": 1})
    batch, size = batch_of(1)
    again = Learner(size, replace(RECIPE, seed=7), torch.device("cpu"))
    again.load_state(tmp_path)
    for each in (learner, again):
        each.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, learner.parameters, again.parameters))
    with pytest.raises(RuntimeError, match="Missing key"):
        Learner(size, replace(RECIPE, layers=2), torch.device("cpu")).load_state(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Learner(size, replace(RECIPE, hidden=128), torch.device("cpu")).load_state(tmp_path)
