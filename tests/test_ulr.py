"""ULR against full recomputation: pixels, whole sequences and Python lists at every step, one question at a time."""

import math
from itertools import pairwise

import pytest
import torch
from test_methods import QUESTIONS
from tiny import tiny_vlm

from dmlr.config import Config, ConfigError
from dmlr.loop.optimize import initial_latents
from dmlr.loop.reference import Reference, eager
from dmlr.methods import METHODS
from dmlr.methods.latent import prefill_latent, question_noise
from dmlr.methods.ulr import CONTRASTED, ulr_config
from dmlr.prompts import Prompts

SMALL = {"max_new_tokens": 3, "ulr_steps": 8, "ulr_alignment_steps": 3}
VARIANTS = {
    "published": {"max_new_tokens": 3},
    "steps that move": SMALL | {"ulr_lr": 0.02, "ulr_sigma": 0.05},
    "stage II alone": SMALL | {"ulr_alignment_steps": 0, "ulr_lr": 0.02, "ulr_sigma": 0.05},
    "more think tokens than image tokens": SMALL | {"ulr_thought_tokens": 6, "ulr_lr": 0.02, "ulr_sigma": 0.05},
}


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm(context=2048)


class Literal(Reference):
    """ULR as its paper has it, on what the oracle of the loop recomputes."""

    def states(self, latents):
        """Last hidden states [sequence, D] and attention [sequence, N] of one whole forward."""
        kept = []
        hook = self.model.model.language_model.norm.register_forward_hook(lambda *call: kept.append(call[-1][0]))
        try:
            _, attention, starts, _ = self.forward(latents, [[]] * len(latents), self.encoded.suffix_ids.tolist())
        finally:
            hook.remove()
        return kept[0], attention, starts

    def chosen(self, latents):
        """Lists of positives and of negatives, per think token."""
        columns, length = self.encoded.image_columns.tolist(), len(latents)
        if not columns:
            return [[]] * length, [[]] * length
        with torch.no_grad():
            _, attention, _ = self.states(latents)
        rows = attention[max(columns) + 1 : len(self.encoded.input_ids)]
        looked = rows.mean(dim=0).tolist()
        each = min(CONTRASTED, len(columns) // length)
        top = sorted(sorted(range(len(columns)), key=lambda n: -looked[n])[: each * length])
        positive = [top[i * each : (i + 1) * each] for i in range(length)]
        rest = [sorted((n for n in range(len(columns)) if n not in mine), key=lambda n: looked[n]) for mine in positive]
        return positive, [other[:CONTRASTED] for other in rest]

    def loss(self, latents):
        hidden, _, starts = self.states(latents)
        images, total = hidden[self.encoded.image_columns], 0 * latents.sum()
        for start, mine, others in zip(starts, self.positive, self.negative, strict=True):
            if mine:
                near = torch.cosine_similarity(hidden[start][None], images, dim=1) / self.config.ulr_temperature
                total = total - (near[mine].exp().sum() / near[mine + others].exp().sum()).log()
        return total / len(latents)

    def confidence(self, latents):
        logits, _, starts, _ = self.forward(latents, [[]] * len(latents), [])
        each = [-torch.log_softmax(logits[at], dim=-1).sort().values[-10:].mean().item() for at in starts]
        growth = [math.log(later / earlier) for earlier, later in pairwise(each)]
        return sum(each) / len(each) + 0.05 * sum(growth) / len(growth)

    def reward(self, latents, patches):
        """Minus the loss in stage I, confidence in stage II; nothing is asked about patches."""
        return (-self.loss(latents) if self.config.use_auto_grad else self.confidence(latents)), []

    def ulr(self, start, noise):
        """Latents to decode, and the rewards of all iterations."""
        config, (self.positive, self.negative) = self.config, self.chosen(start)
        first = min(config.ulr_alignment_steps, config.ulr_steps)
        self.config = config.replace(max_num_steps=first, use_auto_grad=True, disable_best_reward=True)
        one = self.run(start, noise[:first])
        sigma = config.sigma * config.sigma_decay**first
        self.config = config.replace(max_num_steps=config.ulr_steps - first, sigma=sigma)
        two = self.run(one.best_latents, noise[first:])
        return two.best_latents, [step.reward for step in one.steps + two.steps]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ulr_equals_full_recomputation(vlm, variant):
    config = Config(**VARIANTS[variant])
    answers = METHODS["ulr"](vlm, QUESTIONS, config)
    own = ulr_config(config)
    prefix, encoded = prefill_latent(vlm, QUESTIONS, own, Prompts())
    start, oracle = initial_latents(vlm, prefix, own), eager(vlm)
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        literal = Literal(oracle, encoded[row], own)
        latents, rewards = literal.ulr(start[row], question_noise(vlm, question, own))
        assert answer.error is None
        assert [step["reward"] for step in answer.reasoning.steps] == pytest.approx(rewards, abs=1e-4)
        assert (answer.reasoning.latents - latents).abs().max() <= 1e-4
        with torch.no_grad():
            assert answer.reasoning.start_reward == pytest.approx(literal.confidence(start[row]), abs=1e-4)
        ids = literal.decode(latents, [[]] * len(latents), config.max_new_tokens)
        assert answer.text == vlm.tokenizer.decode(ids, skip_special_tokens=True)
        if question.images and variant == "steps that move":
            assert (latents - start[row]).abs().max() > 0.02, "nothing moved: this tested little"
            assert 3 < answer.reasoning.best_step <= 8 and not answer.reasoning.steps[0]["is_new_best"]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"ulr_thought_tokens": 1}, "out of range"), ({"ulr_sigma": 0}, "ulr_sigma = 0 gives ULR's stage II nothing")],
)
def test_what_ulr_cannot_do_is_an_error(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)
