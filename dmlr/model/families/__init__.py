"""Architectures by the name that their checkpoints give in config.json (`model_type`)."""

from __future__ import annotations

from transformers import PretrainedConfig

from dmlr.model.families.family import Family
from dmlr.model.families.qwen import Qwen3VL, QwenVL
from dmlr.model.families.tiles import InternVL, LlavaOneVision, SmolVLM

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
    """The model's family. ModelError for an architecture that has none."""
    check_known(model.config)
    return FAMILIES[model.config.model_type](model, processor, min_pixels, max_pixels)


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
            "(dmlr/model/families/ is the place for another)"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError(
            f"{kind}: sliding-window layers are not supported: the prefix must stay visible to every think token"
        )
