"""The rewards against numbers worked out by hand, and the parsing of a spoken score."""

import math

import pytest
import torch

from dmlr.loop.rewards import entropy_confidence, logprob_confidence, parse_score, progress, self_certainty


def test_truncated_entropy_uses_the_full_softmax():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]))
    expected = 1 + 0.5 * math.log(0.5) + 0.25 * math.log(0.25)
    assert entropy_confidence(logits, 2).item() == pytest.approx(expected, abs=1e-6)


def test_reward_is_the_mean_over_positions():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    each = [entropy_confidence(logits[:, i : i + 1], 2) for i in range(2)]
    torch.testing.assert_close(entropy_confidence(logits, 2), (each[0] + each[1]) / 2)


def test_logprob_grows_with_the_peak():
    flat, peaked = torch.zeros(1, 1, 8), torch.tensor([[[9.0, 0, 0, 0, 0, 0, 0, 0]]])
    assert logprob_confidence(flat, 4).item() == pytest.approx(math.log(8), abs=1e-5)
    assert logprob_confidence(peaked, 4) > logprob_confidence(flat, 4)


def test_self_certainty_is_the_divergence_from_uniform():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]))
    expected = -math.log(4) - math.log(0.5 * 0.25 * 0.125 * 0.125) / 4
    assert self_certainty(logits, 2).item() == pytest.approx(expected, abs=1e-6)
    assert self_certainty(torch.zeros(1, 2, 8), 2).item() == pytest.approx(0, abs=1e-6)


def test_progress_is_the_mean_growth_of_confidence():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.99, 0.01]]]))
    confidence = [-(math.log(p) + math.log(1 - p)) / 2 for p in (0.5, 0.9, 0.99)]
    expected = (math.log(confidence[1] / confidence[0]) + math.log(confidence[2] / confidence[1])) / 2
    assert progress(logits, 2).item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="only one"):
        progress(logits[:, :1], 2)


def test_k_larger_than_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="top_k = 9"):
        entropy_confidence(torch.zeros(1, 1, 8), 9)


def test_spoken_scores():
    texts = ["0.7", "1", "Score: .25.", "0", "0.9 of 1", "", "very good", "7", "-"]
    assert [parse_score(text) for text in texts] == pytest.approx([0.7, 1, 0.25, 0, 0.9, *[math.nan] * 4], nan_ok=True)
