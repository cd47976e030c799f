"""The embedded model's parts: a tiny Qwen2.5-VL configuration, a tokenizer of the project's own text, a processor.

The result is an ordinary checkpoint folder; nothing else in the project knows that it is small.
How it is trained is in lesson.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from data.shapes.scenes import CELL, GRID
from dmlr.prompts import Prompts

# Ids 0.. in this order; the names are Qwen's.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD = range(len(SPECIAL))
# Qwen's split of text into words, except that a digit keeps the blank before it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' or 'video' in item %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_text(system: str, user: str) -> str:
    """What `CHAT_TEMPLATE` makes of a system turn and a user turn with one image, generation prompt included."""
    return f"{chat_prefix(system)}{user}{CHAT_SUFFIX}"


def chat_prefix(system: str) -> str:
    """The chat up to the text of the user turn."""
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>")  # fmt: skip


CHAT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


def build_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text tokenises, the project's own words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


FAMILIES = {  # classes of configuration, model, processor and its videos
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def build_config(
    vocab_size: int,
    hidden: int = 256,
    layers: int = 5,
    vision_hidden: int = 160,
    vision_blocks: int = 3,
    family: str = "qwen2_5_vl",
):
    """A Qwen2.5-VL or Qwen3-VL configuration a thousand times smaller than the smallest published one.

    Differences in kind: every vision block attends to the whole image, and the embeddings are tied. The rotary base
    must leave half of each head's pairs nearly still over a prompt's length, or attention cannot find content far
    away (with a base of 100 not even option letters were looked up after 140,000 questions); the larger initial
    weights suit the small width.
    """
    heads = hidden // 32
    text = {  # no padding token here: its embedding, which is that of think tokens, would stay zero
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ENDOFTEXT, "eos_token_id": IM_END,
    }  # fmt: skip
    vision = {
        "depth": vision_blocks, "hidden_size": vision_hidden, "intermediate_size": vision_hidden * 5 // 2,
        "num_heads": vision_hidden // 32, "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": CELL * GRID, "fullatt_block_indexes": list(range(vision_blocks)),
    }  # fmt: skip
    if family == "qwen3_vl":  # DeepStack: features of all blocks but the last enter the first language layers
        text |= {"head_dim": 32}
        text["rope_parameters"] |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        vision |= {
            "num_position_embeddings": (2 * GRID) ** 2,
            "deepstack_visual_indexes": list(range(vision_blocks - 1)),
        }
        del vision["window_size"], vision["fullatt_block_indexes"]
    return FAMILIES[family][0](
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        bos_token_id=ENDOFTEXT, eos_token_id=IM_END, pad_token_id=ENDOFTEXT,
    )  # fmt: skip


def build_model(vocab_size: int, seed: int = 0, family: str = "qwen2_5_vl", **sizes: int) -> PreTrainedModel:
    """A randomly initialised model in float32."""
    torch.manual_seed(seed)
    model = FAMILIES[family][1](build_config(vocab_size, family=family, **sizes))
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[IM_END, ENDOFTEXT], pad_token_id=ENDOFTEXT, bos_token_id=ENDOFTEXT
    )
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast, family: str = "qwen2_5_vl"):
    """The family's processor; any image becomes about GRID x GRID merged tokens."""
    _, _, processor, videos = FAMILIES[family]
    cut = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(size=dict.fromkeys(("shortest_edge", "longest_edge"), (GRID * CELL) ** 2), **cut)
    if family == "qwen3_vl":
        tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return processor(images, tokenizer, videos(**cut), chat_template=CHAT_TEMPLATE)


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, processor, folder: str | Path, numbers: dict) -> None:
    """An ordinary checkpoint folder, weights in bfloat16; `numbers` go to training.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    dtype = model.config.dtype
    try:
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = dtype
    processor.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


SYSTEMS = (
    "You are a careful visual assistant. Think inside <think></think> and answer inside <answer></answer>.",
    "You are a helpful assistant.",
    "Reason inside <think></think>, then answer inside <answer></answer>.",
    "You look at images and answer questions about them.",
    "You are a visual assistant.",
)
TASKS = (
    "{question}",
    "Look at the image and answer the question.\n\n{question}",
    "Answer the question about the image. Put the final answer into \\boxed{}.\n\n{question}",
    "Think step by step and put your final answer into \\boxed{}.\n\n{question}",
    "Look at the image. Reason first, then answer in \\boxed{}; "
    "for a multiple-choice question, with the letter.\n\n{question}",
    "Describe what matters in the image, then answer the question.\n\n{question}",
    "Question: {question}",
    "Here is an image. Write your reasoning and then the letter or the number in \\boxed{}.\n\n{question}",
)
HINTS = (
    "\n\nThe next {count} special tokens are a space for thoughts without words.\n",
    "\n\nThink silently in the next {count} tokens, then answer.\n",
    "\n",
    "\n\nReason in the {count} tokens that follow. You may answer directly after them.\n",
)


def wordings(default: Prompts) -> list[Prompts]:
    """The default prompts first, then paraphrases of them."""
    found = [default]
    for i in range(24):
        task = (TASKS + default.solver)[i % (len(TASKS) + 3)]
        system = ((default.system, *SYSTEMS))[i % (len(SYSTEMS) + 1)]
        found.append(Prompts(system, (task,) * 3, ((default.latents, *HINTS))[i % (len(HINTS) + 1)]))
    return found
