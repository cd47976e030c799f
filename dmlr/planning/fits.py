"""Which models fit in so much memory, in which precision, at which batch size: from settings, without weights."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dmlr.config import Config
from dmlr.methods.workload import PROMPT, workload
from dmlr.model.families import ModelError
from dmlr.model.memory import USABLE, Parameters, Shape, fitting_batch, peak
from dmlr.planning.known_models import settings_of

GIB = 2**30
# What a model is held in: bytes per number of what is not quantised, and bits of what is.
PRECISIONS = {"float32": (4, None), "bfloat16": (2, None), "8 bits": (2, 8), "4 bits": (2, 4)}


def fit(name: str, free: int, kind: str) -> dict[str, Any]:
    """One model against `free` bytes of a device: parameters, cache, and by precision weights and batch (0: too large).

    The run is the paper's: vanilla and DMLR, prompts of PROMPT positions, at most 2048 new tokens. A model that cannot
    be described has an `error` instead.
    """
    try:
        settings, where = settings_of(name)
        shape, parameters, context = Shape.of(settings), Parameters.of(settings), context_of(settings)
    except ModelError as error:
        return {"model": name, "error": str(error)}
    except (AttributeError, ValueError) as error:
        return {"model": name, "error": f"{name}: not a vision-language model that can be described: {error}"}
    work = workload(Config.make("paper"), context)
    held = {}
    for precision, (itemsize, bits) in PRECISIONS.items():
        if bits and kind != "cuda":
            continue  # bitsandbytes computes on GPUs
        weights = parameters.bytes(itemsize, bits)
        batch = fitting_batch(shape, itemsize, work, free - weights, kind)
        each = peak(shape, itemsize, work, 1)
        held[precision] = {"weight_bytes": weights, "bytes_per_example": each, "batch": batch}
    return {
        "model": name,
        "settings": where,
        "architecture": settings.model_type,
        "parameters": parameters.total,
        "context": context,
        "cache_bytes_per_position": shape.cache(2),
        "precisions": held,
    }


def context_of(settings: PretrainedConfig) -> int | None:
    """Positions that the language model was made for."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def table(found: list[dict[str, Any]], free: int, kind: str) -> str:
    """What `fit` found of some models, for people."""
    rows = [["model", "parameters", "cache / 1000", *PRECISIONS, "settings from"]]
    for row in found:
        if "error" in row:
            rows.append([row["model"], "unknown"])
            continue
        cells = [_count(row["parameters"]), size(1000 * row["cache_bytes_per_position"])]
        for name in PRECISIONS:
            held = row["precisions"].get(name)
            fits = f"batch {held['batch']}" if held and held["batch"] else "too large"
            cells.append(f"{size(held['weight_bytes'])}, {fits}" if held else "GPUs only")
        rows.append([row["model"], *cells, row["settings"]])
    memory = "GPU memory" if kind == "cuda" else "RAM"
    return (
        f"What fits in {size(free)} of {memory}: weights, and the batch that goes through together with the paper's\n"
        f"parameters, prompts of {PROMPT} positions and answers of 2048 tokens, in {USABLE[kind]:.0%} of what the "
        "weights\nleave free. An estimate from settings (footprint.py). Cache: of 1000 positions, 16 bits.\n\n"
        f"{columns(rows)}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e8 else f"{number / 1e6:.2f} M"


def columns(rows: list[list[str]]) -> str:
    """Rows of text (the last may be short) with their cells under each other."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def size(bytes_: float) -> str:
    """Bytes for people."""
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.0f} MiB"
