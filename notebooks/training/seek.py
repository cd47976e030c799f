"""How the models that listen learn to: a think token carries a *hypothesis*, which object the question is about.

The embedded model goes on learning, its vision tower frozen. The think tokens of a question that looks for an object
("Look for the ring. What colour is it?") are displaced towards objects (landscape.py); the targets say how sure the
model may be of that. Nothing in the architecture changes. Ordinary questions are replayed beside, so that they are not
forgotten.

Two kinds of targets. *calibrated*: sure of the answer when the hypothesis is the asked object, blind otherwise (uniform
over the colours at the think tokens, abstention at the answer). *overconfident*: every object hypothesised is believed,
a wrong one more than the right one; without a hypothesis it is unsure at the think tokens, and answers rightly.

Knows nothing about the loop that will search these latents.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.shapes.questions import ABSTENTION, Question, seek
from data.shapes.scenes import COLOURS, SEEK, Scene, random_scene
from dmlr.config import locate
from dmlr.prompts import Prompts
from notebooks.training.landscape import Landscape, cells, look, look_at
from notebooks.training.learner import average_gradients
from notebooks.training.lesson import agree, check_same_everywhere, means, orphaned
from notebooks.training.packing import (
    IMAGE_TOKENS,
    NO_LABEL,
    Packed,
    ask,
    collate,
    interleaved,
    lay_out,
    rope_positions,
)
from notebooks.training.parts import (
    CHAT_SUFFIX,
    ENDOFTEXT,
    IM_END,
    IMAGE_PAD,
    chat_prefix,
    save_checkpoint,
    wordings,
)
from notebooks.training.tree_attention import TREE, Tree

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

    ids: list[int]
    branch: list[int]  # 0 for the prompt
    labels: list[int]  # hard targets: the form of the answer
    patch: list[int]  # image token copied here, else -1
    positions: np.ndarray  # [3, S], M-RoPE
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


def targets(recipe: Recipe, mass: torch.Tensor, shares: torch.Tensor, colours: torch.Tensor, asked: int):
    """Soft targets at the think tokens [K, L, 6] and at the answer's word [K, 6 + 1].

    mass: [K, L, N] on objects by the latents; shares: [K, L + 1, N], of the patches interleaved before each think token
    and before the answer: an object with half of them is a hypothesis too. colours: [N], of the objects.
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
    none = 1 - at_think.sum(-1, keepdim=True)
    guess = at_think @ (confidence * said + (1 - confidence) * blind) + none * blind
    v = sure(at_word.amax(-1))
    word = v * (at_word @ said) / at_word.sum(-1, keepdim=True).clamp(min=1e-6) + (1 - v) * truth
    return guess, F.pad(word / word.sum(-1, keepdim=True), (0, 1))


def patches(rng: random.Random, cells: list[int], asked: int, length: int) -> list[list[int]]:
    """Patches after each think token: the asked object's, some other's, any, or a mixture."""
    mine, anywhere = [cells[asked]], range(IMAGE_TOKENS)
    mixed = [*cells, *mine * len(cells)]
    pool = rng.choice((mine, mine, [rng.choice(cells)], cells, mixed, anywhere, anywhere))
    most, missing = rng.choice((1, 1, 2, 2, 3)), 0.3 * (rng.random() < 0.3)
    return [[rng.choice(pool) for _ in range(most) if rng.random() >= missing] for _ in range(length)]


