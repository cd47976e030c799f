"""The loop recorded and replayed. Without a GPU the operations of a forward are recorded one by one and run again on
the same memory, as a CUDA graph does with kernels: no Python in between, nothing read back, nothing moved."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from recomputed import noise_of
from test_oracle import BASE, GPU, VARIANTS, encode
from tiny import noise_image, tiny_vlm
from tiny_families import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmlr.config import Config
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import optimize
from dmlr.loop.score import confidence
from dmlr.methods import METHODS, Question
from dmlr.model import cpu_linear
from dmlr.model import graphs as cuda_graphs
from dmlr.model.decode import decode
from dmlr.model.graphs import MOST, ROUNDED, Recording
from dmlr.model.vlm import VLM

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


def record_on_a_cpu(function, inputs, flags, pool):
    with Recorder() as recorder:
        outputs = function(*inputs, **flags)
    for tensor in outputs:  # whoever reads the outputs without a replay is found out
        if tensor is not None:
            tensor.fill_(float("nan"))
    return Recording(inputs, outputs, recorder.replay)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The names of what was recorded."""
    recorded = []

    def record(function, inputs, flags, pool):
        recorded.append((*(tuple(x.shape) for x in inputs), flags))
        return record_on_a_cpu(function, inputs, flags, pool)

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(VLM, "on_one_gpu", True)
    monkeypatch.setattr(cpu_linear, "FEW", 0)  # packed weights are a CPU's alone
    return recorded


def loop(vlm, config, rows=4):
    """rows: so many questions, or prompts."""
    encoded = encode(vlm, config, rows) if isinstance(rows, int) else rows
    return optimize(vlm, vlm.prefill(encoded), config, noise_of(vlm, config, range(len(encoded))))


def same(plain, other, atol=1e-6):
    """Two traces of the same decisions; rewards, attention and latents differ by rounding."""
    close = partial(torch.testing.assert_close, atol=atol, rtol=1e-5)
    assert len(plain.steps) == len(other.steps)
    for one, two in zip(plain.steps, other.steps, strict=True):
        assert torch.equal(one.accepted, two.accepted)
        assert one.tried.patches.tolist() == two.tried.patches.tolist()
        for name in ("reward", "explored", "attention"):
            close(getattr(one, name), getattr(two, name))
    close(plain.final.latents, other.final.latents)
    assert plain.final.patches.tolist() == other.final.patches.tolist()


def dynamic():
    """InternVL3's checkpoints ask for frequencies that change beyond the context alone."""
    vlm = TINY["internvl"]()
    vlm.text_model.rotary_emb.rope_type = "dynamic"
    return VLM(vlm.model, vlm.processor)


@pytest.mark.parametrize(
    ("build", "variant"),
    [
        *((tiny_vlm, VARIANTS[name]) for name in ("paper", "released", "every patch", "answer")),
        (tiny_vlm, VARIANTS["late start, interval, candidate"]),
        (partial(TINY["qwen3_vl"], deep_patches=True), {}),
        (dynamic, {}),
    ],
)
def test_a_replayed_loop_is_the_loop(build, variant, as_on_a_gpu):
    vlm, config = build(), Config(**BASE | variant)
    plain = loop(vlm, config)
    assert not as_on_a_gpu
    replayed = loop(vlm, config.replace(cuda_graphs=True))
    assert as_on_a_gpu
    assert len(as_on_a_gpu) == len({str(shapes) for shapes in as_on_a_gpu}), "recorded again and again"
    same(plain, replayed)


