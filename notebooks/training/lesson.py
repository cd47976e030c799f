"""How the embedded model learns: first what lies under each merged token, then to answer.

Training runs for a given time with a cosine schedule over it, on a GPU or on several single-threaded CPU processes
that average their gradients (one thread each wastes nothing on barriers, and another program on a core slows only
that one). It continues from its last state when started again.

What failed is in dev/LOG.md, what each ingredient is for in notebook 00. The order matters: labels of what lies under
each merged token and where; dense answers (captions, copying) in more than half of the questions; then questions. Many
images with few questions each, and Muon for the matrices, learn in minutes what took an hour without.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoProcessor, AutoTokenizer

from data.shapes.scenes import EASY, Difficulty, random_scene
from dmlr.config import locate
from dmlr.prompts import Prompts
from notebooks.training.learner import STATE, Learner, Recipe
from notebooks.training.packing import DENSE, MIX, Phase, batches
from notebooks.training.parts import build_processor, build_tokenizer, chat_text, save_checkpoint, wordings

PROCESSOR = "processor"  # folder beside the state


def corpus(scenes: int = 1500) -> list[str]:
    """Text for the tokenizer: every wording of the prompts, and questions with answers about training scenes."""
    rng, texts = random.Random(5), []
    for prompts in wordings(Prompts()):
        texts += [chat_text(prompts.system, prompts.latent_task("", count)) for count in range(1, 9)]
        texts.append(chat_text(prompts.system, prompts.task("")))
    texts = texts * 4 + [Prompts().self_score] * 4 + list(Prompts().solver) * 40
    for _ in range(scenes):
        scene = random_scene(rng, "train", EASY)
        texts += [q.prompt + q.response for maker, _ in (*MIX, *DENSE) for q in maker(scene, rng)]
    return texts


def learning_rate(recipe: Recipe, step: int, share: float) -> float:
    """Warm-up over 200 steps, then cosine over the share of time gone, down to a fiftieth."""
    return recipe.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))


def phase(recipe: Recipe, seconds: float) -> Phase:
    """What is asked after so many seconds: dense captions first, think tokens with patches last."""
    late = seconds >= recipe.late * 60 * recipe.minutes
    fallen = min(max(seconds / 60 - recipe.vision_minutes, 0) / recipe.dense_minutes, 1)
    dense = recipe.dense + (recipe.late_dense - recipe.dense) * fallen
    if late:
        return Phase(recipe.questions, recipe.late_latent, dense, recipe.late_guess, Difficulty())
    return Phase(recipe.questions, recipe.latent, dense, 0.0, EASY)


def train(folder: str | Path, recipe: Recipe, state_folder: str | Path) -> None:
    """Trains into `folder` (an ordinary checkpoint, renewed every few minutes) and returns when the time is up.

    `state_folder` keeps what a later call continues from (the processor too: the tokenizer is made once) and log.jsonl,
    a line of means every 50 steps. A later call may give more minutes. ValueError for another recipe, and for a state
    without its processor.
    """
    folder, state_folder = Path(folder), Path(state_folder)
    state_folder.mkdir(parents=True, exist_ok=True)
    told = state_folder / "recipe.json"
    if told.exists() and json.loads(told.read_text()) | {"minutes": 0} != asdict(recipe) | {"minutes": 0}:
        raise ValueError(f"{state_folder} holds a run of another recipe; name another folder or remove it")
    _make_processor_once(state_folder, recipe)
    told.write_text(json.dumps(asdict(recipe)))
    if torch.cuda.is_available() or recipe.processes == 1:
        _work(0, 1, folder, recipe, state_folder)
        return
    meeting = state_folder / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_work, (recipe.processes, folder, recipe, state_folder, meeting), recipe.processes)


def _make_processor_once(state_folder: Path, recipe: Recipe) -> None:
    """What the weights mean depends on the tokenizer, and that on the wording of every question: never made again."""
    kept = state_folder / PROCESSOR
    if kept.exists():
        return
    if (state_folder / STATE).exists():
        raise ValueError(f"{state_folder} holds a state without its {PROCESSOR}; name another folder or remove it")
    half = state_folder / f"{PROCESSOR}.part"
    start = AutoTokenizer.from_pretrained(locate(recipe.start)) if recipe.start else None
    build_processor(start or build_tokenizer(corpus(), 768), recipe.family).save_pretrained(half)
    half.rename(kept)


def _work(rank: int, world: int, folder: Path, recipe: Recipe, state_folder: Path, meeting: Path | None = None):
    if meeting is not None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting.resolve().as_uri(), rank=rank, world_size=world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(state_folder / PROCESSOR)
    tokenizer = processor.tokenizer
    learner = Learner(len(tokenizer), recipe, device)
    step, before, saved = 0, 0.0, time.time()
    if (state_folder / STATE).exists():
        step, before = (json.loads(_metadata(state_folder))[key] for key in ("step", "seconds"))
        learner.load_state(state_folder)

    def keep(step: int, seconds: float) -> None:
        learner.save_state(state_folder, {"step": step, "seconds": seconds})
        parameters = sum(p.numel() for p in learner.model.parameters())
        log = state_folder / "log.jsonl"
        curve = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        numbers = {"recipe": asdict(recipe), "steps": step, "seconds": round(seconds), "parameters": parameters}
        numbers |= {"curve": curve}
        save_checkpoint(learner.model, processor, folder, numbers)

    start, window = time.time(), []
    gone, seed = before, f"{recipe.seed} {rank} {step}"
    data = batches(
        tokenizer, wordings(Prompts()), seed, lambda: phase(recipe, gone), recipe.scenes, recipe.length, recipe.targets
    )
    noise = torch.Generator().manual_seed(recipe.seed + 1000 * step + rank)
    while (gone := agree(before + time.time() - start)) < 60 * recipe.minutes:
        if orphaned():  # the notebook was killed: nobody waits for this, and its folders may be somebody else's
            return
        share = gone / (60 * recipe.minutes)
        batch = next(data).to(device)
        now = None if gone < 60 * recipe.vision_minutes else phase(recipe, gone)
        told = learner.step(batch, learning_rate(recipe, step, share), now, noise)
        step += 1
        if rank > 0:
            continue
        window.append(told)
        if step % 50 == 0:
            line = json.dumps({"step": step, "seconds": round(gone), **means(window)})
            with open(state_folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            window.clear()
        if time.time() - saved > 150:
            saved = time.time()
            keep(step, gone)
    if rank == 0:
        keep(step, gone)
    if meeting is not None:
        check_same_everywhere(learner.parameters)
        dist.destroy_process_group()


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each quantity over the rows that have it: answers have a loss only once questions are asked."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in columns.items()}


def check_same_everywhere(parameters: Iterable[torch.Tensor]) -> None:
    """RuntimeError unless all processes hold the same weights, bit for bit, as the same steps from one start must."""
    checksum = hashlib.sha256()
    for parameter in parameters:
        checksum.update(parameter.detach().cpu().numpy().tobytes())
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, checksum.hexdigest())
    if len(set(found)) > 1:
        raise RuntimeError("the processes ended with different weights; the checkpoint holds those of the first")


def orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def agree(seconds: float) -> float:
    """The first process's clock, so that all stop at the same step."""
    clock = torch.tensor([seconds], dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return clock.item()


def _metadata(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / STATE, "pt") as file:
        return file.metadata()["progress"]
