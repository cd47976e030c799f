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
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import constants
from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from dmlr.config import Config, locate, root, shown
from dmlr.machine import copy_bandwidth, environment, median_seconds
from dmlr.methods.latent import ltpo_config
from dmlr.methods.ulr import ulr_config
from dmlr.methods.workload import workload
from dmlr.model.families import ModelError, check_known
from dmlr.model.memory import MOST, Shape, fitting_batch, peak, seconds
from dmlr.parameters import check_parameters, config_of, default_output
from dmlr.run import evaluate, records
from dmlr.run.verdicts import llm_settings
from dmlr.show.provenance import in_words

LOOKED_AT = 60  # results.json files of a method that are read, at most
PAPER_TABLE = "the paper's table"

# Of the paper's models, the numbers of their config.json on the hub; fine-tunes share what they were made from. First
# those of the text, where the last says whether one matrix embeds tokens and scores them; then the vision tower's that
# are not its kind's usual ones.
_TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_TEXT += ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
_QWEN2_5_3B = Qwen2_5_VLConfig, (2048, 36, 16, 2, 11_008, 151_936, 128_000, True), {"hidden_size": 1280}
_QWEN2_5_7B = Qwen2_5_VLConfig, (3584, 28, 28, 4, 18_944, 152_064, 128_000, False), {"hidden_size": 1280}
_SMALLER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
PAPER_MODELS: dict[str, tuple[type[PretrainedConfig], tuple, dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _QWEN2_5_3B,
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN2_5_7B,
    "Qwen/Qwen3-VL-4B-Instruct": (Qwen3VLConfig, (2560, 36, 32, 8, 9728, 151_936, 262_144, True), _SMALLER),
    "Qwen/Qwen3-VL-8B-Instruct": (Qwen3VLConfig, (4096, 36, 32, 8, 12_288, 151_936, 262_144, False), {}),
    "Fancy-MLLM/R1-Onevision-7B": _QWEN2_5_7B,
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-3B": _QWEN2_5_3B,
    "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-7B": _QWEN2_5_7B,
}


class NotHere(ModelError):
    """A model whose settings are not on this machine."""


def described(name: str, revision: str = "") -> tuple[Shape, str]:
    """A model, by folder or hub id, as its settings describe it, and where they are from; nothing is fetched.

    NotHere for one that is not on this machine and none of the paper's, ModelError for settings that cannot be read and
    for an architecture that cannot be run.
    """
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
        kind, sizes, vision = PAPER_MODELS[name]
        text = dict(zip(_TEXT, sizes, strict=True))
        vision = vision | {"out_hidden_size": text["hidden_size"]}
        settings = kind(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])
        source = PAPER_TABLE
    check_known(settings)
    return Shape(settings), source


