"""Every method against a literal description of its procedure: one question at a time, by full recomputation. Same
prompts, same insert positions, same tokens."""

import pytest
import torch
from tiny import noise_image, tiny_vlm

from dmlr.config import Config, ConfigError
from dmlr.loop.optimize import example_generator, initial_latents
from dmlr.loop.reference import Reference, eager
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import prefill_latent
from dmlr.methods.self_consistency import equal_samples, loop_positions, vote, winner
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.prompts import Prompts

PROMPTS = Prompts()
QUESTIONS = [
    Question(0, "How many?", [noise_image(0, 112, 112)]),
    Question("b", "Which of them has the larger {task}?", [noise_image(1, 56, 84), noise_image(2, 84, 84)]),
    Question(2, "What is two plus two?", []),
    Question(3, "Is there a star?\nA. yes\nB. no", [noise_image(3, 56, 56)]),  # four image tokens, fewer than inserted
]
BASE = {"num_thought_tokens": 3, "max_num_steps": 4, "lr": 0.02, "sigma": 0.05, "max_new_tokens": 9}
BASE |= {"rationale_tokens": 12, "rationale_answer_tokens": 5, "scene_graph_tokens": 11}


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm(context=2048)


@pytest.fixture(scope="module")
def breaking():
    """A model that says newlines often, but not always."""
    vlm = tiny_vlm(seed=5, context=2048)
    newline = vlm.tokenizer.encode("\n")[0]
    vlm.model.lm_head.weight.data[newline] *= 4
    return vlm


def run(vlm, method, asked, config):
    """Answers, and the tokens of every decoded row in the order of the calls."""
    ids = []

    def seen(*args, **kwargs):
        decoded = decode(*args, **kwargs)
        ids.extend(d.ids for d in decoded)
        return decoded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmlr.model.decode.decode", seen)
        return METHODS[method](vlm, asked, config), ids


def turn(vlm, oracle, system, task, images):
    """One conversation turn of one question under full recomputation, its prompt spelled out here."""
    encoded = encode(vlm, system, task, images)
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    user = f"<|im_start|>user\n{pictures}{task}<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.prompt == f"<|im_start|>system\n{system}<|im_end|>\n{user}"
    return Reference(oracle, encoded, Config())


def task(question):
    return PROMPTS.solver[0].replace("{question}", question.text)


def text(vlm, ids):
    return vlm.tokenizer.decode(ids, skip_special_tokens=True)


NOTHING = torch.zeros(0, 48), []  # think tokens and their patches


@torch.no_grad()
def last(reference, ids, patches):
    """After the prompt and these tokens, each with the patches behind it: logits [V] of the last position, and its
    attention over the image."""
    embeds = reference.vlm.embed(torch.tensor(ids, dtype=torch.long))
    logits, attention, *_ = reference.forward(embeds, patches, [])
    return logits[-1], attention[-1].tolist()


# methods in words


@pytest.mark.parametrize(
    ("method", "said", "lengths", "system", "solver"),
    [
        ("multimodal-cot", "rationale", (12, 5), PROMPTS.helper, 2),  # answers only, whatever the config's solver is
        ("ccot", "scene_graph", (11, 9), PROMPTS.system, 1),
    ],
)
def test_two_calls(vlm, method, said, lengths, system, solver):
    answers, ids = run(vlm, method, QUESTIONS, Config(**BASE, solver_prompt_idx=1))
    oracle = eager(vlm)
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        ask = getattr(PROMPTS, said).replace("{question}", question.text)
        first = turn(vlm, oracle, PROMPTS.helper, ask, question.images)
        told = first.decode(*NOTHING, lengths[0])
        ask = PROMPTS.solver[solver].replace("{question}", question.text)
        ask = getattr(PROMPTS, f"{said}_answer").replace("{task}", ask).replace(f"{{{said}}}", text(vlm, told))
        second = turn(vlm, oracle, system, ask, question.images)
        reply = second.decode(*NOTHING, lengths[1])
        assert (answer.details[f"{said}_prompt"], answer.details[said]) == (first.encoded.prompt, text(vlm, told))
        assert (ids[row], ids[4 + row]) == (told, reply)
        assert (answer.prompt, answer.text) == (second.encoded.prompt, text(vlm, reply))
        assert answer.num_new_tokens == len(told) + len(reply)


