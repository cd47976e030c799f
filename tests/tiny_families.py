"""Tiny random models of every family: the real config, model and processor classes, the family's own special tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as hf
from tiny import byte_tokenizer, lively, qwen_tokenizer, tiny_vlm

from dmlr.model.attention import ATTENTION
from dmlr.model.vlm import VLM

HIDDEN, TILE = 48, {"height": 56, "width": 56}
# Each as the family's published checkpoints have it, without tools, videos and defaults for a missing system turn.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def text_config(tokenizer, **more) -> dict:
    """Two layers with grouped heads; Qwen2's, Qwen3's and Llama's configs share these names."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def siglip(side: int, patch: int, **more) -> dict:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": side, "patch_size": patch, **more}  # fmt: skip


def qwen_ids(tokenizer) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def qwen2_vl():
    tokenizer, size = qwen_tokenizer(), {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    processor = hf.Qwen2VLProcessor(hf.Qwen2VLImageProcessor(size=size), tokenizer, hf.Qwen2VLVideoProcessor())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    text = text_config(tokenizer, rope_parameters=rope)
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer)), processor


def qwen3_vl():
    tokenizer, size = qwen_tokenizer(), {"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
    images = hf.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2)
    processor = hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN,
        "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = text_config(tokenizer, rope_parameters=rope, head_dim=12)
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer)), processor


def llava():
    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], eos="</s>", pad="<pad>", template=LLAVA_TEMPLATE)
    tokenizer.image_token = "<image>"
    images = hf.SiglipImageProcessor(size=TILE)
    processor = hf.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full")
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **siglip(56, 14)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return config, processor


def llava_onevision():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = byte_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", template=ONEVISION_TEMPLATE)
    tokenizer.image_token, tokenizer.video_token = "<image>", "<video>"
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    images = hf.LlavaOnevisionImageProcessor(size=TILE, image_grid_pinpoints=pinpoints)
    more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = hf.LlavaOnevisionProcessor(images, tokenizer, hf.LlavaOnevisionVideoProcessor(), **more)
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", **siglip(56, 14, vision_use_head=False)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return config, processor


def internvl():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    tokenizer = byte_tokenizer(special, "<|im_end|>", "<|endoftext|>", INTERN_TEMPLATE, extra_special_tokens=named)
    images = hf.GotOcr2ImageProcessor(size=TILE, crop_to_patches=True, max_patches=6)
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(), image_seq_length=4)
    vision = siglip([56, 56], [14, 14], use_absolute_position_embeddings=True, use_mean_pooling=True)
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return config, processor


def smolvlm():
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
               "<global-img>", "<video>", *tiles]  # fmt: skip
    tokenizer = byte_tokenizer(special, eos="<end_of_utterance>", pad="<|endoftext|>", template=SMOL_TEMPLATE)
    tile = {"longest_edge": 56}
    images = hf.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size=tile)
    videos = hf.SmolVLMVideoProcessor(size=tile, max_image_size=tile, fps=1, num_frames=1)
    processor = hf.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)
    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config=siglip(56, 14),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def tiny_family(build: Callable[[], tuple], **options) -> VLM:
    """A random model of the config and with the processor that `build` makes, frozen, that cares for its input."""
    config, processor = build()
    processor.chat_template = processor.tokenizer.chat_template
    config._attn_implementation = {"text_config": ATTENTION, "vision_config": "sdpa"}
    torch.manual_seed(1)
    model = lively(getattr(hf, type(config).__name__.replace("Config", "ForConditionalGeneration"))(config))
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id]
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return VLM(model, processor, **options)


BUILDS = (qwen2_vl, qwen3_vl, llava, llava_onevision, internvl, smolvlm)
TINY: dict[str, Callable[..., VLM]] = {"qwen2_5_vl": tiny_vlm, **{b.__name__: partial(tiny_family, b) for b in BUILDS}}
