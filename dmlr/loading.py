"""Checkpoints, from the hub or from a folder, without running code from them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dmlr.config import Config, locate
from dmlr.families import ModelError
from dmlr.kv_cache import ATTENTION


def load_checkpoint(config: Config) -> tuple:
    """Model and processor of `model_name_or_path`. ModelError says what failed."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = config.dtype if config.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    path = str(locate(config.model_name_or_path))
    shared = {
        "trust_remote_code": config.trust_remote_code,
        "token": os.environ.get("HUGGING_FACE_TOKEN") or os.environ.get("HF_TOKEN"),
    }
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, name),
            attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
            use_safetensors=True,
            **shared,
        )
        processor = AutoProcessor.from_pretrained(path, **shared)
    except (OSError, ValueError, KeyError, ImportError) as error:
        kind = "folder" if Path(path).is_dir() else "name (no such folder here; the hub was asked)"
        raise ModelError(f"cannot load {kind} {config.model_name_or_path!r}: {error}") from error
    return model.to(device), processor
