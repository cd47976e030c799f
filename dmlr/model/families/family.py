"""What the method needs of an architecture and transformers does not offer under one name.

A family says how an image and a text become tokens, where image tokens stand on the picture, what positions are, and
how pixels become features. This is the form that most architectures share; `qwen.py` and `tiles.py` say what differs.
Knows nothing about batches of prompts, caches, think tokens or rewards.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

Grid = tuple[int, int]  # (height, width) in image tokens
Inputs = Mapping[str, torch.Tensor]  # what a processor makes of one prompt


class Pictures(list[Image.Image]):
    """The images of one question, with what a processor made of them: pixels are processed once, whatever is asked."""

    made_by: Any = None
    resized: Any = None
    pixels: Any = None


class _Once:
    """An image processor that leaves what it makes with the pictures, and finds it there."""

    def __init__(self, processor, pictures: Pictures) -> None:
        self.processor, self.pictures = processor, pictures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, images, **options):
        if self.pictures.pixels is None:
            self.pictures.pixels = self.processor(images, **options)
        return copy.copy(self.pictures.pixels)


class Family:
    """Square pictures of a fixed size, text positions, one feature for each image token (LLaVA 1.5)."""

    language_model = "language_model"  # its name in the model's core
    position_axes = 1

    def __init__(self, model, processor, min_pixels: int | None = None, max_pixels: int | None = None):
        """min_pixels, max_pixels: image size in merged tokens, as far as the family can choose; none: its own."""
        self.core, self.config, self.processor = model.model, model.config, processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self._maker = processor, min_pixels, max_pixels
        self.reads = set(inspect.signature(self.core.get_image_features).parameters)
        rotary = getattr(self.text_model, "rotary_emb", None)
        if "dynamic" in getattr(rotary, "rope_type", ""):  # InternVL3's: it changes beyond the context alone, but a GPU
            rotary.rope_type = "default"  # would wait in every forward to be told where that is, and record none

    @property
    def text_model(self) -> torch.nn.Module:
        return getattr(self.core, self.language_model)

    @property
    def deep_levels(self) -> int:
        """Feature maps that enter the language model above its input, for each image token (DeepStack)."""
        return 0

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """Tokens before and after an image."""
        return [], []

    def image_options(self) -> dict:
        """Options of the processor that decide image sizes."""
        return {}

    def resized(self, images: Sequence[Image.Image]) -> list:
        """The images as the processor should get them. ValueError for one that has no usable size."""
        return [image.convert("RGB") for image in images]

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> Inputs:
        """Tokens [1, P] and what the vision tower reads, of one prompt with its images."""
        processor, pictures = self.processor, None
        if images:
            known, maker = images if isinstance(images, Pictures) else Pictures(images), self._maker
            if known.made_by != maker:
                known.made_by, known.resized, known.pixels = maker, self.resized(images), None
            pictures, processor = known.resized, copy.copy(processor)
            processor.image_processor = _Once(processor.image_processor, known)
        return processor(text=[prompt], images=pictures, return_tensors="pt", **self.image_options())

    def positions(self, ids: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """[axes, P] of the first P tokens `ids` [P]."""
        return torch.arange(len(ids))[None]

    def layout(self, images: Sequence[Image.Image], inputs: Inputs, count: int) -> tuple[Grid, torch.Tensor]:
        """Grid (height, width) of the first image, and the order [N] in which `count` image tokens are numbered.

        The first height * width lie on that image, row-major; whatever else there is (thumbnails, ends of lines,
        further images) comes after them.
        """
        side = math.isqrt(count // len(images))
        return (side, side), torch.arange(count)

    def features(
        self, batch: Sequence[Inputs], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[sum of N, D], features of all image tokens in the order of the prompts; and the deep ones, each as much.

        Examples go through the vision tower together where their tensors fit together, else one by one.
        """
        shapes = {tuple((name, tensor.shape[1:]) for name, tensor in inputs.items()) for inputs in batch}
        if len(shapes) == 1:
            batch = [{name: torch.cat([inputs[name] for inputs in batch]) for name in batch[0]}]
        seen = []
        for inputs in batch:
            there = {name: tensor.to(device) for name, tensor in inputs.items()}
            there = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in there.items()}
            seen.append(self.core.get_image_features(**there))
        deep = [torch.cat([_flat(one.deepstack_features[level]) for one in seen]) for level in range(self.deep_levels)]
        return torch.cat([_flat(one.pooler_output) for one in seen]), deep


def _flat(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[..., D], or several of them, as [tokens, D]."""
    parts = [features] if isinstance(features, torch.Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])
