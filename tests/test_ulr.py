"""ULR against full recomputation: pixels, whole sequences and Python lists at every step, one question at a time."""

import math
from itertools import pairwise

import pytest
import torch
from tiny import noise_image, tiny_vlm

from dmlr.config import Config, ConfigError
from dmlr.loop.optimize import initial_latents
from dmlr.loop.reference import Reference, adam_step, eager
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import prefill_latent, question_noise
from dmlr.methods.ulr import CONTRASTED, alignment_loss, contrasted, question_attention, ulr_config
from dmlr.prompts import Prompts

QUESTIONS = [
    Question(0, "How many?", [noise_image(0, 112, 112)]),
    Question("b", "Which of the two has the larger square?", [noise_image(1, 56, 84), noise_image(2, 84, 84)]),
    Question(2, "What is two plus two?", []),
    Question(3, "Is there a star?\nA. yes\nB. no", [noise_image(3, 56, 56)]),  # four image tokens
]
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

    def loss(self, latents, positive, negative):
        hidden, _, starts = self.states(latents)
        images, total = hidden[self.encoded.image_columns], 0.0
        for start, mine, others in zip(starts, positive, negative, strict=True):
            if mine:
                near = torch.cosine_similarity(hidden[start][None], images, dim=1) / self.config.ulr_temperature
                total = total - (near[mine].exp().sum() / near[mine + others].exp().sum()).log()
        return total / len(latents)

    def confidence(self, latents):
        with torch.no_grad():
            logits, _, starts, _ = self.forward(latents, [[]] * len(latents), [])
        each = [-torch.log_softmax(logits[at], dim=-1).sort().values[-10:].mean().item() for at in starts]
        growth = [math.log(later / earlier) for earlier, later in pairwise(each)]
        return sum(each) / len(each) + 0.05 * sum(growth) / len(growth)

    def ulr(self, start, noise):
        """Latents to decode, and the rewards of all iterations."""
        config, latents, rewards = self.config, start, []
        positive, negative = self.chosen(start)
        moments, sigma = (torch.zeros_like(start), torch.zeros_like(start)), config.sigma
        first = min(config.ulr_alignment_steps, config.ulr_steps)
        for t in range(first):
            given = latents.detach().requires_grad_()
            loss, gradient = self.loss(given, positive, negative), torch.zeros_like(start)
            if any(positive):
                (gradient,) = torch.autograd.grad(-loss, given)
                loss = loss.detach()
            latents, moments = adam_step(latents, gradient, moments, t + 1, config.lr)
            rewards.append(-float(loss))
            sigma *= config.sigma_decay
        best, most = latents, 0.0
        for t in range(first, config.ulr_steps):
            xi = sigma * noise[t, 0]
            rewards.append(self.confidence(latents + xi))
            latents = latents + config.lr * rewards[-1] * xi / sigma**2
            if rewards[-1] > most:
                best, most = latents, rewards[-1]
            sigma *= config.sigma_decay
        return best, rewards


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
        assert answer.reasoning.start_reward == pytest.approx(literal.confidence(start[row]), abs=1e-4)
        ids = literal.decode(latents, [[]] * len(latents), config.max_new_tokens)
        assert answer.text == vlm.tokenizer.decode(ids, skip_special_tokens=True)
        if question.images and variant == "steps that move":
            assert (latents - start[row]).abs().max() > 0.02, "nothing moved: this tested little"
            assert 3 < answer.reasoning.best_step <= 8 and not answer.reasoning.steps[0]["is_new_best"]


def test_where_the_question_looks_is_what_the_prefill_saw(vlm):
    config = ulr_config(Config())
    prefix, encoded = prefill_latent(vlm, QUESTIONS, config, Prompts())
    attention, oracle = question_attention(vlm, prefix), eager(vlm)
    for row in (0, 1, 3):
        count = len(encoded[row].image_columns)
        literal = Literal(oracle, encoded[row], config)
        with torch.no_grad():
            states, seen, _ = literal.states(initial_latents(vlm, prefix, config)[row])
        asked = seen[int(encoded[row].image_columns.max()) + 1 : len(encoded[row].input_ids)]
        torch.testing.assert_close(attention[row, :count], asked.mean(dim=0), atol=1e-6, rtol=1e-4)
        wanted = states[encoded[row].image_columns]
        torch.testing.assert_close(prefix.image_states[row, :count], wanted, atol=1e-4, rtol=1e-4)
    assert (attention[2] == 0).all()


def test_positives_are_runs_of_the_most_attended_in_image_order():
    attention = torch.tensor([[9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 0, 0.5]]) / 100
    positive, negative = contrasted(attention, torch.ones(1, 12, dtype=torch.bool), 2)
    assert [row.nonzero()[:, 0].tolist() for row in positive[0]] == [[0, 2, 3, 4], [5, 6, 7, 8]]
    assert [row.nonzero()[:, 0].tolist() for row in negative[0]] == [[1, 9, 10, 11]] * 2


def test_the_loss_is_of_the_positives_share():
    think, images = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    first, rest = torch.tensor([[[True, False, False]]]), torch.tensor([[[False, True, True]]])
    share = math.exp(1 / 0.5) / sum(math.exp(cosine / 0.5) for cosine in (1, 0, -1))
    assert alignment_loss(think, images, first, rest, 0.5).item() == pytest.approx(-math.log(share))
    assert alignment_loss(think, images, ~first & first, rest, 0.5).item() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [({"ulr_thought_tokens": 1}, "out of range"), ({"ulr_sigma": 0}, "ulr_sigma = 0 gives ULR's stage II nothing")],
)
def test_what_ulr_cannot_do_is_an_error(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)
