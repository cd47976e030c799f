"""Before anything runs: does a model fit, at which batch size, about how long will it take, and what would fail.

Everything comes from settings (config.json), from the records of earlier runs and from what a device does in a second:
no weights are loaded and nobody is called. What a model needs is `model.memory`'s arithmetic, and an estimate.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping
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
from dmlr.config import Config, locate, root, shown
from dmlr.machine import environment
from dmlr.methods.latent import ltpo_config
from dmlr.methods.ulr import ulr_config
from dmlr.methods.workload import workload
from dmlr.model.families import ModelError, check_known
from dmlr.model.memory import MOST, Parameters, Shape, fitting_batch, peak, seconds
from dmlr.parameters import check_parameters, config_of, default_output
from dmlr.run import evaluate, records
from dmlr.run.verdicts import llm_settings
from dmlr.show.provenance import in_words

LOOKED_AT = 60  # results.json files of a method that are read, at most
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
    """A model as its settings describe it. `context`: positions that it was made for; `source`: folder, hub's cache or
    the paper's table."""

    source: str
    shape: Shape
    parameters: Parameters
    context: int | None

    @classmethod
    def of(cls, name: str, revision: str = "") -> Model:
        """By folder or hub id; nothing is fetched. NotHere for one that is not on this machine and none of the paper's,
        ModelError for settings that cannot be read and for an architecture that cannot be run."""
        path = locate(name)
        source = "folder" if Path(path).is_dir() else "hub's cache"
        try:
            settings = AutoConfig.from_pretrained(str(path), local_files_only=True, revision=revision or "main")
        except (OSError, ValueError, KeyError) as error:
            if source == "folder":
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise ModelError(f"{name}: no settings that transformers can read: {reason}") from None
            if name not in PAPER_MODELS:
                raise NotHere(f"{name}: no such folder, and not in the hub's cache on this machine") from None
            settings, source = PAPER_MODELS[name](), PAPER_TABLE
        check_known(settings)
        context = getattr(settings.get_text_config(), "max_position_embeddings", None)
        return cls(source, Shape.of(settings), Parameters.of(settings), context)

    def batch(self, config: Config, itemsize: int, free: int, device: str, bits: int | None = None) -> int:
        """Examples of such a run that go through together in what the weights leave of `free` bytes; 0: not one."""
        left = free - self.parameters.bytes(itemsize, bits)
        return fitting_batch(self.shape, itemsize, workload(config, self.context), left, device)


@dataclass(frozen=True)
class Needs:
    """What a run asks of its device: `weights` and `each` (over them, of one example of a batch) in bytes.

    `model` is None where its settings are not on this machine, `batch` where nobody can say, `free` 0 where the device
    is not here.
    """

    device: str  # its type
    itemsize: int  # bytes per number
    free: int
    batch: int | None
    model: Model | None = None
    weights: int = 0
    each: int = 0

    @classmethod
    def of(cls, config: Config, examples: int) -> Needs:
        """Of a run over so many examples. ModelError for an architecture that cannot be run."""
        here = "cuda" if torch.cuda.is_available() else "cpu"
        device = here if config.device == "auto" else config.device.partition(":")[0]
        itemsize = {"auto": 4 if device == "cpu" else 2, "float32": 4}.get(config.dtype, 2)
        free = psutil.virtual_memory().available if device == "cpu" else 0
        if device == here == "cuda":
            one = None if config.device == "auto" else config.device
            gpus = range(torch.cuda.device_count()) if config.device_map else [one]
            free = sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
        try:
            model = Model.of(config.model_name_or_path, config.revision)
        except NotHere:
            return cls(device, itemsize, free, config.batch_size)
        batch = MOST["cpu"]
        if device == "cuda":
            batch = max(1, model.batch(config, itemsize, free, device, config.load_in_bits)) if free else None
        batch = config.batch_size or (batch and min(batch, max(1, math.ceil(examples / config.num_workers))))
        weights = model.parameters.bytes(itemsize, config.load_in_bits)
        each = peak(model.shape, itemsize, workload(config, model.context), 1)
        return cls(device, itemsize, free, batch, model, weights, each)


def earlier_pace(config: Config, method: str) -> tuple[float, str] | None:
    """Seconds of an example with one worker in this run's own folder, else in the newest run of this model and method
    on such a device, and the folder."""
    here = environment()["device"], locate(config.model_name_or_path)
    for folder in (evaluate.output_folder(config), root() / "reports" / "runs"):
        paths = [path / records.RESULTS for path in records.find_runs(folder) if path.name == method]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:LOOKED_AT]:
            with suppress(records.ResultsError):
                result = records.read_results(path)
                there = (result.get("environment") or {}).get("device"), locate(str(result.get("model")))
                speed = (result.get("efficiency") or {}).get("examples_per_second")
                if speed and there == here:
                    return 1 / speed, f"the run in {shown(path.parent)}"
    return None