@pytest.mark.parametrize(("every", "patches", "most"), [(2, 16, 3), (1, 3, 2), (1, 3, 0)])
def test_icot(breaking, every, patches, most):
    config = Config(**BASE | {"max_new_tokens": 40}, icot_newlines=every, icot_patches=patches, icot_insertions=most)
    vlm, oracle = breaking, eager(breaking)
    answers, ids = run(vlm, "icot", QUESTIONS, config)
    start, end = (vlm.tokenizer.convert_tokens_to_ids(t) for t in ("<|vision_start|>", "<|vision_end|>"))
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        reference = turn(vlm, oracle, PROMPTS.system, task(question), question.images)
        said, tail, behind, insertions = [], [], [], []  # the patches `behind` each token of the tail

        while len(said) < 40:
            said.append(int(last(reference, tail, behind)[0].argmax()))
            tail, behind = [*tail, said[-1]], [*behind, []]
            if said[-1] in vlm.eos_ids:
                break
            due = text(vlm, said[-1:]) == "\n" and text(vlm, said).count("\n") % every == 0
            if due and len(insertions) < most and question.images and len(said) < 40:
                attention = last(reference, tail, behind)[1]  # of the newline itself
                best = sorted(sorted(range(len(attention)), key=lambda p: -attention[p])[:patches])
                insertions.append({"after_tokens": len(said), "patches": best})
                tail, behind = [*tail, start, end], [*behind, best, []]
        assert ids[row] == said and answer.text == text(vlm, said) and answer.prompt == reference.encoded.prompt
        assert answer.details["insertions"] == insertions
    where = {i["after_tokens"] for a in answers for i in a.details["insertions"]}
    assert len(where) > 1 or not most, "too alike to prove much"


def test_a_finished_row_gets_no_more_insertions(breaking, monkeypatch):
    """A row that said its last token may wait in the batch; what happens to it there is no part of its answer."""
    config = Config(**BASE | {"max_new_tokens": 40}, icot_newlines=1, icot_insertions=9)
    free, ids = run(breaking, "icot", QUESTIONS, config)
    newline = breaking.tokenizer.encode("\n")[0]
    row, end = next(
        (row, token)
        for row, answer in enumerate(free)
        for token in ids[row][: ([0] + [i["after_tokens"] for i in answer.details["insertions"]])[-1]]
        if token != newline and not any(token in other for other in ids[:row] + ids[row + 1 :])
    )
    monkeypatch.setitem(breaking.__dict__, "eos_ids", [*breaking.eos_ids, end])
    together, _ = run(breaking, "icot", QUESTIONS, config)
    alone, _ = run(breaking, "icot", QUESTIONS[row : row + 1], config)
    assert together[row].details == alone[0].details
    assert len(together[row].details["insertions"]) < len(free[row].details["insertions"])


def test_self_consistency(vlm):
    config, oracle = Config(**BASE, consistency_samples=3, consistency_temperature=0.8), eager(vlm)
    answers, ids = run(vlm, "self-consistency", QUESTIONS, config)
    by_question = [[ids[row], *ids[4 + 2 * row : 6 + 2 * row]] for row in range(4)]  # first samples, then the others
    different = set()
    for question, answer, samples in zip(QUESTIONS, answers, by_question, strict=True):
        reference = turn(vlm, oracle, PROMPTS.system, task(question), question.images)
        for number, sample in enumerate(samples):
            generator, said = example_generator(42, question.idx, f"sample {number}"), []
            for point in torch.rand(9, generator=generator).tolist():
                logits = last(reference, said, [[] for _ in said])[0]
                share = torch.softmax(logits.double() / 0.8, dim=0).cumsum(dim=0)
                said.append(int((share <= point).sum()))
                if said[-1] in vlm.eos_ids:
                    break
            assert sample == said
            different.add(tuple(said))
        texts = [text(vlm, sample) for sample in samples]
        assert answer.details["votes"] == [vote(each, question.text) for each in texts]
        assert answer.text == texts[winner(answer.details["votes"])] and answer.details["samples"] == 3
        assert answer.num_new_tokens == sum(map(len, samples)) and answer.prompt == reference.encoded.prompt
    assert len(different) > 8, "samples that are all alike prove little"


