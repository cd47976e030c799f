"""How fast the loop is: `python -m dmlr bench`. Beside it, in one process, on the same random weights and inputs:

- the *released behaviour* (`reference.py`): per iteration the vision tower once and twice the whole sequence, eager
  attention with every map returned, logits over the full vocabulary at all positions, batch 1, float32;
- a *prefix-cache peer*, as other latent optimisers are written: transformers' own model and DynamicCache, think tokens
  and suffix forwarded over the cached prompt, the cache cropped again, batch 1.

Knows nothing about datasets or answers.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from dmlr.config import Config, ConfigError, locate
from dmlr.json_files import write_json
from dmlr.loop.optimize import initial_latents, optimize
from dmlr.loop.reference import Reference, eager
from dmlr.machine import environment
from dmlr.methods.answers import Question
from dmlr.methods.latent import append_latents, question_noise
from dmlr.model.decode import decode
from dmlr.model.vlm import VLM, Encoded
from dmlr.peak_memory import peak_bytes
from dmlr.random_weights import SHAPES, random_prompt, random_vlm

SIDES = {64: 8, 256: 16, 1024: 32}  # of square images, by their tokens
TEXT = 384  # positions of text in a prompt
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32)}
NEW_TOKENS = {"cpu": (64,), "cuda": (256, 2048)}  # of whole examples; with the first, "example" alone
# Prefixes of figures' names, and the parameters that they were measured with.
GPU_WAYS: dict[str, dict[str, bool]] = {"": {}, "replayed_": {"cuda_graphs": True}}
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


def noise_of(vlm: VLM, config: Config, batch: int) -> torch.Tensor:
    """[B, T, M, L, D]"""
    return torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)]).to(vlm.device)


def loop_seconds(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> float:
    """Seconds of one iteration of one example in a batch of this size, prefill left out, first forward left out."""
    prefix, noise = vlm.prefill([encoded] * batch), noise_of(vlm, config, batch)
    none, all_ = config.replace(max_num_steps=0), config
    whole = seconds(lambda: optimize(vlm, prefix, all_, noise, NO_IDS), vlm.device)
    start = seconds(lambda: optimize(vlm, prefix, none, noise, NO_IDS), vlm.device)
    return (whole - start) / config.max_num_steps / batch


class Released(Reference):
    """The reference as the released code spends its time: one pass of the two of an iteration sees the image."""

    def image_features(self) -> list[torch.Tensor]:
        """Computed in every second pass, the first included; the one after it takes the same again."""
        if self.forward_count % 2:
            self.features = super().image_features()
        return self.features


def released_seconds(vlm: VLM, config: Config, encoded: Encoded, iterations: int = 2) -> float:
    """Seconds of an iteration of the released behaviour: full recomputation, twice."""
    whole = Released(eager(vlm), encoded, config.replace(max_num_steps=iterations))
    start = Released(whole.vlm, encoded, config.replace(max_num_steps=0))
    latents = initial_latents(vlm, vlm.prefill([encoded]), config)[0]
    (noise,) = noise_of(vlm, whole.config, 1)
    with torch.no_grad():
        both, first = (seconds(lambda run=run: run.run(latents, noise), vlm.device) for run in (whole, start))
    return (both - first) / iterations


def slots_of(vlm: VLM, config: Config, prompt: Encoded, batch: int) -> torch.Tensor:
    """Embeddings [B, L + S, D] of the think tokens and the suffix."""
    ids = torch.cat([torch.full((config.num_thought_tokens,), vlm.think_id), prompt.suffix_ids])
    return vlm.embed(ids).expand(batch, -1, -1)


def forward(vlm: VLM, config: Config, prompt: Encoded, batch: int) -> Callable[[], torch.Tensor]:
    """One pass of think tokens and suffix over the cached prompt, to be called: logits [B, L, V] of the former."""
    prefix, slots = vlm.prefill([prompt] * batch), slots_of(vlm, config, prompt, batch)
    filled = torch.ones(slots.shape[:2], dtype=torch.bool, device=vlm.device)
    read = torch.arange(config.num_thought_tokens, device=vlm.device).expand(batch, -1)
    return torch.no_grad()(lambda: vlm.extend(prefix, slots, filled, read)[0])


def peer_forward(vlm: VLM, config: Config, prompt: Encoded) -> Callable[[], torch.Tensor]:
    """The same pass of the prefix-cache peer, batch 1."""
    model = eager(vlm).model
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    text, cache, slots = model.model.language_model, DynamicCache(), slots_of(vlm, config, prompt, 1)
    inputs = {name: tensor.to(vlm.device) for name, tensor in prompt.image_inputs.items()}
    embeds = vlm.embed(prompt.input_ids)[None].clone()
    with torch.no_grad():
        features = model.model.get_image_features(**inputs).pooler_output
        embeds[0, prompt.image_columns] = torch.cat(list(features)).to(embeds)
        text(inputs_embeds=embeds, position_ids=prompt.positions[:, None].to(vlm.device), past_key_values=cache)
    last = int(prompt.positions.max()) + 1
    positions = torch.arange(last, last + slots.shape[1], device=vlm.device).expand(3, 1, -1)

    def work() -> torch.Tensor:
        hidden = text(inputs_embeds=slots, position_ids=positions, past_key_values=cache).last_hidden_state
        cache.crop(-slots.shape[1])
        return model.lm_head(hidden).float()[:, : config.num_thought_tokens]

    return torch.no_grad()(work)


def example_work(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> Callable[[], None]:
    """A whole batch, to be called: prefill, optimise, decode."""
    noise = noise_of(vlm, config, batch)

    def work():
        prefix = vlm.prefill([encoded] * batch)
        trace = optimize(vlm, prefix, config, noise, NO_IDS)
        append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
        decode(vlm, prefix, config.max_new_tokens, recorded=config.cuda_graphs and vlm.on_one_gpu)

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


def released(vlm: VLM, config: Config, more: bool = True) -> dict[str, float]:
    """The released behaviour in the model's dtype. Its decoding is taken to be ours at batch 1, with a KV cache."""
    prompt, plain = prompts(vlm, config)[256], config.replace(max_num_steps=0)
    figures = {"iteration": released_seconds(vlm, config, prompt)}
    for tokens, name in examples(vlm, more).items():
        ours = example_seconds(vlm, plain.replace(max_new_tokens=tokens), prompt, 1)
        figures[name] = config.max_num_steps * figures["iteration"] + ours
    if more:
        figures["peak_bytes"] = released_peak(vlm, config)
        figures["iteration_16_patches"] = released_seconds(vlm, many_patches(config), prompt)
        for tokens in (64, 1024):
            longer = prompts(vlm, config)[tokens]
            figures[f"iteration_{tokens}_image_tokens"] = released_seconds(vlm, config, longer, 1)
    return {f"released_{name}": value for name, value in figures.items()}