def test_one_recording_serves_what_has_the_same_shapes(as_on_a_gpu):
    """Prompts and images of other lengths, another seed or answer of an endpoint's request."""
    vlm, config = tiny_vlm(), Config(**BASE, cuda_graphs=True)
    rows = encode(vlm, config, 4)
    lengths = {max(len(e.input_ids) for e in batch) for batch in (rows[:2], rows[2:])}
    assert len(lengths) > 1 and len({-(-length // ROUNDED) for length in lengths}) == 1
    loop(vlm, config, rows[:2])
    decode(vlm, vlm.prefill(rows[:2]), 24, recorded=True)
    count = len(as_on_a_gpu)
    for other in (config, config.replace(seed=7, max_num_steps=4, sigma=0.1)):
        same(loop(vlm, other.replace(cuda_graphs=False), rows[2:]), loop(vlm, other, rows[2:]))
        plain = decode(vlm, vlm.prefill(rows[2:]), 20)
        assert decode(vlm, vlm.prefill(rows[2:]), 20, recorded=True) == plain
    assert len(as_on_a_gpu) == count
    loop(vlm, config, rows[:3])
    assert len(as_on_a_gpu) > count, "another batch size is another shape"


@pytest.mark.parametrize("sides", [(56, 140), (140, 56)])
def test_patches_of_a_partners_image_are_replayed(sides, as_on_a_gpu):
    """Whether it has more image tokens than the question's own or fewer."""
    vlm, config = tiny_vlm(), Config(**BASE, max_pixels=None)
    mine, other = (Question(side, "How many?", [noise_image(side, side, side)]) for side in sides)
    asked = [replace(mine, partner=lambda: other)]
    (plain,) = METHODS["swapped"](vlm, asked, config)
    assert plain.error is None and any(plain.details["patches"]) and not as_on_a_gpu
    (replayed,) = METHODS["swapped"](vlm, asked, config.replace(cuda_graphs=True))
    assert as_on_a_gpu and (replayed.text, replayed.details) == (plain.text, plain.details)
    assert replayed.reasoning.best_reward == pytest.approx(plain.reasoning.best_reward, abs=1e-5)


class Launches(TorchDispatchMode):
    """How many operations Python starts; views are none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = [r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns]
        self.count += not any(views)
        return function(*args, **(kwargs or {}))


def test_python_starts_few_operations_once_they_are_recorded(monkeypatch):
    """As many layers as the 7B model has: what is started does not depend on their widths."""
    vlm, config, outputs = tiny_vlm(layers=28), Config(**BASE), []
    rows = encode(vlm, config, 1)

    def record(function, inputs, flags, pool):
        if not outputs:
            outputs[:] = function(*inputs, **flags)
        return Recording(inputs, tuple(outputs), lambda: None)

    def launches(count, recorded):
        """Of an answer of so many tokens."""
        with Launches() as counted:
            decode(vlm, vlm.prefill(rows), count, recorded=recorded)
        return counted.count

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setitem(vlm.__dict__, "eos_ids", [-1])
    launches(2, True)  # what is recorded is started once
    plain, replayed = ((launches(8, recorded) - launches(4, recorded)) / 4 for recorded in (False, True))
    print(f"operations a token: {plain:g}, recorded {replayed:g}")
    assert replayed < 25 < 28 * 15 < plain


def test_recordings_that_were_not_used_for_longest_leave_first():
    vlm = tiny_vlm()
    prefix = vlm.prefill(encode(vlm, Config(**BASE), 1))
    made = {}
    for purpose in (1, 2, 3, 4, 1, 5, 1, 2):
        made.setdefault(purpose, []).append(vlm.recordings.over(prefix, 1, purpose))
        assert len(vlm.recordings) <= MOST
    assert all(one is made[1][0] for one in made[1]) and made[2][0] is not made[2][1]
    vlm.recordings.clear()
    assert not vlm.recordings


class Driver:
    """torch.cuda as far as recording needs it, without a GPU: which streams are current, and what runs on which."""

    def __init__(self, monkeypatch, at_the_end=None):
        self.streams, self.devices, self.at_the_end = [self.stream("cuda:0")], [torch.device("cuda:0")], at_the_end
        monkeypatch.setattr(cuda_graphs, "side_stream", cache(self.stream))  # no other test may be given this one
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[-1])
        monkeypatch.setattr(torch.cuda, "stream", partial(self.within, self.streams))
        monkeypatch.setattr(torch.cuda, "device", partial(self.within, self.devices))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, pool=object))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def stream(self, device):
        return SimpleNamespace(device=torch.device(device), wait_stream=lambda other: None)

    @contextmanager
    def within(self, stack, entered):
        depth = len(stack)
        stack.append(entered)
        try:
            yield
        finally:
            del stack[depth:]

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As torch's: where the end of a capture raises, its stream stays the current one."""
        self.streams.append(stream)
        yield
        if self.at_the_end:
            raise self.at_the_end
        self.streams.pop()

    def record(self, device):
        """A recording of tensors there: the stream and the device on which the function runs."""
        seen = []
        tensor = SimpleNamespace(device=torch.device(device))
        cuda_graphs.record(lambda x: seen.append((self.streams[-1], self.devices[-1])), [tensor], {}, None)
        return seen


def test_recordings_are_made_on_one_stream_of_the_device_where_the_tensors_are(monkeypatch):
    driver = Driver(monkeypatch)
    seen = driver.record("cuda:1") + driver.record("cuda:1")
    assert len(seen) == 4 and all(stream is seen[0][0] for stream, _ in seen)
    assert seen[0][0].device == seen[0][1] == torch.device("cuda:1")
    assert len(driver.streams) == len(driver.devices) == 1


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    driver = Driver(monkeypatch, at_the_end=RuntimeError("capture invalidated"))
    with pytest.raises(RuntimeError, match="take cuda_graphs = false .capture invalidated."):
        driver.record("cuda:0")
    assert len(driver.streams) == len(driver.devices) == 1


class StaysOnMeta(TorchDispatchMode):
    """No operation makes a tensor on another device: a copy from the CPU makes a GPU wait, and no graph holds it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(x.is_meta for x in tree_leaves(out) if isinstance(x, torch.Tensor)), function
        return out


@pytest.mark.parametrize("family", TINY)
def test_a_forward_stays_on_its_device(family):
    """On the meta device, where nothing can be read back either."""
    vlm, config = TINY[family](), Config(**BASE, reward_position="think_next")
    prefix = vlm.prefill(encode(vlm, config, 3))
    vlm.model.to("meta")
    prefix = replace(prefix, **{k: v.to("meta") for k, v in vars(prefix).items() if isinstance(v, torch.Tensor)})
    prefix.cache = prefix.cache.each(lambda x: x.to("meta"))
    latents = torch.zeros(3, 2, 4, vlm.text_config.hidden_size, device="meta")
    index, count = (torch.zeros(*shape, dtype=torch.long, device="meta") for shape in ((3, 4, 5), (3, 4)))
    with StaysOnMeta():
        reward, attention = confidence(vlm, prefix, config, latents, Patches(index, count), True)
    assert reward.shape == (3, 2) and attention.shape == (3, 4, prefix.images.shape[1])


@pytest.mark.parametrize("hidden", [pytest.param(hidden, marks=GPU) for hidden in (48, 512)])  # heads of 12 and 128
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_loop_on_a_gpu_is_the_loop(dtype, hidden):
    """In half precision the padding of the recorded prefix moves rewards by what rounding does."""
    vlm, config = tiny_vlm(hidden=hidden), Config(**BASE)
    vlm.model.to("cuda", dtype)
    plain, replayed = (loop(vlm, config.replace(cuda_graphs=on)) for on in (False, True))
    if dtype == torch.float32:
        same(plain, replayed, atol=1e-4)
        rows = encode(vlm, config, 4)
        said, again = (decode(vlm, vlm.prefill(rows), 20, recorded=on) for on in (False, True))
        assert said == again
    torch.testing.assert_close(plain.start_reward, replayed.start_reward, atol=0.02, rtol=0)
    torch.testing.assert_close(plain.best_reward, replayed.best_reward, atol=0.05, rtol=0)
