"""One example's prompt: chat template, tokens, pixels and positions, as the model reads them.

What depends on the architecture is asked of its family. Knows nothing about batches, caches or what think tokens
are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dmlr.model.families.family import Grid

if TYPE_CHECKING:
    from dmlr.model.vlm import VLM


class PromptError(ValueError):
    """One example cannot be given to the model; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """One example on the CPU: P prefix tokens, N of them image tokens.

    Image token i is the one in column `image_columns[i]`. The first height * width of `patch_grid` lie row-major on the
    first image; thumbnails, ends of lines and further images are numbered after them.
    """

    prompt: str  # the exact text given to the tokenizer, chat template applied
    input_ids: torch.Tensor  # [P], everything before the first think token
    positions: torch.Tensor  # [axes, P], three axes with M-RoPE
    suffix_ids: torch.Tensor  # [S], what follows the think tokens (empty without any)
    image_columns: torch.Tensor  # [N], where the image tokens are in input_ids
    image_inputs: Mapping[str, torch.Tensor]  # what the vision tower reads, by its names; empty without image
    patch_grid: Grid  # (height, width) of the first image in image tokens; (0, 0) without image


class Encoder:
    """Turns a question into an Encoded."""

    def __init__(self, vlm: VLM):
        self.vlm = vlm

    def __call__(self, system: str, task: str, images: list[Image.Image], num_thought_tokens: int = 0) -> Encoded:
        """One example's prompt. The think tokens end the user turn; what follows them is the suffix.

        Raises PromptError for a question that holds the model's special tokens, an image that cannot be resized, or
        a prompt longer than the model's context.
        """
        vlm, family = self.vlm, self.vlm.family
        special = [*vlm.tokenizer.all_special_tokens, vlm.tokenizer.convert_ids_to_tokens(vlm.image_token_id)]
        if found := [token for token in special if token in task]:
            raise PromptError(f"the question contains the model's special token {found[0]}")
        think = vlm.tokenizer.convert_ids_to_tokens(vlm.think_id)
        content = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": task + think * num_thought_tokens})
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}]
        messages.append({"role": "user", "content": content})
        prompt = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            inputs = family.inputs(prompt, images)
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise PromptError(f"an image of {sizes} pixels cannot be resized for the model: {error}") from error
        ids = inputs["input_ids"][0]
        if len(ids) >= vlm.context_length:
            raise PromptError(f"the prompt has {len(ids)} tokens; the model's context is {vlm.context_length}")
        start, end = self._think_tokens(ids, num_thought_tokens)
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
        )

    def _think_tokens(self, ids: torch.Tensor, count: int) -> tuple[int, int]:
        """Where the think tokens begin and end in ids [P]: the last place with so many of that token in a row."""
        if not count:
            return len(ids), len(ids)
        runs = (ids == self.vlm.think_id).unfold(0, count, 1).all(dim=1)  # [P - count + 1], True where a run may begin
        begins = runs & ~torch.cat([runs.new_zeros(1), runs[:-1]])  # the template's own may follow in the same run
        start = int(begins.nonzero()[-1, 0])
        return start, start + count
