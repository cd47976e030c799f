"""What the method needs of an architecture and transformers does not offer under one name.

A family says how an image and a text become tokens, where image tokens stand on the picture, what positions are, and
how pixels become features. `Family` is the form that most architectures share, the others say what differs; `FAMILIES`
has them by the name that their checkpoints give in config.json (`model_type`).
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
from transformers import PretrainedConfig

from dmlr.model.attention import WINDOWS

Grid = tuple[int, int]  # (height, width) in image tokens
Inputs = Mapping[str, torch.Tensor]  # what a processor makes of one prompt


class ModelError(ValueError):
    """The checkpoint cannot be loaded, or its architecture lacks something the method needs."""


class Pictures(list[Image.Image]):
    """The images of one question, with what a processor made of them: pixels are processed once, whatever is asked."""

    made_by: Any = None
    resized: Any = None
    pixels: Any = None


class Family:
    """Square pictures of a fixed size, text positions, one feature for each image token (LLaVA 1.5)."""

    language_model = "language_model"  # its name in the model's core
    position_axes = 1
    deep_levels = 0  # feature maps that enter the language model above its input, for each image token (DeepStack)
    marks: tuple[list[int], list[int]] = [], []  # tokens before and after an image

    def __init__(self, model, processor, min_pixels: int | None = None, max_pixels: int | None = None):
        """min_pixels, max_pixels: image size in merged tokens, as far as the family can choose; none: its own."""
        self.core, self.config, self.processor = model.model, model.config, processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self._maker = processor, min_pixels, max_pixels
        self.reads = set(inspect.signature(self.core.get_image_features).parameters)
        self.text_model = getattr(self.core, self.language_model)
        rotary = getattr(self.text_model, "rotary_emb", None)
        if "dynamic" in getattr(rotary, "rope_type", ""):  # InternVL3's: it changes beyond the context alone, but a GPU
            rotary.rope_type = "default"  # would wait in every forward to be told where that is, and record none

    def image_options(self) -> dict:
        """Options of the processor that decide image sizes."""
        return {}

    def resized(self, images: Sequence[Image.Image]) -> list:
        """The images as the processor should get them. ValueError for one that has no usable size."""
        return [image.convert("RGB") for image in images]

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> Inputs:
        """Tokens [1, P] and what the vision tower reads, of one prompt with its images."""
        options = {"text": [prompt], "return_tensors": "pt", **self.image_options()}
        if not images:
            return self.processor(**options)
        pictures = images if isinstance(images, Pictures) else Pictures(images)
        if pictures.made_by != self._maker:
            pictures.made_by, pictures.resized, pictures.pixels = self._maker, self.resized(images), None
        processor, maker = copy.copy(self.processor), copy.copy(self.processor.image_processor)

        def preprocess(resized: Sequence[Image.Image], **options):
            if pictures.pixels is None:
                pictures.pixels = self.processor.image_processor.preprocess(resized, **options)
            return copy.copy(pictures.pixels)

        processor.image_processor, maker.preprocess = maker, preprocess
        return processor(images=pictures.resized, **options)

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
            there = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
            seen.append(self.core.get_image_features(**there))
        deep = [torch.cat([_flat(one.deepstack_features[level]) for one in seen]) for level in range(self.deep_levels)]
        return torch.cat([_flat(one.pooler_output) for one in seen]), deep


def _flat(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[..., D], or several of them, as [tokens, D]."""
    parts = [features] if isinstance(features, torch.Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])


# Qwen2-VL, Qwen2.5-VL (R1-OneVision and VLAA-Thinker are its fine-tunes) and Qwen3-VL


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


# pictures in square tiles of a fixed size, with a small copy of the whole beside them


def tiled(rows: int, columns: int, side: int, count: int) -> tuple[Grid, torch.Tensor]:
    """Grid and order of `count` tokens that begin with rows x columns tiles of side x side tokens each."""
    tokens = torch.arange(rows * columns * side * side).view(rows, columns, side, side)
    first = tokens.transpose(1, 2).flatten()  # row-major over the whole picture
    return (rows * side, columns * side), torch.cat([first, torch.arange(len(first), count)])


