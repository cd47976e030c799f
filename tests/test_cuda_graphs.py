"""The loop recorded and replayed. Without a GPU the operations of a forward are recorded one by one and run again on
the same memory, as a CUDA graph does with kernels: no Python in between, nothing read back, nothing moved."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from recomputed import noise_of
from test_oracle import BASE, QUESTIONS, VARIANTS, encode
from tiny import noise_image, tiny_vlm
from tiny_families import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmlr.config import Config
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import optimize
from dmlr.loop.score import confidence
from dmlr.methods.answers import Question
from dmlr.model import cpu_linear
from dmlr.model import graphs as cuda_graphs
from dmlr.model.decode import decode
from dmlr.model.graphs import MOST, ROUNDED, Recording
from dmlr.model.vlm import VLM
from dmlr.run.batches import answer_batch

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

    def record(function, inputs, flags, pool):
        recorded.append((*(tuple(x.shape) for x in inputs), flags))
        return record_on_a_cpu(lambda *x: function(*x, **flags), inputs)

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(VLM, "on_one_gpu", True)
    monkeypatch.setattr(cpu_linear, "FEW", 0)  # packed weights are a CPU's alone
    return recorded


def loop(vlm, config, batch=4):
    return loop_over(vlm, config, encode(vlm, config, batch))


def loop_over(vlm, config, encoded):
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


@pytest.mark.parametrize("name", ["paper", "released", "every patch", "late start, interval, candidate", "answer"])
def test_a_replayed_loop_is_the_loop(name, as_on_a_gpu):
    vlm, config = tiny_vlm(), Config(**{**BASE, **VARIANTS[name]})
    plain = loop(vlm, config)
    assert not as_on_a_gpu
    replayed = loop(vlm, config.replace(cuda_graphs=True))
    assert as_on_a_gpu
    assert len(as_on_a_gpu) == len({str(shapes) for shapes in as_on_a_gpu}), "recorded again and again"
    same(plain, replayed)


def test_batches_of_other_prompts_and_images_are_replayed_from_one_recording(as_on_a_gpu):
    vlm, config = tiny_vlm(), Config(**BASE, cuda_graphs=True)
    rows = encode(vlm, config, 4)
    batches = [rows[:2], rows[2:], rows[1:3]]
    lengths = {max(len(e.input_ids) for e in batch) for batch in batches}
    assert len(lengths) > 1 and len({-(-length // ROUNDED) for length in lengths}) == 1
    first, *others = batches
    loop_over(vlm, config, first)
    count = len(as_on_a_gpu)
    for batch in others:
        same(loop_over(vlm, config.replace(cuda_graphs=False), batch), loop_over(vlm, config, batch))
    assert len(as_on_a_gpu) == count
    loop_over(vlm, config, rows[:3])
    assert len(as_on_a_gpu) > count, "another batch size is another shape"


def test_what_a_reward_does_not_depend_on_records_nothing_anew(as_on_a_gpu):
    """Another seed or answer of an endpoint's request, and every control of the battery, which scores a state once."""
    vlm, config = tiny_vlm(), Config(**BASE, cuda_graphs=True)
    loop(vlm, config)
    decode(vlm, vlm.prefill(encode(vlm, config, 2)), 20, recorded=True)
    count, other = len(as_on_a_gpu), config.replace(seed=7, max_num_steps=4, sigma=0.1)
    same(loop(vlm, other.replace(cuda_graphs=False)), loop(vlm, other))
    decode(vlm, vlm.prefill(encode(vlm, config, 2)), 24, recorded=True)
    assert len(as_on_a_gpu) == count


def test_patches_with_deep_features_are_replayed_too(as_on_a_gpu):
    vlm, config = TINY["qwen3_vl"](deep_patches=True), Config(**BASE)
    assert vlm.deep_levels
    same(loop(vlm, config, 2), loop(vlm, config.replace(cuda_graphs=True), 2))
    assert as_on_a_gpu


def test_tokens_that_are_replayed_are_the_tokens(as_on_a_gpu):
    """Rows of different lengths, in two batches that share one recording."""
    vlm = tiny_vlm()
    rows = encode(vlm, Config(**BASE), 4)
    for batch in (rows[:2], rows[2:]):
        plain = decode(vlm, vlm.prefill(batch), 20)
        assert decode(vlm, vlm.prefill(batch), 20, recorded=True) == plain
    assert len(as_on_a_gpu) == 1


