"""The paper's Table 1, to be printed beside our numbers: facts copied by hand, nothing that this code measured."""

from __future__ import annotations

import re
from pathlib import Path

from dmlr.data.benchmarks import BENCHMARKS

SOURCE = (
    "Liu et al., arXiv 2512.12623, Table 1 (at most 1000 items each; labels of its rows as far as they are legible)"
)
_TABLE = """
Qwen2.5-VL-7B  vanilla         58.7  21.6  37.5  65.4  68.7  59.3  49.7
Qwen2.5-VL-7B  multimodal-cot  56.4  21.8  35.6  63.6  68.1  57.9  49.5
Qwen2.5-VL-7B  ccot            57.8  22.5  36.3  64.9  69.0  58.7  50.2
Qwen2.5-VL-7B  icot            58.9  23.3  37.0  65.5  69.3  60.4  50.4
Qwen2.5-VL-7B  dmlr            59.1  24.4  38.8  65.8  70.1  60.1  51.3
Qwen2.5-VL-3B  vanilla         48.2  15.7  29.0  64.2  55.6  50.2  44.1
Qwen2.5-VL-3B  dmlr            51.0  17.7  33.3  64.7  56.8  51.2  46.9
VLAA-Thinking  vanilla         61.1  23.5  41.5  62.0  68.3  58.9  50.6
VLAA-Thinking  dmlr            62.9  27.6  43.9  67.9  69.4  59.2  52.0
R1-OneVision   vanilla         51.2  18.7  40.7  62.1  67.0  52.1  50.9
R1-OneVision   dmlr            58.0  23.3  42.9  64.1  71.9  56.2  55.4
Qwen3-VL-8B    vanilla         66.0  32.9  66.2  73.2  71.9  68.1  54.1
Qwen3-VL-8B    dmlr            66.9  36.2  67.7  74.6  72.8  70.0  55.6
Qwen3-VL-4B    vanilla         64.7  24.2  65.4  71.6  71.3  57.4  52.4
Qwen3-VL-4B    dmlr            65.6  29.4  65.9  72.7  72.3  60.3  54.9
"""
# Hub names of models that the paper calls otherwise. VLAA-Thinker exists with 3B and 7B, and the paper does not say
# which it took: neither has its numbers.
_CALLED = {"r1-onevision-7b": "r1-onevision"}
TABLE_1 = {
    (model.lower(), method, benchmark): float(value)
    for model, method, *values in map(str.split, _TABLE.strip().splitlines())
    for benchmark, value in zip(BENCHMARKS, values, strict=True)
}


def benchmark_of(dataset: str) -> str | None:
    """Which of the paper's benchmarks a dataset file is, by the names that `python -m dmlr data` gives; None: none."""
    stem = re.sub(r"-\d+-seed-?\d+$", "", Path(dataset).name.removesuffix(".json"))
    return stem if stem in BENCHMARKS else None


def accuracy(model: str, method: str, dataset: str) -> float | None:
    """The paper's accuracy in per cent; None unless model, method and benchmark are the paper's.

    A model is the paper's by its whole name, with or without "-Instruct": a model fine-tuned from it is another one.
    """
    name = Path(model.rstrip("/")).name.lower().removesuffix("-instruct")
    return TABLE_1.get((_CALLED.get(name, name), method, benchmark_of(dataset)))