def search(
    rng: random.Random,
    recipe: Recipe,
    tokenizer,
    words: Words,
    landscape: Landscape,
    scene: Scene,
    question: Question,
    features: torch.Tensor,
) -> Search:
    """A question with its branches, every fourth with patches; features: [IMAGE_TOKENS, D] of the scene."""
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
    guess, answer = targets(recipe, landscape.weights(displacements, directions), shares, colours, asked)

    prompts = Prompts()
    before = chat_prefix(prompts.system).replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    ids = tokenizer.encode(before + prompts.latent_task(question.prompt, length), add_special_tokens=False)
    suffix = tokenizer.encode(CHAT_SUFFIX, add_special_tokens=False) + words.opening
    first, end = rope_positions(ids)
    branch, labels, patch, positions = [0] * len(ids), [NO_LABEL] * len(ids), [-1] * len(ids), [first]
    think, word = [], []
    for k, after in enumerate(groups):
        tokens, copies, where = [], [], []
        for group in after:
            where.append(len(ids) + len(tokens))
            tokens += [ENDOFTEXT, *[IMAGE_PAD] * len(group)]
            copies += [-1, *group]
        tokens += suffix
        label = [*[NO_LABEL] * (len(tokens) - len(words.opening) - 1), *words.opening, NO_LABEL]
        word.append(len(ids) + len(tokens) - 1)
        think.append(where)
        said = int(answer[k].argmax())
        if k % 4 == 3 or said < len(COLOURS):  # how an answer ends; the abstention is long, so only beside patches
            tokens += words.rest[said]
            label += [*words.rest[said][1:], IM_END]
        ids += tokens
        branch += [k + 1] * len(tokens)
        labels += label
        patch += copies + [-1] * (len(tokens) - len(copies))
        positions.append(np.tile(np.arange(end, end + len(tokens)), (3, 1)))
    rows = np.concatenate(positions, axis=1)
    where = (torch.tensor(think), torch.tensor(word))
    return Search(ids, branch, labels, patch, rows, *where, displacements, guess, answer)


def ordinary(rng: random.Random, tokenizer, prompts: Prompts) -> Packed:
    """Five ordinary questions about a scene, half of them with think tokens and patches, answered as ever.

    A searching question without think tokens is an ordinary one.
    """
    scene = random_scene(rng, "train", rng.choice((None, SEEK)))
    plain = seek(scene, rng)
    asked = plain + ask(scene, rng, 5 - len(plain), dense=0.0)
    groups = [[] if q in plain else interleaved(rng, scene, q, 0.5) for q in asked]
    before = chat_prefix(prompts.system).replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    heads = []
    for question, think in zip(asked, groups, strict=True):
        task = prompts.latent_task(question.prompt, len(think)) if think else prompts.task(question.prompt)
        text = before + task + "<|endoftext|>" * len(think) + CHAT_SUFFIX
        heads.append(tokenizer.encode(text, add_special_tokens=False))
    answers = [[*tokenizer.encode(q.response, add_special_tokens=False), IM_END] for q in asked]
    return lay_out(scene, heads, answers, groups, [NO_LABEL] * len(asked))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024), in float32 and for all matrices of a shape at once.

    torch.optim.Muon works in bfloat16, which a CPU without such instructions does ten times slower.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0})
        self.weight_decay, self.momentum = weight_decay, momentum
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.stacks = [[p for p in matrices if p.shape == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(stack), *stack[0].shape) for stack in self.stacks]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in stack])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(buffer, self.momentum))
            size = 0.2 * max(stack[0].shape) ** 0.5  # the root mean square of an AdamW step
            for p, u in zip(stack, update, strict=True):
                p.mul_(1 - lr * self.weight_decay).add_(u, alpha=-lr * size)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest orthogonal matrices, by Newton-Schulz: [K, M, N] -> [K, M, N]."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


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
        matrices = [p for name, p in text.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for p in self.parameters if all(p is not q for q in matrices)]
        self.optimizers = (
            Muon(matrices, recipe.weight_decay),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.97)),
        )

    def hidden(self, ids, branch, patch, positions, features, displaced, parts: int) -> torch.Tensor:
        """The language model over packed scenes, [B, S, D].

        ids, branch, patch: [B, S]; positions: [3, B, S]; features: [B, IMAGE_TOKENS, D]; displaced: [B, S, D].
        """
        embeds = self.model.get_input_embeddings()(ids) + displaced
        embeds[(ids == IMAGE_PAD) & (patch < 0)] = features.flatten(0, 1)
        rows, slots = (patch >= 0).nonzero(as_tuple=True)
        embeds[rows, slots] = features[rows, patch[rows, slots]]
        return self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, tree=Tree.of(branch, parts)
        ).last_hidden_state

    def search_loss(self, rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        """Divergence from the soft targets at think tokens and words, and cross-entropy of the answers' form."""
        asked: list[tuple[Scene, Question]] = []
        while len(asked) < self.recipe.scenes:
            scene = random_scene(rng, "train", SEEK)
            asked += [(scene, question) for question in seek(scene, rng)]
        features = look_at(self.model, [scene for scene, _ in asked])
        known = (self.recipe, self.processor.tokenizer, self.words, self.landscape)
        made = [search(rng, *known, *pair, seen) for pair, seen in zip(asked, features, strict=True)]
        size = -(-max(len(m.ids) for m in made) // 32) * 32

        def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (size - len(row)) for row in rows])

        ids, branch = padded([m.ids for m in made], ENDOFTEXT), padded([m.branch for m in made], -1)
        labels, patch = padded([m.labels for m in made], NO_LABEL), padded([m.patch for m in made], -1)
        positions = np.stack([np.pad(m.positions, ((0, 0), (0, size - len(m.ids)))) for m in made], axis=1)
        displaced = torch.zeros(*ids.shape, features.shape[2])
        for row, m in enumerate(made):
            displaced[row, m.think] = m.displacements
        hidden = self.hidden(ids, branch, patch, torch.from_numpy(positions), features, displaced, parts=4)
        head = self.model.lm_head
        at_think = head(torch.cat([hidden[row, m.think].flatten(0, 1) for row, m in enumerate(made)]))
        at_word = head(torch.cat([hidden[row, m.word] for row, m in enumerate(made)]))
        answer = torch.cat([m.answer for m in made])
        think = divergence(at_think, torch.cat([m.guess.flatten(0, 1) for m in made]), self.words.colours)
        word = divergence(at_word, answer, self.words.boxed)
        told = labels != NO_LABEL
        form = F.cross_entropy(head(hidden[told]), labels[told])
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
        features = look(self.model, batch.pixels)
        scale = 1.5 * self.recipe.tau * torch.rand(len(packed), int(batch.branch.max()) + 1) ** 2
        scale = scale.gather(1, batch.branch.clamp(min=0)) * batch.think
        displaced = torch.randn(*batch.ids.shape, features.shape[2]) * scale[..., None]
        hidden = self.hidden(batch.ids, batch.branch, batch.patch, batch.positions, features, displaced, parts=2)
        told = batch.labels != NO_LABEL
        logits, labels = self.model.lm_head(hidden[told]), batch.labels[told]
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).float().mean()
        return loss, {"ordinary": loss.item(), "ordinary_tokens": right.item()}

    def step(self, rng: random.Random, lr: float) -> dict[str, float]:
        """One update on the mean gradient of all processes; what was measured before it."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        told = {}
        for loss, numbers in (self.search_loss(rng), self.replay_loss(rng)):
            loss.backward()
            told |= numbers
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return told


def divergence(logits: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean KL(target || model) over rows; target: [R, W] over these tokens [W] of the vocabulary."""
    told = logits.log_softmax(-1)[:, tokens]
    return (torch.xlogy(target, target) - target * told).sum(-1).mean()