def ours(vlm: VLM, config: Config, batches: Sequence[int], more: bool = True) -> dict[str, float]:
    """The loop as `config` says, whole examples, and what both need of memory over the weights."""
    prompt, largest = prompts(vlm, config)[256], max(batches)
    figures = {f"iteration_batch_{batch}": loop_seconds(vlm, config, prompt, batch) for batch in batches}
    for batch in batches:
        figures[f"forward_batch_{batch}"] = seconds(forward(vlm, config, prompt, batch), vlm.device) / batch
    for tokens, name in examples(vlm, more).items():
        longer = config.replace(max_new_tokens=tokens)
        figures[name] = example_seconds(vlm, longer, prompt, largest)
        figures[f"{name}_batch_1"] = example_seconds(vlm, longer, prompt, 1)
    if more:
        figures["peak_bytes"] = loop_peak(vlm, config)
        figures[f"peak_bytes_batch_{largest}"] = least_peak(vlm, example_work(vlm, config, prompt, largest))
        figures["iteration_16_patches"] = loop_seconds(vlm, many_patches(config), prompt, 1)
        for tokens in (64, 1024):
            longer = prompts(vlm, config)[tokens]
            figures[f"iteration_{tokens}_image_tokens"] = loop_seconds(vlm, config, longer, 1)
    return figures


def examples(vlm: VLM, more: bool) -> dict[int, str]:
    """Figures of whole examples, by the number of their new tokens."""
    first, *others = NEW_TOKENS[vlm.device.type]
    return {first: "example"} | {tokens: f"example_{tokens}_tokens" for tokens in others if more}


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
    noise = noise_of(vlm, short, 1)
    return least_peak(vlm, lambda: optimize(vlm, vlm.prefill([prompt]), short, noise, NO_IDS))


def released_peak(vlm: VLM, config: Config) -> int:
    """The same of the released behaviour."""
    short = config.replace(max_num_steps=2)
    reference = Released(eager(vlm), prompts(vlm, config)[1024], short)
    latents = vlm.embed(torch.full((config.num_thought_tokens,), vlm.think_id)).float()
    (noise,) = noise_of(vlm, short, 1)
    return least_peak(vlm, torch.no_grad()(lambda: reference.run(latents, noise)))


def least_peak(vlm: VLM, work: Callable[[], Any]) -> int:
    """The least of three peaks: what an allocator does with memory freed before is not what the work needs."""
    peaks = []
    for _ in range(3):
        vlm.recordings.clear()
        peaks.append(peak_bytes(vlm.device, work))
    return min(peaks)


