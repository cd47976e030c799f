"""Every method against a literal description of its procedure: one question at a time, the whole sequence from pixels
at every step, transformers' own eager attention and `generate`. Same prompts, same insert positions, same tokens."""

import pytest
import torch
from tiny import noise_image, tiny_vlm

from dmlr.config import Config, ConfigError
from dmlr.loop.optimize import example_generator, initial_latents
from dmlr.loop.reference import Reference, eager
from dmlr.methods import METHODS, Question
from dmlr.methods.latent import prefill_latent, question_noise
from dmlr.methods.self_consistency import equal_samples, loop_positions, vote, winner
from dmlr.model.decode import decode
from dmlr.model.encode import encode
from dmlr.prompts import Prompts, load_prompts

PROMPTS = Prompts()
QUESTIONS = [
    Question(0, "How many?", [noise_image(0, 112, 112)]),
    Question(
        "b", "Which of the two pictures has the larger {square}?", [noise_image(1, 56, 84), noise_image(2, 84, 84)]
    ),
    Question(2, "What is two plus two?", []),
    Question(
        3, "Is there a star?\nA. yes\nB. no", [noise_image(3, 56, 56)]
    ),  # four image tokens, fewer than ICoT inserts
]
BASE = {
    "num_thought_tokens": 3,
    "max_num_steps": 4,
    "lr": 0.02,
    "sigma": 0.05,
    "max_new_tokens": 9,
    "rationale_tokens": 12,
    "rationale_answer_tokens": 5,
    "scene_graph_tokens": 11,
}


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


class Literal:
    """One conversation turn of one question, with nothing cached."""

    def __init__(self, vlm, model, system, task, images):
        self.vlm, self.model = vlm, model
        pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        self.prompt = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{pictures}{task}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        self.inputs = vlm.processor(
            text=[self.prompt], images=images or None, return_tensors="pt", return_mm_token_type_ids=True
        )

    def generate(self, max_new_tokens):
        out = self.model.generate(**self.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, self.inputs["input_ids"].shape[1] :].tolist()

    def text(self, ids):
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def forward(self, tail):
        """Logits [V] and attention over the image tokens [N] of the last position of prompt + tail.

        `tail` holds token ids, and (p,) for a copy of image token p. Positions are counted by the model itself, over a
        sequence in which a text token stands in for each copy.
        """
        core, prompt = self.model.model, self.inputs["input_ids"][0]
        image_token = self.model.config.image_token_id
        stand_in = torch.tensor([0 if isinstance(item, tuple) else item for item in tail], dtype=torch.long)
        ids = torch.cat([prompt, stand_in])[None]
        grid = self.inputs.get("image_grid_thw")
        embeds = self.model.get_input_embeddings()(ids)[0].clone()
        if grid is not None:
            features = torch.cat(core.get_image_features(self.inputs["pixel_values"], grid).pooler_output)
            embeds[: len(prompt)][prompt == image_token] = features
        for at, item in enumerate(tail, start=len(prompt)):
            if isinstance(item, tuple):
                embeds[at] = features[item[0]]
        kinds = torch.cat([self.inputs["mm_token_type_ids"][0], torch.zeros_like(stand_in)])[None]
        positions, _ = core.get_rope_index(ids, image_grid_thw=grid, video_grid_thw=None, mm_token_type_ids=kinds)
        out = core.language_model(
            inputs_embeds=embeds[None], position_ids=positions, use_cache=False, output_attentions=True
        )
        attention = torch.stack(out.attentions)[:, 0, :, -1].mean(dim=(0, 1))  # [sequence]
        return self.model.lm_head(out.last_hidden_state[0, -1]), attention[: len(prompt)][prompt == image_token]


# methods in words


