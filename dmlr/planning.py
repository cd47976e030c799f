"""Before anything runs: does a model fit, at which batch size, how long will a run take, and what would fail.

Everything comes from settings (config.json), from the records of earlier runs and from what a device does in a second:
no weights are loaded and nobody is called. What a model needs is `model.memory`'s arithmetic, and an estimate.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants
from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from dmlr import bench
from dmlr.config import Config, locate, root
from dmlr.data.examples import Example, ImageError, open_image
from dmlr.json_files import as_plain
from dmlr.machine import environment
from dmlr.methods.latent import ltpo_config
from dmlr.methods.workload import PROMPT, workload
from dmlr.model.families import ModelError, check_known
from dmlr.model.memory import MOST, USABLE, Parameters, Rates, Shape, fitting_batch, peak, seconds
from dmlr.parameters import check_parameters, config_of, default_output, from_here
from dmlr.run import evaluate
from dmlr.run.records import (
    FREE_PARAMETERS,
    LOG,
    RESULTS,
    ResultsError,
    differences,
    read_log,
    read_results,
    read_run,
    with_defaults,
)
from dmlr.run.verdicts import llm_settings
from dmlr.show.provenance import in_words

GIB = 2**30
LOOKED_AT = 60  # most results.json files that are read, the newest first; most images that are measured
PRECISIONS = {"float32": (4, None), "bfloat16": (2, None), "8 bits": (2, 8), "4 bits": (2, 4)}  # itemsize, bits
PAPER_TABLE = "the paper's table"

# ------------------------------------------------------------------------------------------- settings of models

# Of the paper's models, the numbers of their config.json on the hub; two fine-tunes share what they were made from.
_QWEN2_5 = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
_QWEN3 = [*_QWEN2_5[:-1], "depth", "vision", "vision_intermediate", "deepstack"]
_SHAPES = {
    "Qwen2.5-VL-3B": dict(zip(_QWEN2_5, (2048, 36, 16, 2, 11_008, 151_936), strict=True)),
    "Qwen2.5-VL-7B": dict(zip(_QWEN2_5, (3584, 28, 28, 4, 18_944, 152_064), strict=True)),
    "Qwen3-VL-4B": dict(zip(_QWEN3, (2560, 36, 32, 8, 9728, 24, 1024, 4096, [5, 11, 17]), strict=True)),
    "Qwen3-VL-8B": dict(zip(_QWEN3, (4096, 36, 32, 8, 12_288, 27, 1152, 4304, [8, 16, 24]), strict=True)),
}
_TIED = ("Qwen2.5-VL-3B", "Qwen3-VL-4B")  # one matrix embeds tokens and scores them
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
    """Settings of one of PAPER_MODELS, from the table; a test counts its parameters against the published totals."""
    kind = PAPER_MODELS[name]
    text = {key: value for key, value in _SHAPES[kind].items() if key in _QWEN2_5}
    text["tie_word_embeddings"] = tied = kind in _TIED
    vision = {"num_heads": 16, "out_hidden_size": text["hidden_size"]}
    if kind.startswith("Qwen2.5"):
        text["max_position_embeddings"] = 128_000
        vision |= {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    text |= {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 262_144}
    depth, hidden, intermediate, deep = (_SHAPES[kind][key] for key in _QWEN3[5:])
    vision |= {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate}
    vision["deepstack_visual_indexes"] = list(deep)
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


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
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(f"{name}: no settings that transformers can read: {reason}") from None
    if name in PAPER_MODELS:
        return paper_settings(name), PAPER_TABLE
    raise ModelError(f"{name}: no such folder, and not in the hub's cache on this machine")


def context_of(settings: PretrainedConfig) -> int | None:
    """Positions that the language model was made for."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


# ------------------------------------------------------------------------------------------- does it fit


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
    work, precisions = workload(Config.make("paper"), context), {}
    for precision, (itemsize, bits) in PRECISIONS.items():
        if bits and kind != "cuda":
            continue  # bitsandbytes computes on GPUs
        weights = parameters.bytes(itemsize, bits)
        batch = fitting_batch(shape, itemsize, work, free - weights, kind)
        each = peak(shape, itemsize, work, 1)
        precisions[precision] = {"weight_bytes": weights, "bytes_per_example": each, "batch": batch}
    return {
        "model": name,
        "settings": where,
        "architecture": settings.model_type,
        "parameters": parameters.total,
        "context": context,
        "cache_bytes_per_position": shape.cache(2),
        "precisions": precisions,
    }