class Launches(TorchDispatchMode):
    """How many operations Python starts; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = [r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns]
        self.count += not any(views)
        return function(*args, **(kwargs or {}))


def launches(work):
    with Launches() as counted:
        work()
    return counted.count


def test_python_starts_few_operations_once_they_are_recorded(monkeypatch):
    """As many layers as the 7B model has: what is started does not depend on their widths."""
    vlm, config = tiny_vlm(layers=28), Config(**BASE, cuda_graphs=True)
    (row,) = encode(vlm, config, 1)
    outputs = []

    def record(function, inputs, flags, pool):
        if not outputs:
            outputs[:] = function(*inputs, **flags)
        return Recording(inputs, tuple(outputs), lambda: None)

    def per_token(recorded):
        def work(count):
            return lambda: decode(vlm, vlm.prefill([row]), 40, recorded=recorded, pick=stop_at(count))

        work(2)()  # what is recorded is started once
        return (launches(work(8)) - launches(work(4))) / 4

    def stop_at(count):
        end = torch.tensor(vlm.eos_ids[:1])
        return lambda logits, rows, step: logits.argmax(dim=-1) if step + 1 < count else end

    monkeypatch.setattr(cuda_graphs, "record", record)
    plain, replayed = per_token(False), per_token(True)
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


def test_a_batch_lacks_no_memory_that_recordings_hold(as_on_a_gpu, monkeypatch):
    vlm, config = tiny_vlm(), Config(**BASE, cuda_graphs=True)
    questions = [Question(i, text, [noise_image(i, *size)]) for i, (text, size) in enumerate(QUESTIONS[:3])]
    expected = answer_batch(vlm, "dmlr", questions, config)
    prefill, asked = VLM.prefill, []

    def cramped(self, batch):
        asked.append((len(batch), len(self.recordings)))
        if self.recordings:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, batch)

    monkeypatch.setattr(VLM, "prefill", cramped)
    found = answer_batch(vlm, "dmlr", questions, config)
    assert asked == [(3, 2), (3, 0)], "the loop's and the answer's are let go of, and the batch is whole"
    assert [(a.text, a.error) for a in found] == [(a.text, None) for a in expected]


class Driver:
    """torch.cuda as far as recording needs it, without a GPU: which streams are current, and what runs on which."""

    def __init__(self, monkeypatch, at_the_end=None):
        self.streams, self.devices, self.at_the_end = [self.stream_of("cuda:0")], [torch.device("cuda:0")], at_the_end
        monkeypatch.setattr(torch.cuda, "Stream", self.stream_of)
        monkeypatch.setattr(cuda_graphs, "side_stream", cache(self.stream_of))  # no other test may be given this one
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[-1])
        monkeypatch.setattr(torch.cuda, "stream", partial(self.within, self.streams))
        monkeypatch.setattr(torch.cuda, "device", partial(self.within, self.devices))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, pool=object))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def stream_of(self, device="cuda:0"):
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


def test_recordings_are_made_on_one_stream_of_the_device_where_the_tensors_are(monkeypatch):
    driver, seen = Driver(monkeypatch), []
    tensor = SimpleNamespace(device=torch.device("cuda:1"))
    for _ in range(2):
        cuda_graphs.record(lambda x: seen.append((driver.streams[-1], driver.devices[-1])), [tensor], {}, None)
    assert len(seen) == 4 and all(stream is seen[0][0] for stream, _ in seen)
    assert seen[0][0].device == seen[0][1] == tensor.device and len(driver.streams) == len(driver.devices) == 1


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    driver = Driver(monkeypatch, at_the_end=RuntimeError("capture invalidated"))
    with pytest.raises(RuntimeError, match="take cuda_graphs = false .capture invalidated."):
        cuda_graphs.record(lambda x: None, [SimpleNamespace(device=torch.device("cuda:0"))], {}, None)
    assert len(driver.streams) == len(driver.devices) == 1


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
        reward, attention = confidence(vlm, prefix, config, latents, Patches(index, count), True)
    assert reward.shape == (3, 2) and attention.shape == (3, 4, prefix.images.shape[1])


def test_frequencies_that_change_beyond_the_context_alone_are_not_looked_at(as_on_a_gpu):
    """InternVL3's checkpoints ask for a dynamic RoPE."""
    vlm, config = TINY["internvl"](), Config(**BASE)
    expected = loop(vlm, config, 2)
    vlm.text_model.rotary_emb.rope_type = "dynamic"
    same(expected, loop(VLM(vlm.model, vlm.processor), config.replace(cuda_graphs=True), 2))
    assert as_on_a_gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hidden", [48, 512])  # heads of 12 and 128
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
