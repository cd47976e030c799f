"""How well a model answers the embedded benchmark, with think tokens and patches put in as they come, unoptimised.

This is what the embedded model must be robust to before any optimisation is worth looking at; methods and full runs
are in `evaluate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from data.shapes.questions import SUITES
from dmlr.config import Config, locate
from dmlr.data.images import open_image
from dmlr.judge import judge
from dmlr.loop.optimize import Trace, example_generator, optimize
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import reasoned
from dmlr.model.cache import Prefix
from dmlr.model.vlm import VLM


def load_suite(folder: str | Path, suite: str, examples: int | None = None) -> list[dict]:
    """The first `examples` records of a suite, with absolute image paths."""
    folder = Path(locate(folder))
    records = json.loads((folder / f"{suite}.json").read_text(encoding="utf-8"))[:examples]
    return [record | {"image_path": str(folder / record["image_path"])} for record in records]


def answers(
    vlm: VLM, questions: Sequence[Question], config: Config, think: int = 0, patches: int = 0, noise: float = 0.0
) -> list[str]:
    """Greedy answers with `think` think tokens, `patches` most attended patches after each; 0: the plain prompt.

    noise: scale of Gaussian noise on the think tokens, in units of their embedding's RMS, each question's its own.
    """
    if not think:
        return [answer.text for answer in METHODS["vanilla"](vlm, questions, config)]
    config = config.replace(
        num_thought_tokens=think,
        max_num_steps=0,
        disable_best_reward=True,  # decode the start with its patches
        initial_patch_count=patches,
        num_selected_patches=patches,
        max_total_patches=None,
        patch_increment=0,
    )

    def perturbed(vlm: VLM, prefix: Prefix, config: Config, none: torch.Tensor, ids: torch.Tensor) -> Trace:
        trace = optimize(vlm, prefix, config, none, ids)
        latents = trace.final.latents  # [B, L, D]
        streams = [example_generator(config.seed, question.idx, "robustness") for question in questions]
        draws = torch.stack([torch.randn(latents.shape[1:], generator=stream) for stream in streams])
        trace.final.latents = latents + noise * vlm.embedding_rms * draws.to(latents.device)
        return trace

    return [answer.text for answer in reasoned(vlm, questions, config, perturbed)]


def accuracy(
    vlm: VLM,
    records: Sequence[dict],
    config: Config,
    think: int = 0,
    patches: int = 0,
    noise: float = 0.0,
    batch: int = 32,
) -> pd.DataFrame:
    """One row per question: suite, category, think, patches, noise, answer, right."""
    rows = []
    for at in range(0, len(records), batch):
        part = records[at : at + batch]
        asked = [Question(r["idx"], r["prompt"], [open_image(r["image_path"])]) for r in part]
        for record, text in zip(part, answers(vlm, asked, config, think, patches, noise), strict=True):
            verdict = judge(text, record["solution"], choices=record.get("choices"), question=record["prompt"])
            row = {name: record[name] for name in ("suite", "category", "prompt", "solution")}
            row |= {"think": think, "patches": patches, "noise": noise, "answer": text}
            rows.append(row | {"right": verdict.status == "correct"})
    return pd.DataFrame(rows)


# Think tokens, attended patches after each, noise in units of the embedding's RMS.
SETTINGS = ((0, 0, 0), (1, 2, 0), (4, 0, 0), (4, 2, 0), (4, 4, 0), (4, 2, 0.5), (4, 2, 1), (8, 2, 0))


def overview(
    vlm: VLM,
    config: Config,
    folder: str | Path = "data/shapes",
    settings: Sequence[tuple[int, int, float]] = SETTINGS,
    examples: int | None = None,
) -> pd.DataFrame:
    """Rows of `accuracy` for every suite and every setting."""
    records = [record for suite in SUITES for record in load_suite(folder, suite, examples)]
    return pd.concat([accuracy(vlm, records, config, *setting) for setting in settings], ignore_index=True)