def fits_text(fits: list[dict[str, Any]], free: int, kind: str) -> str:
    """What `fit` gives for some models, for people."""
    rows = [["model", "parameters", "cache / 1000", *PRECISIONS, "settings from"]]
    for row in fits:
        if "error" in row:
            rows.append([row["model"], "unknown"])
            continue
        number = row["parameters"]
        cells = [f"{number / 1e9:.2f} G" if number >= 1e8 else f"{number / 1e6:.2f} M"]
        cells.append(size(1000 * row["cache_bytes_per_position"]))
        for name in PRECISIONS:
            held = row["precisions"].get(name)
            fitting = f"batch {held['batch']}" if held and held["batch"] else "too large"
            cells.append(f"{size(held['weight_bytes'])}, {fitting}" if held else "GPUs only")
        rows.append([row["model"], *cells, row["settings"]])
    memory = "GPU memory" if kind == "cuda" else "RAM"
    return (
        f"What fits in {size(free)} of {memory}: weights, and the batch that goes through together with the paper's\n"
        f"parameters, prompts of {PROMPT} positions and answers of 2048 tokens, in {USABLE[kind]:.0%} of what the "
        "weights\nleave free. An estimate from settings (model/memory.py). Cache: of 1000 positions, 16 bits.\n\n"
        f"{columns(rows)}"
    )


