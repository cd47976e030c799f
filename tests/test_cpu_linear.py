"""Linear layers through oneDNN: the same product, the same gradients, torch's own class wherever it does not apply."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_vlm

from dmlr.loop.reference import eager
from dmlr.model import cpu_linear
from dmlr.model.cpu_linear import Linear, through_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def layers_here_are_small(monkeypatch):
    monkeypatch.setattr(cpu_linear, "TINY", 0)


def test_only_a_model_that_is_small_beside_the_memory_is_packed(monkeypatch):
    for total, packs in ((4 * 16 * 16, False), (4 * 4 * 16 * 16, True)):
        monkeypatch.setattr(cpu_linear.psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        layer = through_onednn(torch.nn.Linear(16, 16, bias=False).requires_grad_(False))
        layer(torch.ones(2, 16))
        assert layer.packs == packs == (layer._packed is not None)


def pair(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)
    return plain, through_onednn(copy.deepcopy(plain))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 17, 96), (2, 0, 96), (640, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_to_rounding(shape, bias):
    plain, fast = pair(bias)
    x = torch.randn(shape)
    exact = torch.nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    assert fast(x).shape == exact.shape and fast(x).is_contiguous()
    torch.testing.assert_close(fast(x).double(), exact, atol=2e-6, rtol=0)


def test_float32_without_a_gradient_takes_it_and_all_else_does_not(monkeypatch):
    taken = []
    multiply = cpu_linear.multiply
    monkeypatch.setattr(cpu_linear, "multiply", lambda *given: taken.append(1) or multiply(*given))
    _, fast = pair()
    fast(torch.randn(2, 96))
    assert taken == [1]
    pair(dtype=torch.bfloat16)[1](torch.randn(2, 96, dtype=torch.bfloat16))
    fast.to("meta")(torch.randn(2, 96, device="meta"))
    plain, fast = pair()
    x, y = (torch.ones(2, 96, requires_grad=True) for _ in range(2))
    fast(x).sum().backward()
    plain(y).sum().backward()
    assert torch.equal(x.grad, y.grad) and taken == [1]
    with torch.no_grad():
        fast(x)
    assert taken == [1, 1]
    monkeypatch.setattr(cpu_linear, "TINY", 2 * 96 * 40)
    assert torch.equal(fast(x), plain(x)) and taken == [1, 1]


@pytest.mark.parametrize("rows", [3, cpu_linear.FEW + 1])
def test_a_weight_that_changed_is_a_new_weight(rows):
    """Few rows go through a copy in oneDNN's blocks, which must not outlive what it was made of."""
    plain, fast = pair()
    x = torch.randn(rows, 96)
    fast(x)
    copied = copy.deepcopy(fast)  # of a layer that has its blocks
    with torch.no_grad():
        for layer in (plain, fast, copied):
            layer.weight.mul_(2)
    torch.testing.assert_close(fast(x), plain(x), atol=4e-6, rtol=0)
    torch.testing.assert_close(copied(x), plain(x), atol=4e-6, rtol=0)
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_a_model_gets_it_and_the_reference_does_not():
    """What it is measured and checked against is torch as everybody has it, over the same weights."""
    vlm = tiny_vlm()
    twin = eager(vlm)
    for model, expected in ((vlm.model, Linear), (twin.model, torch.nn.Linear)):
        assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {expected}
    here, there = ([p.data_ptr() for p in each.model.parameters()] for each in (vlm, twin))
    assert here == there, "of 7B a second copy is 33 GB"
