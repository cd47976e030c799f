"""Everything that a GPU would refuse for where its tensors are, found without one."""

import pytest
import torch
import torch.nn.functional as F
from pretend_gpu import GPU, OnGPU, PretendGPU, to_gpu
from test_oracle import BASE, QUESTIONS, VARIANTS
from tiny import noise_image, tiny_vlm
from tiny_families import TINY

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.methods import METHODS
from dmlr.methods.answers import Question
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM
from notebooks.walkthrough import view
from notebooks.walkthrough.walk import explore
from notebooks.walkthrough.what_if import try_changes, usual_changes

BRIEF = {"rationale_tokens": 4, "rationale_answer_tokens": 4, "scene_graph_tokens": 4, "ltpo_steps": 2, "ulr_steps": 7}
SOME = ("released", "every patch", "visual start", "exact gradient", "early stop")


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (10**9, 10**10))


def answers(build, method, config, gpu):
    vlm = build()
    questions = [
        Question(i, text, [noise_image(i, *size)], lambda: questions[0], [[9, 9, 40, 40]], "4")
        for i, (text, size) in enumerate(QUESTIONS[:3])
    ]
    if not gpu:
        return METHODS[method](vlm, questions, config)
    to_gpu(vlm.model)
    with PretendGPU():
        assert vlm.device == GPU
        return METHODS[method](vlm, questions, config)


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        *(("qwen2_5_vl", method, BRIEF) for method in METHODS),
        *(("qwen2_5_vl", "dmlr", VARIANTS[name]) for name in SOME),
        *((family, "dmlr", {}) for family in TINY),
    ],
)
def test_what_runs_on_a_cpu_runs_where_the_model_is(family, method, options):
    both = (answers(TINY[family], method, Config(**BASE | options), gpu) for gpu in (False, True))
    for here, there in zip(*both, strict=True):
        assert (here.text, here.error) == (there.text, None)
        if here.reasoning:
            assert here.reasoning.patches == there.reasoning.patches
            assert here.reasoning.best_reward == pytest.approx(there.reasoning.best_reward, abs=1e-4)


def test_a_tower_sees_the_windows_of_all_images_in_few_calls_that_nothing_is_planned_for():
    calls, vlm = [], tiny_vlm()
    encoded = [encode(vlm, "", text, [noise_image(i, *size)]) for i, (text, size) in enumerate(QUESTIONS)]
    here = vlm.prefill(encoded)

    class Watched(PretendGPU):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                calls.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().__torch_function__(function, types, args, kwargs)

    to_gpu(vlm.model)
    with Watched():
        there = VLM(vlm.model, vlm.processor).prefill(encoded)
        torch.testing.assert_close(here.images, there.images.cpu(), atol=1e-5, rtol=1e-5)
    # windows of 16, 8 and 4 patches in the first of the tower's layers, four sizes of images in the second
    assert len(calls) == 3 + 4 + len(there.cache.stored)
    assert not any(calls), "cuDNN plans anew for every shape"


def test_the_walkthrough_runs_where_the_model_is():
    config, images = Config(**BASE), [noise_image(0)]
    here, there = tiny_vlm(), tiny_vlm()
    to_gpu(there.model)
    walk = explore(here, config, Example(row=0, idx=0, question="How many?", solution=""), images)
    with PretendGPU():
        again = explore(there, config, Example(row=0, idx=0, question="How many?", solution=""), images)
        changed = try_changes(again, usual_changes(again))
    assert [moment.answer for moment in walk.moments] == [moment.answer for moment in again.moments]
    assert view.moments_table(again).shape == view.moments_table(walk).shape
    for moment in again.moments:  # on the CPU: they are drawn
        assert view.heat(moment).on(again.grid).max() > 0
    assert [o.answer for o in try_changes(walk, usual_changes(walk))] == [o.answer for o in changed]


def test_what_a_gpu_refuses_is_refused():
    there, here = torch.ones(3).as_subclass(OnGPU), torch.ones(3)
    with PretendGPU():
        assert torch.arange(3, device=there.device).device == GPU == (there + 1).device == here.to(there.device).device
        assert there.cpu().device.type == (there + 1).to("cpu").device.type == "cpu"
        assert (there + torch.tensor(2.0)).tolist() == [3.0] * 3, "a number may come from anywhere"
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.where(there > 0, there, here),
        ):
            with pytest.raises(AssertionError, match="a tensor on the CPU"):
                mixed()
        with pytest.raises(AssertionError, match="needs the tensor on the CPU"):
            there.numpy()
        with pytest.raises(AssertionError, match="generator"):
            torch.multinomial(there, 1, generator=torch.Generator())
