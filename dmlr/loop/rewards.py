"""Logits to confidence: the rewards by name, as pure functions of the next-token distribution at a few positions.

Each maps logits [..., R, V] and k, the most probable tokens that count, to [...]; all are larger where the model is
surer. Natural logarithms. They know nothing about where the positions are, or what made the logits.
"""

from __future__ import annotations

import math
import re

import torch


def entropy_confidence(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Equations 6 and 7: `R = 1 - mean_i H_k(P_i)`, with the truncated entropy over the k most probable tokens.

    Probabilities are those of the full softmax, not renormalised: a distribution flat over a large vocabulary has a
    small truncated entropy too.
    """
    top = _top_log_probs(logits, k)
    entropy = -(top.exp() * top).sum(dim=-1)  # [..., R]
    return 1 - entropy.mean(dim=-1)


def logprob_confidence(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The released code's reward: minus the mean log-probability of the k most probable tokens.

    It grows as the distribution gets more peaked, because the k-th token then gets less likely.
    """
    return -_top_log_probs(logits, k).mean(dim=(-2, -1))


def self_certainty(logits: torch.Tensor, k: int) -> torch.Tensor:
    """KL(uniform || P) over the whole vocabulary, mean over positions (Kang et al., arXiv 2502.18581); without k."""
    return -(logits.log_softmax(dim=-1) + math.log(logits.shape[-1])).mean(dim=(-2, -1))


def progress(logits: torch.Tensor, k: int) -> torch.Tensor:
    """How confidence grows along the think tokens: the mean of log(c_{i+1} / c_i), c_i the `logprob_confidence` of
    position i alone (ULR, arXiv 2605.02735). ValueError for a single position."""
    if logits.shape[-2] < 2:
        raise ValueError("progress compares neighbouring positions; there is only one")
    confidence = -_top_log_probs(logits, k).mean(dim=-1)  # [..., R]
    return confidence.log().diff(dim=-1).mean(dim=-1)


def confidence_and_progress(logits: torch.Tensor, k: int) -> torch.Tensor:
    """ULR's reward: `logprob_confidence` with .05 times its `progress`; ValueError for a single position."""
    return logprob_confidence(logits, k) + 0.05 * progress(logits, k)


def parse_score(text: str) -> float:
    """The model's own score of its latents: the first number of its reply, if it lies in [0, 1]; else nan."""
    match = re.search(r"(?<![\d.])\d*\.?\d+", text)
    score = float(match.group()) if match else float("nan")
    return score if 0 <= score <= 1 else float("nan")


REWARDS = {
    "entropy": entropy_confidence,
    "logprob": logprob_confidence,
    "self-certainty": self_certainty,
    "progress": progress,
    "ulr": confidence_and_progress,
}


def _top_log_probs(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[..., R, k], sorted. ValueError when the vocabulary is smaller than k."""
    if k > logits.shape[-1]:
        raise ValueError(f"top_k = {k} is larger than the vocabulary of {logits.shape[-1]} tokens")
    return logits.log_softmax(dim=-1).topk(k, dim=-1).values
