"""How fast the loop is: `python -m dmlr bench`. Beside it, in one process, on the same random weights and inputs:

- the *released behaviour* (`reference.py`): per iteration the vision tower once and twice the whole sequence, eager
  attention with every map returned, logits over the full vocabulary at all positions, batch 1, float32;
- a *prefix-cache peer*, as other latent optimisers are written: transformers' own model and DynamicCache, think tokens
  and suffix forwarded over the cached prompt, the cache cropped again, batch 1.

Knows nothing about datasets or answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from dmlr.config import Config, check_names, locate
from dmlr.json_files import write_json
from dmlr.loop.optimize import optimize
from dmlr.loop.reference import Reference, eager
from dmlr.machine import copy_bandwidth, environment, median_seconds, peak_bytes
from dmlr.methods.answers import Question
from dmlr.methods.latent import append_latents, question_noise
from dmlr.model.decode import decode
from dmlr.model.vlm import VLM, Encoded
from dmlr.random_weights import SHAPES, random_prompt, random_vlm

SIDES = {64: 8, 256: 16, 1024: 32}  # of square images, by their tokens
TEXT = 384  # positions of text in a prompt
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32)}
NEW_TOKENS = {"cpu": (64,), "cuda": (256, 2048)}  # of whole examples; with the first, "example" alone
# Prefixes of figures' names, and the parameters that they were measured with.
GPU_WAYS: dict[str, dict[str, bool]] = {"": {}, "replayed_": {"cuda_graphs": True}}


def noise_of(vlm: VLM, config: Config, batch: int) -> torch.Tensor:
    """[B, T, M, L, D]"""
    return torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)]).to(vlm.device)


# What is timed: each makes a function, of the number of iterations (loops) or of no arguments.


def loop(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> Callable[[int], Any]:
    """Our loop of so many iterations on a batch of one prompt, already prefilled."""
    prefix, noise = vlm.prefill([encoded] * batch), noise_of(vlm, config, batch)
    return lambda iterations: optimize(vlm, prefix, config.replace(max_num_steps=iterations), noise)


class Released(Reference):
    """The reference as the released code spends its time: one pass of the two of an iteration sees the image."""

    def image_features(self) -> list[torch.Tensor]:
        """Computed in every second pass, the first included; the one after it takes the same again."""
        if self.forward_count % 2:
            self.features = super().image_features()
        return self.features


def released_loop(vlm: VLM, config: Config, encoded: Encoded) -> Callable[[int], Any]:
    """The released behaviour's loop of so many iterations: full recomputation, twice in each."""
    twin, noise = eager(vlm), noise_of(vlm, config, 1)[0]
    latents = vlm.embed(torch.full((config.num_thought_tokens,), vlm.think_id)).float()
    return lambda iterations: Released(twin, encoded, config.replace(max_num_steps=iterations)).run(latents, noise)


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
    inputs = {"input_ids": prompt.input_ids[None], "position_ids": prompt.positions[:, None], **prompt.image_inputs}
    with torch.no_grad():
        model.model(**{name: tensor.to(vlm.device) for name, tensor in inputs.items()}, past_key_values=cache)
    last = int(prompt.positions.max()) + 1
    positions = torch.arange(last, last + slots.shape[1], device=vlm.device).expand(3, 1, -1)

    def work() -> torch.Tensor:
        hidden = text(inputs_embeds=slots, position_ids=positions, past_key_values=cache).last_hidden_state
        cache.crop(-slots.shape[1])
        return model.lm_head(hidden).float()[:, : config.num_thought_tokens]

    return torch.no_grad()(work)


