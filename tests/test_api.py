"""The package from Python: load, wrap, ask."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import noise_image, tiny_vlm

import dmlr
from dmlr.api import AT_LOAD, OF_A_RUN, identity
from dmlr.config import Config, ConfigError
from dmlr.methods import METHODS, Question

SMALL = {"preset": "demo", "max_num_steps": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return noise_image(0)


@pytest.fixture(scope="module")
def embedded():
    return dmlr.load("data/models/shapes-vl", **SMALL)


def test_a_question_in_five_lines(embedded, picture, tmp_path):
    picture.save(path := tmp_path / "board.png")
    answer = embedded.ask("How many stars are there?", path, method="dmlr", num_thought_tokens=3)
    assert answer.text and answer.new_tokens <= 8 and answer.seconds > 0
    assert len(answer.trace.steps) == 2 and len(answer.trace.patches) == 3
    assert json.loads(json.dumps(answer.to_dict()))["trace"]["best_reward"] == answer.trace.best_reward
    assert re.fullmatch(r"<Answer of dmlr: .+, reward -?[\d.]+ → -?[\d.]+>", repr(answer))
    assert answer._repr_html_().startswith("<img alt='kept patches and reward' src='data:image/png;base64,")


def test_images_come_in_any_form_and_answers_do_not_depend_on_company(embedded, picture, tmp_path):
    picture.save(path := tmp_path / "board.png")
    forms = [picture, path, str(path), path.read_bytes(), [picture]]
    together = embedded.ask_many([("How many stars are there?", form) for form in forms])
    alone = embedded.ask("How many stars are there?", picture)
    assert {answer.text for answer in together} == {alone.text}
    assert {tuple(map(tuple, answer.trace.patches)) for answer in together} == {tuple(map(tuple, alone.trace.patches))}
    assert embedded.ask("How many stars are there?", method="vanilla").trace is None


def test_an_answer_is_what_the_method_gives(embedded, picture):
    answer = embedded.ask("Is there a red ring?", picture, method="vanilla", idx=7)
    (expected,) = METHODS["vanilla"](embedded.vlm, [Question(7, "Is there a red ring?", [picture])], embedded.config)
    assert answer.text == expected.text
    assert answer.prompt_tokens == len(
        embedded.vlm.processor(text=[expected.prompt], images=[picture], return_tensors="pt")["input_ids"][0]
    )


def test_one_bad_question_costs_its_own_answer(embedded, picture):
    answers = embedded.ask_many([("How many?", "nowhere.png"), ("How many?", picture), "", {"question": 3}])
    assert [answer.error is None for answer in answers] == [False, True, False, False]
    assert repr(answers[0]).startswith("<Answer of dmlr: error: ImageError: nowhere.png")
    assert "nowhere.png" in answers[0].error
    with pytest.raises(ValueError, match="nowhere.png"):
        embedded.ask("How many?", "nowhere.png")
    assert embedded.ask_many([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.ask("?", dtype="float16"), "dtype is fixed when a model is loaded"),
        (lambda m: m.ask("?", dataset="x.json"), "dataset belongs to a run"),
        (lambda m: m.ask("?", sigmaa=1), "unknown parameter 'sigmaa' .did you mean 'sigma'"),
        (lambda m: m.ask("?", sigma=-1), "sigma = -1"),
        (lambda m: m.ask("?", method="DMLR"), "unknown method 'DMLR' .did you mean 'dmlr'"),
        (lambda m: m.ask_many([{"question": "?", "picture": 1}]), "unknown key of a question 'picture'"),
        (lambda m: dmlr.load("data/models/shapes-vl", num_workers=2), "num_workers belongs to a run"),
        (lambda m: dmlr.wrap(m.vlm.model, m.vlm.processor, device="cpu"), "device is a matter of loading"),
    ],
)
def test_what_is_asked_at_the_wrong_place_is_an_error(embedded, call, message):
    with pytest.raises(ConfigError, match=message):
        call(embedded)


def test_every_parameter_is_fixed_at_load_or_free_at_ask_or_a_runs():
    assert set(Config.model_fields) >= AT_LOAD | OF_A_RUN and not AT_LOAD & OF_A_RUN


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_wrapped_model_answers_alike_and_stays_as_it_was(picture, attention):
    vlm = tiny_vlm()
    expected = dmlr.api.Model(vlm, Config.make(**SMALL)).ask("How many?", picture)
    theirs = tiny_vlm().model.requires_grad_(True)
    theirs.set_attn_implementation(attention)
    wrapped = dmlr.wrap(theirs, vlm.processor, **SMALL)
    answer = wrapped.ask("How many?", picture)
    assert (answer.text, answer.trace.patches) == (expected.text, expected.trace.patches)
    assert theirs.config._attn_implementation == attention and all(p.requires_grad for p in theirs.parameters())
    mine, own = wrapped.vlm.model.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    assert mine.data_ptr() == own.data_ptr()


def test_noise_comes_from_text_and_pixels(picture):
    other = Image.eval(picture, lambda value: 255 - value)
    names = [identity("a", [picture]), identity("b", [picture]), identity("a", [other]), identity("a", [])]
    assert len(set(names)) == 4 and identity("a", [picture.copy()]) == names[0]


def test_the_import_is_light_and_leaves_no_trace():
    code = (
        "import os, random, sys, time; before = (random.getstate(), {**os.environ}); t = time.perf_counter();"
        "import dmlr;"
        "assert time.perf_counter() - t < 0.3; assert 'torch' not in sys.modules;"
        "assert random.getstate() == before[0];"
        "print({k: v for k, v in os.environ.items() if before[1].get(k) != v})"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "{'GOMP_SPINCOUNT': '10000'}"


def test_answers_leave_the_random_state_alone(embedded, picture):
    before = torch.get_rng_state()
    embedded.ask("How many?", picture)
    assert torch.equal(before, torch.get_rng_state())