class InternVL(Family):
    """Tiles first, then a thumbnail (none beside a single tile). `max_pixels` limits their number."""

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        names = (self.processor.start_image_token, self.processor.end_image_token)
        return tuple([self.processor.tokenizer.convert_tokens_to_ids(name)] for name in names)

    @property
    def most_tiles(self) -> int:
        most = self.processor.image_processor.max_patches
        if self.max_pixels:
            most = min(most, max(1, self.max_pixels // self.processor.image_seq_length - 1))
        return most

    def image_options(self) -> dict:
        return {"crop_to_patches": self.most_tiles > 1, "max_patches": self.most_tiles}

    def layout(self, images: Sequence[Image.Image], inputs: Inputs, count: int) -> tuple[Grid, torch.Tensor]:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        rows = columns = 1
        if self.most_tiles > 1:
            size, least = self.processor.image_processor.size, self.processor.image_processor.min_patches
            shape, tile = (images[0].height, images[0].width), (size["height"], size["width"])
            columns, rows = get_optimal_tiled_canvas(shape, tile, least, self.most_tiles)
        return tiled(rows, columns, math.isqrt(self.processor.image_seq_length), count)


class SmolVLM(Family):
    """Tiles in rows, then the whole picture in one. `max_pixels` limits their number."""

    language_model = "text_model"

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        fake = self.processor.tokenizer.convert_tokens_to_ids(self.processor.fake_image_token)
        return [fake], [fake]

    def image_options(self) -> dict:
        images = self.processor.image_processor
        tile = images.max_image_size["longest_edge"]
        most = images.size["longest_edge"] // tile
        if self.max_pixels:
            most = min(most, math.isqrt(max(1, self.max_pixels // self.processor.image_seq_len - 1)))
        return {"size": {"longest_edge": most * tile}, "do_image_splitting": images.do_image_splitting and most > 1}

    def resized(self, images: Sequence[Image.Image]) -> list[list[Image.Image]]:
        return [super().resized(images)]  # a list for each prompt

    def layout(self, images: Sequence[Image.Image], inputs: Inputs, count: int) -> tuple[Grid, torch.Tensor]:
        counted = self.processor.image_processor.get_number_of_image_patches
        _, rows, columns = counted(images[0].height, images[0].width, self.image_options())
        return tiled(max(rows, 1), max(columns, 1), math.isqrt(self.processor.image_seq_len), count)


class LlavaOneVision(Family):
    """A single picture: the whole in one tile, then at a higher resolution with an end of line after each row.

    Of several pictures each is one tile and one end of line. The high resolution is padded to whole tiles, and padding
    is cut away in whole rows or columns, so a cell may lie up to half a cell beside what it shows. `max_pixels` has no
    effect.
    """

    def layout(self, images: Sequence[Image.Image], inputs: Inputs, count: int) -> tuple[Grid, torch.Tensor]:
        base = self.processor.num_image_tokens
        side = math.isqrt(base)
        if len(images) > 1:
            return (side, side), torch.arange(count)
        height, width = inputs["image_sizes"][0].tolist()
        tile = self.config.vision_config.image_size
        from transformers.image_processing_utils import select_best_resolution

        tall, wide = select_best_resolution([height, width], self.processor.image_processor.image_grid_pinpoints)
        _, rows = self.processor._get_unpadded_features(height, width, side, side, tall // tile, wide // tile)
        columns = (count - base) // rows - 1
        fine = base + torch.arange(rows * (columns + 1)).view(rows, columns + 1)
        return (rows, columns), torch.cat([fine[:, :-1].flatten(), torch.arange(base), fine[:, -1]])


FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "llava": Family,
    "llava_onevision": LlavaOneVision,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
}


def check_known(config: PretrainedConfig) -> None:
    """ModelError that says what an architecture lacks, or that nobody has tested it. Reads settings, no weights."""
    kind, text = config.model_type, config.get_text_config()
    if kind not in FAMILIES:
        lacks = {
            "vision tower (vision_config)": getattr(config, "vision_config", None) is None,
            "image token (image_token_id)": getattr(config, "image_token_id", None) is None,
            "language model that is causal everywhere": getattr(text, "use_bidirectional_attention", False),
        }
        missing = [what for what, lacking in lacks.items() if lacking]
        because = f"it has no {', no '.join(missing)}" if missing else "nobody has tested it"
        raise ModelError(
            f"the architecture {kind!r} is not supported: {because}; supported are {', '.join(FAMILIES)} "
            "(dmlr/model/families.py is the place for another)"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError(
            f"{kind}: sliding-window layers are not supported: the prefix must stay visible to every think token"
        )
