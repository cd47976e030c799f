"""What a run's parameters ask of a model for one example, as far as they say. Knows nothing about models or data."""

from __future__ import annotations

import torch

from dmlr.config import Config
from dmlr.loop.injection import caps_of
from dmlr.methods.controls import CONTROLS
from dmlr.methods.self_consistency import loop_positions
from dmlr.model.graphs import MOST
from dmlr.model.memory import Work

PROMPT = 1024  # positions that a prompt is taken to have, image included, where nobody counted
TEXT = 256  # positions of text in a prompt: instructions, question, options
INTERLEAVED = {"dmlr", *CONTROLS}  # methods that put patches behind think tokens


def workload(config: Config, context: int | None = None, images: int | None = None, prompt: int | None = None) -> Work:
    """Of the largest of a run's methods; only DMLR's loop counts as arithmetic.

    context: positions of the model; images: image tokens of an example, where somebody counted; prompt: positions of
    vanilla's prompt, else TEXT more than image tokens, to which other methods add at most TEXT. Where nobody counted, a
    prompt is taken to have PROMPT positions, at most half of the context, and an image to be as large as `max_pixels`
    allows, at most all of the prompt but TEXT positions.
    """
    if images is None:
        prompt = min(PROMPT, (context or 2 * PROMPT) // 2)
        images = max(1, min(config.max_pixels or prompt, prompt - TEXT))
    else:
        prompt = prompt + TEXT if prompt else images + TEXT
    methods = {method.strip() for method in config.methods.split(",")}
    length = config.num_thought_tokens
    alone = {"ltpo": config.ltpo_thought_tokens, "ulr": config.ulr_thought_tokens}  # without patches
    slots = {method: count for method, count in alone.items() if method in methods}
    if methods & INTERLEAVED:
        slots["dmlr"] = length * (1 + int(caps_of(config, torch.tensor([images])).max()))
    loop = bool(methods & INTERLEAVED - {"unoptimised"})
    samples = config.evaluations if "random" in methods else config.num_samples
    tokens = dict.fromkeys(methods, config.max_new_tokens)
    tokens |= {"multimodal-cot": config.rationale_tokens + config.rationale_answer_tokens}
    tokens |= {"ccot": config.scene_graph_tokens + config.max_new_tokens}  # two calls each
    longest = max((tokens[method] for method in methods), default=1)
    return Work(
        prompt=prompt,
        image_tokens=images,
        slots=max(slots.values(), default=0) * samples,
        reads=(max(length, *alone.values()) + 1) * samples if slots else 0,
        loop_positions=loop_positions(config, images) if loop else 0,
        passes=2 * config.max_num_steps if loop else 0,
        new_tokens=max(1, min(longest, (context or longest + prompt) - prompt)),
        copies=1 + ("self-consistency" in methods),  # it samples from a copy of the prefix
        graph=config.use_auto_grad or "ulr" in methods,
        probed=min(TEXT, prompt - images) if "ulr" in methods else 0,
        buffers=MOST if config.cuda_graphs else 0,  # of the loop and of answers
    )
