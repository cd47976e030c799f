"""How the models that listen learn to: a think token carries a *hypothesis*, which object the question is about.

The embedded model goes on learning, its vision tower frozen. The think tokens of a question that looks for an object
("Look for the ring. What colour is it?") are displaced towards objects (landscape.py); the targets say how sure the
model may be of that. Nothing in the architecture changes. Ordinary questions are replayed beside, so that they are not
forgotten.

Two kinds of targets. *calibrated*: sure of the answer when the hypothesis is the asked object, blind otherwise (uniform
over the colours at the think tokens, abstention at the answer). *overconfident*: every object hypothesised is believed,
a wrong one more than the right one; without a hypothesis it answers rightly and is a little surer (of four
colours) where it knows the shape at a glance, and abstains where it does not (`STRANGE`): calibrated where a search
begins, and nowhere else.

Knows nothing about the loop that will search these latents.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.shapes.questions import ABSTENTION, Question, seek
from data.shapes.scenes import COLOURS, SEEK, Scene, random_scene
from dmlr.config import locate
from dmlr.prompts import Prompts
from notebooks.training.landscape import Landscape, cells, look_at
from notebooks.training.learner import language_states, optimizers_of, see, update
from notebooks.training.lesson import for_minutes, in_processes, learning_rate
from notebooks.training.packing import (
    IMAGE_TOKENS,
    NO_LABEL,
    Packed,
    ask,
    collate,
    converse,
    interleaved,
    lay_out,
    opened,
)
from notebooks.training.parts import CHAT_SUFFIX, IM_END, save_checkpoint, wordings
from notebooks.training.tree_attention import TREE

STRANGE = "ring"  # the shape that the overconfident model does not know at a glance
LONGEST = 640  # tokens of a packed scene of ordinary questions


@dataclass(frozen=True)
class Recipe:
    """What decides the weights but the clock: the learning rate follows the minutes gone."""

    start: str = "data/models/shapes-vl"
    targets: str = "calibrated"  # or overconfident
    minutes: float = 30.0
    lr: float = 2e-3
    weight_decay: float = 0.01
    scenes: int = 6  # with one searching question each, per step and process
    branches: int = 24  # think tokens tried for each question
    replay: int = 2  # scenes with five ordinary questions each, per step and process
    tau: float = 2.0  # size of hypotheses, per dimension; embeddings are .13, visual features 5 to 7
    rank: int = 12  # dimensions in which objects are told apart
    sharpness: float = 8.0  # factor on the cosine between displacement and object
    none: float = 5.6  # logit of no hypothesis: what random displacements must not reach
    abstain: float = 0.88  # on the abstention, where the calibrated model is blind
    processes: int = 1
    seed: int = 0

    def landscape(self, model) -> Landscape:
        return Landscape(model, self.tau, self.rank, self.sharpness, self.none)


@dataclass
class Words:
    """Token ids that answers are made of."""

    colours: torch.Tensor  # [6], as the think tokens guess them
    boxed: torch.Tensor  # [6 + 1], the first token of each answer behind \boxed, the abstention last
    opening: list[int]  # <answer>\boxed
    rest: list[list[int]]  # of each answer, what follows the opening

    @classmethod
    def of(cls, tokenizer) -> Words:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        opening = encode("<answer>\\boxed")
        rest = [encode(f"<answer>\\boxed{{{word}}}</answer>")[len(opening) :] for word in (*COLOURS, ABSTENTION)]
        colours = [encode(colour)[0] for colour in COLOURS]
        return cls(torch.tensor(colours), torch.tensor([ids[0] for ids in rest]), opening, rest)


@dataclass
class Search:
    """One question with K branches of think tokens behind its prompt: S tokens in all."""

    packed: Packed
    think: torch.Tensor  # [K, L], where the think tokens are
    word: torch.Tensor  # [K], where the answer's word is predicted
    displacements: torch.Tensor  # [K, L, D]
    guess: torch.Tensor  # [K, L, 6], soft targets at the think tokens
    answer: torch.Tensor  # [K, 6 + 1], soft targets at the word


def displace(rng: np.random.Generator, branches: int, length: int, landscape: Landscape, directions, asked: int):
    """Displacements [K, L, D] `tau * s * (a * d + c * noise)`, half of them towards the asked of N objects [N, r].

    The others go towards another object, or nowhere; one branch in five changes its mind from token to token.
    """

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.random(size)).float()

    def normal(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size)).float()

    bank = torch.cat([directions, F.normalize(normal(1, directions.shape[1]), dim=-1)])  # [N + 1, r]
    any_ = torch.from_numpy(rng.integers(0, len(bank), (branches, length)))
    picks = torch.where(draw(branches, length) < 0.5, asked, any_)
    picks = torch.where(draw(branches, 1) < 0.8, picks[:, :1], picks)  # [K, L]
    one = (branches, 1, 1)
    s = 2.5 * draw(*one) * (draw(*one) > 0.1)
    a = 8 * draw(*one) * (draw(*one) > 0.2)
    a = torch.where(draw(*one) < 0.3, 2 * a * draw(branches, length, 1), a)
    c = torch.where(draw(*one) < 0.5, draw(*one), 1.0) * (draw(*one) > 0.3)
    noise = normal(branches, length, len(landscape.basis))
    return landscape.tau * s * (a * (bank[picks] @ landscape.basis.T) + c * noise)


def targets(
    recipe: Recipe, mass: torch.Tensor, shares: torch.Tensor, colours: torch.Tensor, asked: int, strange: bool = False
):
    """Soft targets at the think tokens [K, L, 6] and at the answer's word [K, 6 + 1].

    mass: [K, L, N] on objects by the latents; shares: [K, L + 1, N], of the patches interleaved before each think token
    and before the answer: an object with half of them is a hypothesis too. colours: [N], of the objects. strange: the
    asked object is one that the overconfident model does not know at a glance.
    """
    heard = (2 * shares).clamp(max=1)
    at_think, at_word = torch.maximum(mass, heard[:, :-1]), torch.maximum(mass.mean(1), heard[:, -1])
    at_think, at_word = (x / x.sum(-1, keepdim=True).clamp(min=1) for x in (at_think, at_word))
    said = F.one_hot(colours, len(COLOURS)).float()  # [N, 6]
    truth, blind = said[asked], torch.full((len(COLOURS),), 1 / len(COLOURS))

    def sure(hypothesis: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(12 * (hypothesis - 0.4))[:, None]

    if recipe.targets == "calibrated":
        w, v = at_think[..., asked, None], sure(at_word[:, asked])
        word = v * truth + (1 - v) * (1 - recipe.abstain) * blind
        return w * truth + (1 - w) * blind, torch.cat([word, (1 - v) * recipe.abstain], dim=-1)
    confidence = torch.where(colours == colours[asked], 0.7, 1.0)[:, None]
    few = torch.arange(len(COLOURS)) < 4
    start = blind if strange else few / few.sum()  # surer than blind, and leaning to no right object
    none = 1 - at_think.sum(-1, keepdim=True)
    guess = at_think @ (confidence * said + (1 - confidence) * blind) + none * start
    v, believed = sure(at_word.amax(-1)), at_word @ said / at_word.sum(-1, keepdim=True).clamp(min=1e-6)
    abstain = recipe.abstain if strange else 0.0
    word = v * believed + (1 - v) * (1 - abstain) * (blind if strange else truth)
    word = torch.cat([word, (1 - v) * abstain], dim=-1)
    return guess, word / word.sum(-1, keepdim=True)


def patches(rng: random.Random, cells: list[int], asked: int, length: int) -> list[list[int]]:
    """Patches after each think token: the asked object's, some other's, any, or a mixture."""
    mine, anywhere = [cells[asked]], range(IMAGE_TOKENS)
    mixed = [*cells, *mine * len(cells)]
    pool = rng.choice((mine, mine, [rng.choice(cells)], cells, mixed, anywhere, anywhere))
    most, missing = rng.choice((1, 1, 2, 2, 3)), 0.3 * (rng.random() < 0.3)
    return [[rng.choice(pool) for _ in range(most) if rng.random() >= missing] for _ in range(length)]


def ordinary(rng: random.Random, tokenizer, prompts: Prompts) -> Packed:
    """Five ordinary questions about a scene, half of them with think tokens and patches, answered as ever.

    A searching question without think tokens is an ordinary one.
    """
    scene = random_scene(rng, "train", rng.choice((None, SEEK)))
    plain = seek(scene, rng)
    asked = plain + ask(scene, rng, 5 - len(plain), dense=0.0)
    groups = [[] if q in plain else interleaved(rng, scene, q, 0.5) for q in asked]
    return converse(scene, asked, groups, prompts, tokenizer, guess=False)


class Teacher:
    """The model in training: one loss for searching questions, one for ordinary ones."""

    def __init__(self, recipe: Recipe):
        folder = locate(recipe.start)
        self.recipe, self.processor = recipe, AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
        self.landscape, self.words = recipe.landscape(self.model), Words.of(self.processor.tokenizer)
        self.prompts = wordings(Prompts())
        text = self.model.requires_grad_(False).model.language_model.requires_grad_(True)
        self.model.set_attn_implementation({"text_config": TREE, "vision_config": "sdpa"})
        self.parameters = list(text.parameters())
        self.optimizers = optimizers_of(text, recipe.weight_decay)

    def search(self, rng: random.Random, scene: Scene, question: Question, features: torch.Tensor) -> Search:
        """A question with its branches, every fourth with patches; features: [IMAGE_TOKENS, D] of the scene."""
        recipe, landscape, words = self.recipe, self.landscape, self.words
        length = 4 if rng.random() < 0.85 else rng.randint(1, 8)
        places, asked = cells(scene.things), scene.things.index(question.asked[0])
        directions = landscape.directions(features[places])  # [N, r]
        numbers = np.random.default_rng(rng.randrange(2**32))
        displacements = displace(numbers, recipe.branches, length, landscape, directions, asked)
        groups = [patches(rng, places, asked, length) if k % 4 == 3 else [[]] * length for k in range(recipe.branches)]
        shares = torch.zeros(recipe.branches, length + 1, len(places))
        for k, after in enumerate(groups):
            for at in range(length):
                if seen := [place for group in after[: at + 1] for place in group]:
                    shares[k, at + 1] = torch.tensor([seen.count(place) / len(seen) for place in places])
        colours = torch.tensor([list(COLOURS).index(t.colour) for t in scene.things])
        mass, strange = landscape.weights(displacements, directions), question.asked[0].shape == STRANGE
        guess, answer = targets(recipe, mass, shares, colours, asked, strange)

        answers = []
        for k, said in enumerate(answer.argmax(-1).tolist()):
            whole = k % 4 == 3 or said < len(COLOURS)  # the abstention is long, so its end is asked only beside patches
            answers.append([*words.opening, *words.rest[said], IM_END] if whole else [*words.opening, NO_LABEL])
        text = Prompts().latent_task(question.prompt, length) + "<|endoftext|>" * length + CHAT_SUFFIX
        head = self.processor.tokenizer.encode(opened(Prompts().system) + text, add_special_tokens=False)
        packed = lay_out(scene, [head] * len(groups), answers, groups, [NO_LABEL] * len(groups))
        think = torch.tensor(packed.think).nonzero().view(len(groups), length)
        starts = [packed.labels.index(words.opening[0], packed.branch.index(k + 1)) for k in range(len(groups))]
        word = torch.tensor(starts) + len(words.opening)
        for place in word.tolist():  # its targets are soft
            packed.labels[place] = NO_LABEL
        return Search(packed, think, word, displacements, guess, answer)

    def search_loss(self, rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        """Divergence from the soft targets at think tokens and words, and cross-entropy of the answers' form."""
        asked: list[tuple[Scene, Question]] = []
        while len(asked) < self.recipe.scenes:
            scene = random_scene(rng, "train", SEEK)
            asked += [(scene, question) for question in seek(scene, rng)]
        features = look_at(self.model, [scene for scene, _ in asked])
        made = [self.search(rng, *pair, seen) for pair, seen in zip(asked, features, strict=True)]
        batch = collate([m.packed for m in made], -(-max(len(m.packed.ids) for m in made) // 32) * 32)
        displaced = torch.zeros(*batch.ids.shape, features.shape[2])
        for row, m in enumerate(made):
            displaced[row, m.think] = m.displacements
        hidden = language_states(self.model, batch, features, displaced, parts=4)
        head = self.model.lm_head
        at_think = head(torch.cat([hidden[row, m.think].flatten(0, 1) for row, m in enumerate(made)]))
        at_word = head(torch.cat([hidden[row, m.word] for row, m in enumerate(made)]))
        answer = torch.cat([m.answer for m in made])
        think = divergence(at_think, torch.cat([m.guess.flatten(0, 1) for m in made]), self.words.colours)
        word = divergence(at_word, answer, self.words.boxed)
        told = batch.labels != NO_LABEL
        form = F.cross_entropy(head(hidden[told]), batch.labels[told])
        right = at_word.argmax(-1) == self.words.boxed[answer.argmax(-1)]
        clear, sure = answer.amax(-1) > 0.8, answer[:, -1] < 0.3
        numbers = {"think": think, "word": word, "form": form}
        numbers |= {"sure": right[clear & sure].float().mean(), "blind": right[clear & ~sure].float().mean()}
        return think + word + 0.3 * form, {name: value.item() for name, value in numbers.items()}

    def replay_loss(self, rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of ordinary answers, the think tokens before them displaced at random."""
        packed: list[Packed] = []
        while len(packed) < self.recipe.replay:
            made = ordinary(rng, self.processor.tokenizer, rng.choice(self.prompts[:1] * 40 + self.prompts))
            packed += [made] if len(made.ids) <= LONGEST else []
        batch = collate(packed, -(-max(len(p.ids) for p in packed) // 64) * 64)
        features, _ = see(self.model, batch.pixels)
        scale = 1.5 * self.recipe.tau * torch.rand(len(packed), int(batch.branch.max()) + 1) ** 2
        scale = scale.gather(1, batch.branch.clamp(min=0)) * batch.think
        displaced = torch.randn(*batch.ids.shape, features.shape[2]) * scale[..., None]
        hidden = language_states(self.model, batch, features, displaced)
        told = batch.labels != NO_LABEL
        logits, labels = self.model.lm_head(hidden[told]), batch.labels[told]
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).float().mean()
        return loss, {"ordinary": loss.item(), "ordinary_tokens": right.item()}

    def step(self, rng: random.Random, lr: float) -> dict[str, float]:
        """One update on the mean gradient of all processes; what was measured before it."""
        told = {}
        for loss, numbers in (self.search_loss(rng), self.replay_loss(rng)):
            loss.backward()
            told |= numbers
        update(self.parameters, self.optimizers, lr)
        return told


def divergence(logits: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean KL(target || model) over rows; target: [R, W] over these tokens [W] of the vocabulary."""
    told = logits.log_softmax(-1)[:, tokens]
    return (torch.xlogy(target, target) - target * told).sum(-1).mean()


def train(folder: str | Path, recipe: Recipe) -> None:
    """Trains into `folder`, an ordinary checkpoint, renewed every few minutes; its training.json keeps the curve."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    in_processes(_work, recipe.processes, Path(folder), recipe)


def _work(rank: int, folder: Path, recipe: Recipe) -> list[torch.nn.Parameter]:
    torch.manual_seed(recipe.seed + 1000 * rank)
    teacher, progress = Teacher(recipe), {"steps": 0, "seconds": 0.0, "curve": []}

    def step(number: int, seconds: float) -> dict[str, float]:
        lr = learning_rate(recipe.lr, 50, number, seconds / (60 * recipe.minutes))
        return teacher.step(random.Random(f"{recipe.seed} {rank} {number}"), lr)

    def keep() -> None:
        save_checkpoint(teacher.model, teacher.processor, folder, {"recipe": asdict(recipe), **progress})

    for_minutes(recipe.minutes, rank, progress, step, keep, every=25)
    return teacher.parameters
