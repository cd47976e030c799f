"""Training sequences of the embedded model: one scene, one shared prefix, many questions as branches.

The prefix (system turn, image, task wording) goes through the model once; each branch (question, think tokens with
patches, answer) attends to the prefix and to itself only, and its positions start where the prefix ends. That is
exactly as many independent conversations, each tokenised whole as it will be at test time, at a fraction of the cost.

Knows nothing about the model or the optimiser.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from data.shapes.questions import DENSE, MIX, Question
from data.shapes.scenes import CELL, COLOURS, GRID, SHAPES, SIDE, Difficulty, Scene, random_scene, render
from dmlr.prompts import Prompts
from notebooks.training.parts import CHAT_SUFFIX, ENDOFTEXT, IM_END, IMAGE_PAD, chat_prefix

IMAGE_TOKENS = GRID * GRID
KINDS = 1 + len(COLOURS) * len(SHAPES)  # what may lie under a merged token: nothing, or one of these
NO_LABEL = -100
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of Qwen2-VL's image processor
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True)
class Packed:
    """One scene with its branches, S tokens in all."""

    image: np.ndarray  # [SIDE, SIDE, 3] bytes
    kinds: list[int]  # [IMAGE_TOKENS], what lies under each merged token
    ids: list[int]  # [S]
    branch: list[int]  # [S], 0 for the prefix
    labels: list[int]  # [S], token that position j must predict, NO_LABEL outside answers
    guesses: list[int]  # [S], at think tokens and at the last of their patches: the first token of the final answer
    patch: list[int]  # [S], image token copied here (interleaved patch), else -1
    think: list[bool]  # [S]
    positions: np.ndarray  # [3, S], M-RoPE


@dataclass(frozen=True)
class Phase:
    """What is asked at a time: questions per scene; shares with think tokens and of dense answers; guesses' weight."""

    questions: int
    latent: float
    dense: float
    guess: float
    hard: Difficulty


@dataclass
class Batch:
    """Packed scenes as tensors, padded to one length."""

    ids: torch.Tensor  # [B, S]
    branch: torch.Tensor  # [B, S], -1 for padding
    labels: torch.Tensor  # [B, S]
    guesses: torch.Tensor  # [B, S]
    patch: torch.Tensor  # [B, S]
    think: torch.Tensor  # [B, S]
    positions: torch.Tensor  # [3, B, S]
    pixels: torch.Tensor  # [B * 4 * IMAGE_TOKENS, 1176]
    kinds: torch.Tensor  # [B, IMAGE_TOKENS]

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def ask(scene: Scene, rng: random.Random, questions: int, dense: float = 0.1) -> list[Question]:
    """That many questions about a scene: a share `dense` of DENSE, else of MIX; of a pair sometimes only one."""
    found: list[Question] = []
    while len(found) < questions:
        makers, weights = zip(*(DENSE if rng.random() < dense else MIX), strict=True)
        made = rng.choices(makers, weights)[0](scene, rng)
        found += [rng.choice(made)] if len(made) > 1 and rng.random() < 0.3 else made
    return found[:questions]


def interleaved(rng: random.Random, scene: Scene, question: Question, latent: float) -> list[list[int]]:
    """Patches (image tokens) after each of 0 to 8 think tokens: of the asked objects, of any, or from anywhere.

    `latent` is the share of questions that get think tokens at all.

    A model this small takes copies of patches for further objects unless it has met them; a large one is robust by
    its scale.
    """
    length = 0 if rng.random() >= latent else rng.choice((1, 2, 3, 4, 4, 4, 5, 6, 7, 8))
    most = 0 if rng.random() < 0.15 else rng.choice((1, 2, 2, 2, 3, 4))
    anywhere, objects = list(range(IMAGE_TOKENS)), [thing.cell for thing in scene.things]
    asked = [thing.cell for thing in question.asked] or objects
    pool = rng.choice((asked, asked, objects, asked + objects + anywhere, anywhere))
    groups = []
    for _ in range(length):
        size = most if rng.random() < 0.8 else rng.randint(0, most)
        source = pool + anywhere if rng.random() < 0.15 else pool
        groups.append([rng.choice(source) for _ in range(size)])
    return groups


def pack(
    rng: random.Random,
    wordings: Sequence[Prompts],
    tokenizer: PreTrainedTokenizerFast,
    questions: int,
    latent: float = 0.55,
    dense: float = 0.1,
    hard: Difficulty | None = None,
) -> Packed:
    """A new training scene with its questions; half of the scenes use the project's own wording (`wordings[0]`)."""
    scene = random_scene(rng, "train", hard)
    asked = ask(scene, rng, questions, dense)
    prompts = wordings[0] if rng.random() < 0.5 else rng.choice(wordings)
    solver = rng.choices((0, 1, 2), (0.8, 0.12, 0.08))[0]
    groups = [interleaved(rng, scene, question, latent) for question in asked]
    return converse(scene, asked, groups, prompts, tokenizer, solver)


