"""Logits to confidence: the two rewards, as pure functions.

Both read the next-token distribution at a few positions and are larger where the model is surer. Knows nothing about
where the positions are, or what made the logits.
"""

from __future__ import annotations

import re

import torch


def entropy_confidence(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Equations 6 and 7: `R = 1 - mean_i H_k(P_i)`, with the truncated entropy over the k most probable tokens.

    logits: [..., R, V]; returns [...]. Probabilities are those of the full softmax, not renormalised; natural log.
    """
    top = _top_log_probs(logits, k)
    entropy = -(top.exp() * top).sum(dim=-1)  # [..., R]
    return 1 - entropy.mean(dim=-1)


def logprob_confidence(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The released code's reward: minus the mean log-probability of the k most probable tokens.

    logits: [..., R, V]; returns [...]. It grows as the distribution gets more peaked, because the k-th token then gets
    less likely.
    """
    return -_top_log_probs(logits, k).mean(dim=(-2, -1))


def parse_score(text: str) -> float:
    """The model's own score of its latents: the first number of its reply, if it lies in [0, 1]; else nan."""
    match = re.search(r"(?<![\d.])\d*\.?\d+", text)
    score = float(match.group()) if match else float("nan")
    return score if 0 <= score <= 1 else float("nan")


REWARDS = {"entropy": entropy_confidence, "logprob": logprob_confidence}


def _top_log_probs(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[..., R, k], sorted. ValueError when the vocabulary is smaller than k."""
    if k > logits.shape[-1]:
        raise ValueError(f"top_k = {k} is larger than the vocabulary of {logits.shape[-1]} tokens")
    return logits.log_softmax(dim=-1).topk(k, dim=-1).values
