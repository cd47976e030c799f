"""`python -m dmlr doctor`: what this machine has, what of it is broken, and which models fit in it; nothing is fetched.

Of secrets it tells only whether they are set.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator

import psutil
import torch
from huggingface_hub import constants

from dmlr.config import Config
from dmlr.data.check import check_dataset
from dmlr.data.examples import DatasetError
from dmlr.judge.llm_judge import JudgeError, JudgeSettings
from dmlr.machine import environment
from dmlr.methods.workload import PROMPT, workload
from dmlr.model.families import ModelError
from dmlr.model.loading import load_checkpoint
from dmlr.model.memory import USABLE, fitting_batch
from dmlr.planning import PAPER_MODELS, columns, described, size

EMBEDDED_MODEL = "data/models/shapes-vl"
EMBEDDED_DATA = tuple(f"data/shapes/{suite}.json" for suite in ("mathematics", "visual", "composition"))
EXTRAS = ("ray", "bitsandbytes")  # several workers; weights in few bits
PRECISIONS = {"float32": (4, None), "bfloat16": (2, None), "8 bits": (2, 8), "4 bits": (2, 4)}  # itemsize, bits


def examine(models: Iterable[str] = (), memory: int | None = None) -> tuple[str, list[str]]:
    """A report for people, and what is needed and does not work.

    models: folders or hub ids beside the paper's and the embedded one. memory: bytes of a GPU to plan with, instead of
    what is free here.
    """
    here, ram = environment(), psutil.virtual_memory()
    gpus = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    free = memory or max((free for free, _ in gpus), default=ram.available)
    keys = [name for name in ("HF_TOKEN", "HUGGING_FACE_TOKEN", "OPENAI_API_KEY") if os.environ.get(name)]
    extras = [f"{name} is {'' if importlib.util.find_spec(name) else 'not '}there" for name in EXTRAS]
    try:
        judge = f"{JudgeSettings.from_environment().model} can be asked"
    except JudgeError as error:
        judge = str(error).partition(" (")[0]
    table, unknown = fits([EMBEDDED_MODEL, *models, *PAPER_MODELS], free, "cuda" if gpus or memory else "cpu")
    broken = list(embedded())
    lines = [
        ("software", ", ".join([*(f"{name} {here[name]}" for name in ("python", "torch", "transformers")), *extras])),
        ("device", f"{here['device']}; {', '.join(f'{size(f)} of {size(t)} free' for f, t in gpus) or 'no GPU seen'}"),
        ("memory", f"{size(ram.available)} of {size(ram.total)} free; disk: {size(shutil.disk_usage('.').free)} free"),
        ("hub", "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "asked for what is not in its cache"),
        ("keys", f"{', '.join(keys) or 'none'} set"),
        ("LLM judge", judge),
        ("embedded", "; ".join(broken) or f"{len(EMBEDDED_DATA)} suites and the model are whole"),
    ]
    report = ["\n".join(f"{name:<11}{text}" for name, text in lines), table]
    return "\n\n".join(report + [f"broken: {problem}" for problem in broken + unknown]), broken + unknown


def embedded() -> Iterator[str]:
    """What is wrong with the embedded datasets and the embedded model."""
    for dataset in EMBEDDED_DATA:
        try:
            yield from (f"{dataset}, row {problem.row}: {problem.message}" for problem in check_dataset(dataset))
        except DatasetError as error:
            yield str(error)
    try:
        load_checkpoint(Config(model_name_or_path=EMBEDDED_MODEL, device="cpu"))
    except ModelError as error:
        yield str(error)


def fits(models: Iterable[str], free: int, kind: str) -> tuple[str, list[str]]:
    """A table of models against `free` bytes of a device, for people, and those that cannot be described."""
    rows, unknown = [["model", "parameters", "cache / 1000", *PRECISIONS, "settings from"]], []
    for name in dict.fromkeys(models):
        try:
            shape, source = described(name)
        except ModelError as error:
            rows.append([name, "unknown"])
            unknown.append(str(error))
            continue
        work, parameters = workload(Config.make("paper"), shape.context), shape.parameters
        cells = [f"{parameters.total / 1e9:.3g} G", size(1000 * shape.cache(2))]
        for itemsize, bits in PRECISIONS.values():
            weights = parameters.bytes(itemsize, bits)
            batch = fitting_batch(shape, itemsize, work, free - weights, kind)
            held = f"{size(weights)}, {f'batch {batch}' if batch else 'too large'}"
            cells.append("GPUs only" if bits and kind != "cuda" else held)  # bitsandbytes computes on GPUs
        rows.append([name, *cells, source])
    return (
        f"What fits in {size(free)} of {'GPU memory' if kind == 'cuda' else 'RAM'}: weights, and the batch that goes "
        f"through together with the\npaper's parameters, prompts of {PROMPT} positions and answers of 2048 tokens, in "
        f"{USABLE[kind]:.0%} of what the\nweights leave free. An estimate from settings (model/memory.py). "
        f"Cache: of 1000 positions, 16 bits.\n\n{columns(rows)}"
    ), unknown
