"""DMLR as a model of lmms-eval: `--model dmlr --model_args pretrained=…,method=dmlr,preset=paper`.

Found by lmms-eval through its entry-point group; what loads models is imported when this model is made, so that
whatever is missing breaks this model alone. Knows nothing about tasks but the shape of their requests.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any, Literal, get_args

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

Prompt = Literal["project", "task"]
Text = Literal["full", "short"]
Budget = Literal["config", "task"]


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest("dmlr", chat_class_path=f"{__name__}.DMLR")


class DMLR(lmms):
    """Any method of this package under lmms-eval's tasks and scores.

    prompt: "project" puts the task's text into this project's wording, "task" asks it as it is, with the model's own
    system turn. answer: "full" is all that was said, "short" the part that answers, for scorers that take a bare letter
    or number only. budget: the most new tokens are the configuration's, or what the task asks for (16 with some, which
    ends most reasoning). `parameters` are `Config`'s; a task's `until` is not applied, since answers have paragraphs.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "dmlr",
        preset: str = "paper",
        prompt: Prompt = "project",
        answer: Text = "full",
        budget: Budget = "config",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **parameters: Any,
    ):
        from dmlr.api import load
        from dmlr.config import check_names
        from dmlr.methods import METHODS

        super().__init__()
        given = {"method": (method, METHODS), "prompt": (prompt, get_args(Prompt))}
        given |= {"answer": (answer, get_args(Text)), "budget": (budget, get_args(Budget))}
        for name, (value, known) in given.items():
            check_names([value], known, what=name)
        if prompt == "task":
            parameters["prompts_file"] = "notebooks/params/prompts/bare.yaml"
        if batch_size != "auto":
            parameters["batch_size"] = batch_size
        if device:
            parameters["device"] = device
        self.model = load(pretrained, preset, **parameters)
        self.method, self.short, self.by_task = method, answer == "short", budget == "task"

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Results in order, with their tokens. A request that cannot be answered is an empty text and a warning."""
        groups: dict[int | None, list[int]] = defaultdict(list)  # by most new tokens; None: the configuration's
        for place, request in enumerate(requests):
            groups[request.args[2].get("max_new_tokens") if self.by_task else None].append(place)
        results: dict[int, GenerationResult] = {}
        for most, places in groups.items():
            asked = [self.question(requests[place]) for place in places]
            answers = self.model.ask_many(asked, self.method, **({"max_new_tokens": most} if most else {}))
            for place, answer in zip(places, answers, strict=True):
                context, _, how, doc_id, task, _ = requests[place].args
                if answer.error:
                    logging.getLogger(__name__).warning("%s %s: %s", task, doc_id, answer.error)
                text = (answer.short if self.short else "") or answer.text
                results[place] = GenerationResult(text, TokenCounts(answer.prompt_tokens, answer.new_tokens))
                self.cache_hook.add_partial("generate_until", (context, how), text)
        return [results[place] for place in range(len(requests))]

    def question(self, request: Instance) -> dict[str, Any]:
        """As `Model.ask_many` takes one. ValueError for several turns, and for anything but text and images."""
        _, messages_of, _, doc_id, task, split = request.args
        messages = messages_of(self.task_dict[task][split][doc_id])
        parts = [part for message in messages for part in message["content"]]
        if [message["role"] for message in messages] != ["user"]:
            raise ValueError(f"{task}: DMLR answers a single user turn")
        if kinds := {part["type"] for part in parts} - {"text", "image"}:
            raise ValueError(f"{task}: DMLR reads text and images, not {', '.join(sorted(kinds))}")
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        return {"question": text, "image": [part["url"] for part in parts if part["type"] == "image"], "idx": doc_id}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("DMLR generates answers; it scores none that are given")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("DMLR answers a single turn")
