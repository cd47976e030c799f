"""One update of the embedded model: losses of a packed batch, gradients averaged over processes, Muon and AdamW.

Knows nothing about time, files other than its state, or where batches come from. States are safetensors, no pickles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.shapes.scenes import GRID
from dmlr.config import locate
from notebooks.training.packing import IMAGE_TOKENS, KINDS, NO_LABEL, Batch, Phase
from notebooks.training.parts import ENDOFTEXT, IMAGE_PAD, build_model
from notebooks.training.tree_attention import TREE

STATE = "state.safetensors"
TIED = "lm_head.weight"  # the embedding's second name


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights but the clock: `minutes` are real ones, and what is asked, and the learning
    rate, follow the time gone. Two runs of one recipe are two draws, not the same weights."""

    family: str = "qwen2_5_vl"  # or qwen3_vl
    start: str = ""  # checkpoint whose tokenizer it takes, and its language model as far as names and shapes agree
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


class Learner:
    """The model with a linear head that names what each merged token shows and where (thrown away afterwards)."""

    def __init__(self, vocab_size: int, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        sizes = {"hidden": recipe.hidden, "layers": recipe.layers}
        self.model = build_model(vocab_size, recipe.seed, recipe.family, **sizes).to(device).train()
        if recipe.start:
            start_from(self.model, recipe.start)
        self.model.set_attn_implementation({"text_config": TREE, "vision_config": "sdpa"})
        self.head = torch.nn.Linear(recipe.hidden, KINDS + 2 * GRID).to(device)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for p in self.parameters if all(p is not q for q in matrices)]
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.97)),
        )

    def features(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Merged visual features, [B, IMAGE_TOKENS, D], and the deep ones (DeepStack), [B * IMAGE_TOKENS, D] each."""
        count = len(batch.ids)
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * count, device=self.device)
        seen = self.model.model.get_image_features(batch.pixels, grid)
        deep = [torch.cat(list(level)) for level in getattr(seen, "deepstack_features", None) or ()]
        return torch.cat(list(seen.pooler_output)).view(count, IMAGE_TOKENS, -1), deep

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

    def hidden(
        self, features: torch.Tensor, deep: list[torch.Tensor], batch: Batch, noise: torch.Generator | None = None
    ) -> torch.Tensor:
        """The language model over packed scenes, [B, S, D]; with `noise` on their think tokens."""
        embedding = self.model.get_input_embeddings()
        embeds = embedding(batch.ids).clone()  # [B, S, D]
        features = features.to(embeds.dtype)
        seen = (batch.ids == IMAGE_PAD) & (batch.patch < 0)
        embeds[seen] = features.flatten(0, 1)
        rows, slots = (batch.patch >= 0).nonzero(as_tuple=True)
        embeds[rows, slots] = features[rows, batch.patch[rows, slots]]
        if noise is not None:
            embeds = embeds + self._noise(embeds, batch, embedding.weight[ENDOFTEXT].detach(), noise)
        return self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch.positions,
            use_cache=False,
            tree=batch.tree(),
            **({"visual_pos_masks": seen, "deepstack_visual_embeds": deep} if deep else {}),
        ).last_hidden_state

    def answer_loss(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Cross-entropies of the answers' tokens and of the guesses at think tokens, and the accuracy of the former."""
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
            features, deep = self.features(batch)
            loss, under = self.token_loss(features, batch)
            told = {"token_accuracy": under}
            if now:
                answers, guesses, told["answer_token_accuracy"] = self.answer_loss(
                    self.hidden(features, deep, batch, noise), batch
                )
                told |= {"loss": answers.item(), "guess_loss": guesses.item()}
                loss = answers + now.guess * guesses + self.recipe.auxiliary * loss
        loss.backward()
        average_gradients(self.parameters)
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
        (folder / "state.tmp").replace(folder / STATE)

    def load_state(self, folder: Path) -> None:
        """Continues from `save_state`. RuntimeError when the state is of another recipe's layers or shapes."""
        tensors = load_file(folder / STATE, device=str(self.device))
        found = self.model.load_state_dict(_part(tensors, "model."), strict=False)
        if found.unexpected_keys or found.missing_keys not in ([], [TIED]):
            raise RuntimeError(f"{folder}: state of another model: {found.missing_keys + found.unexpected_keys}")
        self.head.load_state_dict(_part(tensors, "head."))
        for i, parameter in enumerate(self.parameters):
            if state := _part(tensors, f"optimizer.{i}."):
                if "step" in state:
                    state["step"] = state["step"].cpu()
                self._optimizer_of(parameter).state[parameter] = state

    def _optimizer_of(self, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        groups = ((optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups)
        return next(optimizer for optimizer, group in groups if any(p is parameter for p in group["params"]))


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Each process gets the mean of all processes' gradients, bit for bit the same; alone it keeps its own."""
    if not dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _unshared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State without the second name of tied weights."""
    return {name: value for name, value in model.state_dict().items() if name != TIED}


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def start_from(model: torch.nn.Module, checkpoint: str) -> None:
    """The language model's weights of another checkpoint, as far as names and shapes agree; the others stay."""
    theirs, mine = load_file(Path(locate(checkpoint)) / "model.safetensors"), model.state_dict()
    with torch.no_grad():
        for name, value in theirs.items():
            if "language_model" in name and name in mine and mine[name].shape == value.shape:
                mine[name].copy_(value)
