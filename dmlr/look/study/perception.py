"""Vanilla chains, token by token: how probable each token was, what it attended to, and how much it needed the image.

Visual dependency is the paper's (arXiv 2512.12623, fig. 2): `S_t = log π(x_t | x_<t, I, q) − log π(x_t | x_<t, Î, q)`
with a perturbed image Î, teacher-forced over the answer that the model gave to I. Knows nothing about ground truth,
words or figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageStat

from dmlr.config import Config, check_names
from dmlr.look.study.words import token_ends
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import example_generator
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import append_latents, prefill_latent
from dmlr.methods.prompting import decode, prefill_task, prompts_of
from dmlr.model.decode import Decoded
from dmlr.model.prefix import Prefix
from dmlr.model.vlm import VLM

CHUNK = 64  # tokens that are read at once: a row of logits is as wide as the vocabulary
PERTURBATIONS = ("noise", "blur", "blank")


@dataclass
class Chain:
    """An answer of T tokens (the one that ended it left out). N image tokens are numbered as in `Encoded`."""

    idx: int | str
    text: str
    stop_reason: str
    ids: list[int]
    ends: list[int]  # [T], where each token's text ends in `text`
    log_probs: torch.Tensor  # [T], given the image
    perturbed: dict[str, torch.Tensor]  # the same given each perturbed image; empty for a question without one
    attention: torch.Tensor  # [T, N], of the position that predicts each token; nan for the first (see `forced`)
    patch_grid: tuple[int, int]
    truth: list[float] = field(default_factory=list)  # see confidence.py; empty unless asked for

    def dependency(self, kind: str) -> torch.Tensor:
        """S_t of every token, [T], in nats."""
        return self.log_probs - self.perturbed[kind]


def answered(vlm: VLM, prefix: Prefix, questions: Sequence[Question], grids: Sequence, config: Config) -> list[Chain]:
    """Each question's greedy answer from its prefix, with what the model made of every token. Leaves the prefix as it
    is."""
    said = decode(vlm, prefix.branch(), config)
    ids = [_text_ids(vlm, one) for one in said]
    log_probs, attention = forced(vlm, prefix, ids, with_attention=True)
    counts = prefix.image_mask.sum(dim=1).tolist()
    return [
        Chain(q.idx, d.text, d.stop_reason, i, token_ends(vlm.tokenizer, i), p, {}, a[:, :n], g)
        for q, d, i, p, a, n, g in zip(questions, said, ids, log_probs, attention, counts, grids, strict=True)
    ]


def with_dependency(
    vlm: VLM, questions: Sequence[Question], chains: Sequence[Chain], config: Config, kinds: Sequence[str]
) -> list[Chain]:
    """The chains with their tokens' log-probabilities under each kind of perturbation (PERTURBATIONS).

    ConfigError for an unknown kind. A question without an image has nothing to perturb and comes back as it is.
    """
    check_names(kinds, PERTURBATIONS, what="perturbation")
    seen = [n for n, question in enumerate(questions) if question.images]
    found: list[dict[str, torch.Tensor]] = [{} for _ in questions]
    for kind in kinds if seen else ():
        changed = [replace(questions[n], images=perturb_all(questions[n], kind, config.seed)) for n in seen]
        prefix, _ = prefill_task(vlm, changed, config, prompts_of(config))
        log_probs, _ = forced(vlm, prefix, [chains[n].ids for n in seen])
        for n, row in zip(seen, log_probs, strict=True):
            found[n][kind] = row
    return [replace(chain, perturbed=rows) for chain, rows in zip(chains, found, strict=True)]


@torch.no_grad()
def attention_after(
    vlm: VLM, questions: Sequence[Question], answers: Sequence[Answer], config: Config
) -> list[torch.Tensor | None]:
    """Attention [T, N] of the positions that predict each of T tokens of answers that latents preceded (DMLR's).

    Over the image's own tokens: what goes to the interleaved copies of patches is not in it. None for an answer without
    latents. Prompt, latents and patches go through the model once more, and the answer's text behind them.
    """
    thought = [n for n, answer in enumerate(answers) if answer.reasoning is not None]
    found: list[torch.Tensor | None] = [None] * len(answers)
    if not thought:
        return found
    prefix, _ = prefill_latent(vlm, [questions[n] for n in thought], config, prompts_of(config))
    reasoning = [answers[n].reasoning for n in thought]
    latents = torch.stack([one.latents for one in reasoning]).to(vlm.device)
    append_latents(vlm, prefix, latents, Patches.of([one.patches for one in reasoning], vlm.device))
    ids = [vlm.tokenizer(answers[n].text, add_special_tokens=False)["input_ids"] for n in thought]
    _, attention = forced(vlm, prefix, ids, with_attention=True)
    for n, row, count in zip(thought, attention, prefix.image_mask.sum(dim=1).tolist(), strict=True):
        found[n] = row[:, :count]
    return found


@torch.no_grad()
def forced(
    vlm: VLM, prefix: Prefix, ids: Sequence[Sequence[int]], with_attention: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Teacher forcing: log-probability [T] of every token of each row after the prefix, which stays as it is.

    With attention also [T, N] over the image tokens, mean over layers and heads, of the position that predicts each
    token; nan in its first row, since that position is in the prefix.
    """
    longest = max(1, max(map(len, ids)))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=vlm.device)  # [B, T]
    filled = torch.arange(longest, device=vlm.device) < torch.tensor([[len(row)] for row in ids], device=vlm.device)
    prefix = prefix.branch()
    log_probs = [_log_prob(prefix.logits[:, None], tokens[:, :1])]
    attention = [torch.full((len(ids), 1, prefix.images.shape[1]), torch.nan, device=vlm.device)]
    for start in range(0, longest - 1, CHUNK):
        end = min(start + CHUNK, longest - 1)
        rows = torch.arange(end - start, device=vlm.device)
        logits, weights = vlm.extend(
            prefix,
            vlm.embed(tokens[:, start:end]),
            filled[:, start:end],
            read=rows.expand(len(ids), -1),
            probe_rows=rows if with_attention else None,
            commit=True,
        )
        log_probs.append(_log_prob(logits, tokens[:, start + 1 : end + 1]))
        attention.append(weights)
    scores = torch.cat(log_probs, dim=1).cpu()
    seen = torch.cat(attention, dim=1).cpu() if with_attention else [None] * len(ids)
    return (
        [row[: len(one)] for row, one in zip(scores, ids, strict=True)],
        [row[: len(one)] for row, one in zip(seen, ids, strict=True)] if with_attention else [],
    )


def perturb(image: Image.Image, kind: str, generator: torch.Generator) -> Image.Image:
    """The image with less to see, in the same size.

    noise: Gaussian, 128 of 255 grey levels, on every channel of every pixel; blur: Gaussian, with a radius of a tenth
    of the shorter side; blank: the mean colour.
    """
    if kind == "blank":
        return Image.new("RGB", image.size, tuple(round(value) for value in ImageStat.Stat(image.convert("RGB")).mean))
    if kind == "blur":
        return image.convert("RGB").filter(ImageFilter.GaussianBlur(min(image.size) / 10))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    noise = 128 * torch.randn(pixels.shape, generator=generator).numpy()
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def perturb_all(question: Question, kind: str, seed: int) -> list[Image.Image]:
    """A question's images, perturbed; the noise comes from (seed, idx) alone."""
    generator = example_generator(seed, question.idx, kind)
    return [perturb(image, kind, generator) for image in question.images]


def _log_prob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] of logits [B, T, V] at tokens [B, T]."""
    return logits.log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0]


def _text_ids(vlm: VLM, said: Decoded) -> list[int]:
    """Without the token that ended the answer."""
    return said.ids[:-1] if said.stop_reason == "eos_token" else said.ids
