"""Methods that think in words or not at all: vanilla, Multimodal-CoT, CCoT. The model is asked once or twice, greedily.

The second question of a method is an ordinary prompt that holds the first one's answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmlr.config import Config, ConfigError, locate
from dmlr.methods.answers import Answer, Clock, Question
from dmlr.model import decode as decoding
from dmlr.model.cache import Prefix
from dmlr.model.decode import Decoded, Feed, Pick, greedy
from dmlr.model.encode import encode
from dmlr.model.vlm import VLM, Encoded
from dmlr.prompts import Prompts, load_prompts


def vanilla(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """The model's own prompt, greedy: the baseline."""
    prompts, clock = prompts_of(config), Clock(vlm.device)
    prefix, encoded = prefill_task(vlm, questions, config, prompts)
    clock.lap("prefill")
    decoded = decode(vlm, prefix, config)
    clock.lap("decode")
    seconds = clock.per_example(len(questions))
    return [Answer.of(e, d, seconds) for e, d in zip(encoded, decoded, strict=True)]


def multimodal_cot(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """Rationale first, answer second, the image in both (Zhang et al., *Multimodal Chain-of-Thought Reasoning in
    Language Models*, arXiv 2302.00923: answer inference reads the question, the image and the rationale).

    Budgets: `rationale_tokens`, `rationale_answer_tokens`. The original fine-tunes a small encoder-decoder for each
    stage; here, as in the paper's Table 1, a frozen model is prompted twice. With which words is not published; since
    64 tokens leave no room to reason again, the second call asks for the answer alone.
    """
    prompts = prompts_of(config)
    first = [(prompts.helper, prompts.ask_rationale(q.text)) for q in questions]

    def second(question: Question, rationale: str) -> tuple[str, str]:
        return prompts.helper, prompts.answer_from_rationale(question.text, rationale)

    return _two_calls(
        vlm, questions, config, "rationale", first, config.rationale_tokens, second, config.rationale_answer_tokens
    )


def ccot(vlm: VLM, questions: Sequence[Question], config: Config) -> list[Answer]:
    """A scene graph in JSON first; then image, scene graph and question (Mitra et al., *Compositional Chain-of-Thought
    Prompting for Large Multimodal Models*, arXiv 2311.17076).

    Budgets: `scene_graph_tokens`, then `max_new_tokens` as for vanilla, with vanilla's system and task wording. The
    scene graph is passed on as it was said, valid JSON or not, also when its budget cut it off.
    """
    prompts = prompts_of(config)
    first = [(prompts.helper, prompts.ask_scene_graph(q.text)) for q in questions]

    def second(question: Question, graph: str) -> tuple[str, str]:
        return prompts.system, prompts.answer_from_scene_graph(question.text, graph, config.solver_prompt_idx)

    return _two_calls(
        vlm, questions, config, "scene_graph", first, config.scene_graph_tokens, second, config.max_new_tokens
    )


def _two_calls(vlm, questions, config, name, first, first_budget, second, second_budget) -> list[Answer]:
    """Answers to `second(question, what was said to first)`; both are (system, task). Details keep the first call."""
    clock = Clock(vlm.device)

    def call(asked: list[tuple[str, str]], budget: int) -> tuple[list[Encoded], list[Decoded]]:
        encoded = [encode(vlm, *texts, q.images) for texts, q in zip(asked, questions, strict=True)]
        prefix = vlm.prefill(encoded)
        clock.lap("prefill")
        decoded = decode(vlm, prefix, config, budget)
        clock.lap("decode")
        return encoded, decoded

    asked, said = call(first, first_budget)
    encoded, decoded = call([second(q, s.text) for q, s in zip(questions, said, strict=True)], second_budget)
    seconds = clock.per_example(len(questions))
    answers = []
    for a, s, e, d in zip(asked, said, encoded, decoded, strict=True):
        details = {name: s.text, f"{name}_prompt": a.prompt, f"{name}_stop_reason": s.stop_reason}
        answers.append(Answer.of(e, d, seconds, num_new_tokens=s.num_tokens + d.num_tokens, details=details))
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