def measure(shape: str, device: str, more: bool = True) -> dict:
    """All figures of one shape: 256 image tokens, 640 positions, L = 4, 15 iterations.

    On a CPU in float32. On a GPU in bfloat16, the released behaviour also in float32 as it was, and our loop in every
    way of GPU_WAYS; of one that fails there is the error. more: also memory, other images and patches, longer answers.
    """
    gpu = device == "cuda"
    config = Config.make("paper", max_new_tokens=NEW_TOKENS[device][0])
    vlm = random_vlm(shape, torch.float32, device)
    figures = {"shape": shape, **SHAPES[shape], "parameters": sum(p.numel() for p in vlm.model.parameters())}
    figures["new_tokens"] = config.max_new_tokens
    if gpu:
        figures |= released(vlm, config, more)
        vlm = None  # both would not fit everywhere
        vlm = random_vlm(shape, torch.bfloat16, device)
    figures |= {"dtype": str(vlm.dtype).removeprefix("torch."), "weight_bytes": weight_bytes(vlm)}
    figures["floor"] = 2 * language_model_bytes(vlm) / copy_bandwidth(vlm.device)  # seconds: weights twice an iteration
    figures["peer_forward"] = seconds(peer_forward(vlm, config, prompts(vlm, config)[256]), vlm.device)
    for way, parameters in (GPU_WAYS if gpu else {"": {}}).items():
        try:
            result = ours(vlm, config.replace(**parameters), BATCHES[device], more)
        except RuntimeError as error:
            if not way:
                raise
            result = {"error": f"{error}".split("\n")[0]}
        figures |= {f"{way}{name}": value for name, value in result.items()}
    like = "_same_dtype" if gpu else ""
    return figures | {f"{name}{like}": value for name, value in released(vlm, config, more).items()}


def weight_bytes(vlm: VLM) -> int:
    """Memory of all weights."""
    return sum(p.nbytes for p in vlm.model.parameters())


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """How many times less than the released behaviour, in float32 and, where that is another, in the same dtype.

    `forward`: than the prefix-cache peer. Growth is of an iteration from 64 to 1024 image tokens; `times_floor` of the
    fastest way at batch 1.
    """
    result = {}
    for way in GPU_WAYS:
        for name in [name for name in figures if name.startswith((f"{way}iteration", f"{way}example", f"{way}peak"))]:
            base = "released_" + re.sub("_batch_.*", "", name.removeprefix(way))
            for like in ("", "_same_dtype"):
                if not name.endswith("image_tokens") and "peak_bytes_batch" not in name and base + like in figures:
                    result[name + like] = figures[base + like] / figures[name]
        for name in [name for name in figures if name.startswith(f"{way}forward")]:
            result[name] = figures["peer_forward"] / figures[name]
        small, large = (f"{way}iteration_{tokens}_image_tokens" for tokens in (64, 1024))
        for base in ("", "released_"):
            if base + large in figures:
                result[f"{base or way}growth"] = figures[base + large] / figures[base + small]
    fastest = min(figures[name] for name in (f"{way}iteration_batch_1" for way in GPU_WAYS) if name in figures)
    return result | {"times_floor": fastest / figures["floor"]}


def startup() -> dict[str, float]:
    """Seconds of `import dmlr`, and of a process that loads the embedded model and answers one question."""
    question = "import dmlr.bench as b; b.one_question()"
    begun = {}
    for name, code in (("import", "import dmlr"), ("one_question", question)):
        run = [sys.executable, "-c", code]
        begun[name] = seconds(lambda run=run: subprocess.run(run, check=True), torch.device("cpu"))
    return begun


def one_question() -> None:
    """Loads the embedded model and answers the first question of its benchmark with DMLR."""
    from dmlr.data.examples import load_dataset
    from dmlr.methods import METHODS
    from dmlr.run.batches import prepare

    config = Config.make("demo")
    examples, _ = load_dataset(config.dataset)
    METHODS["dmlr"](VLM.load(config), prepare(examples[:1]).questions, config)


def main(shapes: Sequence[str] = (), quick: bool = False) -> int:
    """Measures the shapes (default: A and B on a CPU, 3B and 7B on a GPU) and writes reports/efficiency/.

    quick: times of an iteration, a forward and an example alone, which are printed and not written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = shapes or (["3B", "7B"] if device == "cuda" else ["A", "B"])
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ConfigError(f"unknown shape {unknown[0]!r}; shapes are {', '.join(SHAPES)}")
    rows, measured_on = [], environment()  # before the first shape is written, which makes the tree another revision
    path = Path(locate("reports")) / "efficiency" / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds_to_start = {} if quick else startup()
    for shape in shapes:
        figures = measure(shape, device, more=not quick)
        rows.append({**figures, "ratios": ratios(figures)})
        print(json.dumps(rows[-1], indent=1), flush=True)
        if not quick:
            write_json(path, {"environment": measured_on, "startup": seconds_to_start, "shapes": rows})
    print("quick: not written" if quick else f"written: {path}")
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
