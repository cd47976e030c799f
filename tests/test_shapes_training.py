"""Training goes on where it stopped, with the tokenizer it began with, and its processes hold the same weights."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoProcessor

from notebooks.training import lesson
from notebooks.training.learner import Recipe
from notebooks.training.lesson import check_same_everywhere, corpus, train
from notebooks.training.parts import build_processor, build_tokenizer

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