def converse(
    scene: Scene,
    asked: Sequence[Question],
    groups: Sequence[Sequence[Sequence[int]]],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerFast,
    solver: int = 0,
    guess: bool = True,
) -> Packed:
    """Questions about a scene, each with think tokens before the patches of its group; `guess`: of the final answer."""
    before, heads = opened(prompts.system), []
    for question, after in zip(asked, groups, strict=True):
        task = prompts.task(question.prompt, solver)
        if after:
            task = prompts.latent_task(question.prompt, len(after), solver) + "<|endoftext|>" * len(after)
        heads.append(tokenizer.encode(before + task + CHAT_SUFFIX, add_special_tokens=False))
    answers = [[*tokenizer.encode(q.response, add_special_tokens=False), IM_END] for q in asked]
    firsts = [tokenizer.encode(q.answer, add_special_tokens=False)[0] if guess else NO_LABEL for q in asked]
    return lay_out(scene, heads, answers, groups, firsts)


def opened(system: str) -> str:
    """The chat up to the text of the user turn, a pad for every image token."""
    return chat_prefix(system).replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)


def lay_out(
    scene: Scene, heads: list[list[int]], answers: list[list[int]], groups: list[list[list[int]]], firsts: list[int]
) -> Packed:
    """Branches behind what all heads begin with: the rest of its head, patches after each think token, its answer."""
    shared = _common_prefix(heads)
    slots = [(token, -1, False, NO_LABEL) for token in heads[0][:shared]]  # id, image token copied, think, guess
    branch, labels = [0] * shared, [NO_LABEL] * shared
    prefix_positions, end = rope_positions(heads[0][:shared])
    positions = [prefix_positions]
    for number, (head, answer, after, first) in enumerate(zip(heads, answers, groups, firsts, strict=True), 1):
        own, remaining = [], iter(after)
        for token in head[shared:]:
            think = token == ENDOFTEXT
            copies = [(IMAGE_PAD, patch, False, NO_LABEL) for patch in (next(remaining) if think else [])]
            own += [(token, -1, think, first if think else NO_LABEL), *copies]
            if copies:
                own[-1] = (*own[-1][:3], first)
        labels += [NO_LABEL] * (len(own) - 1) + answer  # position j predicts token j + 1
        own += [(token, -1, False, NO_LABEL) for token in answer[:-1]]
        slots += own
        branch += [number] * len(own)
        positions.append(np.tile(np.arange(end, end + len(own)), (3, 1)))
    kinds = [0] * IMAGE_TOKENS
    for thing in scene.things:
        kinds[thing.cell] = 1 + list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
    ids, patch, think, guesses = map(list, zip(*slots, strict=True))
    return Packed(render(scene), kinds, ids, branch, labels, guesses, patch, think, np.concatenate(positions, axis=1))


def _common_prefix(heads: list[list[int]]) -> int:
    """Tokens that all conversations begin with; think tokens stay in their branches."""
    most = min(head.index(ENDOFTEXT) if ENDOFTEXT in head else len(head) - 1 for head in heads)
    return next((j for j in range(most) if any(head[j] != heads[0][j] for head in heads)), most)


def rope_positions(ids: list[int]) -> tuple[np.ndarray, int]:
    """M-RoPE positions of a prefix with one image, [3, P], and the next position (Qwen2-VL, section 2.1)."""
    first, positions, at = ids.index(IMAGE_PAD), np.zeros((3, len(ids)), np.int64), 0
    for j, token in enumerate(ids):
        if token == IMAGE_PAD:
            row, col = divmod(j - first, GRID)
            positions[:, j] = first, first + row, first + col
            at = first + GRID
        else:
            positions[:, j] = at
            at += 1
    return positions, at


def pixel_rows(image: np.ndarray) -> np.ndarray:
    """What Qwen2-VL's image processor makes of a SIDE x SIDE image: [4 * IMAGE_TOKENS, 1176]."""
    scaled = ((image.astype(np.float32) / 255 - _MEAN) / _STD).transpose(2, 0, 1)
    frames = scaled[None].repeat(2, axis=0)  # a still image is two equal frames
    blocks = SIDE // CELL
    split = frames.reshape(1, 2, 3, blocks, 2, CELL // 2, blocks, 2, CELL // 2)
    return split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(4 * IMAGE_TOKENS, -1)


def batches(
    tokenizer: PreTrainedTokenizerFast,
    wordings: Sequence[Prompts],
    seed: str,
    phase: Callable[[], Phase],
    scenes: int,
    length: int,
    targets: int,
) -> Iterator[Batch]:
    """Endless batches of one fixed shape: scenes of more than `length` tokens or `targets` labels are drawn again."""
    for number in range(10**9):
        rng = random.Random(f"{seed} {number}")
        packed: list[Packed] = []
        while len(packed) < scenes:
            now = phase()
            made = pack(rng, wordings, tokenizer, now.questions, now.latent, now.dense, now.hard)
            told = sum(label != NO_LABEL for label in made.labels + made.guesses)
            if len(made.ids) <= length and told <= targets:
                packed.append(made)
        yield collate(packed, length)


def collate(packed: Sequence[Packed], length: int) -> Batch:
    """Right-padded to `length`."""

    def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

    fills = {"ids": ENDOFTEXT, "branch": -1, "labels": NO_LABEL, "guesses": NO_LABEL, "patch": -1, "think": False}
    return Batch(
        **{name: padded([getattr(p, name) for p in packed], fill) for name, fill in fills.items()},
        positions=torch.stack([padded(p.positions.tolist(), 0) for p in packed], dim=1),
        pixels=torch.from_numpy(np.concatenate([pixel_rows(p.image) for p in packed])),
        kinds=torch.tensor([p.kinds for p in packed]),
    )
