"""The rewards against numbers worked out by hand, and the parsing of a spoken score."""

import math

import pytest
import torch

from dmlr.loop.rewards import entropy_confidence, logprob_confidence, parse_score, progress, self_certainty

SKEWED = [0.5, 0.25, 0.125, 0.125]
GROWING = [0.5, 0.9, 0.99]  # of two tokens the first one's probability, at three positions
SURE = [-(math.log(p) + math.log(1 - p)) / 2 for p in GROWING]  # confidence at each
CASES = {
    "the entropy is of the full softmax": (entropy_confidence, [SKEWED], 1 - 0.5 * math.log(2) - 0.25 * math.log(4)),
    "the entropy's mean over positions": (entropy_confidence, [[1, 0], [0.5, 0.5]], 1 - 0.5 * math.log(2)),
    "logprob of a flat distribution": (logprob_confidence, [[0.25] * 4], math.log(4)),
    "logprob grows with the peak": (logprob_confidence, [[1 - 1e-4, 1e-4]], -math.log((1 - 1e-4) * 1e-4) / 2),
    "divergence from uniform, without k": (self_certainty, [SKEWED], -math.log(4) - math.log(2**-9) / 4),
    "no divergence": (self_certainty, [[0.25] * 4] * 2, 0),
    "growth of confidence": (progress, [[p, 1 - p] for p in GROWING], math.log(SURE[2] / SURE[0]) / 2),
}


@pytest.mark.parametrize("case", CASES)
def test_rewards(case):
    reward, probabilities, expected = CASES[case]
    logits = torch.tensor([probabilities], dtype=torch.float64).clamp(min=1e-30).log()
    assert reward(logits, 2).item() == pytest.approx(expected, abs=1e-6)


def test_what_a_reward_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="only one"):
        progress(torch.zeros(1, 1, 8), 2)
    with pytest.raises(ValueError, match="top_k = 9"):
        entropy_confidence(torch.zeros(1, 1, 8), 9)


def test_spoken_scores():
    texts = ["0.7", "1", "Score: .25.", "0", "0.9 of 1", "", "very good", "7", "-"]
    assert [parse_score(text) for text in texts] == pytest.approx([0.7, 1, 0.25, 0, 0.9, *[math.nan] * 4], nan_ok=True)