def columns(rows: list[list[str]]) -> str:
    """Rows of text (the last may be short) with their cells under each other."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def size(bytes_: float) -> str:
    """Bytes for people."""
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.0f} MiB"


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
    weights, free, batch = parameters.bytes(itemsize, config.load_in_bits), 0, MOST["cpu"]
    if device == here == "cuda":
        free = torch.cuda.mem_get_info()[0]
        batch = max(1, fitting_batch(shape, itemsize, workload(config, context), free - weights))
    elif device == here:
        free = psutil.virtual_memory().available
    elif device == "cuda":
        batch = None  # nobody can say for a GPU that is elsewhere
    batch = config.batch_size or (batch and min(batch, max(1, math.ceil(len(examples) / config.num_workers))))
    each = peak(shape, itemsize, workload(config, context, images), 1)
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
    return max(min(most, config.max_pixels or most), config.min_pixels or 1)


# ------------------------------------------------------------------------------------------- how long


@dataclass(frozen=True)
class Pace:
    """Seconds of an example with one worker, and where the number is from."""

    seconds: float
    source: str


def earlier_pace(config: Config, dataset: str, method: str, results: Iterable[dict[str, Any]]) -> Pace | None:
    """From earlier results (`earlier_results`): of this method, if possible of this dataset and these parameters."""
    ours, defaults, known = as_plain(config.as_dict()), as_plain(Config().as_dict()), []
    # Whatever may differ on resume has no part in an answer, but the batch has a part in its time.
    names = [name for name in ours if name not in FREE_PARAMETERS | {"dataset"} or name == "batch_size"]
    for result in results:
        speed = (result.get("efficiency") or {}).get("examples_per_second")
        if result.get("method") != method or not speed:
            continue
        theirs = result.get("config") or {}
        other = [name for name in names if theirs.get(name, defaults[name]) != ours[name]]
        other += ["number of threads"] if result["environment"]["device"] != environment()["device"] else []
        elsewhere = Path(str(result.get("dataset"))).name != Path(dataset).name
        source = f"an earlier run{' on ' + Path(str(result['dataset'])).stem if elsewhere else ''}"
        source += f" with another {', '.join(other)}" if other else ""
        known.append((len(other) + elsewhere, Pace(1 / speed, source)))
    return min(known, key=lambda one: one[0])[1] if known else None


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
    return Pace(
        seconds(model.parameters, model.shape, model.itemsize, work, model.batch, rates),
        f"arithmetic and memory alone, at {rates.flops / 1e12:.2g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s as "
        f"measured now, with {work.new_tokens} tokens in every answer",
    )


@lru_cache
def measured_rates(device: str, itemsize: int) -> Rates:
    """What this device does: a product of square matrices, and a copy. About a second."""
    side = 8192 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(torch.float32 if itemsize == 4 else torch.bfloat16)
    product = bench.seconds(lambda: matrix @ matrix, matrix.device, 5)
    return Rates(2 * side**3 / product, bench.copy_bandwidth(matrix.device))


# ------------------------------------------------------------------------------------------- the plan of a run


@dataclass(frozen=True)
class JobPlan:
    """One dataset through one method: examples, how many of them are finished, and how many ended in an error."""

    job: evaluate.Job
    finished: int = 0
    errors: int = 0
    aside: int = 0  # records of an earlier run that would be moved aside
    pace: Pace | None = None

    @property
    def todo(self) -> int:
        return len(self.job.examples) - self.finished

    @property
    def complete(self) -> bool:
        """Whether a run with resume would find nothing to do."""
        return not self.todo and (self.job.folder / RESULTS).is_file()


@dataclass(frozen=True)
class Plan:
    """A run of the benchmark notebook. `errors`: what would fail on this machine, as the run would say it."""

    config: Config
    model: Model
    jobs: list[JobPlan]
    errors: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.errors and all(job.complete for job in self.jobs)

    @property
    def seconds(self) -> float:
        """Of what is still to do, as far as it is known; `untimed` is the rest."""
        return sum(job.todo * job.pace.seconds for job in self.jobs if job.todo and job.pace) / self.config.num_workers

    @property
    def untimed(self) -> list[str]:
        """Methods that are still to do and whose time nobody can tell."""
        return list(dict.fromkeys(job.job.method for job in self.jobs if job.todo and not job.pace))


def plan(config: Config) -> Plan:
    """Everything that is known before the run.

    Raises what the run would raise at once: ConfigError for an unknown method, DatasetError for a file that cannot be
    used, JudgeError for an LLM judge without a key, ModelError for an architecture that is not supported.
    """
    jobs, errors = evaluate.plan(config), []
    llm_settings(config)
    model = describe(config, max((job.examples for job in jobs), key=len))
    earlier = earlier_results(config.model_name_or_path, {root() / "reports" / "runs", evaluate.output_folder(config)})
    plans = []
    for job in jobs:
        pace = earlier_pace(config, job.dataset, job.method, earlier) or settings_pace(config, model, job.method)
        try:
            plans.append(JobPlan(job, *progress(job, config), pace))
        except ResultsError as error:
            errors.append(str(error))
            plans.append(JobPlan(job, pace=pace))
    return Plan(config, model, plans, errors if config.verify_only else errors + obstacles(config, model))


def progress(job: evaluate.Job, config: Config) -> tuple[int, int, int]:
    """Of the records in the run's folder: finished, errors, and those that would be moved aside.

    ResultsError where `resume` would be refused, or the log is damaged. Files are compared by their contents; dtype and
    device are the model's to say, which is not loaded here.
    """
    if not (job.folder / LOG).is_file():
        return 0, 0, 0
    records = read_log(job.folder)
    if not config.resume:
        return 0, 0, len(records)
    saved, checksums = read_run(job.folder), evaluate.checksums(job, config)
    facts, free = saved.get("facts") or {}, FREE_PARAMETERS | checksums.keys() | {"dtype", "device"}
    changes = differences(with_defaults(saved.get("config")), as_plain(config.as_dict()), free)
    changes += [f"the {name} has changed" for name, now in checksums.items() if facts.get(name) not in (None, now)]
    if changes:
        raise ResultsError(f"{job.folder}: cannot resume under another configuration: {'; '.join(changes)}")
    rows = {example.row for example in job.examples}
    ends = [record["stop_reason"] for record in records if record["row"] in rows]
    return sum(end != "error" for end in ends), ends.count("error"), 0


def obstacles(config: Config, model: Model) -> list[str]:
    """What is missing on this machine for the run."""
    missing = []
    if not config.ray_address and model.device == "cuda" and not model.free:
        missing.append(f"device = {config.device!r}, but torch sees no GPU here")
    if (config.num_workers > 1 or config.ray_address) and importlib.util.find_spec("ray") is None:
        missing.append("several workers need Ray, which is not installed: pip install -e '.[ray]'")
    if config.load_in_bits and importlib.util.find_spec("bitsandbytes") is None:
        missing.append(f"load_in_bits = {config.load_in_bits} needs bitsandbytes: pip install bitsandbytes")
    name = config.model_name_or_path
    if model.shape is None or model.source == PAPER_TABLE:  # not on this machine
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        if constants.HF_HUB_OFFLINE or not on_hub:
            offline = f"{name}: not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked"
            missing.append(offline if on_hub else model.why)
    if model.free and model.batch and model.weights > model.free:
        missing.append(f"the weights take {size(model.weights)}, and {size(model.free)} of memory are free")
    return missing


def dry_run(notebook: str | Path, given: Mapping[str, Any], output: str | Path | None = None) -> tuple[str, list[str]]:
    """The plan of a notebook's run as text, and what would fail; seen from the notebook's folder, as the kernel does.

    Of a notebook that is no run of the benchmark (01, 04, ...) only parameters and output are known. Raises as `plan`,
    and ConfigError for parameters that the notebook does not have.
    """
    notebook = Path(notebook).resolve()
    values = from_here(check_parameters(notebook, given))
    executed, config = Path(output or default_output(notebook, values)), config_of(notebook, values)
    report = shown(executed.with_suffix(".html"))
    if config is None:
        lines = [f"{name}: {value}" for name, value in values.items()] or ["all parameters at their defaults"]
        return "\n".join([*lines, f"report: {report}"]), []
    with working_folder(notebook.parent):
        made = plan(config)
    return f"{as_text(made)}\nreport     {report}", made.errors


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """The process in that folder for a while; where a `.env` is looked for, among other things."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ------------------------------------------------------------------------------------------- for people


