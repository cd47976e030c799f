"""The method by full recomputation: slow, literal, one example at a time. The oracle that the fast path must equal.

Every reward runs the vision tower on the pixels and the language model on the whole sequence, with plain Python lists
for the bookkeeping. It shares with the fast path only the prompt's tokens (`VLM.encode`) and the noise; rewards,
retrieval, interleaving, positions and decoding are written again here, straight from the paper.

Knows nothing about batches, caches or speed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from dmlr.config import Config
from dmlr.model.cpu_linear import through_torch
from dmlr.model.vlm import VLM, Encoded


@dataclass
class ReferenceStep:
    """One iteration: both rewards, the updated latents [L, D], the patches tried, and whether they were accepted."""

    reward: float
    explored: float
    latents: torch.Tensor
    patches: list[list[int]]
    accepted: bool


@dataclass
class ReferenceTrace:
    """`best_latents` are decoded with `best_patches`."""

    start_reward: float
    best_reward: float
    best_step: int
    best_latents: torch.Tensor
    best_patches: list[list[int]]
    steps: list[ReferenceStep] = field(default_factory=list)


class Reference:
    """One example under full recomputation. `forward_count` counts passes of the whole model."""

    def __init__(self, vlm: VLM, encoded: Encoded, config: Config):
        self.vlm, self.encoded, self.config = vlm, encoded, config.absolute(vlm.embedding_rms)
        self.model, self.forward_count = vlm.model, 0

    def forward(self, latents: torch.Tensor, patches: list[list[int]], text: list[int]) -> tuple:
        """[Q, Z, tau_1, patches(1), ..., tau_L, patches(L), text] from scratch, with pixels.

        latents: [L, D]. Returns logits [sequence, V], attention [sequence, N] over the image tokens (mean over layers
        and heads), positions of the think tokens and of the group ends in the sequence.
        """
        model, encoded = self.model, self.encoded
        self.forward_count += 1
        features, *deep = self.image_features()
        pieces, starts, ends, slots = [], [], [], []
        at = len(encoded.input_ids)
        for tau, chosen in zip(latents, patches, strict=True):
            starts.append(at)
            pieces.append(tau[None].to(features.dtype))
            pieces += [features[p][None] for p in chosen]
            slots += range(at + 1, at + 1 + len(chosen))
            at += 1 + len(chosen)
            ends.append(at - 1)
        # Text tokens stand in for think tokens and patches, so that the model itself counts the positions.
        filler = torch.full((at - len(encoded.input_ids),), self.vlm.think_id)
        ids = torch.cat([encoded.input_ids, filler, torch.tensor(text, dtype=torch.long)])[None].to(self.vlm.device)
        embeds = model.get_input_embeddings()(ids)[0].clone()
        embeds[encoded.image_columns] = features.to(embeds.dtype)
        if pieces:
            prompt, rest = embeds[: len(encoded.input_ids)], embeds[at:]
            embeds = torch.cat([prompt, torch.cat(pieces).to(embeds.dtype), rest])
        also = self.positions(ids)
        if deep:  # DeepStack: what the vision tower's inner layers add to the image tokens, and to patches if asked
            flat = [p for chosen in patches for p in chosen] if self.vlm.deep_levels else []
            columns = torch.cat([encoded.image_columns, torch.tensor(slots[: len(flat)], dtype=torch.long)])
            order = columns.argsort()
            also["visual_pos_masks"] = torch.isin(torch.arange(len(embeds)), columns)[None]
            also["deepstack_visual_embeds"] = [torch.cat([level, level[flat]])[order] for level in deep]
        language_model = getattr(model.model, "language_model", None) or model.model.text_model
        out = language_model(inputs_embeds=embeds[None], use_cache=False, output_attentions=True, **also)
        logits = model.lm_head(out.last_hidden_state)[0].float()
        attention = torch.stack([layer[0].float().mean(dim=0) for layer in out.attentions]).mean(dim=0)
        return logits, attention[:, encoded.image_columns], starts, ends

    def positions(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Position ids [3, 1, S] of a sequence [1, S], by the model itself; nothing where it counts them on its own."""
        core = self.model.model
        if not hasattr(core, "get_rope_index"):
            return {}
        kinds, grid = (ids == self.model.config.image_token_id).int(), self.encoded.image_inputs.get("image_grid_thw")
        found = core.get_rope_index(ids, image_grid_thw=grid, video_grid_thw=None, mm_token_type_ids=kinds)
        return {"position_ids": found[0]}

    def image_features(self) -> list[torch.Tensor]:
        """[N, D] from the pixels, every time, in the order of `Encoded.image_columns`; then the deep ones, as many."""
        encoded, vlm = self.encoded, self.vlm
        if not encoded.image_inputs:
            return [torch.zeros(0, vlm.text_config.hidden_size, device=vlm.device)]
        inputs = {name: tensor.to(vlm.device) for name, tensor in encoded.image_inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
        out = self.model.model.get_image_features(**inputs)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        flat = [torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels]
        ranks = encoded.image_columns.argsort().argsort()  # which feature, in the order of the prompt, is image token i
        return [level[ranks] for level in flat]

    def reward(self, latents: torch.Tensor, patches: list[list[int]]) -> tuple[torch.Tensor, list[list[float]]]:
        """R and the attention of each think token over the image, (6) and (7)."""
        suffix = self.encoded.suffix_ids.tolist()
        text = suffix if self.config.reward_position == "answer" else suffix[:1]
        logits, attention, starts, ends = self.forward(latents, patches, text)
        reads = {
            "think": starts,
            "think_next": [*starts, ends[-1] + 1],
            "group_end": ends,
            "answer": [ends[-1] + len(suffix)],
        }[self.config.reward_position]
        total = 0.0
        for at in reads:
            log_probs, _ = torch.sort(torch.log_softmax(logits[at], dim=-1), descending=True)
            top = log_probs[: self.config.top_k]
            entropy = -(top.exp() * top).sum()  # H_k
            total = total + (1 - entropy if self.config.reward == "entropy" else -top.mean())
        return total / len(reads), attention[starts].tolist()

    def retrieve(self, attention: list[list[float]], kept: list[list[int]], budget: int) -> list[list[int]]:
        """Z_cand: kept patches first, then the most attended, within the budget and the caps."""
        config, chosen = self.config, []
        injecting = [*range(0, len(kept), config.visual_insert_stride)]
        for i, row in enumerate(attention):
            limit = 0
            if i in injecting:
                limit = min(budget, len(row))
                if config.num_selected_patches is not None:
                    limit = min(limit, config.num_selected_patches)
                if config.max_total_patches is not None:
                    share, rest = divmod(config.max_total_patches, len(injecting))
                    limit = min(limit, share + (1 if injecting.index(i) < rest else 0))
            ranked = sorted((p for p in range(len(row)) if p not in kept[i]), key=lambda p: -row[p])
            chosen.append((kept[i] + ranked)[: max(limit, len(kept[i]))])
        return chosen

    @torch.no_grad()
    def run(self, latents: torch.Tensor, noise: torch.Tensor) -> ReferenceTrace:
        """Algorithm 1. latents: [L, D] to start from; noise: [T, M, L, D] standard normal, M samples an iteration."""
        config, length = self.config, len(latents)
        budget = 10**9 if config.initial_patch_count is None else config.initial_patch_count
        kept: list[list[int]] = [[] for _ in range(length)]
        start, attention = self.reward(latents, kept)
        trace = ReferenceTrace(float(start), float(start), 0, latents, kept)
        released = config.accept_at == "candidate"
        threshold, sigma = 0.0 if released else float(start), config.sigma
        moments = (torch.zeros_like(latents), torch.zeros_like(latents))
        for t in range(config.max_num_steps):
            since = t - config.visual_injection_start_step
            injects = since >= 0 and since % config.visual_injection_interval == 0
            if since == 0 and not released:
                kept = self.retrieve(attention, kept, budget)
            draws = [0 * xi if config.use_auto_grad else sigma * xi for xi in noise[t]]
            patches = kept
            if released and injects:
                maps = [self.reward(latents + xi, kept)[1] for xi in draws]
                patches = self.retrieve(torch.tensor(maps).mean(dim=0).tolist(), kept, budget)
            if config.use_auto_grad:
                explored, attention, gradient = self.gradient(latents, patches)
                rewards = [float(explored)]
                updated, moments = adam_step(latents, gradient, moments, t + 1, config.lr)
            else:
                found = [self.reward(latents + xi, patches) for xi in draws]
                rewards = [float(reward) for reward, _ in found]
                attention = torch.tensor([seen for _, seen in found]).mean(dim=0).tolist()
                baseline = sum(rewards) / len(rewards) if len(rewards) > 1 else 0.0
                ahead = sum((reward - baseline) * xi for reward, xi in zip(rewards, draws, strict=True))
                updated = latents + config.lr * ahead / len(rewards) / sigma**2
            if released:
                tried, reward = patches, max(rewards)
            else:
                tried = self.retrieve(attention, kept, budget) if injects else kept
                reward = float(self.reward(updated, tried)[0])
            accepted = reward > threshold
            trace.steps.append(ReferenceStep(reward, sum(rewards) / len(rewards), updated, tried, accepted))
            if accepted:
                threshold = trace.best_reward = reward
                trace.best_step, trace.best_latents, trace.best_patches = t + 1, updated, tried
                kept = tried
                budget += config.patch_increment
            latents = updated
            if accepted and 0 < config.reward_threshold <= reward:
                break
            sigma *= config.sigma_decay
        if config.disable_best_reward:
            trace.best_latents, trace.best_patches = latents, kept
        return trace

    def gradient(self, latents: torch.Tensor, patches: list[list[int]]) -> tuple[torch.Tensor, list, torch.Tensor]:
        """Reward, attention and the exact gradient of the reward in the latents, through the whole model."""
        with torch.enable_grad():
            latents = latents.detach().requires_grad_(True)
            reward, attention = self.reward(latents, patches)
            return reward.detach(), attention, torch.autograd.grad(reward, latents)[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, patches: list[list[int]], max_new_tokens: int) -> list[int]:
        """Greedy, every token from the whole sequence; ends with an end-of-turn token or at the limit."""
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            logits, *_ = self.forward(latents, patches, self.encoded.suffix_ids.tolist() + ids)
            ids.append(int(logits[-1].argmax()))
            if ids[-1] in self.vlm.eos_ids:
                break
        return ids


def adam_step(latents, gradient, moments, step: int, lr: float, betas=(0.9, 0.999), eps: float = 1e-8) -> tuple:
    """Adam (Kingma & Ba, 2015, Algorithm 1), ascending. Returns the new latents and moments."""
    first = betas[0] * moments[0] + (1 - betas[0]) * gradient
    second = betas[1] * moments[1] + (1 - betas[1]) * gradient**2
    direction = (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
    return latents + lr * direction, (first, second)


def eager(vlm: VLM) -> VLM:
    """A second view of the same weights whose language model uses transformers' own eager attention with all maps."""
    twin, shared = copy.copy(vlm), (*vlm.model.parameters(), *vlm.model.buffers())
    twin.model = through_torch(copy.deepcopy(vlm.model, {id(tensor): tensor for tensor in shared}))
    # `encode` and `family` may stay those of the original: the reference does not run them
    twin.model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    return twin
