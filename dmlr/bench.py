"""How fast the loop is, beside the released code's behaviour: `python -m dmlr bench`.

Both run in one process on the same random weights, inputs and number of tokens. The released behaviour is
`reference.py`: per iteration twice the vision tower and the whole sequence, eager attention with every map returned,
logits over the full vocabulary at all positions, batch 1, float32. Knows nothing about datasets or answers.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmlr.config import Config, ConfigError, locate
from dmlr.json_files import write_json
from dmlr.loop.optimize import initial_latents, optimize
from dmlr.loop.reference import Reference, eager
from dmlr.machine import environment
from dmlr.methods.answers import Question
from dmlr.methods.latent import append_latents, question_noise
from dmlr.model.encode import Encoded
from dmlr.model.vlm import VLM
from dmlr.peak_memory import peak_bytes
from dmlr.random_weights import SHAPES, random_prompt, random_vlm

SIDES = {64: 8, 256: 16, 1024: 32}  # of square images, by their tokens
TEXT = 384  # positions of text in a prompt
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32)}
NEW_TOKENS = {"cpu": 64, "cuda": 256}
# Prefixes of figures' names, and the parameters that they were measured with.
GPU_WAYS: dict[str, dict[str, bool]] = {
    "": {},
    "replayed_": {"cuda_graphs": True},
    "compiled_": {"cuda_graphs": True, "compile_layers": True},
}
NO_IDS = torch.zeros(0, dtype=torch.long)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def loop_seconds(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> float:
    """Seconds of one iteration of one example in a batch of this size, prefill left out, first forward left out."""
    prefix = vlm.prefill([encoded] * batch)
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)])
    none, all_ = config.replace(max_num_steps=0), config
    whole = seconds(lambda: optimize(vlm, prefix, all_, noise, NO_IDS), vlm.device)
    start = seconds(lambda: optimize(vlm, prefix, none, noise, NO_IDS), vlm.device)
    return (whole - start) / config.max_num_steps / batch


def released_seconds(vlm: VLM, config: Config, encoded: Encoded, iterations: int = 2) -> float:
    """The same for the released behaviour: full recomputation, twice an iteration."""
    reference = Reference(eager(vlm), encoded, config.replace(max_num_steps=iterations))
    latents = initial_latents(vlm, vlm.prefill([encoded]), config)[0]
    noise = question_noise(vlm, Question(0, "", []), config)
    start = Reference(reference.vlm, encoded, config.replace(max_num_steps=0))
    with torch.no_grad():
        whole = seconds(lambda: reference.run(latents, noise), vlm.device)
        begin = seconds(lambda: start.run(latents, noise), vlm.device)
    return (whole - begin) / iterations


def example_work(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> Callable[[], None]:
    """A whole batch, to be called: prefill, optimise, decode."""
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)])

    def work():
        prefix = vlm.prefill([encoded] * batch)
        trace = optimize(vlm, prefix, config, noise, NO_IDS)
        append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
        vlm.decode(prefix, config.max_new_tokens)

    return work


def example_seconds(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> float:
    """Seconds of one whole example in a batch."""
    return seconds(example_work(vlm, config, encoded, batch), vlm.device, 1) / batch


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads and writes."""
    block = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(block)
    return 2 * block.nbytes / seconds(lambda: target.copy_(block), device, 5)


def language_model_bytes(vlm: VLM) -> int:
    """Weights that one forward of think tokens reads: the language model and the output head, not the embedding."""
    weights = sum(p.nbytes for p in vlm.text_model.layers.parameters())
    return weights + vlm.model.get_output_embeddings().weight.nbytes


def released(vlm: VLM, config: Config) -> dict[str, float]:
    """The released behaviour in the model's dtype. Its decoding is taken to be ours at batch 1, with a KV cache."""
    prompt, many = prompts(vlm, config)[256], many_patches(config)
    told = {"peak_bytes": released_peak(vlm, config)}
    iteration = told["iteration"] = released_seconds(vlm, config, prompt)
    told["iteration_16_patches"] = released_seconds(vlm, many, prompt)
    plain = config.replace(max_num_steps=0)
    told["example"] = config.max_num_steps * iteration + example_seconds(vlm, plain, prompt, 1)
    for tokens in (64, 1024):
        longer = prompts(vlm, config)[tokens]
        told[f"iteration_{tokens}_image_tokens"] = released_seconds(vlm, config, longer, 1)
    return {f"released_{name}": value for name, value in told.items()}


def ours(vlm: VLM, config: Config, batches: Sequence[int]) -> dict[str, float]:
    """The loop as `config` says, whole examples in the largest batch, and what both need of memory over the weights."""
    prompt, largest = prompts(vlm, config)[256], max(batches)
    told = {"peak_bytes": loop_peak(vlm, config)}
    told[f"peak_bytes_batch_{largest}"] = least_peak(vlm, example_work(vlm, config, prompt, largest))
    told |= {f"iteration_batch_{batch}": loop_seconds(vlm, config, prompt, batch) for batch in batches}
    told["iteration_16_patches"] = loop_seconds(vlm, many_patches(config), prompt, 1)
    told["example"] = example_seconds(vlm, config, prompt, largest)
    for tokens in (64, 1024):
        longer = prompts(vlm, config)[tokens]
        told[f"iteration_{tokens}_image_tokens"] = loop_seconds(vlm, config, longer, 1)
    return told


