"""Checkpoints, from the hub or from a folder, without running code from them. Knows nothing about how they are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from dmlr.config import Config, hub_token, locate
from dmlr.model.attention import ATTENTION
from dmlr.model.families import ModelError, check_known

# What stays as it is with few bits: the head, and vision towers and projectors by the names that families give them.
VISION = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector")
NAMED = 5  # missing weights that a message names
WHOLE = ["lm_head", *(f"model.{name}" for name in VISION)]


def load_checkpoint(config: Config) -> tuple:
    """Model and processor of `model_name_or_path`, on their device. ModelError says what failed, and what to do.

    Settings are read first, so an architecture that is not supported costs no weights. `device_map` lets accelerate
    place the layers; `load_in_bits` quantises the language model with bitsandbytes while it is read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device if config.device == "auto" else config.device
    name = config.dtype if config.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    path = str(locate(config.model_name_or_path))
    shared: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "token": hub_token(),
        "revision": config.revision or "main",
    }
    placed: dict[str, Any] = {"device_map": config.device_map} if config.device_map else {}
    if config.load_in_bits:
        placed.setdefault("device_map", {"": device})
        placed["quantization_config"] = quantised(config.load_in_bits, getattr(torch, name))
    try:
        settings = AutoConfig.from_pretrained(path, **shared)
        check_known(settings)
        # flash attention sees all windows of Qwen2.5-VL in one call; where it is missing each length is (attention.py)
        windows = settings.model_type == "qwen2_5_vl" and torch.device(device).type == "cuda" and name != "float32"
        vision = "flash_attention_2" if windows and is_flash_attn_2_available() else "sdpa"
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, name),
            attn_implementation={"text_config": ATTENTION, "vision_config": vision},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # its own error does not name them, check_whole does
            **placed,
            **shared,
        )
        processor = AutoProcessor.from_pretrained(path, **shared)
        check_whole(config.model_name_or_path, loaded)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or len(tokenizer) <= model.config.image_token_id:  # transformers makes up an empty one
            raise ModelError(f"{config.model_name_or_path!r} has no tokenizer that knows the model's image token")
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises what a damaged file or setting happens to cause
        kind = "folder" if Path(path).is_dir() else "name"
        reason = hub_reason(error) if kind == "name" else f"{error or type(error).__name__}"
        raise ModelError(f"cannot load {kind} {config.model_name_or_path!r}: {reason}") from error
    return (model if placed else model.to(device)), processor


def check_whole(name: str, loaded: Mapping[str, Iterable]) -> None:
    """ModelError where weights are missing or have another shape, which would be random instead; naming them."""
    lost = {
        "are missing": sorted(loaded["missing_keys"]),
        "have another shape": sorted(key for key, *_ in loaded["mismatched_keys"]),
    }
    for what, keys in lost.items():
        if keys:
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            raise ModelError(f"cannot load {name!r}: weights {what}: {', '.join(keys[:NAMED])}{more}")


def quantised(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The language model's layers in 4 (NF4) or 8 bits. ModelError where the library is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"load_in_bits = {bits} needs the library bitsandbytes: pip install bitsandbytes")
    kind = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return BitsAndBytesConfig(llm_int8_skip_modules=WHOLE, bnb_4bit_compute_dtype=dtype, **kind)


def hub_reason(error: BaseException) -> str:
    """What is wrong and what helps, from the hub's error behind the one that transformers raised."""
    chain: list[BaseException] = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for kind, reason in (
        (errors.GatedRepoError, "the hub wants you to accept its terms first, on the model's page; then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such folder here, and no such model on the hub (misspelt, or private and "
         "HF_TOKEN is not set)"),
        (errors.RevisionNotFoundError, "the hub has the model, but not this revision"),
        (errors.HFValidationError, "no such folder here, and no name of the form owner/model"),
        (errors.LocalEntryNotFoundError, "no such folder here, it is not in the hub's cache on this machine, and the "
         "hub cannot be reached (offline? HF_HUB_OFFLINE = 1?)"),
    ):  # fmt: skip
        if any(isinstance(one, kind) for one in chain):
            return reason
    return f"{chain[0] or type(chain[0]).__name__}"
