"""A dataset through methods: batches in, judged records out. The only place where answers meet ground truths.

Nothing that goes wrong with one example stops the run: it becomes one error record. Who answers, the model of this
process or workers on Ray, is chosen here and nowhere else. Knows nothing about how a method works or a notebook looks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmlr.config import Config, ConfigError, check_names, locate
from dmlr.data.examples import Example, ImageError, Problem, load_dataset, open_image
from dmlr.data.images import without_password
from dmlr.machine import environment  # noqa: F401 (notebooks take it from here)
from dmlr.methods import METHODS, Answer
from dmlr.methods.prompting import prompts_of
from dmlr.model.vlm import VLM
from dmlr.run.batches import InProcess, cut, partners
from dmlr.run.records import ResultsError, RunLog, held, read_results, read_run, write_results, write_reward_csv
from dmlr.run.verdicts import ask_llm, judged_again, llm_settings, verdict_of
from dmlr.run.workers import Workers, started
from dmlr.stats.metrics import efficiency
from dmlr.stats.outcomes import tally

Judge = Callable[[RunLog, list[Example]], dict[str, Any] | None]  # `ask_llm`, as this run is configured
# What metrics group records by, copied from the dataset where it is there, as text where it is no single value.
GROUPS = (
    *("suite", "category", "subcategory", "l2_category", "answer_type", "level"),
    *("pair_id", "figure_group", "question_group"),
)


@dataclass(frozen=True)
class Job:
    """One dataset through one method."""

    dataset: str
    method: str
    folder: Path
    examples: list[Example]
    problems: list[Problem]

    def __str__(self) -> str:
        return f"{name(self.dataset)}, {self.method}"


class NoAnswers(RuntimeError):
    """A method has nothing but errors on a dataset, as a fault in its code makes it; the message has the first of them.

    The whole run went on all the same, and its records are written.
    """


def run(config: Config, vlm: VLM | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Every dataset of the config through every method; returns results.json's content by (dataset name, method).

    Each job writes `<output_dir>/<dataset>/<method>/`: log.jsonl as it goes, results.json, rewards/<row>.csv. The
    model is loaded first, here or in the workers, and not at all with `verify_only`; `vlm` is one that is loaded
    already, for a run in this process. Raises what makes the whole run pointless (a bad dataset file, a model that
    does not load, workers that cannot start, a folder that another process holds or that cannot be written, an LLM
    judge without a key), and NoAnswers at the end of a run in which a job has only errors.
    """
    jobs = plan(config)
    llm = partial(ask_llm, settings=llm_settings(config), every=config.llm_verify_all)
    total = sum(len(job.examples) for job in jobs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(output_folder(config)))
        work = verify
        if not config.verify_only:
            work = partial(run_job, config=config, executor=stack.enter_context(executor_of(config, vlm)))
        progress = stack.enter_context(tqdm(total=total, unit="ex", disable=config.verbose == 0, smoothing=0.1))
        results = {(name(job.dataset), job.method): work(job, llm=llm, progress=progress) for job in jobs}
    failures = [
        f"{dataset}, {method}: {result['errors']} errors and no answer; the first: "
        + next(entry["error"] for entry in result["entries"] if entry["stop_reason"] == "error")
        for (dataset, method), result in results.items()
        if result["errors"] and not result["total"] + result["judge_failed"]
    ]
    if failures:
        raise NoAnswers(f"every record is an error ({'; '.join(failures)}); they are in {output_folder(config)}")
    return results


def executor_of(config: Config, vlm: VLM | None) -> contextlib.AbstractContextManager[InProcess | Workers]:
    """The model of this process, or workers on Ray where the config asks for several or names a cluster."""
    if config.num_workers == 1 and not config.ray_address:
        return contextlib.nullcontext(InProcess(vlm or VLM.load(config), config))
    if vlm is not None:
        raise ConfigError("workers load the model themselves: give no model, or num_workers = 1 and no ray_address")
    return started(config)


