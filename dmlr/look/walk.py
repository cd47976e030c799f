"""One question, opened up: every state that the loop tried, and what the model would have answered from it.

Runs the method's own steps (methods/latent.py, optimize.py) and keeps what a benchmark throws away. Knows nothing about
figures or widgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.loop.injection import Patches, interleave, reward_slots
from dmlr.loop.optimize import State, Trace, initial_latents, optimize
from dmlr.methods import METHODS
from dmlr.methods.answers import Answer, Clock, Question
from dmlr.methods.latent import append_latents, latent_answers, prefill_latent, question_noise, score_ids, with_notes
from dmlr.methods.prompting import decode, prompts_of
from dmlr.model.cache import Prefix
from dmlr.model.decode import Decoded
from dmlr.model.memory import Work
from dmlr.model.vlm import VLM, Encoded
from dmlr.run.verdicts import verdict_of

NextTokens = list[list[tuple[str, float]]]  # per think token, the most probable next tokens with their probabilities


@dataclass(frozen=True)
class Moment:
    """One iteration, 0 the start. N image tokens are numbered as in `Encoded`; L think tokens."""

    iteration: int
    reward: float  # of the state tried
    best: float  # of the best state so far
    accepted: bool  # the state became the best one
    sigma: float  # noise that led to it; 0 at the start
    attention: torch.Tensor  # [L, N], what ranked its patches
    patches: list[list[int]]  # per think token, as tried
    next_tokens: NextTokens  # after each think token of that state
    answer: str  # decoded from that state
    is_right: bool | None  # None without a ground truth


@dataclass
class Walk:
    """A question with its two answers and every moment of the loop; what a what-if starts from (what_if.py)."""

    vlm: VLM
    config: Config
    example: Example
    question: Question
    vanilla: Answer
    dmlr: Answer
    moments: list[Moment]
    encoded: Encoded
    prefix: Prefix  # one row, up to the first think token
    trace: Trace
    ids: torch.Tensor  # tokens that ask for a self score

    def verdict(self, answer: Answer) -> bool | None:
        """As `is_right`, of an answer as its method gave it."""
        return self.is_right(answer.text, answer.stop_reason)

    def is_right(self, text: str, stop_reason: str = "eos_token") -> bool | None:
        """The rules' verdict; None without a ground truth, or where there is no answer to judge."""
        if not self.example.solution:
            return None
        return verdict_of(self.example, text, stop_reason)["is_correct"]


def explore(vlm: VLM, config: Config, example: Example, images: Sequence[Image.Image], top: int = 5) -> Walk:
    """Vanilla and DMLR on one question, and every state that the loop tried with the answer decoded from it.

    `top` next tokens are kept for each think token. Raises PromptError for a question that the model cannot be
    given.
    """
    config, question = config.absolute(vlm.embedding_rms), Question(example.idx, example.question, list(images))
    vanilla = METHODS["vanilla"](vlm, [question], config)[0]
    prompts, clock = prompts_of(config), Clock(vlm.device)
    prefix, encoded = prefill_latent(vlm, [question], config, prompts)
    clock.lap("prefill")
    ids = score_ids(vlm, prefix, prompts)
    trace = optimize(vlm, prefix, config, question_noise(vlm, question, config)[None], ids)
    clock.lap("optimise")
    decoded = answers_from(vlm, prefix, config, trace.final)
    clock.lap("decode")
    dmlr = with_notes(latent_answers(decoded, encoded, trace, vlm.embedding_rms, clock.per_example(1)), [question])[0]
    walk = Walk(vlm, config, example, question, vanilla, dmlr, [], encoded[0], prefix, trace, ids)
    walk.moments = _moments(walk, top)
    return walk


def _moments(walk: Walk, top: int) -> list[Moment]:
    """All states that were tried, decoded together."""
    trace, nothing = walk.trace, [[] for _ in range(walk.config.num_thought_tokens)]
    steps = trace.steps
    start = initial_latents(walk.vlm, walk.prefix, walk.config)
    patches = [nothing, *(step.tried.patches.tolist()[0] for step in steps)]
    states = State(torch.cat([start, *(step.tried.latents for step in steps)]), Patches.of(patches, start.device))
    decoded = answers_from(walk.vlm, walk.prefix, walk.config, states)
    tokens = next_tokens(walk.vlm, walk.prefix, walk.config, states, top)
    attention = [trace.start_attention, *(step.attention for step in steps)]
    rewards = [float(trace.start_reward), *(float(step.reward) for step in steps)]
    accepted = [False, *(bool(step.accepted) for step in steps)]
    moments, best = [], rewards[0]
    for t, (reward, kept) in enumerate(zip(rewards, accepted, strict=True)):
        best = reward if kept else best
        moments.append(
            Moment(
                iteration=t,
                reward=reward,
                best=best,
                accepted=kept,
                sigma=steps[t - 1].sigma if t else 0.0,
                attention=attention[t][0, :, : len(walk.encoded.image_columns)].float().cpu(),
                patches=patches[t],
                next_tokens=tokens[t],
                answer=decoded[t].text,
                is_right=walk.is_right(decoded[t].text, decoded[t].stop_reason),
            )
        )
    return moments


# the pieces


def parts(vlm: VLM, prefix: Prefix, config: Config, states: State) -> Iterator[tuple[Prefix, State]]:
    """S states of the one question in `prefix`, as many at a time as fit, each with a copy of the prefix of its own."""
    length = states.latents.shape[1]
    slots = length * (1 + states.patches.index.shape[2])
    work = Work(prefix.mask.shape[1], 0, slots, length, slots, 1, config.max_new_tokens)
    size = vlm.fitting_batch(work)
    for first in range(0, len(states.latents), size):
        rows = slice(first, first + size)
        patches = Patches(states.patches.index[rows], states.patches.count[rows]).trimmed()
        yield prefix.select(prefix.next_position.new_zeros(len(patches.count))), State(states.latents[rows], patches)


def answers_from(vlm: VLM, prefix: Prefix, config: Config, states: State) -> list[Decoded]:
    """Answers decoded from S states of the one question in `prefix`, which is left as it was."""
    said = []
    for copies, part in parts(vlm, prefix, config, states):
        append_latents(vlm, copies, part.latents, part.patches)
        said += decode(vlm, copies, config)
    return said


@torch.no_grad()
def next_tokens(vlm: VLM, prefix: Prefix, config: Config, states: State, top: int) -> list[NextTokens]:
    """Per state and think token, the `top` most probable next tokens: what the reward reads with "think"."""
    found = []
    for copies, part in parts(vlm, prefix, config, states):
        embeds, filled = interleave(part.latents[:, None], copies.images, part.patches)
        logits, _ = vlm.extend(copies, embeds[:, 0], filled, read=reward_slots(part.patches, "think"))
        best = logits.softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
        spelled = {i: vlm.tokenizer.decode([i]) for i in best.indices.unique().tolist()}
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            found.append([[(spelled[i], p) for i, p in zip(*token, strict=True)] for token in zip(*row, strict=True)])
    return found