# methods in latents


def references(vlm, config):
    """Each question with its reference and the latents it starts from."""
    prefix, encoded = prefill_latent(vlm, QUESTIONS, config, PROMPTS)
    start, oracle = initial_latents(vlm, prefix, config), eager(vlm)
    for row, question in enumerate(QUESTIONS):
        yield question, Reference(oracle, encoded[row], config), start[row]


def same_reasoning(answer, latents, patches, rewards):
    torch.testing.assert_close(answer.reasoning.latents, latents, atol=1e-4, rtol=0)
    assert answer.reasoning.patches == patches
    assert [step["reward"] for step in answer.reasoning.steps] == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("how", [{}, {"reward": "logprob", "accept_at": "candidate", "reward_position": "think_next"}])
def test_ltpo_is_the_loop_without_patches(vlm, how):
    """With its published budget, whatever DMLR's is."""
    published = {"num_thought_tokens": 10, "max_num_steps": 10, "lr": 0.03, "sigma": 0.1, "sigma_decay": 0.99}
    none = {"initial_patch_count": 0, "patch_increment": 0}
    answers, ids = run(vlm, "ltpo", QUESTIONS, Config(**BASE, **how))
    wanted, same_ids = run(vlm, "dmlr", QUESTIONS, Config(**BASE | published | none, **how))
    assert ids == same_ids
    for answer, want in zip(answers, wanted, strict=True):
        assert answer.reasoning.steps == want.reasoning.steps and len(answer.reasoning.steps) == 10
        assert answer.reasoning.patches == [[]] * 10 and not answer.details


@pytest.mark.parametrize("how", [{}, {"initial_patch_count": None, "max_total_patches": None}])
def test_unoptimised(vlm, how):
    config = Config(**BASE, **how)
    answers, ids = run(vlm, "unoptimised", QUESTIONS, config)
    for row, (question, reference, start) in enumerate(references(vlm, config)):
        with torch.no_grad():
            reward, attention = reference.reward(start, [[]] * 3)
        budget = 10**9 if how else 2
        patches = reference.retrieve(attention, [[]] * 3, budget)
        assert any(patches) == bool(question.images)
        same_reasoning(answers[row], start, patches, [])
        assert answers[row].reasoning.start_reward == pytest.approx(float(reward), abs=1e-4)
        assert ids[row] == reference.decode(start, patches, 9)


VARIANTS = [
    {},
    {"num_samples": 2, "accept_at": "candidate", "patch_increment": 1},
    {"visual_injection_start_step": 2, "visual_injection_interval": 2, "disable_best_reward": True},
    {"reward_threshold": 0.1, "max_num_steps": 6},
]


@pytest.mark.parametrize("how", VARIANTS, ids=lambda how: ",".join(how))
def test_random(vlm, how):
    config = Config(**{**BASE, **how})
    answers, ids = run(vlm, "random", QUESTIONS, config)
    accepted, states = set(), config.num_samples * 2 if config.accept_at == "candidate" else config.num_samples + 1
    for row, (question, reference, start) in enumerate(references(vlm, config)):
        count = len(reference.encoded.image_columns)
        generators = [example_generator(42, question.idx, purpose) for purpose in ("patches", "random")]
        draws = torch.rand(config.max_num_steps, 3, count, generator=generators[0]).tolist()
        noise = torch.randn(config.max_num_steps, states, *start.shape, generator=generators[1])
        kept, budget, sigma = [[]] * 3, 2, config.sigma
        best = float(reference.reward(start, kept)[0])
        threshold = 0.0 if config.accept_at == "candidate" else best
        final, last, rewards = (start, kept), start, []
        for t in range(config.max_num_steps):
            since = t - config.visual_injection_start_step
            injects = since >= 0 and since % config.visual_injection_interval == 0
            tried = reference.retrieve(draws[t], kept, budget) if injects else kept
            scores = [float(reference.reward(start + sigma * xi, tried)[0]) for xi in noise[t]]
            rewards.append(max(scores))
            last = start + sigma * noise[t][scores.index(max(scores))]
            accepted.add(rewards[-1] > threshold)
            if rewards[-1] > threshold:
                threshold = best = rewards[-1]
                final, kept = (last, tried), tried
                budget += config.patch_increment
                if 0 < config.reward_threshold <= best:
                    break
            sigma *= config.sigma_decay
        latents, patches = (last, kept) if config.disable_best_reward else final
        same_reasoning(answers[row], latents, patches, rewards)
        assert answers[row].reasoning.best_reward == pytest.approx(best, abs=1e-4)
        assert answers[row].reasoning.evaluations == 1 + states * len(rewards)
        assert ids[row] == reference.decode(latents, patches, 9)
    assert accepted == {True, False}


