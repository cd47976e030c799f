"""One example's prompt: chat template, tokens, pixels and positions, as the model reads them.

Knows the processor of a Qwen-style model. Knows nothing about batches, caches or what think tokens are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from qwen_vl_utils import process_vision_info

if TYPE_CHECKING:
    from dmlr.vlm import VLM


class PromptError(ValueError):
    """One example cannot be given to the model; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """One example on the CPU: P prefix tokens, N of them image tokens."""

    prompt: str  # the exact text given to the tokenizer, chat template applied
    input_ids: torch.Tensor  # [P], everything before the first think token
    positions: torch.Tensor  # [3, P], M-RoPE
    suffix_ids: torch.Tensor  # [S], what follows the think tokens (empty without any)
    image_columns: torch.Tensor  # [N], where the image tokens are in input_ids
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None  # [images, 3], in unmerged patches
    patch_grid: tuple[int, int]  # (height, width) of the first image in merged tokens; (0, 0) without image


class Encoder:
    """Turns a question into an Encoded. Image sizes are limits in merged visual tokens; none: the processor's own."""

    def __init__(self, vlm: VLM, min_pixels: int | None = None, max_pixels: int | None = None):
        self.vlm = vlm
        images = vlm.processor.image_processor
        merged = (images.patch_size * images.merge_size) ** 2  # pixels under one merged token
        self.min_pixels = min_pixels * merged if min_pixels else images.size["shortest_edge"]
        self.max_pixels = max_pixels * merged if max_pixels else images.size["longest_edge"]

    def __call__(self, system: str, task: str, images: list[Image.Image], num_thought_tokens: int = 0) -> Encoded:
        """One example's prompt. The think tokens end the user turn; what follows them is the suffix.

        Raises PromptError for a question that holds the model's special tokens, an image that cannot be resized, or
        a prompt longer than the model's context.
        """
        vlm = self.vlm
        if found := [token for token in vlm.tokenizer.all_special_tokens if token in task]:
            raise PromptError(f"the question contains the model's special token {found[0]}")
        think = vlm.tokenizer.convert_ids_to_tokens(vlm.think_id)
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        content = [{"type": "image", "image": image, **limits} for image in images]
        content.append({"type": "text", "text": task + think * num_thought_tokens})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        prompt = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            resized = process_vision_info(messages, image_patch_size=vlm.processor.image_processor.patch_size)[0]
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise PromptError(f"an image of {sizes} pixels cannot be resized for the model: {error}") from error
        inputs = vlm.processor(
            text=[prompt], images=resized, do_resize=False, return_tensors="pt", return_mm_token_type_ids=True
        )
        ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
        if len(ids) >= vlm.context_length:
            raise PromptError(f"the prompt has {len(ids)} tokens; the model's context is {vlm.context_length}")
        start, end = len(ids), len(ids)
        if num_thought_tokens:
            where = (ids == vlm.think_id).nonzero()[-num_thought_tokens:, 0]
            start, end = int(where[0]), int(where[-1]) + 1
            assert end - start == num_thought_tokens, "think tokens must be consecutive"
        grid = inputs.get("image_grid_thw")
        positions, _ = vlm.core.get_rope_index(
            ids[None, :start], image_grid_thw=grid, video_grid_thw=None, mm_token_type_ids=types[None, :start]
        )
        merge = vlm.processor.image_processor.merge_size
        return Encoded(
            prompt=prompt,
            input_ids=ids[:start],
            positions=positions[:, 0],
            suffix_ids=ids[end:],
            image_columns=(ids[:start] == vlm.model.config.image_token_id).nonzero()[:, 0],
            pixel_values=inputs.get("pixel_values"),
            grid_thw=grid,
            patch_grid=(int(grid[0, 1]) // merge, int(grid[0, 2]) // merge) if grid is not None else (0, 0),
        )
