"""Methods that think in words or not at all: vanilla, Multimodal-CoT, CCoT. The model is asked once or twice, greedily.

The second question of a method is an ordinary prompt that holds the first one's answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmlr.config import Config, ConfigError, locate
from dmlr.methods.answers import Answer, Clock, Question, answers_of
from dmlr.model import decode as decoding
from dmlr.model.cache import Prefix
from dmlr.model.decode import Decoded, Feed, Pick, greedy
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM, Encoded
from dmlr.prompts import Prompts, load_prompts


def vanilla(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The model's own prompt, greedy: the baseline."""
    clock = Clock(vlm.device)
    prefix, encoded = prefill_task(vlm, questions, config, prompts_of(config))
    clock.lap("prefill")
    return answers_of(encoded, decode(vlm, prefix, config), clock)


def multimodal_cot(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Rationale first, answer second, the image in both (Zhang et al., *Multimodal Chain-of-Thought Reasoning in
    Language Models*, arXiv 2302.00923: answer inference reads the question, the image and the rationale).

    Budgets: `rationale_tokens`, `rationale_answer_tokens`. The original fine-tunes a small encoder-decoder for each
    stage; here, as in the paper's Table 1, a frozen model is prompted twice. With which words is not published; since
    64 tokens leave no room to reason again, the second call asks for the answer alone.
    """
    budgets = config.rationale_tokens, config.rationale_answer_tokens
    return _two_calls(vlm, questions, config, "rationale", budgets, system="helper", solver=2)


def ccot(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """A scene graph in JSON first; then image, scene graph and question (Mitra et al., *Compositional Chain-of-Thought
    Prompting for Large Multimodal Models*, arXiv 2311.17076).

    Budgets: `scene_graph_tokens`, then `max_new_tokens` as for vanilla, with vanilla's system and task wording. The
    scene graph is passed on as it was said, valid JSON or not, also when its budget cut it off.
    """
    budgets = config.scene_graph_tokens, config.max_new_tokens
    return _two_calls(vlm, questions, config, "scene_graph", budgets, system="system", solver=config.solver_prompt_idx)


def _two_calls(
    vlm: VLM,
    questions: Sequence[Question],
    config: Config,
    name: str,
    budgets: tuple[int, int],
    system: str,
    solver: int,
) -> list[Answer]:
    """Asks by the template `name`, then by the one called `name`_answer, which holds what was said and the task.

    budgets: most tokens of each call; system: the second one's system turn. Details keep the first call.
    """
    prompts, clock = prompts_of(config), Clock(vlm.device)

    def call(system: str, tasks: list[str], budget: int) -> list[Answer]:
        encoded = [encode(vlm, system, task, q.images) for task, q in zip(tasks, questions, strict=True)]
        prefix = vlm.prefill(encoded)
        clock.lap("prefill")
        return answers_of(encoded, decode(vlm, prefix, config, budget), clock)

    said = call(prompts.helper, [prompts.filled(name, question=q.text) for q in questions], budgets[0])
    tasks = [
        prompts.filled(f"{name}_answer", task=prompts.task(q.text, solver), **{name: first.text})
        for q, first in zip(questions, said, strict=True)
    ]
    answers = call(getattr(prompts, system), tasks, budgets[1])
    for first, answer in zip(said, answers, strict=True):
        answer.num_new_tokens += first.num_new_tokens
        answer.details |= {name: first.text, f"{name}_prompt": first.prompt, f"{name}_stop_reason": first.stop_reason}
    return answers


# the pieces that methods share


def prompts_of(config: Config) -> Prompts:
    """The texts that this run asks with. ConfigError says what is wrong with its file."""
    try:
        return load_prompts(locate(config.prompts_file) if config.prompts_file else None)
    except OSError as error:
        raise ConfigError(f"prompts_file: {config.prompts_file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"prompts_file: {error}") from None


def prefill_task(
    vlm: VLM, questions: Sequence[Question], config: Config, prompts: Prompts
) -> tuple[Prefix, list[Encoded]]:
    """Vanilla's prompt: image and task, the assistant's turn opened."""
    encoded = [encode_task(vlm, question, config, prompts) for question in questions]
    return vlm.prefill(encoded), encoded


def encode_task(vlm: VLM, question: Question, config: Config, prompts: Prompts) -> Encoded:
    """Vanilla's prompt of one question. PromptError as `encode`."""
    return encode(vlm, prompts.system, prompts.task(question.text, config.solver_prompt_idx), question.images)


def decode(
    vlm: VLM,
    prefix: Prefix,
    config: Config,
    max_new_tokens: int | None = None,
    pick: Pick = greedy,
    feed: Feed | None = None,
    reserve: int = 0,
) -> list[Decoded]:
    """What the model says next, under the run's rules; the limit is the run's unless given."""
    banned = tuple(word for word in config.banned_strings.split("|") if word)
    limit, recorded = max_new_tokens or config.max_new_tokens, config.cuda_graphs and vlm.on_one_gpu
    return decoding.decode(vlm, prefix, limit, banned, config.generation, pick, feed, reserve, recorded)
