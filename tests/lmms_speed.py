"""Questions per second of lmms-eval's own Qwen2.5-VL class and of ours, in one process: the price of the loop.

    .venv-lmms/bin/python tests/lmms_speed.py [MODEL [QUESTIONS]]

The same weights, questions, wording and most new tokens, float32 on a CPU, medians of three rounds in turn; half of the
questions at batch 1. Theirs loads in bfloat16, and is timed so too.
"""

import json
import operator
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.modules.setdefault("decord", ModuleType("decord"))  # reads videos; imported always and not on every machine
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL  # noqa: E402

from dmlr.lmms_eval import DMLR  # noqa: E402

SHAPES = Path(__file__).parents[1] / "data" / "shapes"


def messages_of(doc):
    image = {"type": "image", "url": Image.open(SHAPES / doc["image_path"]).convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["prompt"]}]}]


def theirs(path, batch, as_loaded=False):
    pixels = {"min_pixels": 28 * 28, "max_pixels": 256 * 28 * 28}  # the images stay as they are, as with ours
    model = Qwen2_5_VL(path, device="cpu", device_map="cpu", batch_size=batch, **pixels)
    if not as_loaded:
        model.model.float()
    return model


def main(path="data/models/shapes-vl", count="32"):
    docs = json.loads((SHAPES / "mathematics.json").read_text())[: int(count)]
    asked = [(doc["prompt"], messages_of, {"max_new_tokens": 64}, i, "shapes", "test") for i, doc in enumerate(docs)]
    about = [{"task": "shapes", "doc_id": i, "repeats": 1} for i in range(len(docs))]
    every = [Instance("generate_until", one, 0, what) for one, what in zip(asked, about, strict=True)]
    ours = {"preset": "demo", "prompt": "task", "budget": "task"}
    for batch, requests in ((16, every), (1, every[: len(every) // 2])):
        models = {
            "qwen2_5_vl of lmms-eval": theirs(path, batch),
            "the same in bfloat16": theirs(path, batch, as_loaded=True),
            **{
                f"dmlr, method={method}": DMLR(path, method, batch_size=batch, **ours) for method in ("vanilla", "dmlr")
            },
        }
        seconds, said = {name: [] for name in models}, {}
        for number in range(4):  # the first warms up
            for name, model in models.items():
                model.task_dict = {"shapes": {"test": docs}}
                began = time.perf_counter()
                results = model.generate_until(requests if number else requests[:batch])
                seconds[name].append(time.perf_counter() - began)
                said[name] = [result.text for result in results]
        base = said["qwen2_5_vl of lmms-eval"]
        for name in models:
            rate = len(requests) / statistics.median(seconds[name][1:])
            same = f"{sum(map(operator.eq, said[name], base))} of {len(base)} texts as theirs"
            print(f"batch {batch:2}  {name:24} {rate:7.2f} questions/s, {same}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
