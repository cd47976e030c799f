"""A run's plan, before anything runs: what would be done, what is done already, how long it takes, what would fail.

Loads no model and calls nothing; a file that the run could not read is an error here as there.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from dmlr.config import Config, root
from dmlr.json_files import as_plain
from dmlr.parameters import check_parameters, config_of, default_output, from_here
from dmlr.planning.fits import columns, size
from dmlr.planning.forecast import Model, Pace, describe, earlier_pace, earlier_results, settings_pace
from dmlr.run import evaluate
from dmlr.run.records import (
    FREE_PARAMETERS,
    LOG,
    RESULTS,
    ResultsError,
    differences,
    read_log,
    read_run,
    with_defaults,
)
from dmlr.run.verdicts import llm_settings
from dmlr.show.provenance import in_words


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
    states = []
    for job in jobs:
        try:
            state = progress(job, config)
        except ResultsError as error:
            errors.append(str(error))
            state = JobPlan(job)
        pace = earlier_pace(config, job.dataset, job.method, earlier)
        states.append(
            JobPlan(job, state.finished, state.errors, state.aside, pace or settings_pace(config, model, job.method))
        )
    return Plan(config, model, states, errors if config.verify_only else errors + obstacles(config, model))


def progress(job: evaluate.Job, config: Config) -> JobPlan:
    """What the run's folder holds already. ResultsError where `resume` would be refused, or the log is damaged."""
    if not (job.folder / LOG).is_file():
        return JobPlan(job)
    records = read_log(job.folder)
    if not config.resume:
        return JobPlan(job, aside=len(records))
    if changes := changed(job, config):
        raise ResultsError(f"{job.folder}: cannot resume under another configuration: {'; '.join(changes)}")
    rows = {example.row for example in job.examples}
    ends = [record["stop_reason"] for record in records if record["row"] in rows]
    return JobPlan(job, sum(end != "error" for end in ends), ends.count("error"))


def changed(job: evaluate.Job, config: Config) -> list[str]:
    """Parameters, and contents of files, that are other than those of the folder's log. dtype and device are the
    model's to say, which is not loaded here."""
    saved = read_run(job.folder)
    facts, sums = saved.get("facts") or {}, evaluate.checksums(job, config)
    free = FREE_PARAMETERS | sums.keys() | {"dtype", "device"}
    found = differences(with_defaults(saved.get("config")), as_plain(config), free)
    return found + [f"the {name} has changed" for name, now in sums.items() if facts.get(name) not in (None, now)]


def obstacles(config: Config, model: Model) -> list[str]:
    """What is missing on this machine for the run."""
    found = []
    if not config.ray_address and model.device == "cuda" and not model.free:
        found.append(f"device = {config.device!r}, but torch sees no GPU here")
    if (config.num_workers > 1 or config.ray_address) and importlib.util.find_spec("ray") is None:
        found.append("several workers need Ray, which is not installed: pip install -e '.[ray]'")
    if config.load_in_bits and importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"load_in_bits = {config.load_in_bits} needs bitsandbytes: pip install bitsandbytes")
    if model.shape is None or model.source == "the paper's table":  # not on this machine
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", config.model_name_or_path)
        if constants.HF_HUB_OFFLINE or not on_hub:
            offline = (
                f"{config.model_name_or_path}: not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked"
            )
            found.append(offline if on_hub else model.why)
    if model.free and model.batch and model.weights > model.free:
        found.append(f"the weights take {size(model.weights)}, and {size(model.free)} of memory are free")
    return found


def dry_run(notebook: str | Path, given: Mapping[str, Any], output: str | Path | None = None) -> tuple[str, list[str]]:
    """The plan of a notebook's run as text, and what would fail.

    Of a notebook that is no run of the benchmark (01, 04, ...) only parameters and output are known. Raises as `plan`,
    and ConfigError for parameters that the notebook does not have.
    """
    notebook = Path(notebook).resolve()
    values = from_here(check_parameters(notebook, given))
    executed, config = Path(output or default_output(notebook, values)), config_of(notebook, values)
    if config is None:
        lines = [f"{name}: {value}" for name, value in values.items()] or ["all parameters at their defaults"]
        return "\n".join([*lines, f"report: {shown(executed.with_suffix('.html'))}"]), []
    made = plan(config)
    return f"{as_text(made)}\nreport     {shown(executed.with_suffix('.html'))}", made.errors


def as_text(made: Plan) -> str:
    """A plan for people."""
    config, model = made.config, made.model
    lines = [
        ("model", f"{config.model_name_or_path} ({_model(model)})"),
        ("memory", _memory(model)),
        ("workers", f"{config.num_workers}{f' on Ray at {config.ray_address}' if config.ray_address else ''}"),
        ("batch", f"{model.batch or 'by free memory of the GPU'}{'' if config.batch_size else ' (chosen)'}"),
        ("output", shown(evaluate.output_folder(config))),
    ]
    header = ["dataset", "method", "examples", "unusable rows", "finished", "to do", "time"]
    rows = [header, *(_row(job, config) for job in made.jobs)]
    lines += [("time", f"{time_of([made])}, loading the model not counted")]
    lines += [("", note) for note in _notes(made.jobs)]
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


def _model(model: Model) -> str:
    if model.shape is None:
        return f"settings unknown: {model.why}"
    where = {"the paper's table": "settings from the paper's table; the hub will be asked for the model"}
    known = where.get(model.source, f"settings from {model.source}")
    return f"{model.parameters.total / 1e9:.3g} billion parameters; {known}"


def _memory(model: Model) -> str:
    if model.shape is None:
        return "unknown"
    need = f"{model.device}: {size(model.weights)} of weights and {size(model.each)} for each example of a batch"
    return need + (f"; {size(model.free)} free here" if model.free else "")


def _row(state: JobPlan, config: Config) -> list[str]:
    job = state.job
    spent = state.todo * state.pace.seconds / config.num_workers if state.pace else None
    time = "–" if not state.todo else "unknown" if spent is None else in_words(spent)
    numbers = [len(job.examples), len(job.problems), state.finished, state.todo]
    return [evaluate.name(job.dataset), job.method, *map(str, numbers), time]


def _notes(jobs: list[JobPlan]) -> list[str]:
    timed: dict[str, dict[str, None]] = {}  # methods by where their time is from
    for state in jobs:
        if state.todo:
            timed.setdefault(state.pace.source if state.pace else "unknown", {})[state.job.method] = None
    notes = [f"{', '.join(methods)}: {source}" for source, methods in timed.items()]
    for state in jobs:
        name = f"{evaluate.name(state.job.dataset)} {state.job.method}"
        unjudged = sum(not example.solution for example in state.job.examples)
        notes += [f"{name}: {unjudged} examples have no ground truth and are skipped"] if unjudged else []
        notes += [f"{name}: {state.errors} errors are tried again"] if state.errors else []
        aside = f"{name}: {state.aside} records of an earlier run are moved aside; resume = true goes on from them"
        notes += [aside] if state.aside else []
        notes += [f"{name}: {problem.message}" for problem in state.job.problems[:3]]
    return notes
