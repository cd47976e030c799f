"""How the embedded model learns: first what lies under each merged token, then to answer.

Training runs for a given time with a cosine schedule over it, on a GPU or on several single-threaded CPU processes
that average their gradients (one thread each wastes nothing on barriers, and another program on a core slows only
that one). It continues from its last state when started again. No pickles: states are safetensors.

What failed is in dev/LOG.md, what each ingredient is for in notebook 00. The order matters: labels of what lies under
each merged token and where; dense answers (captions, copying) in more than half of the questions; then questions. Many
images with few questions each, and Muon for the matrices, learn in minutes what took an hour without.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dmlr.prompts import Prompts
from dmlr.shapes import EASY, GRID, Difficulty, random_scene
from dmlr.shapes_attention import TREE
from dmlr.shapes_packing import DENSE, IMAGE_TOKENS, KINDS, MIX, NO_LABEL, Batch, Phase, batches
from dmlr.shapes_vl import (
    ENDOFTEXT,
    IMAGE_PAD,
    build_model,
    build_processor,
    build_tokenizer,
    chat_text,
    save_checkpoint,
    wordings,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the number of steps that fit into `minutes`."""

    minutes: float = 50.0
    vision_minutes: float = 1.5  # labels per merged token only
    hidden: int = 192
    layers: int = 6
    scenes: int = 6  # per step and process; many images with few questions each learn faster than the reverse
    questions: int = 5  # per scene
    latent: float = 0.2  # share of questions with think tokens, at first
    late: float = 0.5  # share of the time after which scenes are hard and think tokens are trained in earnest
    late_latent: float = 0.55
    late_guess: float = 0.05  # weight of the final answer, which think tokens predict: their confidence means something
    dense: float = 0.6  # share of dense answers once questions begin ...
    dense_minutes: float = 15.0  # ... falling to late_dense in these minutes
    late_dense: float = 0.1
    processes: int = 2
    lr: float = 2.5e-3
    weight_decay: float = 0.03
    auxiliary: float = 0.1  # weight of the labels per merged token beside the answers
    noise: float = 3.0  # largest noise on think tokens, in units of their embedding's RMS
    length: int = 512  # tokens of a packed scene
    targets: int = 288  # labels of a packed scene
    seed: int = 0


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