@pytest.mark.parametrize(
    ("method", "said", "lengths", "system", "solver"),
    [
        ("multimodal-cot", "rationale", (12, 5), PROMPTS.helper, 2),  # answers only, whatever the config's solver is
        ("ccot", "scene_graph", (11, 9), PROMPTS.system, 1),
    ],
)
def test_two_calls(vlm, method, said, lengths, system, solver):
    config, model = Config(**BASE, solver_prompt_idx=1), eager(vlm).model
    answers, ids = run(vlm, method, QUESTIONS, config)
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        ask = getattr(PROMPTS, said).replace("{question}", question.text)
        first = Literal(vlm, model, PROMPTS.helper, ask, question.images)
        told = first.generate(lengths[0])
        task = PROMPTS.solver[solver].replace("{question}", question.text)
        task = getattr(PROMPTS, f"{said}_answer").replace("{task}", task).replace(f"{{{said}}}", first.text(told))
        second = Literal(vlm, model, system, task, question.images)
        reply = second.generate(lengths[1])
        assert (answer.details[f"{said}_prompt"], answer.details[said]) == (first.prompt, first.text(told))
        assert (ids[row], ids[4 + row]) == (told, reply)
        assert (answer.prompt, answer.text) == (second.prompt, second.text(reply))
        assert answer.num_new_tokens == len(told) + len(reply)


def test_what_the_first_call_said_is_never_a_template(tmp_path):
    """Braces in a question or a model's text are text."""
    assert "{question} {task}" in PROMPTS.filled("rationale_answer", task="How many?", rationale="{question} {task}")
    assert "What is {rationale}?" in PROMPTS.filled("rationale_answer", task="What is {rationale}?", rationale="four")
    path = tmp_path / "prompts.yaml"
    path.write_text("scene_graph_answer: '{task}, by {scene_graph}'\n")
    assert load_prompts(path).filled("scene_graph_answer", task="Why?", scene_graph="[]") == "Why?, by []"
    path.write_text("rationale_answer: 'no {task}'\n")
    with pytest.raises(ValueError, match="rationale_answer template must contain {rationale} exactly once"):
        load_prompts(path)


@pytest.mark.parametrize(("every", "patches", "most"), [(2, 16, 3), (1, 3, 2)])
def test_icot(breaking, every, patches, most):
    config = Config(**BASE | {"max_new_tokens": 40}, icot_newlines=every, icot_patches=patches, icot_insertions=most)
    vlm, model = breaking, eager(breaking).model
    answers, ids = run(vlm, "icot", QUESTIONS, config)
    start, end = (vlm.tokenizer.convert_tokens_to_ids(t) for t in ("<|vision_start|>", "<|vision_end|>"))
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        turn = Literal(
            vlm, model, PROMPTS.system, PROMPTS.solver[0].replace("{question}", question.text), question.images
        )
        said, tail, insertions = [], [], []
        while len(said) < 40:
            logits, attention = turn.forward(tail)
            said.append(int(logits.argmax()))
            tail.append(said[-1])
            if said[-1] in vlm.eos_ids:
                break
            newlines = turn.text(said).count("\n")
            is_newline = turn.text(said[-1:]) == "\n"
            if is_newline and newlines % every == 0 and len(insertions) < most and question.images and len(said) < 40:
                _, attention = turn.forward(tail)  # of the newline itself
                best = sorted(range(len(attention)), key=lambda p: -attention[p])[:patches]
                insertions.append({"after_tokens": len(said), "patches": sorted(best)})
                tail += [start, *((p,) for p in sorted(best)), end]
        assert ids[row] == said and answer.prompt == turn.prompt and answer.text == turn.text(said)
        assert answer.details["insertions"] == insertions
    assert len({i["after_tokens"] for a in answers for i in a.details["insertions"]}) > 1, "too alike to prove much"
    assert [len(a.details["insertions"]) for a in answers].count(0) < 3