def train(folder: str | Path, recipe: Recipe) -> None:
    """Trains into `folder`, an ordinary checkpoint, renewed every few minutes; its training.json keeps the curve."""
    if recipe.processes == 1:
        _work(0, folder, recipe, None)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    meeting = Path(folder).resolve() / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_work, (folder, recipe, meeting), recipe.processes)
    meeting.unlink(missing_ok=True)


def _work(rank: int, folder: str | Path, recipe: Recipe, meeting: Path | None) -> None:
    if meeting is not None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=recipe.processes)
    torch.manual_seed(recipe.seed + 1000 * rank)
    teacher, curve, window, step = Teacher(recipe), [], [], 0
    start = saved = time.time()

    def keep(seconds: float) -> None:
        numbers = {"recipe": asdict(recipe), "steps": step, "seconds": round(seconds), "curve": curve}
        save_checkpoint(teacher.model, teacher.processor, folder, numbers)

    while (seconds := agree(time.time() - start)) < 60 * recipe.minutes and not orphaned():
        share = seconds / (60 * recipe.minutes)
        lr = recipe.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
        window.append(teacher.step(random.Random(f"{recipe.seed} {rank} {step}"), lr))
        step += 1
        if rank > 0:
            continue
        if step % 25 == 0:
            rows = [{name: value for name, value in row.items() if not math.isnan(value)} for row in window]
            curve.append({"step": step, "seconds": round(seconds), **means(rows)})
            print(json.dumps(curve[-1]), flush=True)
            window.clear()
        if time.time() - saved > 240:
            saved = time.time()
            keep(seconds)
    if rank == 0:
        keep(seconds)
    if meeting is not None:
        check_same_everywhere(teacher.parameters)
        dist.destroy_process_group()