def example(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> Callable[[], Any]:
    """A whole batch: prefill, optimise, decode."""
    noise = noise_of(vlm, config, batch)

    def work() -> None:
        prefix = vlm.prefill([encoded] * batch)
        trace = optimize(vlm, prefix, config, noise)
        append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
        decode(vlm, prefix, config.max_new_tokens, recorded=config.cuda_graphs and vlm.on_one_gpu)

    return work


# measurements


def iteration(run: Callable[[int], Any], iterations: int, device: torch.device) -> float:
    """Seconds of one iteration; what a loop does before its first is left out."""
    whole, start = (median_seconds(partial(run, count), device) for count in (iterations, 0))
    return (whole - start) / iterations


def least_peak(vlm: VLM, work: Callable[[], Any]) -> int:
    """Memory over the weights, the least of three peaks: what an allocator does with memory freed before is not what
    the work needs."""
    peaks = []
    for _ in range(3):
        vlm.recordings.clear()
        peaks.append(peak_bytes(vlm.device, work))
    return min(peaks)


def floor(vlm: VLM) -> float:
    """Seconds that an iteration takes at least: its two forwards of think tokens read all weights of the language model
    and of the output head, not of the embedding."""
    weights = [*vlm.text_model.layers.parameters(), vlm.model.get_output_embeddings().weight]
    return 2 * sum(p.nbytes for p in weights) / copy_bandwidth(vlm.device)


def released(vlm: VLM, config: Config, more: bool = True) -> dict[str, float]:
    """The released behaviour in the model's dtype. Its decoding is taken to be ours at batch 1, with a KV cache."""
    prompt, plain = prompts(vlm, config), config.replace(max_num_steps=0)

    def of(config: Config, tokens: int = 256) -> float:
        return iteration(released_loop(vlm, config, prompt[tokens]), 2 if tokens == 256 else 1, vlm.device)

    figures = {"iteration": of(config)}
    for tokens, name in examples(vlm, more).items():
        ours = median_seconds(example(vlm, plain.replace(max_new_tokens=tokens), prompt[256], 1), vlm.device, 1)
        figures[name] = config.max_num_steps * figures["iteration"] + ours
    if more:
        figures["peak_bytes"] = least_peak(vlm, partial(released_loop(vlm, config, prompt[1024]), 2))
        figures |= variations(of, config)
    return {f"released_{name}": value for name, value in figures.items()}


def ours(vlm: VLM, config: Config, batches: Sequence[int], more: bool = True) -> dict[str, float]:
    """The loop as `config` says, whole examples, and what both need of memory over the weights."""
    prompt, largest = prompts(vlm, config), max(batches)

    def of(config: Config, tokens: int = 256, batch: int = 1) -> float:
        return iteration(loop(vlm, config, prompt[tokens], batch), config.max_num_steps, vlm.device) / batch

    figures = {f"iteration_batch_{batch}": of(config, batch=batch) for batch in batches}
    for batch in batches:
        figures[f"forward_batch_{batch}"] = median_seconds(forward(vlm, config, prompt[256], batch), vlm.device) / batch
    for tokens, name in examples(vlm, more).items():
        longer = config.replace(max_new_tokens=tokens)
        for batch, ending in ((largest, ""), (1, "_batch_1")):
            figures[name + ending] = median_seconds(example(vlm, longer, prompt[256], batch), vlm.device, 1) / batch
    if more:
        figures["peak_bytes"] = least_peak(vlm, lambda: loop(vlm, config, prompt[1024], 1)(2))
        figures[f"peak_bytes_batch_{largest}"] = least_peak(vlm, example(vlm, config, prompt[256], largest))
        figures |= variations(of, config)
    return figures


def examples(vlm: VLM, more: bool) -> dict[int, str]:
    """Figures of whole examples, by the number of their new tokens."""
    first, *others = NEW_TOKENS[vlm.device.type]
    return {first: "example"} | {tokens: f"example_{tokens}_tokens" for tokens in others if more}


def prompts(vlm: VLM, config: Config) -> dict[int, Encoded]:
    """By image tokens."""
    length = config.num_thought_tokens
    return {tokens: random_prompt(vlm, side, side * side + TEXT, length) for tokens, side in SIDES.items()}


def variations(of: Callable[..., float], config: Config) -> dict[str, float]:
    """An iteration with 16 patches per think token instead of 16 in all, and with other images."""
    figures = {"iteration_16_patches": of(config.replace(initial_patch_count=16, max_total_patches=None))}
    return figures | {f"iteration_{tokens}_image_tokens": of(config, tokens) for tokens in (64, 1024)}


def measure(shape: str, device: str, more: bool = True) -> dict:
    """All figures of one shape: 256 image tokens, 640 positions, L = 4, 15 iterations.

    On a CPU in float32. On a GPU in bfloat16, the released behaviour also in float32 as it was, and our loop in every
    way of GPU_WAYS; of one that fails there is the error. more: also memory, other images and patches, longer answers.
    """
    gpu, config = device == "cuda", Config.make("paper", max_new_tokens=NEW_TOKENS[device][0])
    vlm = random_vlm(shape, torch.float32, device)
    figures = {"shape": shape, **SHAPES[shape], "parameters": sum(p.numel() for p in vlm.model.parameters())}
    figures["new_tokens"] = config.max_new_tokens
    if gpu:
        figures |= released(vlm, config, more)
        vlm = None  # both would not fit everywhere
        vlm = random_vlm(shape, torch.bfloat16, device)
    figures["dtype"] = str(vlm.dtype).removeprefix("torch.")
    figures["weight_bytes"] = sum(p.nbytes for p in vlm.model.parameters())
    figures["floor"] = floor(vlm)
    figures["peer_forward"] = median_seconds(peer_forward(vlm, config, prompts(vlm, config)[256]), vlm.device)
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


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """How many times less than the released behaviour, in float32 and, where that is another, in the same dtype.

    `forward`: than the prefix-cache peer. Growth is of an iteration from 64 to 1024 image tokens; `times_floor` of the
    fastest way at batch 1.
    """
    result = {}
    for name, value in figures.items():
        if "image_tokens" in name or "peak_bytes_batch" in name:
            continue
        stem = name.removeprefix("replayed_").partition("_batch_")[0]
        for base, like in (("released_", ""), ("released_", "_same_dtype"), ("peer_", "")):
            if base + stem + like in figures:
                result[name + like] = figures[base + stem + like] / value
    for way in (*GPU_WAYS, "released_"):
        small, large = (f"{way}iteration_{tokens}_image_tokens" for tokens in (64, 1024))
        if large in figures:
            result[f"{way}growth"] = figures[large] / figures[small]
    fastest = min(figures[name] for name in (f"{way}iteration_batch_1" for way in GPU_WAYS) if name in figures)
    return result | {"times_floor": fastest / figures["floor"]}


def main(shapes: Sequence[str] = (), quick: bool = False) -> int:
    """Measures the shapes (default: A and B on a CPU, 3B and 7B on a GPU) and writes reports/efficiency/.

    quick: times of an iteration, a forward and an example alone, which are printed and not written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = shapes or (["3B", "7B"] if device == "cuda" else ["A", "B"])
    check_names(shapes, SHAPES, what="shape")
    rows, measured_on = [], environment()  # before the first shape is written, which makes the tree another revision
    path = Path(locate("reports")) / "efficiency" / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        figures = measure(shape, device, more=not quick)
        rows.append({**figures, "ratios": ratios(figures)})
        print(json.dumps(rows[-1], indent=1), flush=True)
        if not quick:
            write_json(path, {"environment": measured_on, "shapes": rows})
    print("quick: not written" if quick else f"written: {path}")
    return 0
