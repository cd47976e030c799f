"""What opening and encoding photographs costs a run: `python tests/photographs.py [COUNT]`.

Answers questions about drawn photographs (JPEG, 12 megapixels, 256 image tokens) with a random model of shape A, and
prints which share of the time the model waits for images: each opened when it is asked for, and opened ahead. What the
first method has opened is kept for the second, as far as there is room.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.random_weights import random_vlm
from dmlr.run import batches

BATCH = 8


def photographs(folder: Path, count: int) -> list[Example]:
    """Questions about smooth noise: as slow to decode as what a camera makes."""
    noise = torch.Generator().manual_seed(0)
    examples = []
    for row in range(count):
        coarse = torch.randint(256, (300, 400, 3), generator=noise, dtype=torch.uint8).numpy()
        path = folder / f"{row}.jpg"
        Image.fromarray(coarse).resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=90)
        examples.append(Example(row, row, "What is in the picture?", "nothing", (str(path),)))
    return examples


def waiting(executor: batches.InProcess, method: str, examples: list[Example]) -> tuple[float, float]:
    """Seconds a photograph of the whole run, and of them those without the model."""
    work, busy = batches.answer_batch, 0.0

    def timed(*given):
        nonlocal busy
        start = time.perf_counter()
        answers = work(*given)
        busy += time.perf_counter() - start
        return answers

    batches.answer_batch = timed
    start = time.perf_counter()
    together = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    assert all(answer.error is None for _, answer in executor.answers(method, together, {}))
    batches.answer_batch = work
    whole = time.perf_counter() - start
    return whole / len(examples), (whole - busy) / len(examples)


def main(count: int = 48) -> None:
    config = Config.make("paper", device="cpu", min_pixels=64, max_pixels=256, max_new_tokens=64)
    vlm, ahead = random_vlm("A"), batches.ahead
    vlm.family = type(vlm.family)(vlm.model, vlm.processor, 64, 256)
    with tempfile.TemporaryDirectory() as folder:
        examples = photographs(Path(folder), count)
        for name, batches.ahead in (("when asked for", iter), ("ahead", ahead)):
            executor = batches.InProcess(vlm, config)
            for method in ("vanilla", "dmlr"):
                whole, idle = waiting(executor, method, examples)
                print(f"{method}, opened {name}: {whole:.2f} s a photograph, waiting {idle:.3f} s, {idle / whole:.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