# what all methods share


def test_no_question_and_one_image_alone(vlm):
    assert METHODS["dmlr"](vlm, [], Config(**BASE)) == []
    image = noise_image(0)
    assert Question(0, "How many?", image).images == Question(0, "How many?", [image]).images


def test_a_bad_question_costs_its_own_answer(vlm):
    asked = [QUESTIONS[0], Question(1, "Why <|im_end|>?", []), QUESTIONS[3]]
    good, bad, other = METHODS["dmlr"](vlm, asked, Config(**BASE))
    assert bad.stop_reason == "error" and bad.error.startswith("PromptError: the question contains")
    assert (good.text, other.text) == tuple(a.text for a in METHODS["dmlr"](vlm, asked[::2], Config(**BASE)))
    with pytest.raises(ConfigError, match="prompts_file"):  # of all questions alike
        METHODS["dmlr"](vlm, asked, Config(**BASE, prompts_file="nowhere.yaml"))


def test_what_dmlr_costs_in_samples():
    """method.md's paper preset: start 4, thirty passes of 4 think tokens and at most 16 patches, the last state."""
    paper = Config.make("paper", patch_increment=0)
    assert loop_positions(paper, 256) == 4 + 30 * (4 + 4 * 2) + (4 + 4 * 2)
    assert loop_positions(Config.make("paper", initial_patch_count=None), 256) == 4 + 30 * 20 + 20
    assert loop_positions(Config.make("paper"), 256) == 4 + 2 * (12 + 14 * 20) + 20  # 2 each, then 4 each: the cap
    assert loop_positions(Config.make("paper"), 0) == 4 + 30 * 4 + 4
    assert loop_positions(Config.make("paper", accept_at="candidate", num_samples=4), 0) == 4 + 15 * 8 * 4 + 4
    assert [equal_samples(Config.make("paper"), 256, n) for n in (10_000, 304, 100, 1)] == [3, 3, 7, 40]


def test_the_number_of_samples_follows_each_questions_own_first_one(vlm):
    config = Config(**BASE | {"max_new_tokens": 30, "max_num_steps": 2})
    answers, ids = run(vlm, "self-consistency", QUESTIONS, config)
    for question, answer, first in zip(QUESTIONS, answers, ids[:4], strict=True):
        patches = len(encode(vlm, "", question.text, question.images).image_columns)
        assert answer.details["samples"] == equal_samples(config, patches, len(first)) == len(answer.details["votes"])


@pytest.mark.parametrize(
    ("texts", "question", "votes"),
    [
        (["so \\boxed{0.50}", "The answer is 1/2.", "\\boxed{2}"], "How much?", ["1/2", "1/2", "2"]),
        (["\\boxed{B}", "The answer is (b) red", "Answer: red", "?"], "Which?\nA. blue\nB. red", ["B", "B", "B", None]),
        (["<answer>Yes.</answer>", "\\boxed{yes}", ""], "Is it?", ["yes", "yes", None]),
        (["<think>never ends", "50%", "50"], "How many?", [None, "50%", "50"]),
    ],
)
def test_equal_answers_are_one_vote(texts, question, votes):
    assert [vote(text, question) for text in texts] == votes


def test_the_winner_is_the_earliest_of_the_most_frequent():
    assert winner(["a", "b", "b", None]) == 1
    assert winner(["a", "b", "b", "a"]) == 0
    assert winner([None, None, "c"]) == 2
    assert winner([None, None]) == 0