def plan(config: Config) -> list[Job]:
    """The run's jobs in order. ConfigError for an unknown method, an unusable prompts_file, two jobs of one name and a
    range in which a dataset has no row, DatasetError for an unusable dataset."""
    methods = [m.strip() for m in config.methods.split(",") if m.strip()]
    check_names(methods, METHODS, what="method")
    prompts_of(config)
    datasets = [d.strip() for d in config.dataset.split(",") if d.strip()]
    if not methods or not datasets:
        raise ConfigError(f"nothing to run: methods = {config.methods!r}, dataset = {config.dataset!r}")
    end = sys.maxsize if config.end_data_idx is None else config.end_data_idx
    jobs, chosen = [], range(config.start_data_idx, end)
    for dataset in datasets:
        examples, problems = load_dataset(dataset)
        inside = [e for e in examples if e.row in chosen]
        unusable = [p for p in problems if p.fatal and p.row in chosen]
        if not inside and not unusable:
            rows = len({e.row for e in examples} | {p.row for p in problems if p.fatal})
            asked = f"{config.start_data_idx}:{'' if config.end_data_idx is None else end}"
            raise ConfigError(
                f"{dataset}: no row is in the range start_data_idx:end_data_idx = {asked}; "
                f"it has {rows} rows, 0 to {rows - 1}"
            )
        for method in methods:
            job = Job(dataset, method, output_folder(config) / name(dataset) / method, inside, unusable)
            if any(job.folder == other.folder for other in jobs):
                raise ConfigError(f"{job} is there twice in one run, and has one folder")
            jobs.append(job)
    return jobs


def checksums(job: Job, config: Config) -> dict[str, str]:
    """SHA-256 of the files that decide a job's records, by the parameter that names them; empty where it names none."""
    files = {"dataset": job.dataset, "prompts_file": config.prompts_file}
    return {name: path and hashlib.sha256(Path(locate(path)).read_bytes()).hexdigest() for name, path in files.items()}


def output_folder(config: Config) -> Path:
    """`output_dir`, or a folder under reports/runs named by model and datasets."""
    if config.output_dir:
        return Path(config.output_dir)
    datasets = "+".join(name(d.strip()) for d in config.dataset.split(","))
    return Path(locate("reports")) / "runs" / f"{name(config.model_name_or_path)}_{datasets}"


def name(path: str) -> str:
    """Short name of a dataset or model: the last part of its path, safe as a folder name."""
    return re.sub(r"[^\w.+-]+", "-", Path(path.strip().rstrip("/")).name.removesuffix(".json")) or "unnamed"


def run_job(job: Job, config: Config, executor: InProcess | Workers, llm: Judge, progress: tqdm) -> dict[str, Any]:
    """Gets answers to what is not finished yet, judges them, and derives results.json; also when interrupted."""
    progress.set_description(str(job))
    model, size = executor.facts, executor.facts.fitting_batch
    facts = {"method": job.method, "dtype": model.dtype, "device": model.device} | checksums(job, config)
    if config.num_workers > 1:  # of few examples, each worker still gets some
        size = max(1, min(size, math.ceil(len(job.examples) / config.num_workers)))
    with RunLog(job.folder, config, resume=config.resume, facts=facts, batch_size=size) as log:
        if log.aside and config.verbose:
            progress.write(f"{job}: what an earlier run left is kept as {log.aside.name}")
        about = {"environment": model.environment, "scales": model.scales, "llm_judge": None}
        with contextlib.suppress(ResultsError):  # there are none, unless this run goes on with another
            about["llm_judge"] = read_results(job.folder).get("llm_judge")
        try:
            record_answers(job, config, log, executor, progress)
            about["llm_judge"] = llm(log, job.examples)
        except BaseException:
            with contextlib.suppress(ResultsError):  # what went wrong first is what must be heard
                save_results(job, log, config, executor.peak_memory, **about)
            raise
        return save_results(job, log, config, executor.peak_memory, **about)


def record_answers(job: Job, config: Config, log: RunLog, executor: InProcess | Workers, progress: tqdm) -> None:
    """Logs a record for every row that has none yet, or an error's: the rows that are no examples first."""
    finished, begun = log.finished(), {record["row"] for record in log.records()}
    progress.update(sum(example.row in finished for example in job.examples))
    for problem in job.problems:
        if problem.row not in begun:
            never = Example(problem.row, problem.idx, "", "")  # it did not become one
            log.append(record_of(never, Answer("", "", "error", error=f"{problem.kind}: {problem.message}")))
    recent: deque[dict[str, Any]] = deque(maxlen=64)
    batches = cut(job.examples, log.batch_size, finished, begun)
    for example, answer in executor.answers(job.method, batches, partners(job.examples)):
        if example.row in finished:
            continue
        save_extras(job, example, answer, config)  # first: a row in the log is not done again
        recent.append(record_of(example, answer))
        log.append(recent[-1])
        progress.set_postfix(pace(recent, executor.peak_memory), refresh=False)
        progress.update()
        if config.verbose == 2:  # repr: an answer may hold what a terminal would obey
            progress.write(f"{example.idx!r}: {answer.text!r} ({example.solution!r})")


