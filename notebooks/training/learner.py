"""One update of the embedded model: losses of a packed batch, gradients averaged over processes, Muon and AdamW.

Knows nothing about time, files other than its state, or where batches come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from data.shapes.scenes import GRID
from dmlr.config import locate
from notebooks.training.packing import IMAGE_TOKENS, KINDS, NO_LABEL, Batch, Phase
from notebooks.training.parts import ENDOFTEXT, IMAGE_PAD, build_model
from notebooks.training.tree_attention import TREE, Tree

STATE = "state.pt"


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
        self.optimizers = optimizers_of(self.model, recipe.weight_decay, *self.head.parameters())

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
        added = 0.0 if noise is None else self._noise(batch, noise)
        return language_states(self.model, batch, features, added, deep)

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

    def _noise(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Gaussian noise [B, S, D] on the think tokens of half of the branches, mostly small, up to `noise` times their
        RMS."""
        think = self.model.get_input_embeddings().weight[ENDOFTEXT].detach()
        draw = partial(torch.rand, len(batch.ids), int(batch.branch.max()) + 1, generator=generator)
        scale = (draw().pow(2) * self.recipe.noise * (draw() < 0.5)).to(self.device)  # [B, branches]
        scale = scale.gather(1, batch.branch.clamp(min=0)) * batch.think * think.pow(2).mean().sqrt()  # [B, S]
        return torch.randn(*scale.shape, len(think), generator=generator).to(self.device) * scale[..., None]

    def step(self, batch: Batch, lr: float, now: Phase | None, noise: torch.Generator) -> dict[str, float]:
        """One update on the mean gradient of all processes; without a phase on the labels of visual tokens only."""
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere bfloat16 is slower
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast):
            features, deep = see(self.model, batch.pixels)
            loss, under = self.token_loss(features, batch)
            told = {"token_accuracy": under}
            if now:
                answers, guesses, told["answer_token_accuracy"] = self.answer_loss(
                    self.hidden(features, deep, batch, noise), batch
                )
                told |= {"loss": answers.item(), "guess_loss": guesses.item()}
                loss = answers + now.guess * guesses + self.recipe.auxiliary * loss
        loss.backward()
        update(self.parameters, self.optimizers, lr)
        return told

    def save_state(self, folder: Path, progress: dict) -> None:
        """Weights, optimiser state and progress (plain values), to continue from."""
        parts = [part.state_dict() for part in (self.model, self.head, *self.optimizers)]
        torch.save({"parts": parts, "progress": progress}, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / STATE)

    def load_state(self, folder: Path) -> dict:
        """Continues from `save_state`; its progress. RuntimeError when the state is of other layers or shapes."""
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        for part, values in zip((self.model, self.head, *self.optimizers), state["parts"], strict=True):
            part.load_state_dict(values)
        return state["progress"]


def see(model, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Merged visual features [B, IMAGE_TOKENS, D] of B images' rows, and DeepStack's [B * IMAGE_TOKENS, D] each."""
    count = len(pixels) // (4 * IMAGE_TOKENS)
    seen = model.model.get_image_features(pixels, torch.tensor([[1, 2 * GRID, 2 * GRID]] * count, device=pixels.device))
    deep = [torch.cat(list(level)) for level in getattr(seen, "deepstack_features", None) or ()]
    return torch.cat(list(seen.pooler_output)).view(count, IMAGE_TOKENS, -1), deep


def language_states(
    model, batch: Batch, features: torch.Tensor, added, deep: Sequence[torch.Tensor] = (), parts: int = 2
) -> torch.Tensor:
    """The language model's last hidden states over packed scenes, [B, S, D].

    features: [B, IMAGE_TOKENS, D]; added to the embeddings: [B, S, D]; deep: as `see` gives them; parts: see `Tree.of`.
    """
    embeds = model.get_input_embeddings()(batch.ids) + added
    seen = (batch.ids == IMAGE_PAD) & (batch.patch < 0)
    embeds[seen] = features.flatten(0, 1).to(embeds.dtype)
    rows, slots = (batch.patch >= 0).nonzero(as_tuple=True)
    embeds[rows, slots] = features[rows, batch.patch[rows, slots]].to(embeds.dtype)
    tree = Tree.of(batch.branch.cpu(), parts).to(batch.branch.device)
    also = {"visual_pos_masks": seen, "deepstack_visual_embeds": deep} if deep else {}
    return model.model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, use_cache=False, tree=tree, **also
    ).last_hidden_state


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024), in float32.

    torch.optim.Muon works in bfloat16: on a CPU without such instructions 3.2 seconds a step instead of 0.17.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                size = 0.2 * max(p.shape) ** 0.5  # the root mean square of an AdamW step
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest orthogonal matrix, by Newton-Schulz: [M, N] -> [M, N]."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def optimizers_of(network: torch.nn.Module, weight_decay: float, *more: torch.nn.Parameter):
    """Muon for the network's matrices, AdamW for everything else and for the parameters `more`."""
    named = list(network.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    return (
        Muon(matrices, weight_decay),
        torch.optim.AdamW([*others, *more], weight_decay=0.0, betas=(0.9, 0.97)),
    )


def update(parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """A step on the mean gradient of all processes, which is bit for bit the same in each."""
    if dist.is_initialized():
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def start_from(model: torch.nn.Module, checkpoint: str) -> None:
    """The language model's weights of another checkpoint, as far as names and shapes agree; the others stay."""
    theirs, mine = load_file(Path(locate(checkpoint)) / "model.safetensors"), model.state_dict()
    with torch.no_grad():
        for name, value in theirs.items():
            if "language_model" in name and name in mine and mine[name].shape == value.shape:
                mine[name].copy_(value)
