"""Tiny random Qwen2.5-VL models with a byte-level tokenizer: the real classes, milliseconds to build."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from dmlr.model.attention import ATTENTION
from dmlr.model.vlm import VLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(special: list[str], eos: str, pad: str, template: str, **options) -> PreTrainedTokenizerFast:
    """One token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=special,
        chat_template=template,
        padding_side="left",
        **options,
    )


def lively(model: torch.nn.Module, times: float = 8.0) -> torch.nn.Module:
    """Initialisation is so small that a random model ignores its input; this makes it care."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(times if "embed_tokens" not in name else 1.0)
    return model


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """With Qwen's special tokens."""
    tokenizer = byte_tokenizer(SPECIAL, "<|im_end|>", "<|endoftext|>", TEMPLATE)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


def tiny_processor() -> Qwen2_5_VLProcessor:
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def tiny_vlm(seed: int = 1, layers: int = 2, hidden: int = 48, context: int = 1024) -> VLM:
    """A random frozen model in float32: `layers` text layers with grouped heads, two vision blocks (one windowed)."""
    processor = tiny_processor()
    half, third = hidden // 8, hidden // 24  # of a head's dimensions
    sections = [half - 2 * third, third, third]
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    config._attn_implementation = {"text_config": ATTENTION, "vision_config": "sdpa"}
    model = lively(Qwen2_5_VLForConditionalGeneration(config), 8 * (48 / hidden) ** 0.5)  # wider ones care too much
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return VLM(model, processor)


def noise_image(seed: int, height: int = 112, width: int = 112) -> Image.Image:
    """A random RGB picture of coarse blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(14, axis=0).repeat(14, axis=1))
