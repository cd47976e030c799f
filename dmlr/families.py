"""Architectures by the name that their checkpoints give in config.json (`model_type`)."""

from __future__ import annotations

from dmlr.family import Family
from dmlr.qwen import Qwen3VL, QwenVL
from dmlr.tiles import InternVL, LlavaOneVision, SmolVLM

FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "llava": Family,
    "llava_onevision": LlavaOneVision,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
}


class ModelError(ValueError):
    """The checkpoint cannot be loaded, or its architecture lacks something the method needs."""


def family_of(model, processor, min_pixels: int | None = None, max_pixels: int | None = None) -> Family:
    """The model's family. ModelError says what an architecture lacks, or that nobody has tested it."""
    kind, name = model.config.model_type, type(model).__name__
    known = ", ".join(FAMILIES)
    core = getattr(model, "model", None)
    if kind not in FAMILIES:
        lacks = [what for what, there in _needs(model, core, processor).items() if not there]
        because = f"it has no {', '.join(lacks)}" if lacks else "nobody has tested it (dmlr/families.py is the place)"
        raise ModelError(f"{name}: the architecture {kind!r} is not supported: {because}; supported are {known}")
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ModelError(
            f"{name}: sliding-window layers are not supported: the prefix must stay visible to every think token"
        )
    return FAMILIES[kind](model, processor, min_pixels, max_pixels)


def _needs(model, core, processor) -> dict[str, bool]:
    """What the method needs, and whether it is there."""
    return {
        "image features in the language model's space (get_image_features)": hasattr(core, "get_image_features"),
        "language model of its own": hasattr(core, "language_model") or hasattr(core, "text_model"),
        "image token (image_token_id)": getattr(model.config, "image_token_id", None) is not None,
        "image processor": getattr(processor, "image_processor", None) is not None,
    }
