"""One update on several processes is that on their mean gradient; training goes on where it stopped, with the tokenizer
it began with, and its processes hold the same weights."""

import json
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoProcessor

from data.shapes.scenes import EASY
from dmlr.prompts import Prompts
from notebooks.training import lesson
from notebooks.training.learner import Learner, Recipe, orthogonal, update
from notebooks.training.lesson import check_same_everywhere, corpus, train
from notebooks.training.packing import Phase, collate, pack
from notebooks.training.parts import build_processor, build_tokenizer, wordings

SMALL = Recipe(hidden=64, layers=1, noise=0.0)
PHASE = Phase(3, 0.5, 0.3, 0.05, EASY)


def batch_of(seed):
    """A batch, the same for the same seed, and how many tokens there are."""
    texts = [
        p.system + p.latent_task("How many red stars are there?", n) for p in wordings(Prompts()) for n in range(9)
    ]
    tokenizer = build_tokenizer(texts, 600)
    made = pack(random.Random(seed), [Prompts()], tokenizer, PHASE.questions, PHASE.latent, PHASE.dense, PHASE.hard)
    return collate([made], 640), len(tokenizer)


def updated(rank=0):
    batch, size = batch_of(rank)
    learner = Learner(size, SMALL, torch.device("cpu"))
    learner.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(0))
    return learner


def gradients(rank):
    """Those of the first update of a process that is alone, before they are clipped."""
    kept = []

    def keep(parameters, most):
        kept.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)

    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", keep):
        updated(rank)
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
    learner = Learner(batch_of(0)[1], SMALL, torch.device("cpu"))
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
    again = Learner(size, replace(SMALL, seed=7), torch.device("cpu"))
    again.load_state(tmp_path)
    for each in (learner, again):
        each.step(batch, 1e-3, PHASE, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, learner.parameters, again.parameters))
    with pytest.raises(RuntimeError, match="Missing key"):
        Learner(size, replace(SMALL, layers=2), torch.device("cpu")).load_state(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Learner(size, replace(SMALL, hidden=128), torch.device("cpu")).load_state(tmp_path)


# whole trainings

RECIPE = Recipe(minutes=0.03, vision_minutes=0.01, hidden=64, layers=1, scenes=1, questions=3, processes=1)


def told(folder):
    return json.loads((folder / "model/training.json").read_text())


def tokens(folder, text="Is there a red star left of the blue circle? \\boxed{No}"):
    return AutoProcessor.from_pretrained(folder).tokenizer.encode(text)


def test_training_runs_and_continues_with_its_tokenizer(tmp_path, monkeypatch):
    """A second call has nothing left to do, one with more time goes on, also when questions now read differently."""
    few = corpus(scenes=40)
    monkeypatch.setattr(lesson, "corpus", lambda: few)
    train(tmp_path / "model", RECIPE, tmp_path / "state")
    first, words = told(tmp_path), tokens(tmp_path / "model")
    assert first["steps"] > 0
    monkeypatch.setattr(lesson, "corpus", lambda: ["quite other words"] * 9)
    train(tmp_path / "model", RECIPE, tmp_path / "state")
    assert told(tmp_path)["steps"] == first["steps"]
    more = (first["seconds"] + 1) / 60  # on a busy machine the last step may take seconds
    train(tmp_path / "model", replace(RECIPE, minutes=more), tmp_path / "state")
    assert told(tmp_path)["steps"] > first["steps"]
    assert tokens(tmp_path / "model") == words
    with pytest.raises(ValueError, match="another recipe"):
        train(tmp_path / "model", replace(RECIPE, lr=1e-4), tmp_path / "state")
    (tmp_path / "state/processor").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="without its processor"):
        train(tmp_path / "model", RECIPE, tmp_path / "state")


def test_a_processor_that_is_loaded_again_is_the_one_that_was_made(tmp_path):
    texts = corpus(scenes=40)
    made = build_processor(build_tokenizer(texts, 600))
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert [loaded.tokenizer.encode(text) for text in texts] == [made.tokenizer.encode(text) for text in texts]
    assert loaded.chat_template == made.chat_template and len(loaded.tokenizer) == len(made.tokenizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in one process")
@pytest.mark.slow
def test_two_processes_train_with_the_kept_processor(tmp_path):
    """They end only if their weights are the same, bit for bit (the next test), and make no tokenizer of their own."""
    build_processor(build_tokenizer(corpus(scenes=40), 600)).save_pretrained(tmp_path / "state/processor")
    train(tmp_path / "model", replace(RECIPE, processes=2), tmp_path / "state")
    assert told(tmp_path)["steps"] > 0
    assert len(AutoProcessor.from_pretrained(tmp_path / "model").tokenizer) < 700
    assert tokens(tmp_path / "model") == tokens(tmp_path / "state/processor")


def test_a_bit_that_differs_between_processes_is_an_error(monkeypatch):
    """Two processes, of which this one plays both: what each would send is kept, and handed to the next."""
    sent = []

    def gather(found, mine):
        sent.append(mine)
        found[:] = [sent[0], mine]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    weights = [torch.arange(6.0), torch.ones(2, 2)]
    check_same_everywhere(weights)
    check_same_everywhere([weight.clone() for weight in weights])
    weights[0][3] = torch.nextafter(weights[0][3], weights[0][4])
    with pytest.raises(RuntimeError, match="ended with different weights"):
        check_same_everywhere(weights)
