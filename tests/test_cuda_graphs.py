"""The loop recorded and replayed. Without a GPU the operations of a forward are recorded one by one and run again on
the same memory, as a CUDA graph does with kernels: no Python in between, nothing read back, nothing moved."""

from dataclasses import replace

import pytest
import torch
from test_oracle import BASE, VARIANTS, encode
from tiny import tiny_vlm
from tiny_families import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmlr import cuda_graphs
from dmlr.answers import Question
from dmlr.config import Config
from dmlr.cuda_graphs import Recording, Replayed
from dmlr.injection import Patches
from dmlr.methods.latent import question_noise
from dmlr.optimize import optimize, score
from dmlr.vlm import VLM

NO_IDS = torch.zeros(0, dtype=torch.long)
READS_BACK = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Recorder(TorchDispatchMode):
    """Every operation, with the memory that it read and wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READS_BACK, f"{function} makes a GPU wait"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record_on_a_cpu(function, inputs):
    recorder = Recorder()
    with recorder:
        outputs = function(*inputs)
    for tensor in outputs:  # whoever reads the outputs without a replay is found out
        if tensor is not None:
            tensor.fill_(float("nan"))
    return Recording(inputs, outputs, recorder.replay)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The names of what was recorded."""
    recorded = []

    def record(function, inputs):
        recorded.append([tuple(x.shape) for x in inputs])
        return record_on_a_cpu(function, inputs)

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(VLM, "on_one_gpu", True)
    monkeypatch.setattr(Patches, "trimmed", lambda self: self)
    return recorded


def loop(vlm, config, batch=4):
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)])
    return optimize(vlm, vlm.prefill(encode(vlm, config, batch)), config, noise, NO_IDS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "gradient" not in name])
def test_a_replayed_loop_is_the_loop(name, as_on_a_gpu):
    vlm, config = tiny_vlm(), Config(**{**BASE, **VARIANTS[name]})
    plain = loop(vlm, config)
    assert not as_on_a_gpu
    replayed = loop(vlm, config.replace(cuda_graphs=True))
    assert as_on_a_gpu or config.max_num_steps == 0
    assert len(as_on_a_gpu) <= 6, "shapes that change with every iteration would be recorded again and again"
    assert len(plain.steps) == len(replayed.steps)
    for one, other in zip(plain.steps, replayed.steps, strict=True):
        assert torch.equal(one.accepted, other.accepted)
        assert one.tried.patches.tolist() == other.tried.patches.tolist()
        torch.testing.assert_close(one.reward, other.reward, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.explored, other.explored, atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.final.latents, replayed.final.latents, atol=1e-6, rtol=0)
    assert plain.final.patches.tolist() == replayed.final.patches.tolist()


def test_memory_that_moved_is_recorded_anew(monkeypatch):
    made = []
    monkeypatch.setattr(cuda_graphs, "record", lambda f, x: made.append(1) or record_on_a_cpu(f, x))
    weights = [torch.ones(3)]
    replayed = Replayed(lambda x: (x * weights[0], None), place=lambda: weights[0].data_ptr())
    ask = lambda value: replayed(torch.full((3,), value))[0].tolist()  # noqa: E731
    assert [ask(1.0), ask(2.0), ask(3.0)] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    weights[0].mul_(2)  # in place: the recording sees it
    assert ask(3.0) == [6.0] * 3 and len(made) == 1
    weights[0] = torch.full((3,), 5.0)
    assert [ask(1.0), ask(2.0), ask(3.0)] == [[5.0] * 3, [10.0] * 3, [15.0] * 3] and len(made) == 2


def test_a_function_that_reads_back_is_not_recorded():
    with pytest.raises(AssertionError, match="makes a GPU wait"):
        record_on_a_cpu(lambda x: (x * float(x.max()),), [torch.ones(3)])


class StaysOn(TorchDispatchMode):
    """No operation makes a tensor on another device: a copy from the CPU makes a GPU wait, and no graph holds it."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(x.device.type == self.device for x in tree_leaves(out) if isinstance(x, torch.Tensor)), function
        return out


@pytest.mark.parametrize("family", TINY)
def test_a_forward_stays_on_its_device(family):
    """On the meta device, where nothing can be read back either."""
    vlm, config = TINY[family](), Config(**BASE, reward_position="think_next")
    prefix = vlm.prefill(encode(vlm, config, 3))
    vlm.model.to("meta")
    prefix = replace(prefix, **{k: v.to("meta") for k, v in vars(prefix).items() if isinstance(v, torch.Tensor)})
    for layer in prefix.cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    latents = torch.zeros(3, 2, 4, vlm.text_config.hidden_size, device="meta")
    index, count = (torch.zeros(*shape, dtype=torch.long, device="meta") for shape in ((3, 4, 5), (3, 4)))
    with StaysOn("meta"):
        reward, attention, _ = score(vlm, prefix, config, NO_IDS, latents, Patches(index, count))
    assert reward.shape == (3, 2) and attention.shape == (3, 4, prefix.images.shape[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_loop_on_a_gpu_is_the_loop(dtype):
    vlm, config = tiny_vlm(), Config(**BASE)
    vlm.model.to("cuda", dtype)
    plain, replayed = (loop(vlm, config.replace(cuda_graphs=on)) for on in (False, True))
    assert [s.tried.patches.tolist() for s in plain.steps] == [s.tried.patches.tolist() for s in replayed.steps]
    torch.testing.assert_close(plain.final.latents, replayed.final.latents, atol=1e-5, rtol=0)
