"""How fast the loop is, beside the released code's behaviour: `python -m dmlr bench`.

Both run in one process on the same random weights, inputs and number of tokens. The released behaviour is
`reference.py`: per iteration twice the vision tower and the whole sequence, eager attention with every map returned,
logits over the full vocabulary at all positions, batch 1, float32. Knows nothing about datasets or answers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dmlr.answers import Question
from dmlr.config import Config, ConfigError, locate
from dmlr.encode import Encoded
from dmlr.evaluate import environment
from dmlr.json_files import write_json
from dmlr.kv_cache import ATTENTION
from dmlr.methods.latent import append_latents, question_noise
from dmlr.optimize import initial_latents, optimize
from dmlr.peak_memory import peak_bytes
from dmlr.reference import Reference, eager
from dmlr.vlm import VLM

# Qwen2.5-VL shapes: two for a CPU, and the published 3B and 7B.
_SIZES = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab", "vision")
SHAPES: dict[str, dict[str, int]] = {
    "A": dict(zip(_SIZES, (512, 8, 8, 2, 1408, 32_000, 256), strict=True)),
    "B": dict(zip(_SIZES, (1024, 12, 16, 4, 2816, 32_000, 256), strict=True)),
    "3B": dict(zip(_SIZES, (2048, 36, 16, 2, 11_008, 151_936, 1280), strict=True)),
    "7B": dict(zip(_SIZES, (3584, 28, 28, 4, 18_944, 152_064, 1280), strict=True)),
}
NO_IDS = torch.zeros(0, dtype=torch.long)


def random_vlm(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VLM:
    """A model of the given shape with random weights; the processor is the embedded model's."""
    processor = AutoProcessor.from_pretrained(locate("data/models/shapes-vl"))
    ids = processor.tokenizer.convert_tokens_to_ids
    size = SHAPES[shape]
    head = size["hidden"] // size["heads"]
    large = size["vision"] > 256
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size["vocab"],
            "hidden_size": size["hidden"],
            "intermediate_size": size["intermediate"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"],
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
            },
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 32 if large else 8,
            "hidden_size": size["vision"],
            "intermediate_size": 3420 if large else 2 * size["vision"],
            "num_heads": 16 if large else 4,
            "out_hidden_size": size["hidden"],
            "fullatt_block_indexes": [7, 15, 23, 31] if large else [3, 7],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    config._attn_implementation = {"text_config": ATTENTION, "vision_config": "sdpa"}
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)
    model.generation_config.eos_token_id = []  # random weights must not end a measurement early
    return VLM(model, processor)


def random_prompt(vlm: VLM, side: int, length: int, num_thought_tokens: int, seed: int = 0) -> Encoded:
    """A prompt of `length` tokens of which side x side are image tokens, before the think tokens."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((side * side,), vlm.image_token_id)
    words = torch.randint(20, 250, (length - side * side,), generator=generator)
    ids = torch.cat([words[:20], image, words[20:]])
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    kinds = (ids == vlm.image_token_id).int()
    return Encoded(
        prompt="",
        input_ids=ids,
        positions=vlm.family.positions(ids, {"image_grid_thw": grid, "mm_token_type_ids": kinds[None]}),
        suffix_ids=words[:5],
        image_columns=kinds.nonzero()[:, 0],
        image_inputs={"pixel_values": torch.randn(4 * side * side, 1176, generator=generator), "image_grid_thw": grid},
        patch_grid=(side, side),
    )


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
        whole = seconds(lambda: reference.run(latents, noise), vlm.device, 1)
        begin = seconds(lambda: start.run(latents, noise), vlm.device, 1)
    return (whole - begin) / iterations


def example_seconds(vlm: VLM, config: Config, encoded: Encoded, batch: int) -> float:
    """Seconds of one whole example in a batch: prefill, optimise, decode."""
    noise = torch.stack([question_noise(vlm, Question(i, "", []), config) for i in range(batch)])

    def work():
        prefix = vlm.prefill([encoded] * batch)
        trace = optimize(vlm, prefix, config, noise, NO_IDS)
        append_latents(vlm, prefix, trace.final.latents, trace.final.patches)
        vlm.decode(prefix, config.max_new_tokens)

    return seconds(work, vlm.device, 1) / batch


def released_example_seconds(vlm: VLM, config: Config, encoded: Encoded, per_iteration: float) -> float:
    """A whole example of the released behaviour: its iterations as measured, its decoding with a plain KV cache."""
    plain = config.replace(max_num_steps=0)
    return config.max_num_steps * per_iteration + example_seconds(vlm, plain, encoded, 1)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads."""
    block = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(block)
    return block.nbytes / seconds(lambda: target.copy_(block), device, 5)