def prompts(vlm: VLM, config: Config) -> dict[int, Encoded]:
    """By image tokens."""
    length = config.num_thought_tokens
    return {tokens: random_prompt(vlm, side, side * side + TEXT, length) for tokens, side in SIDES.items()}


def many_patches(config: Config) -> Config:
    """16 patches per think token instead of 16 in all."""
    return config.replace(initial_patch_count=16, max_total_patches=None)


def loop_peak(vlm: VLM, config: Config) -> int:
    """Memory over the weights of a prefill and two iterations at 1024 image tokens."""
    short, prompt = config.replace(max_num_steps=2), prompts(vlm, config)[1024]
    noise = question_noise(vlm, Question(0, "", []), short)[None]
    return least_peak(vlm, lambda: optimize(vlm, vlm.prefill([prompt]), short, noise, NO_IDS))


def released_peak(vlm: VLM, config: Config) -> int:
    """The same of the released behaviour."""
    short = config.replace(max_num_steps=2)
    reference = Reference(eager(vlm), prompts(vlm, config)[1024], short)
    noise = question_noise(vlm, Question(0, "", []), short).to(vlm.device)
    latents = vlm.embed(torch.full((config.num_thought_tokens,), vlm.think_id)).float()

    def work():
        with torch.no_grad():
            reference.run(latents, noise)

    return least_peak(vlm, work)


def least_peak(vlm: VLM, work: Callable[[], Any]) -> int:
    """The least of three peaks: what an allocator does with memory freed before is not what the work needs."""
    peaks = []
    for _ in range(3):
        vlm.prepared.clear()
        peaks.append(peak_bytes(vlm.device, work))
    return min(peaks)


def measure(shape: str, device: str) -> dict:
    """All figures of one shape: 256 image tokens, 640 positions, L = 4, 15 iterations.

    On a CPU in float32. On a GPU in bfloat16, the released behaviour also in float32 as it was, and our loop in every
    way of GPU_WAYS; of one that fails there is the error.
    """
    gpu = device == "cuda"
    config = Config.make("paper", max_new_tokens=NEW_TOKENS[device])
    vlm = random_vlm(shape, torch.float32, device)
    told = {"shape": shape, **SHAPES[shape], "parameters": sum(p.numel() for p in vlm.model.parameters())}
    told["new_tokens"] = config.max_new_tokens
    if gpu:
        told |= released(vlm, config)
        vlm = None  # both would not fit everywhere
        vlm = random_vlm(shape, torch.bfloat16, device)
    told |= {"dtype": str(vlm.dtype).removeprefix("torch."), "weight_bytes": weight_bytes(vlm)}
    told["floor"] = 2 * language_model_bytes(vlm) / copy_bandwidth(vlm.device)  # seconds: weights twice an iteration
    for way, parameters in (GPU_WAYS if gpu else {"": {}}).items():
        try:
            found = ours(vlm, config.replace(**parameters), BATCHES[device])
        except RuntimeError as error:
            if not way:
                raise
            found = {"error": f"{error}".split("\n")[0]}
        told |= {f"{way}{name}": value for name, value in found.items()}
    return told | {f"{name}{'_same_dtype' if gpu else ''}": value for name, value in released(vlm, config).items()}


def weight_bytes(vlm: VLM) -> int:
    """Memory of all weights."""
    return sum(p.nbytes for p in vlm.model.parameters())


def ratios(told: dict[str, Any]) -> dict[str, float]:
    """How many times less than the released behaviour, in float32 and, where that is another, in the same dtype.

    Growth is of an iteration from 64 to 1024 image tokens; `times_floor` of the fastest way at batch 1.
    """
    found = {}
    for way in GPU_WAYS:
        names = [name for name in told if name.startswith((f"{way}iteration_batch_", f"{way}example"))]
        for name in [*names, f"{way}iteration_16_patches", f"{way}peak_bytes"]:
            base = "released_" + re.sub("_batch_.*", "", name.removeprefix(way))
            for like in ("", "_same_dtype"):
                if name in told and base + like in told:
                    found[name + like] = told[base + like] / told[name]
        if f"{way}iteration_64_image_tokens" in told:
            found[f"{way}growth"] = told[f"{way}iteration_1024_image_tokens"] / told[f"{way}iteration_64_image_tokens"]
    found["released_growth"] = told["released_iteration_1024_image_tokens"] / told["released_iteration_64_image_tokens"]
    fastest = min(told[name] for name in (f"{way}iteration_batch_1" for way in GPU_WAYS) if name in told)
    found["times_floor"] = fastest / told["floor"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures the shapes named (default: A and B on a CPU, 3B and 7B on a GPU) and writes reports/efficiency/."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = argv or (["3B", "7B"] if device == "cuda" else ["A", "B"])
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ConfigError(f"unknown shape {unknown[0]!r}; shapes are {', '.join(SHAPES)}")
    rows, measured_on = [], environment()  # before the first shape is written, which makes the tree another revision
    path = Path(locate("reports")) / "efficiency" / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        told = measure(shape, device)
        rows.append({**told, "ratios": ratios(told)})
        print(json.dumps(rows[-1], indent=1), flush=True)
        write_json(path, {"environment": measured_on, "shapes": rows})
    print(f"written: {path}")
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