def settings_pace(config: Config, needs: Needs, method: str) -> tuple[float, str] | None:
    """The same from settings and what this device does per second; None for a device that is not here, an unknown model
    and self-consistency, whose work depends on its answers."""
    if not (needs.model and needs.free and needs.batch) or config.ray_address or method == "self-consistency":
        return None
    as_loop = {"ltpo": ltpo_config, "ulr": ulr_config}.get(method)
    alone = as_loop(config).replace(methods="dmlr") if as_loop else config.replace(methods=method)
    work, model = workload(alone, needs.model.context), needs.model
    flops, bandwidth = measured_rates(needs.device, needs.itemsize)
    rates = f"{flops / 1e12:.2g} TFLOP/s and {bandwidth / 1e9:.3g} GB/s as measured now"
    each = seconds(model.parameters, model.shape, needs.itemsize, work, needs.batch, flops, bandwidth)
    return each, f"arithmetic alone: {work.new_tokens} tokens in every answer, {rates}"


@lru_cache
def measured_rates(device: str, itemsize: int) -> tuple[float, float]:
    """Operations and bytes per second of this device, by a product of matrices and by a copy; about a second."""
    side = 8192 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(torch.float32 if itemsize == 4 else torch.bfloat16)
    product = bench.seconds(lambda: matrix @ matrix, matrix.device, 5)
    return 2 * side**3 / product, bench.copy_bandwidth(matrix.device)


class JobPlan(NamedTuple):
    """One dataset through one method; `seconds`: of what is still to do, by all workers, where somebody can tell."""

    job: evaluate.Job
    finished: int  # examples
    todo: int
    seconds: float | None
    source: str


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
    needs = Needs.of(config, max(len(job.examples) for job in jobs))
    for job in jobs:
        finished = 0
        try:
            finished = finished_examples(job, config) if config.resume else 0
        except records.ResultsError as error:
            errors.append(str(error))
        todo, pace = len(job.examples) - finished, earlier_pace(config, job.method)
        each, source = pace or settings_pace(config, needs, job.method) or (None, "")
        plans.append(JobPlan(job, finished, todo, each and todo * each / config.num_workers, source))
    return Plan(config, needs, plans, errors if config.verify_only else errors + obstacles(config, needs))


def finished_examples(job: evaluate.Job, config: Config) -> int:
    """Examples that a run with `resume` would not ask again; those that ended in an error are not among them.

    ResultsError where it would be refused, or the log is damaged; dtype and device are the model's to say, which is not
    loaded here.
    """
    if not (job.folder / records.LOG).is_file():
        return 0
    records.check_same(job.folder, dict(config), evaluate.checksums(job, config))
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


def plan_of(notebook: str | Path, values: Mapping[str, Any]) -> Plan | None:
    """Of a notebook's run with checked parameters, seen from the notebook's folder, as the kernel does (a `.env` may
    lie there); raises as `plan`. None for a notebook that is no run of the benchmark (01, 04, ...)."""
    config, before = config_of(notebook, values), Path.cwd()
    if config is None:
        return None
    os.chdir(Path(notebook).resolve().parent)
    try:
        return plan(config)
    finally:
        os.chdir(before)


def dry_run(notebook: str | Path, given: Mapping[str, Any], output: str | Path | None = None) -> tuple[str, list[str]]:
    """The plan of a notebook's run as text, and what would fail; without one, its parameters.

    Raises as `plan`, and ConfigError for parameters that the notebook does not have.
    """
    values = check_parameters(notebook, given)
    report = shown(Path(output or default_output(Path(notebook), values)).with_suffix(".html"))
    made = plan_of(notebook, values)
    if made is None:
        lines = [f"{name}: {value}" for name, value in values.items()] or ["all parameters at their defaults"]
        return "\n".join([*lines, f"report: {report}"]), []
    return f"{as_text(made)}\nreport     {report}", made.errors


def as_text(made: Plan) -> str:
    """A plan: a row for each dataset and method, then the model, its memory, the time, and what is odd."""
    config, needs, model, notes = made.config, made.needs, made.needs.model, []
    rows = [["dataset", "method", "examples", "unusable rows", "finished", "to do", "time", "from"]]
    for job, finished, todo, left, source in made.jobs:
        dataset = evaluate.name(job.dataset)
        numbers = [str(count) for count in (len(job.examples), len(job.problems), finished, todo)]
        time = ["unknown"] if left is None else [in_words(left), source]
        rows.append([dataset, job.method, *numbers, *(time if todo else ["–"])])
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
    left = [each for made in plans for each in made.jobs if each.todo]
    known = [each.seconds for each in left if each.seconds is not None]
    unknown = sorted({each.job.method for each in left if each.seconds is None})
    words = [in_words(sum(known))] if known or not unknown else []
    return ", ".join(words + ([f"unknown for {', '.join(unknown)}"] if unknown else []))


def columns(rows: list[list[str]]) -> str:
    """Rows of text (the last may be short) with their cells under each other."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def size(bytes_: float) -> str:
    """Bytes for people."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"