def language_model_bytes(vlm: VLM) -> int:
    """Weights that one forward of think tokens reads: the language model and the output head, not the embedding."""
    weights = sum(p.nbytes for p in vlm.text_model.layers.parameters())
    return weights + vlm.model.get_output_embeddings().weight.nbytes


def measure(shape: str, device: str, dtype: torch.dtype = torch.float32, batches: tuple[int, ...] = (1, 8)) -> dict:
    """All figures of one shape: 256 image tokens, 640 positions, L = 4, 15 iterations, 64 new tokens."""
    vlm = random_vlm(shape, dtype, device)
    config = Config.make("paper", max_new_tokens=64)
    prompt = random_prompt(vlm, 16, 640, config.num_thought_tokens)
    told = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), **SHAPES[shape]}
    told["parameters"] = sum(p.numel() for p in vlm.model.parameters())
    told["floor"] = 2 * language_model_bytes(vlm) / copy_bandwidth(vlm.device)  # seconds: weights twice an iteration
    told["released_iteration"] = released_seconds(vlm, config, prompt)
    for batch in batches:
        told[f"iteration_batch_{batch}"] = loop_seconds(vlm, config, prompt, batch)
        if vlm.on_one_gpu:
            replayed = config.replace(cuda_graphs=True)
            told[f"replayed_batch_{batch}"] = loop_seconds(vlm, replayed, prompt, batch)
    many = config.replace(initial_patch_count=16, max_total_patches=None)
    told["released_iteration_16_patches"] = released_seconds(vlm, many, prompt)
    told["iteration_16_patches"] = loop_seconds(vlm, many, prompt, 1)
    told["example"] = example_seconds(vlm, config, prompt, batches[-1])
    told["released_example"] = released_example_seconds(vlm, config, prompt, told["released_iteration"])
    growth = {side * side: random_prompt(vlm, side, side * side + 384, config.num_thought_tokens) for side in (8, 32)}
    for tokens, longer in growth.items():
        told[f"iteration_{tokens}_image_tokens"] = loop_seconds(vlm, config, longer, 1)
        told[f"released_iteration_{tokens}_image_tokens"] = released_seconds(vlm, config, longer, 1)
    told |= {f"peak_bytes{name}": peak for name, peak in _peaks(vlm, config, growth[1024]).items()}
    return told


def _peaks(vlm: VLM, config: Config, prompt: Encoded) -> dict[str, int]:
    """Memory over the weights at 1024 image tokens, of two iterations."""
    short = config.replace(max_num_steps=2)
    noise = question_noise(vlm, Question(0, "", []), short)
    reference = Reference(eager(vlm), prompt, short)
    latents = vlm.embed(torch.full((config.num_thought_tokens,), vlm.think_id)).float()

    def fast():
        optimize(vlm, vlm.prefill([prompt]), short, noise[None], NO_IDS)

    def released():
        with torch.no_grad():
            reference.run(latents, noise.to(vlm.device))

    return {"": peak_bytes(vlm.device, fast), "_released": peak_bytes(vlm.device, released)}


def ratios(told: dict[str, Any]) -> dict[str, float]:
    """How many times less than the released behaviour; growth is of our own iteration from 64 to 1024 image tokens."""
    found = {}
    for name in told:
        if name.startswith(("iteration_batch_", "replayed_batch_")):
            found[name] = told["released_iteration"] / told[name]
    found["iteration_16_patches"] = told["released_iteration_16_patches"] / told["iteration_16_patches"]
    found["example"] = told["released_example"] / told["example"]
    found["growth"] = told["iteration_1024_image_tokens"] / told["iteration_64_image_tokens"]
    found["released_growth"] = told["released_iteration_1024_image_tokens"] / told["released_iteration_64_image_tokens"]
    found["memory"] = told["peak_bytes_released"] / told["peak_bytes"]
    found["times_floor"] = told["iteration_batch_1"] / told["floor"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures the shapes named (default: A and B on a CPU, 3B and 7B on a GPU) and writes reports/efficiency/."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = argv or (["3B", "7B"] if device == "cuda" else ["A", "B"])
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ConfigError(f"unknown shape {unknown[0]!r}; shapes are {', '.join(SHAPES)}")
    rows = []
    for shape in shapes:
        told = measure(shape, device, batches=(1, 8) if device == "cpu" else (1, 8, 32))
        rows.append({**told, "ratios": ratios(told)})
        print(json.dumps(rows[-1], indent=1), flush=True)
    path = Path(locate("reports")) / "efficiency" / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"environment": environment(), "shapes": rows})
    print(f"written: {path}")
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
