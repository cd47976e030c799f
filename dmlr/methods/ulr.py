"""ULR: think tokens first drawn to what the question looks at, then searched by confidence; no patches.

*Visual Latents Know More Than They Say*, arXiv 2605.02735: the nearest rival of DMLR, on the same prompt layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from dmlr.config import Config
from dmlr.loop.injection import Patches, interleave
from dmlr.loop.optimize import Trace, initial_latents, optimize
from dmlr.loop.score import Score, differentiable, scorer
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import reasoned, without_patches
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM

CONTRASTED = 4  # image tokens that a think token is drawn to, and as many that it is kept from


def ulr(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Two stages with the published budget (`ulr_...`), greedy.

    Stage I: Adam down `alignment_loss`; the reward of these iterations is minus the loss, which accepts none of them.
    Stage II: REINFORCE with one sample on confidence and progress, read at the think tokens and accepted as the
    released DMLR does (`accept_at` "candidate"). Sigma decays in both.

    Uncertain, and chosen here: the question's tokens are all text behind the last image; where stage II accepts nothing
    (or has no iterations), the latents of stage I are decoded; an image of fewer than `CONTRASTED` tokens for each
    think token is shared out evenly; without an image stage I leaves the latents as they are.
    """
    return reasoned(vlm, questions, ulr_config(config), two_stages)


def ulr_config(config: Config) -> Config:
    """The configuration under which stage II is DMLR's loop; it counts the iterations of both stages."""
    loop = {"num_samples": 1, "reward": "ulr", "reward_position": "think", "accept_at": "candidate"}
    loop |= {"use_auto_grad": False, "disable_conf_reward": False}
    never = config.ulr_steps  # nothing is asked about patches
    return without_patches(config, "ulr", visual_injection_start_step=never, **loop)


def two_stages(vlm: VLM, prefix: Prefix, config: Config, noise: torch.Tensor, ids: torch.Tensor) -> Trace:
    """Both stages as one trace, whose start and best are measured by stage II's reward. ids: not read."""
    first = min(config.ulr_alignment_steps, config.max_num_steps)
    sigma, start = config.sigma * config.sigma_decay**first, initial_latents(vlm, prefix, config)
    aligning = config.replace(max_num_steps=first, use_auto_grad=True, disable_best_reward=True)
    searching = config.replace(max_num_steps=config.max_num_steps - first, sigma=sigma)
    one = optimize(vlm, prefix, aligning, noise[:, :first], score=alignment_score(vlm, prefix, config))
    score = scorer(vlm, prefix, searching)
    two = optimize(vlm, prefix, searching, noise[:, first:], score=score, start=one.final.latents)
    begun = score(start[:, None], one.final.patches)
    return replace(
        two,
        start_reward=begun.reward[:, 0],
        start_attention=begun.attention,
        best_step=torch.where(two.best_step > 0, two.best_step + first, 0),
        steps=one.steps + two.steps,
    )


# stage I


def alignment_score(vlm: VLM, prefix: Prefix, config: Config) -> Score:
    """Minus `alignment_loss` of a single sample as a reward, with its gradient. What attracts is chosen once."""
    attention = question_attention(vlm, prefix)
    positive, negative = contrasted(attention, prefix.image_mask, config.num_thought_tokens)
    images = prefix.image_states.float()

    def reward_of(latents: torch.Tensor, patches: Patches, with_attention: bool):
        embeds, filled = interleave(latents, prefix.images, patches)
        read = torch.arange(embeds.shape[2], device=embeds.device).expand_as(filled)  # no patches: [B, L]
        rows = read[0] if with_attention else None
        states, attention = vlm.extend(prefix, embeds[:, 0], filled, read, rows, logits=False)
        loss = alignment_loss(states.float(), images, positive, negative, config.ulr_temperature)
        return -loss[:, None], attention

    return differentiable(reward_of)


def alignment_loss(
    think: torch.Tensor, images: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[B]: mean over think tokens of -log(sum over P of e^(cos / temperature) / the same over P and N).

    think: [B, L, D] and images: [B, N, D], states of the last layer; positive, negative: [B, L, N]. Zero for a think
    token without positives.
    """
    similar = F.normalize(think, dim=2) @ F.normalize(images, dim=2).transpose(1, 2) / temperature  # [B, L, N]
    least = torch.finfo(similar.dtype).min
    drawn, both = (similar.masked_fill(~x, least).logsumexp(dim=2) for x in (positive, positive | negative))  # [B, L]
    return torch.where(positive.any(dim=2), both - drawn, 0.0).mean(dim=1)


def contrasted(attention: torch.Tensor, image_mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives and negatives [B, L, N] of each think token, by the question's attention [B, N]; ties go to the left.

    The most attended image tokens in the order of the image: think token i gets the i-th run of `CONTRASTED`. Its
    negatives are the least attended that are not its positives.
    """
    each = (image_mask.sum(dim=1, keepdim=True) // length).clamp(max=CONTRASTED)  # [B, 1]
    rank = attention.masked_fill(~image_mask, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    most = rank < each * length  # [B, N]
    run = (most.cumsum(dim=1) - 1) // each.clamp(min=1)  # [B, N], whose it is
    positive = (run[:, None] == torch.arange(length, device=run.device)[:, None]) & most[:, None]
    others = image_mask[:, None] & ~positive
    rank = attention[:, None].masked_fill(~others, 2).argsort(dim=2, stable=True).argsort(dim=2)
    return positive, others & (rank < CONTRASTED)


@torch.no_grad()
def question_attention(vlm: VLM, prefix: Prefix) -> torch.Tensor:
    """[B, N]: where the text behind the last image looks, mean over layers, heads and its tokens.

    It goes through the model a second time, over the cache of what stands before it.
    """
    columns = prefix.mask.shape[1]
    last = F.pad(prefix.image_columns.masked_fill(~prefix.image_mask, -1), (1, 0), value=-1).amax(dim=1)  # [B]
    count = torch.where(last < 0, 1, columns - 1 - last)  # [B], of a text without image its last token
    slots = int(count.max())
    filled = torch.arange(slots, device=count.device) >= slots - count[:, None]  # [B, S], on the right
    before = prefix.mask & (torch.arange(columns, device=count.device) < columns - count[:, None])
    earlier = replace(prefix, mask=before, next_position=prefix.next_position - count)
    embeds = vlm.embed(prefix.prompt_ids[:, columns - slots : columns])
    rows = torch.arange(slots, device=count.device)
    _, attention = vlm.extend(earlier, embeds, filled, rows[-1:].expand(len(count), 1), probe_rows=rows, logits=False)
    return (attention * filled[..., None]).sum(dim=1) / count[:, None]
