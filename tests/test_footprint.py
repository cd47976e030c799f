"""Estimates from settings against what models really have and take."""

import dataclasses

import pytest
import torch
from live_memory import LiveTensors
from recomputed import noise_of
from tiny import noise_image, tiny_vlm
from tiny_families import TINY

from dmlr.bench import least_peak
from dmlr.config import Config
from dmlr.loop.optimize import optimize
from dmlr.methods.latent import append_latents
from dmlr.methods.ulr import two_stages, ulr_config
from dmlr.methods.workload import workload
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.model.memory import MOST, USABLE, Parameters, Shape, Work, fitting_batch, peak, seconds, stages
from dmlr.model.vlm import VLM
from dmlr.planning import described
from dmlr.random_weights import random_prompt, random_vlm


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    ],
)
def test_the_papers_models_have_the_published_number_of_parameters(name, count):
    """Of the checkpoints: total_size of model.safetensors.index.json, over two bytes."""
    assert described(name)[0].parameters.total == count


def test_fewer_bits_shrink_what_is_linear_and_nothing_else():
    found = Parameters(total=1000, shrinkable=800, language=0, head=0, vision=0)
    assert [found.bytes(2), found.bytes(2, 8), found.bytes(2, 4)] == [2000, 400 + 800, 400 + 450]


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_the_parameters_and_the_cache_that_its_settings_say(family):
    vlm = TINY[family]()
    settings = type(vlm.model.config).from_dict(vlm.model.config.to_dict())
    shape = Shape(settings)
    found = shape.parameters
    assert found.total == sum(p.numel() for p in vlm.model.parameters())
    layers = sum(p.numel() for p in vlm.text_model.layers.parameters())
    assert found.language == layers + vlm.text_model.norm.weight.numel() and found.vision < found.total - layers
    head = vlm.model.get_output_embeddings()
    linear = [m for m in vlm.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert (found.head, found.shrinkable) == (head.weight.numel(), sum(m.weight.numel() for m in linear))
    encoded = encode(vlm, "be brief", "how many?", [noise_image(0)])
    with LiveTensors(vlm.model) as live:
        prefix = vlm.prefill([encoded] * 4)
    assert prefix.cache.nbytes == 4 * prefix.cache.length * shape.cache(vlm.dtype.itemsize)
    work = Work(prompt=len(encoded.input_ids), image_tokens=len(encoded.image_columns), new_tokens=0)
    assert peak(shape, 4, work, 4) > live.peak / 2, "these are so small that what is not counted shows"


def example(vlm, config, prompt, batch, loop=optimize):
    """One batch from prefill to the last token."""
    noise = noise_of(vlm, config, range(batch))

    def work():
        prefix = vlm.prefill([prompt] * batch)
        trace = loop(vlm, prefix, config, noise, None)
        append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
        decode(vlm, prefix, config.max_new_tokens)

    return work


def estimated(vlm, config, prompt):
    """Bytes of one example in each stage, the prompt's lengths counted."""
    length, images = len(prompt.input_ids), len(prompt.image_columns)
    asked = workload(config, images=images)
    work = dataclasses.replace(asked, prompt=length, probed=asked.probed and length - images)
    return stages(vlm.shape, vlm.dtype.itemsize, work)


EVERY_PATCH = {"initial_patch_count": None, "num_selected_patches": None, "max_total_patches": None}
LARGE, SMALL = (5, 140), (2, 30)  # side of the image in tokens, positions of the prompt
ULR = ulr_config(Config.make("paper", methods="ulr", max_new_tokens=4, ulr_steps=7))
CASES = [  # the stage that is the largest, by which parameters, prompt and batch
    ("prefill", Config.make("paper", max_num_steps=2, max_new_tokens=4), LARGE, 8),
    ("loop", Config.make("paper", max_num_steps=1, max_new_tokens=4, num_thought_tokens=8, **EVERY_PATCH), LARGE, 4),
    ("decode", Config.make("paper", max_num_steps=1, max_new_tokens=40), SMALL, 2),
    ("probe", ULR, (2, 230), 4),
    ("probe", ULR, LARGE, 4),
]


@pytest.mark.parametrize(("stage", "config", "lengths", "batch"), CASES)
def test_tensors_take_what_is_estimated_within_a_factor_of_one_and_a_half(stage, config, lengths, batch):
    vlm = tiny_vlm(layers=4, hidden=128)
    vlm.eos_ids = [-1]  # nothing ends an answer early
    prompt = random_prompt(vlm, *lengths, config.num_thought_tokens)
    parts = estimated(vlm, config, prompt)
    assert max(parts, key=parts.get) == stage
    with LiveTensors(vlm.model) as live:
        example(vlm, config, prompt, batch, two_stages if config is ULR else optimize)()
    assert 1 / 1.5 < live.peak / (batch * parts[stage]) < 1.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 16])
