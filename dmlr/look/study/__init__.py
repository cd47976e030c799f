"""Examples of a dataset looked into: the vanilla chain token by token, and what DMLR did with the same question.

Nothing that goes wrong with one example costs another anything; it is counted, with its reason. Knows nothing about
statistics or figures; `tables.py` turns what is found into tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

from dmlr.config import Config
from dmlr.data.examples import Example
from dmlr.look.study.boxes import Box, boxes_of
from dmlr.look.study.confidence import answer_log_probs, step_spans, truth_text
from dmlr.look.study.perception import Chain, answered, attention_after, with_dependency
from dmlr.look.study.words import Span
from dmlr.methods.answers import Answer, Question
from dmlr.methods.prompting import prefill_task, prompts_of
from dmlr.methods.workload import workload
from dmlr.model.vlm import VLM
from dmlr.run.batches import answer_batch, by_halves, cut, failed, prepare
from dmlr.run.evaluate import name, plan
from dmlr.run.verdicts import verdict_of


@dataclass(frozen=True)
class Studied:
    """One example. `steps` are the spans of its chain's reasoning, `right` what the rules say of its answer."""

    dataset: str
    example: Example
    question: Question
    boxes: list[Box] | None
    chain: Chain
    steps: list[Span]
    right: bool | None
    latent: Answer  # DMLR's, with its reasoning
    latent_attention: torch.Tensor | None  # [T, N], of the positions that predict the tokens of that answer

    @property
    def key(self) -> str:
        return f"{self.dataset} {self.example.idx}"

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the first image in pixels."""
        return self.question.images[0].size if self.question.images else None


@dataclass(frozen=True)
class Rules:
    """What a chain of this model looks like. form: how it writes an answer, with `{answer}` in it."""

    form: str
    step_ends: re.Pattern
    perturbations: Sequence[str]


def study(vlm: VLM, config: Config, rules: Rules) -> tuple[list[Studied], list[tuple[str, int | None, str]]]:
    """Every example of the config's datasets and range; and those left out: dataset, row, reason."""
    found, lost = [], []
    jobs = plan(config.replace(methods="dmlr"))
    size = config.batch_size or vlm.fitting_batch(workload(config, vlm.context_length))
    bar = tqdm(total=sum(len(job.examples) for job in jobs), unit="ex", disable=config.verbose == 0)
    for job in jobs:
        dataset = name(job.dataset)
        lost += [(dataset, problem.row, problem.message) for problem in job.problems]
        for examples in cut(job.examples, size, (), ()):
            batch = prepare(examples)
            lost += [(dataset, row, answer.error or answer.stop_reason) for row, answer in batch.settled.items()]
            asked = [example for example in examples if example.row not in batch.settled]
            pairs = list(zip(asked, batch.questions, strict=True))
            look = partial(_look, vlm, dataset, config, rules)
            for example, one in zip(asked, by_halves(look, pairs), strict=True):
                if isinstance(one, Exception):
                    lost.append((dataset, example.row, failed(one).error))
                elif one.latent.error:
                    lost.append((dataset, example.row, one.latent.error))
                else:
                    found.append(one)
            bar.update(len(examples))
    bar.close()
    return found, lost


def _look(
    vlm: VLM, dataset: str, config: Config, rules: Rules, pairs: Sequence[tuple[Example, Question]]
) -> list[Studied]:
    """One batch. The prompt goes through the model once for the chain, its tokens and its steps."""
    examples, questions = [e for e, _ in pairs], [q for _, q in pairs]
    boxes = [boxes_of(example.meta) for example in examples]
    prefix, encoded = prefill_task(vlm, questions, config, prompts_of(config))
    chains = answered(vlm, prefix, questions, [e.patch_grid for e in encoded], config)
    truths = [truth_text(example.solution, example.question) for example in examples]
    truth = answer_log_probs(vlm, prefix, chains, truths, rules.form, rules.step_ends)
    del prefix
    chains = [replace(chain, truth=found) for chain, found in zip(chains, truth, strict=True)]
    chains = with_dependency(vlm, questions, chains, config, rules.perturbations)
    latent = answer_batch(vlm, "dmlr", questions, config)
    after = attention_after(vlm, questions, latent, config)
    return [
        Studied(
            dataset=dataset,
            example=example,
            question=question,
            boxes=found,
            chain=chain,
            steps=step_spans(chain.text, rules.form, rules.step_ends),
            right=verdict_of(example, chain.text, chain.stop_reason)["is_correct"],
            latent=answer,
            latent_attention=attention,
        )
        for example, question, found, chain, answer, attention in zip(
            examples, questions, boxes, chains, latent, after, strict=True
        )
    ]
