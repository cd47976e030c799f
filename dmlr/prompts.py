"""The text of every prompt, and nothing else: no model, no tokenizer, no chat template.

The wording is this project's own; the facts behind it are the paper's (arXiv 2512.12623, App. A) and its
released code's. Every template can be replaced from a YAML file whose keys are the field names below, so
that published wording, or yours, runs through the same code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompts:
    """Templates; `{question}`, `{count}`, `{task}`, `{rationale}` and `{scene_graph}` are the only placeholders, other
    braces are literal.

    `solver` is indexed by `solver_prompt_idx`: 0 step by step, 1 detailed steps, 2 answer only.
    `latents` follows the question when think tokens follow it (DMLR); `self_score` follows the think tokens
    when the model is asked to rate them itself (`disable_conf_reward`).
    `rationale` and `rationale_answer` are the two calls of Multimodal-CoT, `scene_graph` and `scene_graph_answer` those
    of CCoT; `{task}` in a second call is a solver text with its question. `helper` is the system turn of calls that do
    not ask for tags: both of Multimodal-CoT, the first of CCoT.
    """

    system: str = (
        "You are a careful visual assistant. Reason inside <think></think>, then give the answer inside "
        "<answer></answer>."
    )
    solver: tuple[str, ...] = (
        "Look at the image and reason step by step. Put your final answer into \\boxed{}; "
        "for a multiple-choice question that is the letter of the option.\n\n{question}",
        "Look closely at the image. Write down every step of your reasoning in detail, check it, and put your final "
        "answer into \\boxed{}; for a multiple-choice question that is the letter of the option.\n\n{question}",
        "Look at the image and answer with nothing but the final answer in \\boxed{}; "
        "for a multiple-choice question that is the letter of the option.\n\n{question}",
    )
    latents: str = (
        "\n\nThe next {count} special tokens are your inner space, where reasoning happens without words. "
        "You may answer directly after them.\n"
    )
    self_score: str = (
        "\n\nDo not answer the question. Rate from 0 to 1 how well the inner space above leads to the right answer. "
        "Reply with the number only."
    )
    helper: str = "You are a careful visual assistant."
    rationale: str = (
        "Look at the image and work out, step by step, what is needed to answer the question below. Write down this "
        "reasoning only; the answer itself will be asked for next.\n\n{question}"
    )
    rationale_answer: str = "{task}\n\nReasoning that was worked out before:\n{rationale}"
    scene_graph: str = (
        "Describe the image as a scene graph in JSON, as far as it matters for the question below: the objects, their "
        "attributes, and the relations between them. Write the JSON only and do not answer the question.\n\n{question}"
    )
    scene_graph_answer: str = (
        "Scene graph of the image:\n{scene_graph}\n\nUse both the image and this scene graph as context.\n\n{task}"
    )

    def task(self, question: str, solver_prompt_idx: int = 0) -> str:
        """The user turn's text without think tokens."""
        return self.solver[solver_prompt_idx].replace("{question}", question)

    def latent_task(self, question: str, num_thought_tokens: int, solver_prompt_idx: int = 0) -> str:
        """The user turn's text up to the first think token."""
        hint = self.latents.replace("{count}", str(num_thought_tokens))
        return self.task(question, solver_prompt_idx) + hint

    def filled(self, name: str, **values: str) -> str:
        """The template of that name, its placeholders replaced in one pass: braces in what a model or a dataset says
        stay as they are."""
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), getattr(self, name))


def load_prompts(path: str | Path | None) -> Prompts:
    """Defaults, overridden by the keys of a YAML file.

    ValueError says what is wrong with it (no YAML, an unknown key, no text, a lost placeholder); OSError: not readable.
    """
    if path is None:
        return Prompts()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    names = [f.name for f in fields(Prompts)]
    found = [name for name in values if name not in names] if isinstance(values, dict) else type(values).__name__
    if found:
        raise ValueError(f"{path}: expected a mapping with keys among {names}, found {found}")
    if "solver" in values:
        solver = values["solver"]
        values["solver"] = tuple(solver) if isinstance(solver, list) else (solver,) * 3
        if len(values["solver"]) != 3:
            raise ValueError(f"{path}: solver needs three templates (or one text for all), found {len(solver)}")
    for name, value in values.items():
        templates, defaults = (x if name == "solver" else (x,) for x in (value, getattr(Prompts, name)))
        if not all(isinstance(template, str) for template in templates):
            raise ValueError(f"{path}: {name} must be text, found {value!r}")
        for template, known in zip(templates, defaults, strict=True):
            for placeholder in _PLACEHOLDER.findall(known):
                if placeholder != "count" and template.count(f"{{{placeholder}}}") != 1:
                    must = f"{path}: a {name} template must contain {{{placeholder}}} exactly once"
                    raise ValueError(f"{must}: {template[:60]!r}")
    return Prompts(**values)
