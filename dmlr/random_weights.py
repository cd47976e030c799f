"""Models of published shapes with random weights, and prompts for them: speed does not depend on what weights say.

Knows nothing about what is measured.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig

from dmlr.config import locate
from dmlr.model.attention import ATTENTION
from dmlr.model.vlm import VLM, Encoded

# Qwen2.5-VL shapes: two for a CPU, and the published 3B and 7B.
_SIZES = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab", "vision")
_NUMBERS = {
    "A": (512, 8, 8, 2, 1408, 32_000, 256),
    "B": (1024, 12, 16, 4, 2816, 32_000, 256),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, 1280),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, 1280),
}
SHAPES = {name: dict(zip(_SIZES, numbers, strict=True)) for name, numbers in _NUMBERS.items()}


def random_vlm(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VLM:
    """A model of the given shape with random weights; the processor is the embedded model's."""
    processor = AutoProcessor.from_pretrained(locate("data/models/shapes-vl"))
    ids = processor.tokenizer.convert_tokens_to_ids
    size = SHAPES[shape]
    head, width = size["hidden"] // size["heads"], size["vision"]
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    # the published tower is the settings' own default
    small = {"depth": 8, "intermediate_size": 2 * width, "num_heads": 4, "fullatt_block_indexes": [3, 7]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size["vocab"],
            "hidden_size": size["hidden"],
            "intermediate_size": size["intermediate"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={"hidden_size": width, "out_hidden_size": size["hidden"], **(small if width < 1280 else {})},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    config._attn_implementation = {"text_config": ATTENTION, "vision_config": "sdpa"}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = []  # random weights must not end a measurement early
    return VLM(model, processor)


def random_prompt(vlm: VLM, side: int, length: int, num_thought_tokens: int) -> Encoded:
    """A prompt of `length` tokens of which side x side are image tokens, before the think tokens."""
    generator = torch.Generator().manual_seed(0)
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
        num_tokens=len(ids) + num_thought_tokens + 5,
    )
