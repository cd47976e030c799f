"""A dataset through methods: batches in, judged records out. The only place where answers meet ground truths.

Nothing that goes wrong with one example stops the run: a failing batch is halved until the example that fails is
alone, which then becomes one error record. Batches never change an answer, so halving is safe, also when memory
runs out. Knows nothing about how a method works or a notebook looks.
"""

from __future__ import annotations

import hashlib
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dmlr.config import Config, ConfigError, check_names, locate
from dmlr.data import Example, ImageError, Problem, load_dataset, open_image
from dmlr.methods import METHODS, Answer, Question
from dmlr.metrics import efficiency
from dmlr.results import RunLog, read_results, read_run, write_results, write_reward_csv
from dmlr.verdicts import ask_llm, llm_settings, verdict_of
from dmlr.vlm import VLM

if TYPE_CHECKING:
    from dmlr.llm_settings import JudgeSettings

# What metrics and figures group records by, copied from the dataset where it is there.
GROUPS = (
    *("suite", "category", "subcategory", "l2_category", "answer_type", "level"),
    *("pair_id", "figure_group", "question_group", "boxes"),
)


@dataclass(frozen=True)
class Job:
    """One dataset through one method."""

    dataset: str
    method: str
    folder: Path
    examples: list[Example]
    problems: list[Problem]