def test_a_gpu_takes_what_is_estimated_within_a_factor_of_one_and_a_half(batch):
    vlm = random_vlm("3B", torch.bfloat16, "cuda")
    config = Config.make("paper", max_num_steps=2, max_new_tokens=64)
    prompt = random_prompt(vlm, 16, 640, config.num_thought_tokens)
    guess = batch * max(estimated(vlm, config, prompt).values())
    assert guess / 1.5 < least_peak(vlm, example(vlm, config, prompt, batch)) < guess * 1.5  # the first has workspaces


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_the_batch_that_fits_is_the_largest_that_does(kind):
    (shape, _), work = described("Qwen/Qwen2.5-VL-7B-Instruct"), workload(Config.make("paper"))
    for free in (10**8, 10**9, 10**10, 10**11, 10**12):
        batch = fitting_batch(shape, 2, work, free, kind)
        assert batch == 0 or peak(shape, 2, work, batch) <= USABLE[kind] * free
        assert batch == MOST[kind] or peak(shape, 2, work, batch + 1) > USABLE[kind] * free
    assert fitting_batch(shape, 2, work, -(10**9), kind) == 0


def test_a_models_own_batch_is_by_what_the_gpu_has_free(monkeypatch):
    embedded, work = VLM.load(Config()), Work(prompt=1000, image_tokens=36, new_tokens=10)
    assert embedded.fitting_batch(work) == MOST["cpu"]
    monkeypatch.setattr(VLM, "device", torch.device("cuda"))
    each = peak(embedded.shape, 4, work, 1)
    for free, batch in ((0, 1), (3.5 * each / USABLE["cuda"], 3), (10**12, MOST["cuda"])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert embedded.fitting_batch(work) == batch


def test_what_recordings_hold_is_not_counted_twice(monkeypatch):
    """The second batch of a run, which finds them there, is as large as the first. Answers alone are recorded too."""
    vlm, config = tiny_vlm(), Config.make("paper", methods="vanilla", cuda_graphs=True, max_new_tokens=64)
    work = workload(config, images=16, prompt=60)
    free = 3.01 * peak(vlm.shape, 4, work, 1) / USABLE["cuda"]
    vlm.recordings.over(vlm.prefill([random_prompt(vlm, 4, 60, 4)] * 3), 64, "decode")
    taken = sum(recorded.buffer.cache.nbytes for recorded in vlm.recordings.values())
    monkeypatch.setattr(VLM, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - taken, 10**12))
    assert work.buffers and vlm.fitting_batch(work) == 3
    vlm.recordings.clear()
    assert vlm.fitting_batch(work) < 3


def test_methods_decide_what_is_asked_for():
    asks = {methods: workload(Config.make("paper", methods=methods)) for methods in ("vanilla", "dmlr", "ltpo", "ulr")}
    assert (asks["vanilla"].slots, asks["vanilla"].passes, asks["vanilla"].reads) == (0, 0, 0)
    assert asks["dmlr"].slots == 4 * (1 + 4)  # sixteen patches over four think tokens
    assert asks["dmlr"].passes == 30
    assert asks["ltpo"].slots == 10 and not asks["ltpo"].graph
    assert asks["ulr"].slots == 4 and asks["ulr"].graph and asks["ulr"].probed == 256
    released = workload(Config.make("released", methods="dmlr"))
    assert released.slots == 8 * (1 + 256)
    assert workload(Config.make("paper", methods="vanilla,self-consistency")).copies == 2
    small = workload(Config.make("paper"), context=512)
    assert small.prompt + small.new_tokens == 512


def test_time_follows_arithmetic_or_memory():
    shape, _ = described("Qwen/Qwen2.5-VL-7B-Instruct")
    parameters = shape.parameters
    answer = Work(prompt=1, image_tokens=1, new_tokens=1000)
    slow, fast = (1e30, 1e12), (1e30, 2e12)  # decoding alone waits for weights
    one = seconds(shape, 2, answer, 1, *slow)
    assert one == pytest.approx(1000 * 2 * (parameters.language + parameters.head) / 1e12, rel=0.02)
    assert seconds(shape, 2, answer, 1, *fast) == pytest.approx(one / 2)
    assert seconds(shape, 2, answer, 32, *slow) < one / 25
    prompt = Work(prompt=1000, image_tokens=256, new_tokens=0)  # a prompt waits for arithmetic
    flops = 2 * 1000 * parameters.language + 2 * 256 * 4 * parameters.vision
    assert seconds(shape, 2, prompt, 1, 1e14, 1e30) == pytest.approx(flops / 1e14, rel=0.05)