def free_memory(config: Config) -> tuple[str, int]:
    """The type of a run's device, and bytes that are free there, of all that it uses; 0 where it is not here."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.device == "auto" else config.device.partition(":")[0]
    if device == "cpu":
        return device, psutil.virtual_memory().available
    one = None if config.device == "auto" else config.device
    gpus = range(torch.cuda.device_count()) if config.device_map else [one]
    return device, sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) if device == here else 0


class JobPlan(NamedTuple):
    """One dataset through one method; `seconds`: of what is still to do, by all workers, where somebody can tell."""

    job: evaluate.Job
    finished: int  # examples
    todo: int
    seconds: float | None
    source: str


class Plan:
    """A run of the benchmark notebook: everything that is known before it.

    `errors`: what would fail on this machine, as the run would say it. `free`, `weights` and `each` (over them, of one
    example of a batch) are bytes; `free` is 0 where the device is not here, `shape` None where the model's settings are
    not, `batch` None where nobody can say.

    Raises what the run would raise at once: ConfigError for an unknown method, DatasetError for a file that cannot be
    used, JudgeError for an LLM judge without a key, ModelError for an architecture that is not supported.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.jobs, self.errors = config, [], []
        jobs = evaluate.plan(config)
        llm_settings(config)
        self._measure(max(len(job.examples) for job in jobs))
        for job in jobs:
            finished = 0
            try:
                finished = finished_examples(job, config)
            except records.ResultsError as error:
                self.errors.append(str(error))
            todo, pace = len(job.examples) - finished, earlier_pace(config, job.method)
            each, source = pace or self.settings_pace(job.method) or (None, "")
            self.jobs.append(JobPlan(job, finished, todo, each and todo * each / config.num_workers, source))
        self.errors += [] if config.verify_only else self.obstacles()

    def _measure(self, examples: int) -> None:
        """What the model asks of its device, in a run over so many examples."""
        config = self.config
        self.device, self.free = free_memory(config)
        self.itemsize = {"auto": 4 if self.device == "cpu" else 2, "float32": 4}.get(config.dtype, 2)
        self.batch, self.weights, self.each = config.batch_size, 0, 0
        try:
            self.shape, self.source = described(config.model_name_or_path, config.revision)
        except NotHere:
            self.shape = self.source = None
            return
        work = workload(config, self.shape.context)
        self.weights = self.shape.parameters.bytes(self.itemsize, config.load_in_bits)
        self.each = peak(self.shape, self.itemsize, work, 1)
        most = MOST["cpu"]
        if self.device == "cuda":
            most = max(1, fitting_batch(self.shape, self.itemsize, work, self.free - self.weights))
        if self.device != "cuda" or self.free:
            self.batch = self.batch or min(most, max(1, math.ceil(examples / config.num_workers)))

    @property
    def complete(self) -> bool:
        """Whether a run with resume would find nothing to do."""
        done = all(not each.todo and (each.job.folder / records.RESULTS).is_file() for each in self.jobs)
        return done and not self.errors

    def settings_pace(self, method: str) -> tuple[float, str] | None:
        """`earlier_pace` from settings and what this device does per second; None for a device that is not here, an
        unknown model and self-consistency, whose work depends on its answers."""
        config = self.config
        if not (self.shape and self.free and self.batch) or config.ray_address or method == "self-consistency":
            return None
        as_loop = {"ltpo": ltpo_config, "ulr": ulr_config}.get(method)
        alone = as_loop(config).replace(methods="dmlr") if as_loop else config.replace(methods=method)
        work = workload(alone, self.shape.context)
        flops, bandwidth = measured_rates(self.device, self.itemsize)
        rates = f"{flops / 1e12:.2g} TFLOP/s and {bandwidth / 1e9:.3g} GB/s as measured now"
        each = seconds(self.shape, self.itemsize, work, self.batch, flops, bandwidth)
        return each, f"arithmetic alone: {work.new_tokens} tokens in every answer, {rates}"

    def obstacles(self) -> list[str]:
        """What is missing on this machine for the run."""
        config, name, missing = self.config, self.config.model_name_or_path, []
        if not config.ray_address and self.device == "cuda" and not self.free:
            missing.append(f"device = {config.device!r}, but torch sees no GPU here")
        if (config.num_workers > 1 or config.ray_address) and importlib.util.find_spec("ray") is None:
            missing.append("several workers need Ray, which is not installed: pip install -e '.[ray]'")
        if config.load_in_bits and importlib.util.find_spec("bitsandbytes") is None:
            missing.append(f"load_in_bits = {config.load_in_bits} needs bitsandbytes: pip install bitsandbytes")
        if self.source in (None, PAPER_TABLE):  # the hub has to be asked
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                missing.append(f"{name}: no such folder, and no name of the form owner/model")
            elif constants.HF_HUB_OFFLINE:
                missing.append(f"{name}: not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked")
        if self.free and self.weights > self.free:
            missing.append(f"the weights take {size(self.weights)}, and {size(self.free)} of memory are free")
        return missing

    def __str__(self) -> str:
        """A row for each dataset and method, then the model, its memory, the time, and what is odd."""
        config, notes = self.config, []
        rows = [["dataset", "method", "examples", "unusable rows", "finished", "to do", "time", "from"]]
        for job, finished, todo, left, source in self.jobs:
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
        if self.shape:
            about = f"{self.shape.parameters.total / 1e9:.3g} billion parameters; settings from {self.source}"
            need = f"{self.device}: {size(self.weights)} of weights and {size(self.each)} for each example of a batch"
            need += f"; {size(self.free)} free here" if self.free else ""
        lines = [
            ("model", f"{config.model_name_or_path} ({about})"),
            ("memory", need),
            ("workers", f"{config.num_workers}{f' on Ray at {config.ray_address}' if config.ray_address else ''}"),
            ("batch", f"{self.batch or 'by free memory of the GPU'}{'' if config.batch_size else ' (chosen)'}"),
            ("output", shown(evaluate.output_folder(config))),
            ("time", f"{time_of([self])}, loading the model not counted"),
            *(("", note) for note in dict.fromkeys(notes)),
        ]
        head = "\n".join(f"{name:<11}{text}" for name, text in lines)
        return f"{columns(rows)}\n\n{head}"


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


@lru_cache
def measured_rates(device: str, itemsize: int) -> tuple[float, float]:
    """Operations and bytes per second of this device, by a product of matrices and by a copy; about a second."""
    side = 8192 if device == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(torch.float32 if itemsize == 4 else torch.bfloat16)
    product = median_seconds(lambda: matrix @ matrix, matrix.device, 5)
    return 2 * side**3 / product, copy_bandwidth(matrix.device)


def finished_examples(job: evaluate.Job, config: Config) -> int:
    """Examples that the run would not ask again; those that ended in an error are not among them.

    ResultsError where it would be refused, or the log is damaged; dtype and device are the model's to say, which is not
    loaded here.
    """
    if not (config.resume and (job.folder / records.LOG).is_file()):
        return 0
    records.check_same(job.folder, dict(config), evaluate.checksums(job, config))
    rows, log = {example.row for example in job.examples}, records.read_log(job.folder)
    return sum(record["row"] in rows and record["stop_reason"] != "error" for record in log)


def plan_of(notebook: str | Path, values: Mapping[str, Any]) -> Plan | None:
    """Of a notebook's run with checked parameters, seen from the notebook's folder, as the kernel does (a `.env` may
    lie there); raises as `Plan`. None for a notebook that is no run of the benchmark (01, 04, ...)."""
    config, before = config_of(notebook, values), Path.cwd()
    if config is None:
        return None
    os.chdir(Path(notebook).resolve().parent)
    try:
        return Plan(config)
    finally:
        os.chdir(before)


def dry_run(notebook: str | Path, given: Mapping[str, Any], output: str | Path | None = None) -> tuple[str, list[str]]:
    """The plan of a notebook's run as text, and what would fail; without one, its parameters.

    Raises as `Plan`, and ConfigError for parameters that the notebook does not have.
    """
    values = check_parameters(notebook, given)
    report = shown(Path(output or default_output(Path(notebook), values)).with_suffix(".html"))
    made = plan_of(notebook, values)
    if made is None:
        lines = [f"{name}: {value}" for name, value in values.items()] or ["all parameters at their defaults"]
        return "\n".join([*lines, f"report: {report}"]), []
    return f"{made}\nreport     {report}", made.errors


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