def run(config: Config, vlm: VLM | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Every dataset of the config through every method; returns results.json's content by (dataset name, method).

    Each job writes `<output_dir>/<dataset>/<method>/`: log.jsonl as it goes, results.json, rewards/<row>.csv. The
    model is loaded when the first example needs it, and not at all with `verify_only`. Raises what makes the whole
    run pointless (a bad dataset file, a model that does not load, a folder that another process holds, an LLM judge
    without a key).
    """
    jobs = plan(config)
    llm = llm_settings(config)
    model = VLM.load(config) if vlm is None and not config.verify_only else vlm
    work = partial(verify, config=config) if config.verify_only else partial(run_job, config=config, vlm=model)
    work = partial(work, llm=llm)
    total = sum(len(job.examples) for job in jobs)
    with tqdm(total=total, unit="ex", disable=config.verbose == 0, smoothing=0.1) as bar:
        return {(name(job.dataset), job.method): work(job, bar=bar) for job in jobs}


def plan(config: Config) -> list[Job]:
    """The run's jobs in order. ConfigError for an unknown method, DatasetError for an unusable file."""
    methods = [m.strip() for m in config.methods.split(",") if m.strip()]
    check_names(methods, METHODS, what="method")
    datasets = [d.strip() for d in config.dataset.split(",") if d.strip()]
    if not methods or not datasets:
        raise ConfigError(f"nothing to run: methods = {config.methods!r}, dataset = {config.dataset!r}")
    jobs = []
    for dataset in datasets:
        examples, problems = load_dataset(dataset)
        inside = [e for e in examples if _in_range(e.row, config)]
        lost = [p for p in problems if p.fatal and (p.row is None or _in_range(p.row, config))]
        for method in methods:
            jobs.append(Job(dataset, method, output_folder(config) / name(dataset) / method, inside, lost))
    return jobs


def output_folder(config: Config) -> Path:
    """`output_dir`, or a folder under reports/runs named by model and datasets."""
    if config.output_dir:
        return Path(config.output_dir)
    datasets = "+".join(name(d.strip()) for d in config.dataset.split(","))
    return Path(locate("reports")) / "runs" / f"{name(config.model_name_or_path)}_{datasets}"


def name(path: str) -> str:
    """Short name of a dataset or model: the last part of its path, safe as a folder name."""
    return re.sub(r"[^\w.+-]+", "-", Path(path.strip().rstrip("/")).name.removesuffix(".json")) or "unnamed"


def run_job(job: Job, config: Config, vlm: VLM, bar: tqdm, llm: JudgeSettings | None = None) -> dict[str, Any]:
    """Answers what is not finished yet, judges it, and derives results.json; also when interrupted."""
    bar.set_description(f"{name(job.dataset)} {job.method}")
    checksum = hashlib.sha256(Path(locate(job.dataset)).read_bytes()).hexdigest()
    facts = {"method": job.method, "dtype": str(vlm.dtype), "device": vlm.device.type, "dataset": checksum}
    right = judged = 0
    asked = None
    with RunLog(job.folder, config, resume=config.resume, facts=facts) as log:
        done = log.finished()
        todo = [e for e in job.examples if e.row not in done]
        bar.update(len(job.examples) - len(todo))
        try:
            for problem in job.problems:
                log.append(error_record(problem.row, problem.idx, f"{problem.kind}: {problem.message}"))
            for example, answer in answer_all(vlm, job.method, todo, config):
                record = record_of(example, answer)
                log.append(record)
                save_extras(job, example, answer, config)
                right, judged = right + bool(record["is_correct"]), judged + (record["is_correct"] is not None)
                bar.set_postfix_str(f"{right}/{judged} right", refresh=False)
                bar.update()
                if config.verbose == 2:
                    bar.write(f"{example.idx}: {answer.text!r} ({example.solution})")
            asked = ask_llm(log, job.examples, llm, every=config.llm_verify_all)
        finally:
            results = save_results(job, log, config, llm_judge=asked)
    return results


def verify(job: Job, config: Config, bar: tqdm, llm: JudgeSettings | None = None) -> dict[str, Any]:
    """Judges the saved answers again, without the model, under the configuration that made them.

    Whether an LLM is asked is this configuration's choice; what it said before comes from its cache, and only what
    failed, or is new, costs a request.
    """
    bar.set_description(f"{name(job.dataset)} {job.method}: judging again")
    saved, before = read_run(job.folder)["config"], read_results(job.folder)
    examples = {e.row: e for e in job.examples}
    with RunLog(job.folder, saved, resume=True) as log:
        for old in log.records():
            if old["row"] in examples and old["stop_reason"] != "error":
                log.append({**old, **verdict_of(examples[old["row"]], old["model_output"], old["stop_reason"])})
                bar.update()
        asked = ask_llm(log, job.examples, llm, every=config.llm_verify_all)
        return save_results(job, log, Config.make(None, **saved), before["environment"], llm_judge=asked)


def answer_all(vlm: VLM, method: str, examples: Sequence[Example], config: Config) -> Iterator[tuple[Example, Answer]]:
    """Answers in batches, in order. Examples without ground truth are skipped, unreadable images are errors."""
    size = config.batch_size or vlm.fitting_batch(1024 + config.max_new_tokens)
    for start in range(0, len(examples), size):
        batch, answers = examples[start : start + size], {}
        questions = []
        for example in batch:
            if not example.solution:
                answers[example.row] = Answer("", "", "skipped_no_ground_truth")
                continue
            try:
                images = [open_image(example.image)] if example.image else []
                questions.append((example, Question(example.idx, example.question, images)))
            except ImageError as error:
                answers[example.row] = failed(error)
        spoken = answer_batch(vlm, method, [question for _, question in questions], config)
        answers |= {example.row: answer for (example, _), answer in zip(questions, spoken, strict=True)}
        for example in batch:
            yield example, answers[example.row]


def answer_batch(vlm: VLM, method: str, questions: list[Question], config: Config) -> list[Answer]:
    """One batch; where it fails, its halves, down to the single question that cannot be answered."""
    if not questions:
        return []
    try:
        return METHODS[method](vlm, questions, config)
    except Exception as error:  # whatever it is, it may cost one record and not the run
        if len(questions) == 1:
            return [failed(error)]
    if vlm.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(questions) // 2
    return answer_batch(vlm, method, questions[:half], config) + answer_batch(vlm, method, questions[half:], config)


def failed(error: Exception) -> Answer:
    """An answer that says why there is none."""
    return Answer("", "", "error", error=f"{type(error).__name__}: {error}".split("\n")[0])


def record_of(example: Example, answer: Answer) -> dict[str, Any]:
    """One line of the log: everything a reader needs to check the verdict."""
    record = {
        "row": example.row,
        "data_idx": example.idx,
        "question": example.question,
        "prompt": answer.prompt,
        "image_path": example.image if example.image and not example.image.startswith("data:") else None,
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
    if answer.details:
        record["details"] = answer.details
    return record | {key: example.meta[key] for key in GROUPS if key in example.meta}


def error_record(row: int | None, idx: int | str | None, message: str) -> dict[str, Any]:
    """A row of the dataset that never became an example."""
    example = Example(-1 if row is None else row, idx, "", "", None, {})
    return record_of(example, Answer("", "", "error", error=message))


def save_extras(job: Job, example: Example, answer: Answer, config: Config) -> None:
    """The reward CSV of one example and, on request, a drawing of its kept patches."""
    if answer.reasoning is None:
        return
    if config.save_reward_csv:
        write_reward_csv(job.folder / "rewards" / f"{example.row:05d}.csv", answer.reasoning.steps)
    if config.visual_token_viz and example.image:
        from dmlr.plots import save_kept_patches  # matplotlib costs a second that most runs need not pay

        path = job.folder / config.visual_token_viz_dir / f"{example.row:05d}.png"
        save_kept_patches(path, open_image(example.image), answer.reasoning.patches, answer.reasoning.patch_grid)


def save_results(
    job: Job, log: RunLog, config: Config, made_with: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """results.json from the log; `made_with` is the environment of the answers, this one unless said."""
    return write_results(
        job.folder,
        log.records(),
        model=config.model_name_or_path,
        dataset=job.dataset,
        config=config.as_dict(),
        method=job.method,
        environment=made_with or environment(),
        efficiency=efficiency(log.records()) | {"peak_memory_bytes": peak_memory()},
        **more,
    )


def peak_memory() -> int:
    """Most memory so far: allocated on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, str]:
    """Versions and the revision of this code, for the report's header."""
    import transformers

    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "revision": revision or "unknown",
    }


def _in_range(row: int, config: Config) -> bool:
    return row >= config.start_data_idx and (config.end_data_idx is None or row < config.end_data_idx)
