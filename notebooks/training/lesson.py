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
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from transformers import AutoProcessor, AutoTokenizer

from data.shapes.questions import DENSE, MIX
from data.shapes.scenes import EASY, Difficulty, random_scene
from dmlr.config import locate
from dmlr.prompts import Prompts
from notebooks.training.learner import STATE, Learner, Recipe
from notebooks.training.packing import Phase, batches
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


def learning_rate(most: float, warm_up: int, step: int, share: float) -> float:
    """Warm-up over so many steps, then cosine over the share of time gone, down to a fiftieth."""
    return most * min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))


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

    `state_folder` keeps what a later call continues from (the processor too: the tokenizer is made once). A later call
    may give more minutes. ValueError for another recipe, and for a state without its processor.
    """
    folder, state_folder = Path(folder), Path(state_folder)
    state_folder.mkdir(parents=True, exist_ok=True)
    told = state_folder / "recipe.json"
    if told.exists() and json.loads(told.read_text()) | {"minutes": 0} != asdict(recipe) | {"minutes": 0}:
        raise ValueError(f"{state_folder} holds a run of another recipe; name another folder or remove it")
    _make_processor_once(state_folder, recipe)
    told.write_text(json.dumps(asdict(recipe)))
    in_processes(_work, 1 if torch.cuda.is_available() else recipe.processes, state_folder, folder, recipe)


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


def _work(rank: int, state_folder: Path, folder: Path, recipe: Recipe) -> Iterable[torch.Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(state_folder / PROCESSOR)
    learner = Learner(len(processor.tokenizer), recipe, device)
    progress = {"steps": 0, "seconds": 0.0, "curve": []}
    if (state_folder / STATE).exists():
        progress = learner.load_state(state_folder)
    first, gone = progress["steps"], progress["seconds"]
    data = batches(
        processor.tokenizer,
        wordings(Prompts()),
        f"{recipe.seed} {rank} {first}",
        lambda: phase(recipe, gone),
        recipe.scenes,
        recipe.length,
        recipe.targets,
    )
    noise = torch.Generator().manual_seed(recipe.seed + 1000 * first + rank)

    def step(number: int, seconds: float) -> dict[str, float]:
        nonlocal gone
        gone = seconds
        now = None if seconds < 60 * recipe.vision_minutes else phase(recipe, seconds)
        lr = learning_rate(recipe.lr, 200, number, seconds / (60 * recipe.minutes))
        return learner.step(next(data).to(device), lr, now, noise)

    def keep() -> None:
        learner.save_state(state_folder, progress)
        save_checkpoint(learner.model, processor, folder, {"recipe": asdict(recipe), **progress})

    for_minutes(recipe.minutes, rank, progress, step, keep, every=50)
    return learner.parameters


# what both lessons share: a given time, in several processes


def in_processes(work: Callable[..., Iterable[torch.Tensor]], processes: int, folder: Path, *given) -> None:
    """`work(rank, folder, *given)` in single-threaded processes that average their gradients; a single one is this one.

    It returns its parameters. RuntimeError unless they are the same in all processes.
    """
    if processes == 1:
        work(0, folder, *given)
        return
    meeting = folder.resolve() / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_member, (processes, meeting, work, folder, *given), processes)
    meeting.unlink(missing_ok=True)


def _member(rank: int, processes: int, meeting: Path, work: Callable, *given) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=processes)
    parameters = work(rank, *given)
    if not orphaned():
        check_same_everywhere(parameters)
        dist.destroy_process_group()


def for_minutes(
    minutes: float,
    rank: int,
    progress: dict,
    step: Callable[[int, float], dict[str, float]],
    keep: Callable[[], None],
    every: int,
) -> None:
    """`step(number, seconds gone)` until the time is up, by the first process's clock.

    progress: steps, seconds, curve (a line of means every so many steps); goes on where it stands. The first process
    prints the lines, and calls `keep` every two and a half minutes and at the end.
    """
    start, saved, window = time.time() - progress["seconds"], time.time(), []
    while (gone := agree(time.time() - start)) < 60 * minutes:
        if orphaned():  # the notebook was killed: nobody waits for this, and its folders may be somebody else's
            return
        window.append(step(progress["steps"], gone))
        progress |= {"steps": progress["steps"] + 1, "seconds": gone}
        if progress["steps"] % every == 0:
            means = pd.DataFrame(window).mean().dropna().round(4).to_dict()  # no loss before answers are asked
            progress["curve"].append({"step": progress["steps"], "seconds": round(gone), **means})
            window.clear()
            if rank == 0:
                print(json.dumps(progress["curve"][-1]), flush=True)
        if rank == 0 and time.time() - saved > 150:
            saved = time.time()
            keep()
    progress["seconds"] = gone
    if rank == 0:
        keep()


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
