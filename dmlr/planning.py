"""Before anything runs: does a model fit, at which batch size, about how long will it take, and what would fail.

Everything comes from settings (config.json), from the records of earlier runs and from what a device does in a second:
no weights are loaded and nobody is called. What a model needs is `model.memory`'s arithmetic, and an estimate.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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
from dmlr.methods.ulr import ulr_config
from dmlr.methods.workload import workload
from dmlr.model.families import ModelError, check_known
from dmlr.model.memory import MOST, Parameters, Shape, fitting_batch, peak, seconds
from dmlr.parameters import check_parameters, config_of, default_output, from_here
from dmlr.run import evaluate, records
from dmlr.run.verdicts import llm_settings
from dmlr.show.provenance import in_words

LOOKED_AT = 60  # most results.json files that are read, the newest first; most images that are measured
PAPER_TABLE = "the paper's table"


def _settings(kind: type[PretrainedConfig], sizes: tuple, vocabulary: int, context: int, tied: bool, **vision: Any):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    text = dict(zip(names, sizes, strict=True)) | {"vocab_size": vocabulary, "max_position_embeddings": context}
    text |= {"tie_word_embeddings": tied}  # one matrix embeds tokens and scores them
    vision |= {"out_hidden_size": text["hidden_size"]}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied)


# Of the paper's models, the numbers of their config.json on the hub; fine-tunes share what they were made from.
_qwen2_5 = partial(_settings, Qwen2_5_VLConfig, context=128_000, hidden_size=1280)
_QWEN2_5_3B = partial(_qwen2_5, (2048, 36, 16, 2, 11_008), vocabulary=151_936, tied=True)
_QWEN2_5_7B = partial(_qwen2_5, (3584, 28, 28, 4, 18_944), vocabulary=152_064, tied=False)
_qwen3 = partial(_settings, Qwen3VLConfig, vocabulary=151_936, context=262_144)
_QWEN3_4B = partial(_qwen3, (2560, 36, 32, 8, 9728), tied=True, depth=24, hidden_size=1024, intermediate_size=4096)
PAPER_MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _QWEN2_5_3B,
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN2_5_7B,
    "Qwen/Qwen3-VL-4B-Instruct": partial(_QWEN3_4B, deepstack_visual_indexes=[5, 11, 17]),
    "Qwen/Qwen3-VL-8B-Instruct": partial(_qwen3, (4096, 36, 32, 8, 12_288), tied=False),
    "Fancy-MLLM/R1-Onevision-7B": _QWEN2_5_7B,
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-3B": _QWEN2_5_3B,
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-7B": _QWEN2_5_7B,
}


class NotHere(ModelError):
    """A model whose settings are not on this machine."""


@dataclass(frozen=True)
class Model:
    """A model as its settings describe it. `context`: positions that it was made for; `side`: pixels of an image token,
    of models that take any size (Qwen's); `source`: folder, hub's cache or the paper's table."""

    source: str
    shape: Shape
    parameters: Parameters
    context: int | None
    side: int | None

    @classmethod
    def of(cls, name: str, revision: str = "") -> Model:
        """By folder or hub id; nothing is fetched. NotHere for one that is not on this machine and none of the paper's,
        ModelError for settings that cannot be read and for an architecture that cannot be run."""
        path, source = locate(name), "hub's cache"
        try:
            settings = AutoConfig.from_pretrained(str(path), local_files_only=True, revision=revision or "main")
        except (OSError, ValueError, KeyError) as error:
            if Path(path).is_dir():
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise ModelError(f"{name}: no settings that transformers can read: {reason}") from None
            if name not in PAPER_MODELS:
                raise NotHere(f"{name}: no such folder, and not in the hub's cache on this machine") from None
            settings, source = PAPER_MODELS[name](), PAPER_TABLE
        check_known(settings)
        context, vision = getattr(settings.get_text_config(), "max_position_embeddings", None), settings.vision_config
        any_size = hasattr(vision, "spatial_merge_size") and isinstance(getattr(vision, "patch_size", None), int)
        side = vision.patch_size * vision.spatial_merge_size if any_size else None
        source = "folder" if Path(path).is_dir() else source
        return cls(source, Shape.of(settings), Parameters.of(settings), context, side)

    def image_tokens(self, config: Config, examples: Iterable[Example]) -> int | None:
        """Of the largest of these examples' images; None where the model has its own size."""
        if self.side is None:
            return None
        most = config.min_pixels or 1
        for example in examples:
            with suppress(ImageError):  # an error record of the run
                size = open_image(example.image).size if example.image else (0, 0)
                most = max(most, math.prod(math.ceil(length / self.side) for length in size))
        return min(most, config.max_pixels or most)


@dataclass(frozen=True)
class Needs:
    """What a run asks of its device, in bytes; `each`: over the weights, of one example of a batch.

    `model` is None where its settings are not on this machine, `batch` where nobody can say, `free` 0 where the device
    is not here.
    """

    device: str  # its type
    itemsize: int  # bytes per number
    free: int
    model: Model | None = None
    weights: int = 0
    each: int = 0
    batch: int | None = None
    images: int | None = None  # image tokens of an example, where they are known

    @classmethod
    def of(cls, config: Config, examples: Sequence[Example]) -> Needs:
        """Of a run over such examples. ModelError for an architecture that cannot be run."""
        here = "cuda" if torch.cuda.is_available() else "cpu"
        device = here if config.device == "auto" else config.device.partition(":")[0]
        itemsize = {"auto": 4 if device == "cpu" else 2, "float32": 4}.get(config.dtype, 2)
        free = 0
        if device == here:
            free = torch.cuda.mem_get_info()[0] if here == "cuda" else psutil.virtual_memory().available
        try:
            model = Model.of(config.model_name_or_path, config.revision)
        except NotHere:
            return cls(device, itemsize, free, batch=config.batch_size)
        weights, batch = model.parameters.bytes(itemsize, config.load_in_bits), MOST["cpu"]
        if device == "cuda":
            fitting = fitting_batch(model.shape, itemsize, workload(config, model.context), free - weights)
            batch = max(1, fitting) if free else None
        batch = config.batch_size or (batch and min(batch, max(1, math.ceil(len(examples) / config.num_workers))))
        images = model.image_tokens(config, examples[:LOOKED_AT])
        each = peak(model.shape, itemsize, workload(config, model.context, images), 1)
        return cls(device, itemsize, free, model, weights, each, batch, images)


class Pace(NamedTuple):
    """Seconds of an example with one worker, and where the number is from."""

    seconds: float
    source: str


def earlier_results(model: str, folders: Iterable[Path]) -> list[dict[str, Any]]:
    """results.json of runs of this model on such a device, the newest first."""
    paths, kept = {path for folder in folders for path in folder.rglob(records.RESULTS)}, []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:LOOKED_AT]:
        with suppress(records.ResultsError):
            result = records.read_results(path)
            made_on = (result.get("environment") or {}).get("device")
            if made_on == environment()["device"] and locate(str(result.get("model"))) == locate(model):
                kept.append(result)
    return kept


