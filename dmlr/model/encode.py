"""A question becomes a prompt: chat template, tokens, pixels and positions, as the model reads them.

What depends on the architecture is asked of its family. Knows nothing about batches, caches or what think tokens
are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from dmlr.model.vlm import VLM, Encoded


class PromptError(ValueError):
    """One example cannot be given to the model; the message says why."""


def encode(vlm: VLM, system: str, task: str, images: Sequence[Image.Image], num_thought_tokens: int = 0) -> Encoded:
    """One example's prompt. The think tokens end the user turn; what follows them is the suffix.

    Raises PromptError for a question that holds the model's special tokens, an image that cannot be resized, or a
    prompt longer than the model's context.
    """
    family = vlm.family
    special = [*vlm.tokenizer.all_special_tokens, vlm.tokenizer.convert_ids_to_tokens(vlm.image_token_id)]
    if found := [token for token in special if token in task]:
        raise PromptError(f"the question contains the model's special token {found[0]}")
    most = vlm.context_length
    if len(task) > most * vlm.longest_token:  # to tokenize them would take long, for nothing
        raise PromptError(f"the question has {len(task)} characters; the model's context is {most} tokens")
    think = vlm.tokenizer.convert_ids_to_tokens(vlm.think_id)
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": task + think * num_thought_tokens})
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": content})
    prompt = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    try:
        inputs = family.inputs(prompt, images)
    except ValueError as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise PromptError(f"an image of {sizes} pixels cannot be resized for the model: {error}") from error
    ids = inputs["input_ids"][0]
    if len(ids) >= most:
        raise PromptError(f"the prompt has {len(ids)} tokens; the model's context is {most}")
    start, end = _think_tokens(ids, vlm.think_id, num_thought_tokens)
    prefix = ids[:start]
    columns = (prefix == vlm.image_token_id).nonzero()[:, 0]
    grid, order = family.layout(images, inputs, len(columns)) if images else ((0, 0), torch.arange(0))
    return Encoded(
        prompt=prompt,
        input_ids=prefix,
        positions=family.positions(prefix, inputs),
        suffix_ids=ids[end:],
        image_columns=columns[order],
        image_inputs={name: inputs[name] for name in inputs if name in family.reads} if images else {},
        patch_grid=grid,
        num_tokens=len(ids),
    )


def _think_tokens(ids: torch.Tensor, think_id: int, count: int) -> tuple[int, int]:
    """Where the think tokens begin and end in ids [P]: the last place with so many of that token in a row."""
    if not count:
        return len(ids), len(ids)
    runs = (ids == think_id).unfold(0, count, 1).all(dim=1)  # [P - count + 1], True where a run may begin
    begins = runs & ~torch.cat([runs.new_zeros(1), runs[:-1]])  # the template's own may follow in the same run
    start = int(begins.nonzero()[-1, 0])
    return start, start + count