def verify(job: Job, llm: Judge, progress: tqdm) -> dict[str, Any]:
    """Judges the saved answers again, without the model, under the configuration that made them.

    The dataset's ground truths are taken as they are now; its questions must be those that were answered, else
    ResultsError. What an LLM said before comes from its cache: only what failed, or is new, costs a request.
    """
    progress.set_description(f"{job}: judging again")
    saved, before = read_run(job.folder)["config"], read_results(job.folder)
    examples = {e.row: e for e in job.examples}
    with RunLog(job.folder, saved, resume=True) as log:
        answered = [old for old in log.records() if old["row"] in examples and old["stop_reason"] != "error"]
        pairs = [(old, examples[old["row"]]) for old in answered]
        for old, example in pairs:
            if (old["data_idx"], old["question"]) != (example.idx, example.question):
                raise ResultsError(
                    f"{job.folder}: row {example.row} of {job.dataset} is another question now than the one that was "
                    "answered; only solutions may change between a run and verify_only"
                )
        for old, example in pairs:
            log.append(judged_again(old, example))
            progress.update()
        about = {"environment": before["environment"], "scales": before.get("scales")}
        about["llm_judge"] = llm(log, job.examples)
        memory = before.get("efficiency", {}).get("peak_memory_bytes")
        return save_results(job, log, Config.make(None, **saved), memory, **about)


def pace(recent: Iterable[dict[str, Any]], memory: int) -> dict[str, str]:
    """What a progress bar shows beside the number of records: of the recent ones, how many are right and how fast."""
    counts, rates = tally(recent), efficiency(recent)
    shown = {"lately correct": f"{counts['correct']}/{counts['total']}", "it/s": rates["iterations_per_second"]}
    shown |= {"tok/s": rates["tokens_per_second"], "GiB": memory / 2**30}
    return {name: value if isinstance(value, str) else f"{value:.3g}" for name, value in shown.items() if value}


def record_of(example: Example, answer: Answer) -> dict[str, Any]:
    """One line of the log."""
    record = {
        "row": example.row,
        "data_idx": example.idx,
        "question": example.question,
        "prompt": answer.prompt,
        "image_path": shown_path(example.images),
        "model_output": answer.text,
        **verdict_of(example, answer.text, answer.stop_reason),
        "ground_truth": example.solution,
        "best_reward": None,
        "best_reward_step": None,
        "stop_reason": answer.stop_reason,
        "error": answer.error,
        "num_new_tokens": answer.num_new_tokens,
        "seconds": answer.seconds,
    }
    if reasoning := answer.reasoning:
        record |= {
            "best_reward": reasoning.best_reward,
            "best_reward_step": reasoning.best_step,
            "initial_reward": reasoning.start_reward,
            "rewards": [step["reward"] for step in reasoning.steps],
            "patch_counts": [step["patch_count"] for step in reasoning.steps],
            "patches": reasoning.patches,
            "patch_grid": list(reasoning.patch_grid),
        }
        if reasoning.steps:
            record["evaluations"] = reasoning.evaluations
    if answer.details:
        record["details"] = answer.details
    groups = {key: example.meta[key] for key in GROUPS if key in example.meta}
    record |= {key: str(value) if isinstance(value, list | dict) else value for key, value in groups.items()}
    return record | ({"boxes": example.meta["boxes"]} if "boxes" in example.meta else {})


def shown_path(images: tuple[str, ...]) -> str | list[str] | None:
    """As in the dataset file: one path, or several; images that lie in the file itself are not copied."""
    paths = [without_password(path) for path in images if not path.startswith("data:")]
    return (paths[0] if len(paths) == 1 else paths) if paths else None


def save_extras(job: Job, example: Example, answer: Answer, config: Config) -> None:
    """The reward CSV of one example and, on request, a drawing of its kept patches.

    An image that is gone by now (one from a server is fetched again) costs its drawing alone.
    """
    if answer.reasoning is None:
        return
    if config.save_reward_csv:
        write_reward_csv(job.folder / "rewards" / f"{example.row:05d}.csv", answer.reasoning.steps)
    if config.visual_token_viz and example.image:
        from dmlr.show.plots import save_kept_patches  # matplotlib costs a second that most runs need not pay

        path = job.folder / config.visual_token_viz_dir / f"{example.row:05d}.png"
        try:
            save_kept_patches(path, open_image(example.image), answer.reasoning.patches, answer.reasoning.patch_grid)
        except ImageError as error:
            print(f"not drawn: {error}", file=sys.stderr, flush=True)


def save_results(job: Job, log: RunLog, config: Config, peak_memory: int | None, **more: Any) -> dict[str, Any]:
    """results.json from the log; `peak_memory` (bytes) and the `environment` in `more` are those of the answers."""
    speed = efficiency(log.records()) | {"peak_memory_bytes": peak_memory}
    about = {"model": config.model_name_or_path, "dataset": job.dataset, "method": job.method, "efficiency": speed}
    return write_results(job.folder, log.records(), config=dict(config), **about, **more)