def earlier_pace(config: Config, dataset: str, method: str, results: Iterable[dict[str, Any]]) -> Pace | None:
    """From earlier results: of this method, and the most like this run in its dataset and parameters."""
    # What may differ on resume has no part in an answer, but the batch has a part in its time.
    free, known = records.FREE_PARAMETERS - {"batch_size"} | {"model_name_or_path", "dataset"}, []
    ours = as_plain(config.as_dict()) | {"file": Path(dataset).name}
    for result in results:
        speed = (result.get("efficiency") or {}).get("examples_per_second")
        if result.get("method") == method and speed:
            theirs = records.with_defaults(result.get("config")) | {"file": Path(str(result.get("dataset"))).name}
            other = records.differences(theirs, ours, free)
            source = f"an earlier run, {', '.join(other)}" if other else "an earlier run"
            known.append((len(other), Pace(1 / speed, source)))
    return min(known, key=lambda one: one[0])[1] if known else None


def settings_pace(config: Config, needs: Needs, method: str) -> Pace | None:
    """From settings and what this device does per second; None for a device that is not here, an unknown model, or a
    method whose work depends on its answers."""
    unknown = not (needs.model and needs.free and needs.batch) or config.ray_address
    if unknown or method in ("self-consistency", "random"):
        return None
    as_loop = {"ltpo": ltpo_config, "ulr": ulr_config}.get(method)
    alone = as_loop(config).replace(methods="dmlr") if as_loop else config.replace(methods=method)
    work, model = workload(alone, needs.model.context, needs.images), needs.model
    flops, bandwidth = measured_rates(needs.device, needs.itemsize)
    return Pace(
        seconds(model.parameters, model.shape, needs.itemsize, work, needs.batch, flops, bandwidth),
        f"arithmetic alone: {work.new_tokens} tokens in every answer, {flops / 1e12:.2g} TFLOP/s and "
        f"{bandwidth / 1e9:.3g} GB/s as measured now",
    )