def as_text(made: Plan) -> str:
    """A plan: a row for each dataset and method, then the model, its memory, and the time with where it is from."""
    config, model = made.config, made.model
    about, need = f"settings unknown: {model.why}", "unknown"
    if model.shape is not None:
        asked = "settings from the paper's table; the hub will be asked for the model"
        known = asked if model.source == PAPER_TABLE else f"settings from {model.source}"
        about = f"{model.parameters.total / 1e9:.3g} billion parameters; {known}"
        need = f"{model.device}: {size(model.weights)} of weights and {size(model.each)} for each example of a batch"
        need += f"; {size(model.free)} free here" if model.free else ""
    lines = [
        ("model", f"{config.model_name_or_path} ({about})"),
        ("memory", need),
        ("workers", f"{config.num_workers}{f' on Ray at {config.ray_address}' if config.ray_address else ''}"),
        ("batch", f"{model.batch or 'by free memory of the GPU'}{'' if config.batch_size else ' (chosen)'}"),
        ("output", shown(evaluate.output_folder(config))),
        ("time", f"{time_of([made])}, loading the model not counted"),
        *(("", note) for note in _notes(made.jobs)),
    ]
    rows = [["dataset", "method", "examples", "unusable rows", "finished", "to do", "time"]]
    for state in made.jobs:
        job, spent = state.job, state.pace and in_words(state.todo * state.pace.seconds / config.num_workers)
        numbers = [len(job.examples), len(job.problems), state.finished, state.todo]
        time = (spent or "unknown") if state.todo else "–"
        rows.append([evaluate.name(job.dataset), job.method, *map(str, numbers), time])
    head = "\n".join(f"{name:<11}{text}" for name, text in lines)
    return f"{columns(rows)}\n\n{head}"


def time_of(plans: Sequence[Plan]) -> str:
    """Of all of them, one after the other, with what is not in it."""
    known, untimed = sum(made.seconds for made in plans), sorted({name for made in plans for name in made.untimed})
    rest = f"unknown for {', '.join(untimed)}" if untimed else ""
    return ", ".join(filter(None, [in_words(known) if known or not rest else "", rest]))


def shown(path: Path | str) -> str:
    """A path, relative to the project where it lies in it."""
    return str(path).removeprefix(f"{root()}{os.sep}")


def _notes(jobs: list[JobPlan]) -> list[str]:
    by_source: dict[str, dict[str, None]] = {}  # methods by where their time is from
    for state in jobs:
        if state.todo:
            by_source.setdefault(state.pace.source if state.pace else "unknown", {})[state.job.method] = None
    notes = [f"{', '.join(methods)}: {source}" for source, methods in by_source.items()]
    for state in jobs:
        name = f"{evaluate.name(state.job.dataset)} {state.job.method}"
        unjudged = sum(not example.solution for example in state.job.examples)
        notes += [f"{name}: {unjudged} examples have no ground truth and are skipped"] if unjudged else []
        notes += [f"{name}: {state.errors} errors are tried again"] if state.errors else []
        aside = f"{name}: {state.aside} records of an earlier run are moved aside; resume = true goes on from them"
        notes += [aside] if state.aside else []
        notes += [f"{name}: {problem.message}" for problem in state.job.problems[:3]]
    return notes