def test_icot_without_insertions_is_vanilla(breaking):
    config = Config(**BASE | {"max_new_tokens": 40}, icot_newlines=1, icot_insertions=0)
    assert run(breaking, "icot", QUESTIONS, config)[1] == run(breaking, "vanilla", QUESTIONS, config)[1]


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
    config, model = Config(**BASE, consistency_samples=3, consistency_temperature=0.8), eager(vlm).model
    answers, ids = run(vlm, "self-consistency", QUESTIONS, config)
    by_question = [[ids[row], *ids[4 + 2 * row : 6 + 2 * row]] for row in range(4)]  # first samples, then the others
    different = set()
    for question, answer, samples in zip(QUESTIONS, answers, by_question, strict=True):
        turn = Literal(
            vlm, model, PROMPTS.system, PROMPTS.solver[0].replace("{question}", question.text), question.images
        )
        for number, sample in enumerate(samples):
            generator = example_generator(42, question.idx, f"sample {number}")
            said = []
            for point in torch.rand(9, generator=generator).tolist():
                share = torch.softmax(turn.forward(said)[0].double() / 0.8, dim=0).tolist()
                token = 0
                while point >= share[token]:
                    point -= share[token]
                    token += 1
                said.append(token)
                if token in vlm.eos_ids:
                    break
            assert sample == said
            different.add(tuple(said))
        texts = [turn.text(sample) for sample in samples]
        assert answer.details["votes"] == [vote(text, question.text) for text in texts]
        assert answer.text == texts[winner(answer.details["votes"])] and answer.details["samples"] == 3
        assert answer.num_new_tokens == sum(map(len, samples)) and answer.prompt == turn.prompt
    assert len(different) > 8, "samples that are all alike prove little"


# methods in latents


def references(vlm, config, length):
    """Each question's reference, the latents it starts from, and its noise."""
    config = config.replace(num_thought_tokens=length)
    prefix, encoded = prefill_latent(vlm, QUESTIONS, config, PROMPTS)
    start, oracle = initial_latents(vlm, prefix, config), eager(vlm)
    for row, question in enumerate(QUESTIONS):
        yield question, Reference(oracle, encoded[row], config), start[row], question_noise(vlm, question, config)


def same_reasoning(answer, latents, patches, rewards):
    torch.testing.assert_close(answer.reasoning.latents, latents, atol=1e-4, rtol=0)
    assert answer.reasoning.patches == patches
    assert [step["reward"] for step in answer.reasoning.steps] == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("how", [{}, {"reward": "logprob", "accept_at": "candidate", "reward_position": "think_next"}])
def test_ltpo_is_the_loop_without_patches(vlm, how):
    """With its published budget, whatever DMLR's is."""
    answers, ids = run(vlm, "ltpo", QUESTIONS, Config(**BASE, **how))
    published = {"max_num_steps": 10, "lr": 0.03, "sigma": 0.1, "sigma_decay": 0.99}
    config = Config(**BASE | published, **how, initial_patch_count=0, patch_increment=0)
    for row, (question, reference, start, noise) in list(enumerate(references(vlm, config, 10)))[1:3]:
        trace = reference.run(start, noise)
        assert trace.best_patches == [[]] * 10 and len(noise) == 10
        same_reasoning(answers[row], trace.best_latents, trace.best_patches, [step.reward for step in trace.steps])
        assert ids[row] == reference.decode(trace.best_latents, trace.best_patches, 9)
        assert question.images or "note" not in answers[row].details


@pytest.mark.parametrize("how", [{}, {"initial_patch_count": None, "max_total_patches": None}])
def test_unoptimised(vlm, how):
    config = Config(**BASE, **how)
    answers, ids = run(vlm, "unoptimised", QUESTIONS, config)
    for row, (question, reference, start, _) in enumerate(references(vlm, config, 3)):
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
    for row, (question, reference, start, _) in enumerate(references(vlm, config, 3)):
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


def test_no_question_has_no_answer(vlm):
    assert METHODS["dmlr"](vlm, [], Config(**BASE)) == []


def test_one_image_may_stand_alone():
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