@lru_cache
def measured_rates(device: str, itemsize: int) -> tuple[float, float]:
    """Operations and bytes per second of this device, by a product of matrices and by a copy; about a second."""
    side = 8192 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(torch.float32 if itemsize == 4 else torch.bfloat16)
    product = bench.seconds(lambda: matrix @ matrix, matrix.device, 5)
    return 2 * side**3 / product, bench.copy_bandwidth(matrix.device)


@dataclass(frozen=True)
class JobPlan:
    """One dataset through one method: how many of its examples are finished, and the time of the others."""

    job: evaluate.Job
    finished: int
    pace: Pace | None

    @property
    def todo(self) -> int:
        return len(self.job.examples) - self.finished


@dataclass(frozen=True)
class Plan:
    """A run of the benchmark notebook. `errors`: what would fail on this machine, as the run would say it."""

    config: Config
    needs: Needs
    jobs: list[JobPlan]
    errors: list[str]

    @property
    def complete(self) -> bool:
        """Whether a run with resume would find nothing to do."""
        done = all(not each.todo and (each.job.folder / records.RESULTS).is_file() for each in self.jobs)
        return done and not self.errors


def plan(config: Config) -> Plan:
    """Everything that is known before the run.

    Raises what the run would raise at once: ConfigError for an unknown method, DatasetError for a file that cannot be
    used, JudgeError for an LLM judge without a key, ModelError for an architecture that is not supported.
    """
    jobs, plans, errors = evaluate.plan(config), [], []
    llm_settings(config)
    needs = Needs.of(config, max((job.examples for job in jobs), key=len))
    earlier = earlier_results(config.model_name_or_path, {root() / "reports" / "runs", evaluate.output_folder(config)})
    for job in jobs:
        pace = earlier_pace(config, job.dataset, job.method, earlier) or settings_pace(config, needs, job.method)
        finished = 0
        try:
            finished = finished_examples(job, config) if config.resume else 0
        except records.ResultsError as error:
            errors.append(str(error))
        plans.append(JobPlan(job, finished, pace))
    return Plan(config, needs, plans, errors if config.verify_only else errors + obstacles(config, needs))


def finished_examples(job: evaluate.Job, config: Config) -> int:
    """Examples that a run with `resume` would not ask again; those that ended in an error are not among them.

    ResultsError where it would be refused, or the log is damaged; dtype and device are the model's to say, which is not
    loaded here.
    """
    if not (job.folder / records.LOG).is_file():
        return 0
    records.check_same(job.folder, as_plain(config), evaluate.checksums(job, config))
    rows, log = {example.row for example in job.examples}, records.read_log(job.folder)
    return sum(record["row"] in rows and record["stop_reason"] != "error" for record in log)


