"""Qwen2-VL, Qwen2.5-VL (R1-OneVision and VLAA-Thinker are its fine-tunes) and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from dmlr.model.attention import WINDOWS
from dmlr.model.families.family import Family, Grid, Inputs


class QwenVL(Family):
    """Pictures of any size, a grid of merged patches; positions in time, height and width (M-RoPE)."""

    position_axes = 3

    def __init__(self, model, processor, min_pixels: int | None = None, max_pixels: int | None = None):
        super().__init__(model, processor, min_pixels, max_pixels)
        images = processor.image_processor
        self.merge = images.merge_size
        merged = (images.patch_size * self.merge) ** 2  # pixels under one merged token
        self.limits = {
            "min_pixels": min_pixels * merged if min_pixels else images.size["shortest_edge"],
            "max_pixels": max_pixels * merged if max_pixels else images.size["longest_edge"],
        }
        tower = self.core.visual
        if tower.device.type == "cuda" and tower.config._attn_implementation == "sdpa":
            tower.config._attn_implementation = WINDOWS

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        return [self.config.vision_start_token_id], [self.config.vision_end_token_id]

    def image_options(self) -> dict:
        return {"do_resize": False, "return_mm_token_type_ids": True}

    def resized(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        from qwen_vl_utils import process_vision_info  # imports torchvision

        content = [{"type": "image", "image": image, **self.limits} for image in images]
        patch_size = self.processor.image_processor.patch_size
        return process_vision_info([{"role": "user", "content": content}], image_patch_size=patch_size)[0] or []

    def positions(self, ids: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        kinds = inputs["mm_token_type_ids"][:, : len(ids)]
        grid = inputs.get("image_grid_thw")
        positions, _ = self.core.get_rope_index(
            ids[None], image_grid_thw=grid, video_grid_thw=None, mm_token_type_ids=kinds
        )
        return positions[:, 0]

    def layout(self, images: Sequence[Image.Image], inputs: Inputs, count: int) -> tuple[Grid, torch.Tensor]:
        _, height, width = inputs["image_grid_thw"][0].tolist()
        return (height // self.merge, width // self.merge), torch.arange(count)


class Qwen3VL(QwenVL):
    """Features of three vision layers also enter the first language layers (DeepStack)."""

    @property
    def deep_levels(self) -> int:
        return len(self.config.vision_config.deepstack_visual_indexes)
