"""Families that see a picture in square tiles of a fixed size, with a small copy of the whole beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image

from dmlr.model.families.family import Family, Grid, Inputs


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