def obstacles(config: Config, needs: Needs) -> list[str]:
    """What is missing on this machine for the run."""
    name, missing = config.model_name_or_path, []
    if not config.ray_address and needs.device == "cuda" and not needs.free:
        missing.append(f"device = {config.device!r}, but torch sees no GPU here")
    if (config.num_workers > 1 or config.ray_address) and importlib.util.find_spec("ray") is None:
        missing.append("several workers need Ray, which is not installed: pip install -e '.[ray]'")
    if config.load_in_bits and importlib.util.find_spec("bitsandbytes") is None:
        missing.append(f"load_in_bits = {config.load_in_bits} needs bitsandbytes: pip install bitsandbytes")
    if needs.model is None or needs.model.source == PAPER_TABLE:  # the hub has to be asked
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            missing.append(f"{name}: no such folder, and no name of the form owner/model")
        elif constants.HF_HUB_OFFLINE:
            missing.append(f"{name}: not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked")
    if needs.free and needs.weights > needs.free:
        missing.append(f"the weights take {size(needs.weights)}, and {size(needs.free)} of memory are free")
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
    before = Path.cwd()
    os.chdir(notebook.parent)  # where a `.env` is looked for, among other things
    try:
        made = plan(config)
    finally:
        os.chdir(before)
    return f"{as_text(made)}\nreport     {report}", made.errors


def as_text(made: Plan) -> str:
    """A plan: a row for each dataset and method, then the model, its memory, the time, and what is odd."""
    config, needs, model, notes = made.config, made.needs, made.needs.model, []
    rows = [["dataset", "method", "examples", "unusable rows", "finished", "to do", "time", "from"]]
    for each in made.jobs:
        job, dataset = each.job, evaluate.name(each.job.dataset)
        numbers = [str(count) for count in (len(job.examples), len(job.problems), each.finished, each.todo)]
        time = [in_words(each.todo * each.pace.seconds / config.num_workers), each.pace.source] if each.pace else []
        rows.append([dataset, job.method, *numbers, *((time or ["unknown"]) if each.todo else ["–"])])
        if unjudged := sum(not example.solution for example in job.examples):
            notes.append(f"{dataset}: {unjudged} examples have no ground truth and are skipped")
        notes += [f"{dataset}: {problem.message}" for problem in job.problems[:3]]
        if not config.resume and (job.folder / records.LOG).is_file():
            notes.append(f"{dataset} {job.method}: an earlier run is moved aside; resume = true goes on with it")
    about = need = "unknown: its settings are not on this machine"
    if model:
        about = f"{model.parameters.total / 1e9:.3g} billion parameters; settings from {model.source}"
        need = f"{needs.device}: {size(needs.weights)} of weights and {size(needs.each)} for each example of a batch"
        need += f"; {size(needs.free)} free here" if needs.free else ""
    lines = [
        ("model", f"{config.model_name_or_path} ({about})"),
        ("memory", need),
        ("workers", f"{config.num_workers}{f' on Ray at {config.ray_address}' if config.ray_address else ''}"),
        ("batch", f"{needs.batch or 'by free memory of the GPU'}{'' if config.batch_size else ' (chosen)'}"),
        ("output", shown(evaluate.output_folder(config))),
        ("time", f"{time_of([made])}, loading the model not counted"),
        *(("", note) for note in dict.fromkeys(notes)),
    ]
    head = "\n".join(f"{name:<11}{text}" for name, text in lines)
    return f"{columns(rows)}\n\n{head}"


def time_of(plans: Iterable[Plan]) -> str:
    """Of what is still to do in all of them, one after the other, and for which methods nobody can tell."""
    left = [(each, made.config.num_workers) for made in plans for each in made.jobs if each.todo]
    known = [each.todo * each.pace.seconds / workers for each, workers in left if each.pace]
    unknown = sorted({each.job.method for each, _ in left if not each.pace})
    words = [in_words(sum(known))] if known or not unknown else []
    words += [f"unknown for {', '.join(unknown)}"] if unknown else []
    return ", ".join(words)


def columns(rows: list[list[str]]) -> str:
    """Rows of text (the last may be short) with their cells under each other."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def size(bytes_: float) -> str:
    """Bytes for people."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def shown(path: Path | str) -> str:
    """A path, relative to the project where it lies in it."""
    return str(path).removeprefix(f"{root()}{os.sep}")