class Learner:
    """The model with a linear head that names what each merged token shows and where (thrown away afterwards)."""

    def __init__(self, vocab_size: int, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.model = build_model(vocab_size, recipe.seed, hidden=recipe.hidden, layers=recipe.layers).to(device).train()
        self.model.set_attn_implementation({"text_config": TREE, "vision_config": "sdpa"})
        self.head = torch.nn.Linear(recipe.hidden, KINDS + 2 * GRID).to(device)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
        others = [p for p in self.parameters if all(p is not q for q in matrices)]
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.97)),
        )

    def features(self, batch: Batch) -> torch.Tensor:
        """Merged visual features, [B, IMAGE_TOKENS, D]."""
        count = len(batch.ids)
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * count, device=self.device)
        flat = torch.cat(self.model.model.get_image_features(batch.pixels, grid).pooler_output)
        return flat.view(count, IMAGE_TOKENS, -1)

    def token_loss(self, features: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Cross-entropies of what lies under each merged token, of its row and of its column.

        Returns their sum and the share of tokens of which all three are right.
        """
        logits = self.head(features).float().flatten(0, 1).split([KINDS, GRID, GRID], dim=-1)
        place = torch.arange(GRID, device=self.device).expand(len(features), GRID, GRID)
        labels = (batch.kinds.flatten(), place.mT.flatten(), place.flatten())
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True))
        right = torch.stack([x.argmax(-1) == y for x, y in zip(logits, labels, strict=True)]).all(dim=0)
        return loss, right.float().mean().item()

    def answer_loss(self, features: torch.Tensor, batch: Batch, noise: torch.Generator) -> tuple:
        """Cross-entropies of the answers' tokens and of the guesses at think tokens, and the accuracy of the former."""
        embedding = self.model.get_input_embeddings()
        embeds = embedding(batch.ids).clone()  # [B, S, D]
        features = features.to(embeds.dtype)
        embeds[(batch.ids == IMAGE_PAD) & (batch.patch < 0)] = features.flatten(0, 1)
        rows, slots = (batch.patch >= 0).nonzero(as_tuple=True)
        embeds[rows, slots] = features[rows, batch.patch[rows, slots]]
        embeds = embeds + self._noise(embeds, batch, embedding.weight[ENDOFTEXT].detach(), noise)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.positions,
            attention_mask={"full_attention": None},
            use_cache=False,
            tree=batch.tree(),
        ).last_hidden_state
        answered = batch.labels != NO_LABEL
        labels = torch.where(answered, batch.labels, batch.guesses)
        # The same number of positions in every step: one compiled kernel instead of one per batch.
        where = (labels != NO_LABEL).float().topk(self.recipe.targets, dim=1).indices  # [B, targets]
        labels, answered = labels.gather(1, where).flatten(), answered.gather(1, where).flatten()
        hidden = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[2]))
        logits = self.model.lm_head(hidden).float().flatten(0, 1)
        losses = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        right = (logits.argmax(-1) == labels)[answered].float().mean().item()
        guesses = losses[~answered].sum() / (~answered & (labels != NO_LABEL)).sum().clamp(min=1)
        return losses[answered].mean(), guesses, right

    def _noise(self, embeds: torch.Tensor, batch: Batch, think: torch.Tensor, generator: torch.Generator):
        """Gaussian noise on the think tokens of half of the branches, mostly small, up to `noise` times their RMS."""
        count, branches = len(embeds), int(batch.branch.max()) + 1
        draw = partial(torch.rand, count, branches, generator=generator)
        scale = (draw().pow(2) * self.recipe.noise * (draw() < 0.5)).to(self.device)  # [B, branches]
        scale = scale.gather(1, batch.branch.clamp(min=0)) * batch.think * think.pow(2).mean().sqrt()  # [B, S]
        return torch.randn(embeds.shape, generator=generator).to(self.device, embeds.dtype) * scale[..., None]

    def step(self, batch: Batch, lr: float, now: Phase | None, noise: torch.Generator) -> dict[str, float]:
        """One update on the mean gradient of all processes; without a phase on the labels of visual tokens only."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16):
            features = self.features(batch)
            loss, under = self.token_loss(features, batch)
            told = {"token_accuracy": under}
            if now:
                answers, guesses, told["answer_token_accuracy"] = self.answer_loss(features, batch, noise)
                told |= {"loss": answers.item(), "guess_loss": guesses.item()}
                loss = answers + now.guess * guesses + self.recipe.auxiliary * loss
        loss.backward()
        _average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return told

    def save_state(self, folder: Path, progress: dict) -> None:
        """Weights and optimiser state, to continue from."""
        tensors = {f"model.{name}": value.contiguous() for name, value in _unshared(self.model).items()}
        tensors |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for name, value in self._optimizer_of(parameter).state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{name}"] = value
        save_file(tensors, folder / "state.tmp", {"progress": json.dumps(progress)})
        (folder / "state.tmp").replace(folder / "state.safetensors")

    def load_state(self, folder: Path) -> None:
        """Continues from `save_state`. Raises when the state is of another recipe's shapes."""
        tensors = load_file(folder / "state.safetensors", device=str(self.device))
        self.model.load_state_dict(_part(tensors, "model."), strict=False)  # tied weights are saved once
        self.head.load_state_dict(_part(tensors, "head."))
        for i, parameter in enumerate(self.parameters):
            if state := _part(tensors, f"optimizer.{i}."):
                if "step" in state:
                    state["step"] = state["step"].cpu()
                self._optimizer_of(parameter).state[parameter] = state

    def _optimizer_of(self, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        groups = ((optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups)
        return next(optimizer for optimizer, group in groups if any(p is parameter for p in group["params"]))


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

    `state_folder` keeps what a later call continues from and log.jsonl, a line of means every 50 steps. A later call
    may give more minutes; another recipe is a ValueError.
    """
    folder, state_folder = Path(folder), Path(state_folder)
    state_folder.mkdir(parents=True, exist_ok=True)
    told = state_folder / "recipe.json"
    if told.exists() and json.loads(told.read_text()) | {"minutes": 0} != asdict(recipe) | {"minutes": 0}:
        raise ValueError(f"{state_folder} holds a run of another recipe; name another folder or remove it")
    told.write_text(json.dumps(asdict(recipe)))
    if torch.cuda.is_available() or recipe.processes == 1:
        _work(0, 1, folder, recipe, state_folder)
        return
    meeting = state_folder / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_work, (recipe.processes, folder, recipe, state_folder, meeting), recipe.processes)


def _work(rank: int, world: int, folder: Path, recipe: Recipe, state_folder: Path, meeting: Path | None = None):
    if meeting is not None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting.resolve().as_uri(), rank=rank, world_size=world)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer(corpus(), 768)
    processor, learner = build_processor(tokenizer), Learner(len(tokenizer), recipe, device)
    step, before, saved = 0, 0.0, time.time()
    if (state_folder / "state.safetensors").exists():
        step, before = (json.loads(_metadata(state_folder))[key] for key in ("step", "seconds"))
        learner.load_state(state_folder)

    def keep(step: int, seconds: float) -> None:
        learner.save_state(state_folder, {"step": step, "seconds": seconds})
        parameters = sum(p.numel() for p in learner.model.parameters())
        numbers = {"recipe": asdict(recipe), "steps": step, "seconds": round(seconds), "parameters": parameters}
        save_checkpoint(learner.model, processor, folder, numbers)

    start, window = time.time(), []
    gone, seed = before, f"{recipe.seed} {rank} {step}"
    data = batches(
        tokenizer, wordings(Prompts()), seed, lambda: phase(recipe, gone), recipe.scenes, recipe.length, recipe.targets
    )
    noise = torch.Generator().manual_seed(recipe.seed + 1000 * step + rank)
    while (gone := _agree(before + time.time() - start)) < 60 * recipe.minutes:
        if _orphaned():  # the notebook was killed: nobody waits for this, and its folders may be somebody else's
            return
        share = gone / (60 * recipe.minutes)
        batch = next(data).to(device)
        now = None if gone < 60 * recipe.vision_minutes else phase(recipe, gone)
        window.append(learner.step(batch, learning_rate(recipe, step, share), now, noise))
        step += 1
        if rank == 0 and step % 50 == 0:
            mean = {key: round(sum(w[key] for w in window if key in w) / len(window), 4) for key in window[-1]}
            line = json.dumps({"step": step, "seconds": round(gone), **mean})
            with open(state_folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(line + "\n")
            print(line, flush=True)
            window.clear()
        if rank == 0 and time.time() - saved > 150:
            saved = time.time()
            keep(step, gone)
    if rank == 0:
        keep(step, gone)
    if meeting is not None:
        dist.destroy_process_group()


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _agree(seconds: float) -> float:
    """The first process's clock, so that all stop at the same step."""
    clock = torch.tensor([seconds], dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return clock.item()


def _unshared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State without the second name of tied weights."""
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _metadata(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", "pt") as file:
        return file.metadata()["progress"]
