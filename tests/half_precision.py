"""What batch size changes in bfloat16: `python tests/half_precision.py [MINUTES]` asks the embedded questions alone and
24 at a time, and counts equal patches, best iterations and answers. In float32 all are equal (test_embedded.py)."""

from __future__ import annotations

import sys
import time
from collections import Counter

from dmlr.config import Config
from dmlr.data.examples import load_dataset
from dmlr.methods import METHODS
from dmlr.model.vlm import VLM
from dmlr.run.batches import prepare

BATCH = 24
SUITES = {f"data/shapes/{name}.json": "data/models/shapes-vl" for name in ("mathematics", "visual", "composition")}
SUITES["data/shapes/seek.json"] = "data/models/shapes-seek"


def compared(vlm: VLM, config: Config, examples: list) -> Counter:
    """How many of these examples are the same alone and together."""
    questions = prepare(examples).questions
    together = METHODS["dmlr"](vlm, questions, config)
    alone = [METHODS["dmlr"](vlm, [question], config)[0] for question in questions]
    counts = Counter(questions=len(questions))
    for one, other in zip(alone, together, strict=True):
        counts["patches"] += one.reasoning.patches == other.reasoning.patches
        counts["iteration"] += one.reasoning.best_step == other.reasoning.best_step
        counts["answers"] += one.text == other.text
    return counts


def main(minutes: float = 10.0) -> None:
    end = time.monotonic() + 60 * minutes
    config = Config.make("demo", device="cpu", dtype="bfloat16")
    models = {path: VLM.load(config.replace(model_name_or_path=path)) for path in dict.fromkeys(SUITES.values())}
    datasets = {path: load_dataset(path)[0] for path in SUITES}
    total = {path: Counter() for path in SUITES}
    for start in range(0, max(map(len, datasets.values())), BATCH):  # of all suites alike, as far as the time goes
        for path, examples in datasets.items():
            if (block := examples[start : start + BATCH]) and time.monotonic() < end:
                total[path] += compared(models[SUITES[path]], config, block)
                print(path, dict(total[path]), flush=True)
    print("all", dict(sum(total.values(), Counter())))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
