"""Compiled layers give what transformers' own code gives, and few forms of them are compiled."""

import pytest
import torch
from test_cuda_graphs import encode, loop, loop_over, same
from test_oracle import BASE
from tiny import tiny_vlm
from tiny_families import TINY
from torch._dynamo.utils import counters

from dmlr.config import Config
from dmlr.model import compiled
from dmlr.model.vlm import VLM

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own


@pytest.fixture
def graphs(monkeypatch):
    """How many were compiled; layers are compiled on a CPU too."""
    monkeypatch.setattr(VLM, "on_one_gpu", True)
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    compiled._compiled.cache_clear()


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_layers_that_compile_in_one_piece(family, graphs, monkeypatch):
    """Traced, and run without generated code."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    vlm, config = TINY[family](), Config(**BASE, num_samples=2)
    plain = loop(vlm, config, 2)
    assert not graphs()
    same(plain, loop(vlm, config.replace(compile_layers=True), 2), atol=1e-5)
    assert graphs()


def test_generated_code_gives_the_same_loop_for_all_layers_and_batches(graphs):
    vlm, config = tiny_vlm(layers=3), Config(**BASE)
    rows = encode(vlm, config, 4)
    fused = config.replace(compile_layers=True)
    for batch in (rows[:1], rows[:2], rows[1:4], rows[3:]):
        same(loop_over(vlm, config, batch), loop_over(vlm, fused, batch), atol=1e-5)
    assert graphs() <= 6, "a form for each layer, length or width would be compiled again and again"


def test_what_cannot_be_compiled_says_what_to_do(graphs, monkeypatch):
    vlm, config = tiny_vlm(), Config(**BASE, compile_layers=True)
    kind = type(vlm.text_model.layers[0])
    whole = kind.forward

    def reads_back(self, *args, **kw):
        hidden = whole(self, *args, **kw)
        return hidden if hidden.sum().item() > 0 else hidden.clone()

    monkeypatch.setattr(kind, "forward", reads_back)
    with pytest.raises(RuntimeError, match="take compile_layers = false"):
        loop(vlm, config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_layers_on_a_gpu(recorded):
    vlm, config = tiny_vlm(), Config(**BASE)
    vlm.model.to("cuda")
    same(loop(vlm, config), loop(vlm, config.replace(compile_layers=True, cuda_graphs=recorded)), atol=1e-4)
