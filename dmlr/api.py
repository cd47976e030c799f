"""The package from Python: load a model once, ask it questions.

    model = dmlr.load("Qwen/Qwen2.5-VL-7B-Instruct", preset="paper")
    answer = model.ask("How many cups are there?", "photo.jpg", method="dmlr", num_thought_tokens=4)

What a run adds to this (datasets, judging, records) is not known here.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dmlr.config import Config, ConfigError, check_names
from dmlr.data.images import ImageFile, open_image
from dmlr.judge.choice import chosen
from dmlr.judge.extract import candidates, parse_options, plain
from dmlr.methods import METHODS, Question
from dmlr.methods import answers as methods_answers
from dmlr.methods.workload import workload
from dmlr.model.vlm import VLM
from dmlr.run.batches import answer_batch

Source = str | bytes | Path | Image.Image
# What is fixed once weights are loaded, and what only a run over a dataset has; all other parameters are free at ask.
AT_LOAD = {
    *("model_name_or_path", "revision", "trust_remote_code", "device", "dtype", "device_map", "load_in_bits"),
    *("min_pixels", "max_pixels", "deep_patches"),
}
OF_A_RUN = {
    *("dataset", "methods", "output_dir", "start_data_idx", "end_data_idx", "num_workers", "worker_device_round_robin"),
    *("ray_address", "use_llm_verify", "llm_verify_all", "verify_only", "resume", "visual_token_viz"),
    *("visual_token_viz_dir", "save_reward_csv", "verbose"),
}


def load(name_or_path: str, preset: str | None = None, **parameters: Any) -> Model:
    """The model of a hub id or a folder, ready to be asked; `parameters` are those of `Config` over the preset's.

    ConfigError names a parameter that is unknown, out of range or only a run's; ModelError says why a model cannot be
    loaded.
    """
    _refuse(parameters)
    config = Config.make(preset, model_name_or_path=name_or_path, **parameters)
    return Model(VLM.load(config), config)


def wrap(model: torch.nn.Module, processor: Any, preset: str | None = None, **parameters: Any) -> Model:
    """A transformers model that is loaded already, with its processor. It stays as it is; its weights are shared.

    Parameters as for `load`; those that say how weights are loaded are the model's own.
    """
    from dmlr.model.attention import ATTENTION

    own = AT_LOAD - {"min_pixels", "max_pixels", "deep_patches"}
    _refuse(parameters, own, "is a matter of loading, and this model is loaded already")
    name = getattr(model, "name_or_path", "") or type(model).__name__
    config = Config.make(preset, model_name_or_path=name, **parameters)
    twin = _sharing_weights(model)
    twin.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
    return Model(VLM(twin, processor, config.min_pixels, config.max_pixels, config.deep_patches), config)


class Model:
    """A frozen vision-language model with the parameters that its questions are asked under."""

    def __init__(self, vlm: VLM, config: Config):
        self.vlm, self.config = vlm, config

    def ask(
        self,
        question: str,
        image: Source | Sequence[Source] | None = None,
        method: str = "dmlr",
        *,
        idx: int | str | None = None,
        **parameters: Any,
    ) -> Answer:
        """One question about an image (path, URL, bytes, `data:` URI, PIL image), several of them, or none.

        idx: what the noise comes from, with the seed; none: a hash of text and image, so that a question has one
        answer. `parameters` are those of `Config` that need no loading. ValueError for a question that cannot be
        answered; ConfigError as `load`.
        """
        (answer,) = self.ask_many([{"question": question, "image": image, "idx": idx}], method, **parameters)
        if answer.error:
            raise ValueError(answer.error)
        return answer

    def ask_many(
        self, questions: Iterable[str | tuple | Mapping[str, Any]], method: str = "dmlr", **parameters: Any
    ) -> list[Answer]:
        """Answers in order, one pass for `batch_size` questions (none: what fits).

        Each is a text, (text, image) or a mapping with `question` and perhaps `image` and `idx`. A question that cannot
        be answered costs its own answer, whose `error` says why.
        """
        check_names([method], METHODS, what="method")
        _refuse(parameters, AT_LOAD, "is fixed when a model is loaded: give it to dmlr.load")
        config = self.config.replace(**parameters)
        asked = [_asked(question) for question in questions]
        good = [question for question, error in asked if error is None]
        size = config.batch_size or self.vlm.fitting_batch(workload(config, self.vlm.context_length))
        batches = [good[start : start + size] for start in range(0, len(good), size)]
        answers = (answer for batch in batches for answer in answer_batch(self.vlm, method, batch, config))
        return [Answer(q, method, methods_answers.failed(error) if error else next(answers)) for q, error in asked]


@dataclass
class Answer:
    """What a method said to a question, and how it came to it; `whole` is all of it, as the method gave it.

    trace: rewards, patches and attention of every iteration; None for a method without latents. prompt_tokens: image
    tokens included. seconds: this question's share of its batch. error: why there is no answer, or None.
    """

    question: Question
    method: str
    whole: methods_answers.Answer

    def __post_init__(self) -> None:
        whole = self.whole
        self.text, self.error, self.trace = whole.text, whole.error, whole.reasoning
        self.prompt_tokens, self.new_tokens = whole.prompt_tokens, whole.num_new_tokens
        self.seconds = sum(whole.seconds.values())

    def __repr__(self) -> str:
        """In a line, whatever stands in the trace."""
        said = f"error: {self.error}" if self.error else repr(self.short or self.text)
        reward = f", reward {self.trace.start_reward:.4g} → {self.trace.best_reward:.4g}" if self.trace else ""
        return f"<Answer of {self.method}: {said}{reward}>"

    @cached_property
    def short(self) -> str:
        """The part that answers, as the judge reads it: a letter, a number, the inside of a box; "" where none is."""
        found = candidates(self.text)
        return chosen(found, parse_options(self.question.text)) or (plain(found[0].text) if found else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        found = {"question": self.question.text, "idx": self.question.idx, "method": self.method, "text": self.text}
        found |= {"short": self.short, "stop_reason": self.whole.stop_reason, "error": self.error}
        found |= {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "seconds": self.whole.seconds}
        if self.trace:
            names = ("start_reward", "best_reward", "best_step", "steps", "patches", "patch_grid")
            found["trace"] = {name: getattr(self.trace, name) for name in names}
        return found | {"details": self.whole.details}

    def _repr_html_(self) -> str:
        """The image with the patches that were kept, the reward over iterations, the text."""
        text = f"<pre style='white-space:pre-wrap'>{escape(self.error or self.text)}</pre>"
        if self.trace is None:
            return text
        from dmlr.show.figures import Heat, moment  # matplotlib costs a second that most questions need not pay
        from dmlr.show.page import data_uri

        trace = self.trace
        curve = [(trace.start_reward, True), *((step["reward"], step["is_new_best"]) for step in trace.steps)]
        image = self.question.images[0] if self.question.images else None
        attention = trace.attention[min(trace.best_step, len(trace.attention) - 1)]
        heat = Heat(attention, trace.patches, title="Attention and the patches that were kept")
        picture = moment(image, trace.patch_grid, heat, curve, trace.best_step)
        return f"<img alt='kept patches and reward' src='{data_uri(picture)}'>{text}"


def identity(text: str, images: Sequence[Image.Image]) -> str:
    """What the noise of a question without a number of its own comes from: a hash of its text and pixels."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _asked(question: str | tuple | Mapping[str, Any]) -> tuple[Question, Exception | None]:
    """A question with its images opened, and what is wrong with it."""
    if not isinstance(question, Mapping):
        question = dict(zip(("question", "image"), [question] if isinstance(question, str) else question, strict=False))
    check_names(question, ("question", "image", "idx"), what="key of a question")
    text, images, idx = question.get("question", ""), question.get("image"), question.get("idx")
    images = [] if images is None else [images] if isinstance(images, Source) else images
    try:
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the question is empty")
        opened = [open_image(ImageFile("the image", im) if isinstance(im, bytes) else im) for im in images]
    except ValueError as error:  # ImageError is one
        return Question(idx if idx is not None else "", str(text), []), error
    return Question(idx if idx is not None else identity(text, opened), text, opened), None


def _refuse(parameters: Iterable[str], fixed: Iterable[str] = (), why: str = "") -> None:
    """ConfigError for a parameter that is fixed, with the reason, and for one that only a run has."""
    for name in parameters:
        if name in OF_A_RUN:
            raise ConfigError(f"{name} belongs to a run over a dataset (python -m dmlr run)")
        if name in fixed:
            raise ConfigError(f"{name} {why}")


def _sharing_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules around the same storage, frozen; the original's settings and gradients stay its own."""
    tensors = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, tensors | {id(buffer): buffer for buffer in model.buffers()})
