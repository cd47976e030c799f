"""How long a run will take and what memory: from earlier runs of the model on this machine, else from its settings.

Loads no model. Knows nothing about what is finished already or how a plan is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from dmlr import bench
from dmlr.config import Config, locate
from dmlr.data.examples import Example, ImageError, open_image
from dmlr.json_files import as_plain
from dmlr.machine import environment
from dmlr.methods.latent import ltpo_config
from dmlr.methods.workload import workload
from dmlr.model.families import ModelError, check_known
from dmlr.model.memory import MOST, Parameters, Rates, Shape, fitting_batch, peak, seconds
from dmlr.planning.fits import context_of
from dmlr.planning.known_models import settings_of
from dmlr.run.records import FREE_PARAMETERS, RESULTS, ResultsError, read_results

LOOKED_AT = 60  # most results.json files that are read, the newest first; most images that are measured


@dataclass(frozen=True)
class Model:
    """A run's model as far as its settings say; `shape` is None where they are not on this machine, and `why` says so.

    `itemsize` is in bytes per number, `batch` in examples, memory in bytes; a batch of None: nobody can say.
    """

    device: str  # its type
    itemsize: int
    batch: int | None
    why: str = ""
    source: str = ""
    shape: Shape | None = None
    parameters: Parameters | None = None
    weights: int = 0
    each: int = 0  # over the weights, of one example of a batch
    free: int = 0  # on this machine now
    context: int | None = None  # positions
    images: int | None = None  # image tokens of an example


def describe(config: Config, examples: Sequence[Example]) -> Model:
    """The model of a run over such examples. ModelError for an architecture that cannot be run."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.device == "auto" else config.device.partition(":")[0]
    itemsize = {"auto": 4 if device == "cpu" else 2, "float32": 4}.get(config.dtype, 2)
    try:
        settings, source = settings_of(config.model_name_or_path, config.revision)
    except ModelError as error:
        return Model(device, itemsize, config.batch_size, why=str(error))
    check_known(settings)
    shape, parameters = Shape.of(settings), Parameters.of(settings)
    context, images = context_of(settings), image_tokens(config, settings, examples)
    work = workload(config, context, images)
    weights, free, batch = parameters.bytes(itemsize, config.load_in_bits), 0, MOST["cpu"]
    if device == here == "cuda":
        free = torch.cuda.mem_get_info()[0]
        batch = max(1, fitting_batch(shape, itemsize, workload(config, context), free - weights))
    elif device == here:
        free = psutil.virtual_memory().available
    elif device == "cuda":
        batch = None  # nobody can say for a GPU that is elsewhere
    fair = max(1, math.ceil(len(examples) / config.num_workers))
    batch = config.batch_size or (batch and min(batch, fair))
    each = peak(shape, itemsize, work, 1)
    return Model(device, itemsize, batch, "", source, shape, parameters, weights, each, free, context, images)


def image_tokens(config: Config, settings: PretrainedConfig, examples: Sequence[Example]) -> int | None:
    """Image tokens of the largest of the first images, for models that take any size (Qwen's); None for others."""
    vision = settings.vision_config
    if not (isinstance(getattr(vision, "patch_size", None), int) and hasattr(vision, "spatial_merge_size")):
        return None
    side, most = vision.patch_size * vision.spatial_merge_size, 0
    for example in examples[:LOOKED_AT]:
        try:
            width, height = open_image(example.image).size if example.image else (0, 0)
        except ImageError:
            continue  # an error record of the run
        most = max(most, math.ceil(width / side) * math.ceil(height / side))
    most = min(most, config.max_pixels or most)
    return max(most, config.min_pixels or 1)


@dataclass(frozen=True)
class Pace:
    """Seconds of an example with one worker, and where the number is from."""

    seconds: float
    source: str


def earlier_pace(config: Config, dataset: str, method: str, results: Iterable[dict[str, Any]]) -> Pace | None:
    """From earlier results (`earlier_results`): of this method, if possible of this dataset and these parameters."""
    ours, defaults, found = as_plain(config), as_plain(Config()), []
    for result in results:
        speed = (result.get("efficiency") or {}).get("examples_per_second")
        if result.get("method") != method or not speed:
            continue
        theirs = result.get("config") or {}
        # Whatever may differ on resume has no part in an answer, but the batch has a part in its time.
        names = [name for name in ours if name not in FREE_PARAMETERS | {"dataset"} or name == "batch_size"]
        other = [name for name in names if theirs.get(name, defaults[name]) != ours[name]]
        other += ["number of threads"] if result["environment"]["device"] != environment()["device"] else []
        elsewhere = Path(str(result.get("dataset"))).name != Path(dataset).name
        found.append((len(other) + elsewhere, other, elsewhere, 1 / speed, result))
    if not found:
        return None
    _, other, elsewhere, pace, result = min(found, key=lambda one: one[0])
    source = f"an earlier run{' on ' + Path(str(result['dataset'])).stem if elsewhere else ''}"
    return Pace(pace, source + (f" with another {', '.join(other)}" if other else ""))


def earlier_results(model: str, folders: Iterable[Path]) -> list[dict[str, Any]]:
    """results.json of runs of this model on this machine's device, the newest first, without their entries."""
    device, wanted, kept = environment()["device"].partition(",")[0], _same(model), []
    paths = {path for folder in folders for path in folder.rglob(RESULTS)}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:LOOKED_AT]:
        try:
            result = read_results(path)
        except ResultsError:
            continue
        made_on = str((result.get("environment") or {}).get("device")).partition(",")[0]  # without threads
        if _same(str(result.get("model"))) == wanted and made_on == device:
            kept.append({**result, "entries": []})
    return kept


def _same(model: str) -> str:
    path = Path(locate(model))
    return str(path.resolve()) if path.is_dir() else model


def settings_pace(config: Config, model: Model, method: str) -> Pace | None:
    """From settings and what this device does per second; None for a device that is not here, an unknown model, or a
    method whose work depends on its answers."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if model.shape is None or model.device != here or not model.batch or config.ray_address:
        return None
    if method in ("self-consistency", "random"):
        return None
    rates = measured_rates(here, model.itemsize)
    alone = ltpo_config(config).replace(methods="dmlr") if method == "ltpo" else config.replace(methods=method)
    work = workload(alone, model.context, model.images)
    pace = seconds(model.parameters, model.shape, model.itemsize, work, model.batch, rates)
    return Pace(
        pace,
        f"arithmetic and memory alone, at {rates.flops / 1e12:.2g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s as "
        f"measured now, with {work.new_tokens} tokens in every answer",
    )


@lru_cache
def measured_rates(device: str, itemsize: int) -> Rates:
    """What this device does: a product of square matrices, and a copy. About a second."""
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(torch.float32 if itemsize == 4 else torch.bfloat16)
    product = bench.seconds(lambda: matrix @ matrix, matrix.device, 5)
    return Rates(2 * size**3 / product, bench.copy_bandwidth(matrix.device))
