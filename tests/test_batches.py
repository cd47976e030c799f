"""Batches: prepared ahead, cut to what fits, halved where something fails."""

import threading
import weakref

import pytest
import torch
from pretend_gpu import PretendGPU, to_gpu
from test_oracle import BASE
from tiny import noise_image, tiny_vlm

from dmlr.config import Config
from dmlr.methods.answers import Question
from dmlr.model import memory
from dmlr.model.families.family import Pictures
from dmlr.model.vlm import VLM
from dmlr.run import batches
from dmlr.run.batches import ahead, answer_batch, by_halves, work_of


def questions(count):
    return [Question(i, "How many?" * (1 + i % 3), Pictures([noise_image(i)])) for i in range(count)]


@pytest.fixture
def cramped(monkeypatch):
    """A pretended GPU where two examples fit, and what was asked of it: sizes of batches, images processed."""
    sizes, images, prefill, limit = [], [], VLM.prefill, 2
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    vlm = tiny_vlm()

    def limited(self, batch):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, batch)

    class Seen(type(vlm.processor.image_processor)):
        def __call__(self, *args, **options):
            images.append(args)
            return super().__call__(*args, **options)

    vlm.processor.image_processor.__class__ = Seen
    monkeypatch.setattr(VLM, "prefill", limited)
    to_gpu(vlm.model)
    with PretendGPU():
        yield vlm, sizes, images


def free_memory(monkeypatch, amount):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (amount, 10**12))


def test_batches_are_cut_by_the_length_of_their_prompts(cramped, monkeypatch):
    vlm, sizes, images = cramped
    config, asked = Config(**BASE | {"max_new_tokens": 2}, max_pixels=None), questions(5)
    each = memory.peak(vlm.shape, 4, work_of(vlm, "vanilla", asked, config), 1)
    free_memory(monkeypatch, 2.5 * each / memory.USABLE["cuda"])
    assert [answer.error for answer in answer_batch(vlm, "vanilla", asked, config)] == [None] * 5
    assert sizes == [2, 2, 1] and len(images) == 5


def test_what_ran_out_of_memory_is_not_tried_again(cramped, monkeypatch):
    vlm, sizes, images = cramped
    free_memory(monkeypatch, 10**12)
    config, asked = Config(**BASE | {"max_new_tokens": 2}, max_pixels=None), questions(8)
    for _ in range(2):
        assert {answer.error for answer in answer_batch(vlm, "vanilla", asked, config)} == {None}
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2] and len(images) == 8, "an image is processed once"


def test_what_ran_out_of_memory_with_recordings_is_not_tried_again(cramped, monkeypatch):
    """They are let go of first; what does not fit without them either is too much."""
    vlm, sizes, _ = cramped
    free_memory(monkeypatch, 10**12)
    prefill = VLM.prefill

    def recorded(self, batch):
        vlm.recordings.kept["of this batch"] = None
        return prefill(self, batch)

    monkeypatch.setattr(VLM, "prefill", recorded)
    config, asked = Config(**BASE | {"max_new_tokens": 2}, max_pixels=None), questions(8)
    for _ in range(2):
        assert {answer.error for answer in answer_batch(vlm, "vanilla", asked, config)} == {None}
    assert sizes == [8, 8, 4, 4, 2, 2, 4, 4, 2, 2, 2, 2, 2, 2], "once with recordings, once without"


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
