"""Teacher forcing against plain transformers, gains, boxes, intervals, geometry; notebook 05 on the embedded model."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from notebook_files import external_requests, filled, nbval
from PIL import Image
from tiny import noise_image, tiny_vlm

from dmlr import notebooks
from dmlr.config import Config, ConfigError, root
from dmlr.look import study
from dmlr.look.study import confidence, geometry, perception, prose, words
from dmlr.look.study import tables as study_tables
from dmlr.look.study.boxes import BoxError, boxes_of, centre, share_inside, share_kept, touched
from dmlr.look.study.words import Span
from dmlr.loop.reference import eager
from dmlr.methods.answers import Answer, Question
from dmlr.methods.latent import dmlr
from dmlr.methods.prompting import prefill_task, prompts_of
from dmlr.model.vlm import VLM
from dmlr.stats.bootstrap import Bootstrap, Estimate

NOTEBOOK = root() / "notebooks" / "05_perception_and_confidence.ipynb"
CONFIG = Config(max_new_tokens=12, max_pixels=None, max_num_steps=2, verbose=0)
FORM, ENDS = "</think>\\boxed{{answer}}.", re.compile(r"[,.]\s")
PLACE = re.compile(r"(?:row (?P<row>\d+) ?)?(?:column (?P<column>\d+))?")


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def questions():
    sizes = [(112, 112), (56, 112), (84, 56)]
    seen = [Question(i, "What is it" + "?" * 9 * i, [noise_image(i, *size)]) for i, size in enumerate(sizes)]
    return [*seen, Question(3, "And without an image?", [])]


@pytest.fixture(scope="module")
def chains(vlm, questions):
    prefix, encoded = prefill_task(vlm, questions, CONFIG, prompts_of(CONFIG))
    return perception.answered(vlm, prefix, questions, [e.patch_grid for e in encoded], CONFIG)


# the model's view of its own answer


def literally(vlm, question, ids):
    """Plain transformers with eager attention: log π of `ids` after the prompt; attention of the rows before them."""
    prompts = prompts_of(CONFIG)
    encoded = vlm.encode(prompts.system, prompts.task(question.text), question.images)
    inputs = vlm.processor(
        text=[encoded.prompt],
        images=question.images or None,
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    said = torch.tensor([ids])
    for name, more in (("input_ids", said), ("attention_mask", said**0), ("mm_token_type_ids", said * 0)):
        inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        out = eager(vlm).model(**inputs, output_attentions=True)
    first = len(encoded.input_ids)
    log_probs = out.logits[0, first - 1 : -1].log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    attention = torch.stack(out.attentions).mean(dim=(0, 2))[0]  # [T, T]
    return log_probs, attention[first - 1 : -1, encoded.image_columns]


@pytest.mark.parametrize("chunk", [64, 3])
def test_teacher_forcing_is_plain_transformers(vlm, questions, monkeypatch, chunk):
    """Rows of different prompts and answers in one batch, read in one piece and in several."""
    monkeypatch.setattr(perception, "CHUNK", chunk)
    ids = [vlm.tokenizer(text)["input_ids"] for text in ("red", "a blue ring", "at row 2, no", "so it is 3")]
    prefix, _ = prefill_task(vlm, questions, CONFIG, prompts_of(CONFIG))
    before = prefix.logits.clone(), prefix.cache.length
    log_probs, attention = perception.forced(vlm, prefix, ids, with_attention=True)
    assert torch.equal(prefix.logits, before[0]) and prefix.cache.length == before[1]
    for question, one, found, seen in zip(questions, ids, log_probs, attention, strict=True):
        expected, weights = literally(vlm, question, one)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert torch.isnan(seen[0]).all() and len(seen) == len(one)
        torch.testing.assert_close(seen[1:, : weights.shape[1]], weights[1:], atol=1e-6, rtol=1e-4)


def test_a_chain_is_vanillas_answer(vlm, questions, chains):
    from dmlr.methods import METHODS

    said = METHODS["vanilla"](vlm, questions, CONFIG)
    assert [chain.text for chain in chains] == [answer.text for answer in said]
    for chain in chains:
        assert len(chain.log_probs) == len(chain.ids) == len(chain.ends) == len(chain.attention)
        assert chain.ends == sorted(chain.ends) and (not chain.ends or chain.ends[-1] <= len(chain.text))


def test_dependency_is_the_difference_that_the_image_makes(vlm, questions, chains, monkeypatch):
    found = perception.with_dependency(vlm, questions, chains, CONFIG, ("blank", "noise"))
    for question, chain in zip(questions[:3], found, strict=False):
        changed = perception.perturb_all(question, "blank", CONFIG.seed)
        expected, _ = literally(vlm, Question(question.idx, question.text, changed), chain.ids)
        torch.testing.assert_close(chain.dependency("blank"), chain.log_probs - expected, atol=5e-5, rtol=1e-3)
    assert max(float(chain.dependency("blank").abs().max()) for chain in found[:3]) > 0.01
    assert found[3].perturbed == {}, "a question without an image has nothing to perturb"
    monkeypatch.setattr(perception, "perturb", lambda image, kind, generator: image)
    for chain in perception.with_dependency(vlm, questions, chains, CONFIG, ("blur",))[:3]:
        torch.testing.assert_close(chain.dependency("blur"), torch.zeros(len(chain.ids)), atol=2e-5, rtol=0)


def test_perturbations_keep_the_size_and_come_from_seed_and_idx():
    question = Question("a", "?", [noise_image(0, 84, 112)])
    for kind in perception.PERTURBATIONS:
        (once,), (again,) = (perception.perturb_all(question, kind, 1) for _ in range(2))
        assert once.size == question.images[0].size and once.tobytes() == again.tobytes()
        assert once.tobytes() != question.images[0].tobytes()
    (blank,) = perception.perturb_all(question, "blank", 1)
    assert len(blank.getcolors()) == 1
    noises = {perception.perturb_all(Question(idx, "?", question.images), "noise", seed)[0].tobytes()
              for idx in ("a", "b") for seed in (1, 2)}  # fmt: skip
    assert len(noises) == 4
    with pytest.raises(ConfigError, match="did you mean 'blur'"):
        perception.with_dependency(None, [question], [], CONFIG, ("blurr",))


def test_attention_after_latents_reads_behind_think_tokens_and_patches(vlm, questions):
    answers = dmlr(vlm, questions, CONFIG)
    together = perception.attention_after(vlm, questions, answers, CONFIG)
    assert any(patch for answer in answers for patch in answer.reasoning.patches)
    for n in range(4):
        (alone,) = perception.attention_after(vlm, [questions[n]], [answers[n]], CONFIG)
        torch.testing.assert_close(together[n], alone, atol=1e-6, rtol=1e-4, equal_nan=True)
        assert alone.shape == (
            len(vlm.tokenizer(answers[n].text)["input_ids"]),
            len(answers[n].reasoning.attention[0, 0]),
        )
    failed = Answer("", "", "error", error="x")
    assert perception.attention_after(vlm, questions[:1], [failed], CONFIG) == [None]


# gains


def test_the_truths_probability_after_every_step_is_read_literally(vlm, questions, chains):
    """Each moment of each chain by itself: prompt, the reasoning so far, the form with the true answer."""
    texts = ["<think>one, two, three.", "<think>red. ", "", "<think>It is at row 2, column 3. So 4, not 5."]
    told = [perception.replace(chain, text=text) for chain, text in zip(chains, texts, strict=True)]
    truths = ["3", "yes", "A", "14"]
    prefix, _ = prefill_task(vlm, questions, CONFIG, prompts_of(CONFIG))
    found = confidence.answer_log_probs(vlm, prefix, told, truths, FORM, ENDS)
    assert [len(row) for row in found] == [4, 2, 1, 5]
    closed = {truth: vlm.tokenizer(truth + "}.")["input_ids"] for truth in truths}  # what is scored
    for question, text, truth, row in zip(questions, texts, truths, found, strict=True):
        spans = confidence.step_spans(text, FORM, ENDS)
        # a blank between two steps goes with the second
        so_far = ["<think>" if text else "", *(text[: span.end].rstrip() for span in spans[:-1])]
        so_far += [text[: span.end] for span in spans[-1:]]
        for said, score in zip(so_far, row, strict=True):
            ids = vlm.tokenizer(said + FORM.replace("{answer}", truth))["input_ids"]
            expected, _ = literally(vlm, question, ids)
            assert score == pytest.approx(float(expected[-len(closed[truth]) :].sum()), abs=1e-3)
    assert confidence.gains([-3.0, -1.0, -2.5]) == [2.0, -1.5]


def test_without_a_truth_there_is_no_gain(vlm, questions, chains):
    prefix, _ = prefill_task(vlm, questions, CONFIG, prompts_of(CONFIG))
    found = confidence.answer_log_probs(vlm, prefix, chains, ["", "3", "", "3"], FORM, ENDS)
    assert [bool(row) for row in found] == [False, True, False, True]


@pytest.mark.parametrize(
    ("solution", "question", "truth"),
    [
        ("\\boxed{Yes}", "Is it?", "Yes"),
        ("C. circle", "Which?\nOptions:\nA. a\nB. b\nC. circle", "C"),
        ("\\boxed{12}", "How many?", "12"),
        ("orange", "What colour?", "orange"),
    ],
)
def test_the_truth_is_written_as_a_model_would(solution, question, truth):
    assert confidence.truth_text(solution, question) == truth


def test_an_answer_form_needs_its_place():
    with pytest.raises(ConfigError, match="exactly once"):
        confidence.parts("\\boxed{}")


@pytest.mark.parametrize(
    ("step", "boxes", "told"),
    [
        ("star at row 6 column 5:", [(116, 145, 128, 157)], True),
        ("star at row 6 column 4:", [(116, 145, 128, 157)], False),
        ("red cross: column 3,", [(93, 6, 109, 22), (64, 59, 80, 75)], True),
        ("row 1 column 4, row 1 column 1", [(93, 6, 109, 22)], False),  # one of its places is wrong
        ("green star at row 3 column 4.", [], False),  # what was asked about is not there
        ("green star at row 3 column 4.", None, None),  # the record does not say
        ("no green star.", [], None),
        ("4 > 3.", [(93, 6, 109, 22)], None),
    ],
)
def test_a_step_is_grounded_when_its_places_hold_what_was_asked_about(step, boxes, told):
    assert confidence.grounded(step, PLACE, 6, boxes, (168, 168)) is told


# words and steps


def test_tokens_end_where_their_text_does(vlm):
    text = "né 3 → rót, ok"
    ids = vlm.tokenizer(text)["input_ids"]  # one token per byte
    ends = words.token_ends(vlm.tokenizer, ids)
    assert ends[-1] == len(text) and len(ends) == len(text.encode())
    spans = words.words(text)
    assert [text[a:b] for a, b in spans] == ["né", "3", "→", "rót", ",", "ok"]
    owner = words.places(text, ends, spans)
    said = [
        b"".join(bytes([b]) for b, at in zip(text.encode(), owner, strict=True) if at == n) for n in range(len(spans))
    ]
    assert [some.decode(errors="ignore").strip() for some in said][1] == "3"
    assert owner[0] == 0 and owner[-1] == 5


def test_steps_are_cut_inside_the_reasoning_only():
    text = "<think>a at row 1, b: 2. </think><answer>\\boxed{2, 3}</answer>"
    within = words.rationale(text, "</think><answer>\\boxed{")
    assert text[within.start : within.end] == "a at row 1, b: 2. "
    spans = words.steps(text, within, re.compile(r"[,:.]\s"))
    assert [text[a:b] for a, b in spans] == ["a at row 1, ", "b: ", "2. "]
    assert words.rationale("It is 3, so \\boxed{3}", "</think>") == Span(0, 12)
    assert words.steps("<think></think>", words.rationale("<think></think>"), re.compile(",")) == []
    assert words.steps("a. ... b", Span(0, 8), re.compile(r"\.\s")) == [Span(0, 7), Span(7, 8)]


@pytest.mark.parametrize("name", ["shapes", "english"])
def test_word_classes_of_the_files(name):
    classes = words.read_classes(f"notebooks/params/words/{name}.yaml")
    text = "Red at column 4: 3"
    kinds = [words.class_of(text, word, classes) for word in words.words(text)]
    assert (
        kinds
        == {
            "shapes": ["colour", "function", "function", "place", "other", "count"],
            "english": ["colour", "function", "other", "number", "other", "number"],
        }[name]
    )


@pytest.mark.parametrize("content", ["- a\n", "colour: [red]\n", "colour: '(red'\n", ""])
def test_word_classes_say_what_is_wrong(tmp_path, content):
    path = tmp_path / "classes.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="classes.yaml"):
        words.read_classes(path)


def test_a_repeated_word_is_known_in_the_plural_too():
    assert words.vocabulary("How many Crosses and rings?") >= {"cross", "ring", "how"}
    assert words.singular("cross") == "cross" and words.singular("Class") == "class"


# boxes


def test_patches_that_a_box_touches():
    grid, size = (3, 4), (80, 60)  # patches of 20 × 20
    assert touched([(21, 1, 39, 19)], size, grid).nonzero()[0].tolist() == [1]
    assert touched([(15, 15, 25, 25)], size, grid).nonzero()[0].tolist() == [0, 1, 4, 5]
    assert touched([(20, 20, 40, 40)], size, grid).nonzero()[0].tolist() == [5]  # edges touch nothing
    assert touched([(-50, -50, 500, 500)], size, grid).all() and not touched([], size, grid).any()
    assert centre((15, 41, 25, 59), size, grid) == (2, 1)


def test_attention_alike_everywhere_is_chance():
    inside = touched([(0, 0, 40, 20)], (80, 60), (3, 4))
    assert share_inside(np.full((2, 5, 12), 0.03), inside) == pytest.approx(inside.mean())
    weights = np.zeros((2, 12))
    weights[0, 0], weights[1, 11] = 0.3, 0.1  # a row with more attention counts for more
    assert share_inside(weights, inside) == pytest.approx(0.75)
    assert np.isnan(share_inside(np.zeros((2, 12)), inside))
    assert share_kept([[0, 5], [1], []], inside) == pytest.approx(2 / 3)
    assert np.isnan(share_kept([[], []], inside))


def test_boxes_of_a_record():
    assert boxes_of({}) is None and boxes_of({"boxes": []}) == []
    assert boxes_of({"boxes": [[1, 2, 3, 4]]}) == [(1.0, 2.0, 3.0, 4.0)]
    for bad in ("1,2,3,4", [[1, 2, 3]], [[3, 2, 1, 4]], [["a", 2, 3, 4]], [[1, 2, float("nan"), 4]], [5], 7):
        with pytest.raises(BoxError, match="boxes: expected"):
            boxes_of({"boxes": bad})


# intervals


def test_whole_clusters_are_resampled():
    rng = np.random.default_rng(0)
    by_cluster = rng.normal(size=60)
    table = pd.DataFrame({"q": np.repeat(np.arange(60), 20), "x": np.repeat(by_cluster, 20)})
    found = Bootstrap(table, "q").mean("x")
    error = by_cluster.std() / np.sqrt(60)  # as if each cluster were one value, since its values are equal
    assert found.value == pytest.approx(by_cluster.mean()) and (found.n, found.clusters) == (1200, 60)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    alone = Bootstrap(table.assign(q=range(1200)), "q").mean("x")
    assert (alone.high - alone.low) < 0.35 * (found.high - found.low)


def test_differences_are_paired_and_repeatable():
    rng = np.random.default_rng(1)
    base = rng.normal(scale=5, size=40)
    table = pd.DataFrame(
        {"q": np.tile(np.arange(40), 2), "x": np.r_[base + 0.5, base], "new": [True] * 40 + [False] * 40}
    )
    boot = Bootstrap(table, "q", seed=3)
    gap = boot.difference("x", table["new"], ~table["new"])
    assert gap.value == pytest.approx(0.5) and gap.low == pytest.approx(0.5) and gap.sign == 1
    assert Bootstrap(table, "q", seed=3).mean("x") == boot.mean("x") != Bootstrap(table, "q", seed=4).mean("x")
    rows = boot.by("x", ["new"])
    assert rows["value"].tolist() == pytest.approx([base.mean() + 0.5, base.mean()])


def test_too_few_clusters_have_no_interval():
    table = pd.DataFrame({"q": [1, 1, 2, 3], "x": [1.0, 2.0, np.nan, 4.0]})
    found = Bootstrap(table, "q").mean("x")
    assert found.value == pytest.approx(7 / 3) and np.isnan(found.low) and (found.n, found.clusters) == (3, 2)
    assert np.isnan(Bootstrap(table, "q").mean("x", table["q"] == 9).value)
    assert np.isnan(Bootstrap(table.iloc[:0], "q").mean("x").value)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.1, 0.3, "is higher for a than for b"),
        (-0.3, -0.1, "is lower for a than for b"),
        (-0.1, 0.3, "cannot tell"),
        (np.nan, np.nan, "too little"),
    ],
)
def test_sentences_are_decided_by_the_interval(low, high, told):
    assert told in prose.compared("a", "b", "It", Estimate(0.1, low, high, 9, 9))


def test_texts_are_escaped():
    attack = "<script>alert(1)</script>"
    page = prose.shaded([{"title": attack, "note": attack, "pieces": [(attack, 1.0), (attack, None)]}], 2.0, attack)
    assert "<script" not in page + prose.bullets([attack]) and page.count("&lt;script&gt;") == 5


# a dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed")
    noise_image(0).save(path / "a.png")
    (path / "broken.png").write_bytes(b"no picture")
    rows = [
        {"prompt": "How many?", "solution": "\\boxed{3}", "image_path": "a.png", "boxes": [[1, 1, 20, 20]]},
        {"prompt": "No image?", "solution": "\\boxed{3}", "image_path": None},
        {"prompt": "Broken?", "solution": "\\boxed{3}", "image_path": "broken.png"},
        {"prompt": "Bad boxes?", "solution": "\\boxed{3}", "image_path": "a.png", "boxes": [[9, 9, 1, 1]]},
        {"prompt": "No boxes?", "solution": "\\boxed{3}", "image_path": "a.png"},
        {"prompt": "<|im_end|>?", "solution": "\\boxed{3}", "image_path": "a.png"},
        {"prompt": "No truth?", "solution": "", "image_path": "a.png"},
    ]
    (path / "mixed.json").write_text(json.dumps([{**row, "idx": n} for n, row in enumerate(rows)]))
    return path


def test_one_records_failure_costs_no_other(vlm, folder):
    rules = study.Rules(FORM, ENDS, ("blank",))
    found, lost = study.study(vlm, CONFIG.replace(dataset=str(folder / "mixed.json"), batch_size=4), rules)
    assert [one.example.idx for one in found] == [0, 1, 4]
    reasons = {row: reason for _, row, reason in lost}
    assert set(reasons) == {2, 3, 5, 6}
    assert "left < right" in reasons[3] and "special token" in reasons[5] and "no_ground_truth" in reasons[6]
    said = study_tables.word_table(found, {})
    assert set(said["question"]) <= {"mixed 0", "mixed 4"}
    assert study_tables.share_table(found)["question"].tolist() == ["mixed 0"]
    for one in found:  # a word's dependency is the sum over its tokens: nothing is lost or counted twice
        if one.chain.perturbed:
            own = said.loc[said["question"] == one.key, "blank"].sum() if len(said) else 0.0
            dependency = one.chain.dependency("blank").numpy()
            owner = words.places(one.chain.text, one.chain.ends, words.words(one.chain.text))
            mine = [at is not None for at in owner]
            assert own == pytest.approx(float(dependency[mine].sum()), abs=1e-4)


def test_what_is_studied_does_not_depend_on_the_batch(vlm, folder):
    rules = study.Rules(FORM, ENDS, ("noise",))
    config = CONFIG.replace(dataset=str(folder / "mixed.json"))
    one, many = (study.study(vlm, config.replace(batch_size=size), rules)[0] for size in (1, 7))
    for a, b in zip(one, many, strict=True):
        assert a.chain.text == b.chain.text and a.latent.text == b.latent.text
        np.testing.assert_allclose(a.chain.truth, b.chain.truth, atol=1e-4)
        if a.chain.perturbed:
            torch.testing.assert_close(a.chain.perturbed["noise"], b.chain.perturbed["noise"], atol=1e-4, rtol=1e-4)


# geometry


def test_think_tokens_among_text_and_image(vlm, questions):
    answers = dmlr(vlm, questions, CONFIG.replace(lr=0.05))
    found = geometry.collect(vlm, questions, answers, CONFIG, batch_size=3)
    start = vlm.embed(torch.tensor(vlm.think_id)).numpy()
    assert (found.points[found.kind == geometry.START] == start).all()
    latents = torch.cat([answer.reasoning.latents for answer in answers]).numpy()
    np.testing.assert_allclose(found.points[found.kind == geometry.END], latents, rtol=1e-6)
    assert (found.question[found.kind == geometry.IMAGE] == 0).sum() == np.prod(answers[0].reasoning.patch_grid)
    near = geometry.neighbours(found)
    assert set(near["question"]) == {0, 1, 2}, "no image, no row"
    assert (near.loc[near["moment"] == geometry.START, "moved"] == 0).all()
    moved = near.loc[(near["moment"] == geometry.END) & (near["question"] == 0), "moved"]
    expected = np.linalg.norm(answers[0].reasoning.latents.numpy() - start, axis=1) / np.linalg.norm(start)
    np.testing.assert_allclose(moved, expected, rtol=1e-4)
    sample = found.sample(10, seed=0)
    assert (sample.kind == geometry.START).sum() == 1 and (sample.kind == geometry.TEXT).sum() == 10
    flat, variance = geometry.by_pca(sample)
    assert len(flat) == len(geometry.by_tsne(sample)) == len(sample.points) and 0 < variance.sum() <= 1


# the embedded model


@pytest.fixture(scope="module")
def embedded():
    """120 of the embedded questions, DMLR without an iteration."""
    names = ("visual", "mathematics", "composition")
    dataset = ",".join(f"data/shapes/{name}.json" for name in names)
    config = Config.make("demo", dataset=dataset, end_data_idx=40, batch_size=40, max_num_steps=0, verbose=0)
    form = "</think><answer>\\boxed{{answer}}</answer>"
    found, lost = study.study(VLM.load(config), config, study.Rules(form, re.compile(r"[,.:;]\s"), ("noise", "blank")))
    assert len(found) == 120 and not lost
    return found


def test_colour_words_need_the_image_more_than_function_words(embedded):
    table = study_tables.word_table(embedded, words.read_classes("notebooks/params/words/shapes.yaml"))
    boot = Bootstrap(table, "question")
    colour, function = table["kind"] == "colour", table["kind"] == "function"
    for kind in ("noise", "blank"):
        everywhere = boot.difference(kind, colour, function)
        new = boot.difference(kind, colour & ~table["asked"], function)
        assert everywhere.sign == new.sign == 1
        assert new.value > everywhere.value, "a colour that the question names can be said without looking"
        assert boot.mean(kind, table["kind"] == "markup").value == pytest.approx(0, abs=0.01)


def test_steps_of_right_chains_lead_to_the_truth_and_those_of_wrong_ones_away(embedded):
    table = study_tables.step_table(embedded, PLACE, 6, 0.01)
    right = table["right"].astype(bool)
    boot = Bootstrap(table, "question")
    assert boot.mean("gain", right).sign == 1 and boot.mean("gain", ~right).sign == -1
    assert boot.difference("gain", right, ~right).sign == 1
    ends = table.groupby("question").agg(after=("after", "last"), right=("right", "last"))
    assert (ends.loc[ends["right"], "after"] > np.log(0.5)).mean() > 0.95, (
        "after a right chain the truth is most probable"
    )
    assert (ends.loc[~ends["right"], "after"] < np.log(0.5)).mean() > 0.7
    judged = table[table["grounded"].notna()]
    assert len(judged) > 200 and 0.9 < judged["grounded"].mean() < 1


def test_vanilla_attends_to_what_is_asked_about(embedded):
    table = study_tables.share_table(embedded)
    assert len(table) == sum(bool(one.boxes) for one in embedded)
    table["gap"] = table["vanilla answer"] - table["chance"]
    assert Bootstrap(table, "question").mean("gap").sign == 1
    over = study_tables.share_over_iterations(embedded)
    assert set(over["iteration"]) == {0} and len(over) == len(table)
    np.testing.assert_allclose(over["share"], table["think tokens, start"])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    given = {"end_data_idx": 10, "max_num_steps": 3, "geometry_examples": 12}
    path = notebooks.run(NOTEBOOK, given, folder / "out.ipynb")
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_every_figure_is_there_with_its_words(report):
    captions = " ".join(caption.get_text() for caption in report.find_all("figcaption"))
    assert all(f"figure {form}" in captions for form in ("2 A", "3 A", "10 A", "10 B", "10 C"))
    assert len(report.find_all("figure")) >= 12
    assert all(len(image["alt"]) > 20 for image in report.find_all("img"))
    assert external_requests(str(report)) == []
    text = " ".join(report.get_text().split())
    assert "30 questions were looked into, 0 were left out." in text
    for kind in ("noise", "blur", "blank"):  # of so few questions an interval may include zero, and then it is said
        told = rf"Dependency \({kind}\)( is higher for|,) colour words (than for|against) function words: \+[\d.]+ nats"
        assert re.search(told, text), kind
    assert "nan" not in text.lower().split()


def test_shares_inside_the_boxes_are_told_as_measured(report):
    table = next(t for t in report.find_all("table") if "points inside the boxes" in t.get_text())
    head = [cell.get_text() for cell in table.find_all("th")]
    assert head == ["points inside the boxes", "all", "visual", "mathematics", "composition"]
    cells = [[cell.get_text() for cell in row.find_all("td")] for row in table.find_all("tr")[1:]]
    rows = {name: numbers for name, *numbers in cells}
    items = [item.get_text() for item in report.find_all("li")]
    told = [item for item in items if item.startswith("The share inside the boxes") and "points" in item]
    assert len(rows) == 6 and len(told) == 5
    value, low, high = map(float, re.findall(r"[-+][\d.]+", rows["vanilla's answer − chance"][0]))
    assert low < value < high
    verdict = "is higher" if low > 0 else "is lower" if high < 0 else "cannot tell"
    assert verdict in told[0] and f"{value:+.3g} points" in told[0]


def plain_dataset(path, image):
    rows = [
        {"prompt": f"How many circles, {n}?", "solution": "\\boxed{3}", "idx": n, "image_path": image} for n in range(3)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def test_without_images_the_sections_say_so(tmp_path):
    given = {"dataset": plain_dataset(tmp_path / "text.json", None), "max_num_steps": 1}
    page = notebooks.run(NOTEBOOK, given, tmp_path / "text.ipynb").read_text(encoding="utf-8")
    text = " ".join(BeautifulSoup(page, "html.parser").get_text().split())
    for sentence in (
        "there is nothing to perturb",
        "there is no geometry to show",
        "No record has object boxes",
        "this section and the next are skipped",
    ):
        assert sentence in text, sentence
    assert "The mean gain of a step" in text


def test_nbval_of_it_without_boxes(tmp_path):
    Image.new("RGB", (168, 168), "white").save(tmp_path / "white.png")
    small = {"dataset": plain_dataset(tmp_path / "plain.json", "white.png"), "max_num_steps": 1, "geometry_examples": 4}
    path, cells = filled(NOTEBOOK, small, tmp_path)
    result = nbval(path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{cells} passed" in result.stdout
