"""Settings of a model without its weights and without the network: of a folder, of the hub's cache, or of the paper.

The paper's models as shapes: the numbers of their published config.json, put into transformers' own classes. Two
fine-tunes share the shape of what they were made from. The test counts their parameters against the published totals.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from dmlr.config import locate
from dmlr.model.families import ModelError

_QWEN2_5 = "hidden layers heads kv_heads intermediate vocabulary tied".split()
_QWEN3 = "hidden layers heads kv_heads intermediate tied depth vision vision_intermediate deep".split()

# config.json of the hub, Qwen/Qwen2.5-VL-*-Instruct and Qwen/Qwen3-VL-*-Instruct.
_SHAPES = {
    "Qwen2.5-VL-3B": dict(zip(_QWEN2_5, (2048, 36, 16, 2, 11_008, 151_936, True), strict=True)),
    "Qwen2.5-VL-7B": dict(zip(_QWEN2_5, (3584, 28, 28, 4, 18_944, 152_064, False), strict=True)),
    "Qwen3-VL-4B": dict(zip(_QWEN3, (2560, 36, 32, 8, 9728, True, 24, 1024, 4096, (5, 11, 17)), strict=True)),
    "Qwen3-VL-8B": dict(zip(_QWEN3, (4096, 36, 32, 8, 12_288, False, 27, 1152, 4304, (8, 16, 24)), strict=True)),
}
# The paper's models by hub id, and the shape that each has.
PAPER_MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen2.5-VL-3B",
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen3-VL-4B",
    "Qwen/Qwen3-VL-8B-Instruct": "Qwen3-VL-8B",
    "Fancy-MLLM/R1-Onevision-7B": "Qwen2.5-VL-7B",
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-3B": "Qwen2.5-VL-3B",
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-7B": "Qwen2.5-VL-7B",
}


def paper_settings(name: str) -> PretrainedConfig:
    """Settings of one of PAPER_MODELS, from the table."""
    size = _SHAPES[PAPER_MODELS[name]]
    text = {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "intermediate_size": size["intermediate"],
        "tie_word_embeddings": size["tied"],
    }
    if "depth" not in size:
        text |= {"vocab_size": size["vocabulary"], "max_position_embeddings": 128_000}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        vision |= {"out_hidden_size": size["hidden"]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size["tied"])
    text |= {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 262_144}
    vision = {"depth": size["depth"], "hidden_size": size["vision"], "intermediate_size": size["vision_intermediate"]}
    vision |= {"num_heads": 16, "out_hidden_size": size["hidden"], "deepstack_visual_indexes": list(size["deep"])}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size["tied"])


def settings_of(name: str, revision: str = "") -> tuple[PretrainedConfig, str]:
    """Settings of a model by folder or hub id, and where they were found: folder, hub's cache or the paper's table.

    Nothing is fetched: ModelError when they are not on this machine and the model is none of the paper's.
    """
    path = locate(name)
    folder = Path(path).is_dir()
    try:
        settings = AutoConfig.from_pretrained(str(path), local_files_only=True, revision=revision or "main")
        return settings, "folder" if folder else "hub's cache"
    except (OSError, ValueError, KeyError) as error:
        if folder:
            raise ModelError(f"{name}: no settings that transformers can read: {_first_line(error)}") from None
    if name in PAPER_MODELS:
        return paper_settings(name), "the paper's table"
    raise ModelError(f"{name}: no such folder, and not in the hub's cache on this machine")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
