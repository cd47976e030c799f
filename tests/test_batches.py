"""Batches: prepared ahead, cut to what fits, halved where something fails."""

import threading
import weakref
from unittest.mock import Mock

import pytest
import torch
from pretend_gpu import PretendGPU, to_gpu
from test_oracle import BASE
from tiny import noise_image, tiny_vlm

from dmlr.config import Config
from dmlr.methods.answers import Question
from dmlr.model import memory
from dmlr.model.families import Pictures
from dmlr.model.vlm import VLM
from dmlr.run import batches
from dmlr.run.batches import ahead, answer_batch, by_halves, work_of


def questions(count):
    return [Question(i, "How many?" * (1 + i % 3), Pictures([noise_image(i)])) for i in range(count)]


@pytest.fixture
def cramped(monkeypatch):
    """A pretended GPU where two examples fit, and what was asked of it: sizes of batches, images processed."""
    sizes, prefill, limit, vlm = [], VLM.prefill, 2, tiny_vlm()

    def limited(self, batch):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, batch)

    processor = vlm.processor.image_processor
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(processor, "preprocess", Mock(wraps=processor.preprocess))
    monkeypatch.setattr(VLM, "prefill", limited)
    to_gpu(vlm.model)
    with PretendGPU():
        yield vlm, sizes, processor.preprocess


def free_memory(monkeypatch, amount):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (amount, 10**12))


def test_batches_are_cut_by_the_length_of_their_prompts(cramped, monkeypatch):
    vlm, sizes, images = cramped
    config, asked = Config(**BASE | {"max_new_tokens": 2}, max_pixels=None), questions(5)
    each = memory.peak(vlm.shape, 4, work_of(vlm, "vanilla", asked, config), 1)
    free_memory(monkeypatch, 2.5 * each / memory.USABLE["cuda"])
    assert [answer.error for answer in answer_batch(vlm, "vanilla", asked, config)] == [None] * 5
    assert sizes == [2, 2, 1] and images.call_count == 5


ONCE = [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
TWICE = [8, 8, 4, 4, 2, 2, 4, 4, 2, 2, 2, 2, 2, 2]  # with recordings, which are let go of, and then without


@pytest.mark.parametrize(("recorded", "expected"), [(False, ONCE), (True, TWICE)])
def test_what_ran_out_of_memory_is_not_tried_again(cramped, monkeypatch, recorded, expected):
    vlm, sizes, images = cramped
    free_memory(monkeypatch, 10**12)
    prefill = VLM.prefill

    def recording(self, batch):
        if recorded:
            vlm.recordings["of this batch"] = None
        return prefill(self, batch)

    monkeypatch.setattr(VLM, "prefill", recording)
    config, asked = Config(**BASE | {"max_new_tokens": 2}, max_pixels=None), questions(8)
    for _ in range(2):
        assert {answer.error for answer in answer_batch(vlm, "vanilla", asked, config)} == {None}
    assert sizes == expected and images.call_count == 8, "an image is processed once"


def test_an_error_keeps_nothing_of_what_failed():
    class Tensor:
        pass

    held = []

    def work(items):
        tensor = Tensor()
        assert all(one() is None for one in held), "an earlier attempt is still in memory"
        held.append(weakref.ref(tensor))
        raise ValueError(len(items))

    errors = by_halves(work, [1, 2, 3])
    assert [str(error) for error in errors] == ["1"] * 3 and all(one() is None for one in held)


def test_items_are_made_ahead_in_order_and_no_more_than_wait():
    made = []

    def items():
        for i in range(9):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield i
        raise ValueError("the last one")

    seen = []
    with pytest.raises(ValueError, match="the last one"):
        for i in ahead(items()):
            assert len(made) <= i + 1 + batches.AHEAD
            seen.append(i)
    assert seen == list(range(9)) and not any(main for _, main in made)
