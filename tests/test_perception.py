"""Notebook 05: its own functions against plain transformers and by hand, and what it says of the embedded model.

The functions stand in the notebook's cells; `defined` runs those cells with a tiny model around them.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from notebook_files import defined, external_requests
from tiny import noise_image, tiny_vlm
from torch.nn.utils.rnn import pad_sequence

from dmlr import notebooks
from dmlr.config import Config, root
from dmlr.data.boxes import touched
from dmlr.judge.choice import as_choice
from dmlr.judge.extract import parse_options, unbox
from dmlr.loop.reference import eager
from dmlr.methods.answers import Question
from dmlr.methods.prompting import prefill_task, prompts_of
from dmlr.model.encode import encode
from dmlr.show import plots

NOTEBOOK = root() / "notebooks" / "05_perception_and_confidence.ipynb"
CONFIG = Config(max_new_tokens=12, max_pixels=None, max_num_steps=2, verbose=0)
FORM, ENDS = "</think>\\boxed{{answer}}.", re.compile(r"[,.]\s")
PLACE = re.compile(r"(?:row (?P<row>\d+) ?)?(?:column (?P<column>\d+))?")


# the model's view of its own answer


def literally(vlm, question, ids):
    """Plain transformers with eager attention: log π of `ids` after the prompt; attention of their rows."""
    prompts = prompts_of(CONFIG)
    encoded = encode(vlm, prompts.system, prompts.task(question.text), question.images)
    options = {"return_tensors": "pt", "return_mm_token_type_ids": True}
    inputs = vlm.processor(text=[encoded.prompt], images=question.images, **options)
    said = torch.tensor([ids])
    for name, more in (("input_ids", said), ("attention_mask", said**0), ("mm_token_type_ids", said * 0)):
        inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        out = eager(vlm).model(**inputs, output_attentions=True)
    first = len(encoded.input_ids)
    log_probs = out.logits[0, first - 1 : -1].log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    attention = torch.stack(out.attentions).mean(dim=(0, 2))[0]  # [T, T]
    return log_probs, attention[first:, encoded.image_columns]


def test_teacher_forcing_is_plain_transformers():
    vlm = tiny_vlm()
    own = defined(NOTEBOOK, ["forced"], torch=torch, np=np, re=re, vlm=vlm)
    for i, (width, height) in enumerate([(112, 112), (84, 56)]):
        question = Question(i, "What is it?", [noise_image(i, width, height)])
        prefix, _ = prefill_task(vlm, [question], CONFIG, prompts_of(CONFIG))
        ids = list(range(5, 5 + 4**i * 3))
        (log_probs,), (attention,) = own.forced(prefix, ids)
        expected, weights = literally(vlm, question, ids)
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(attention, weights, atol=1e-5, rtol=0)
        (again,), _ = own.forced(prefix, ids)
        torch.testing.assert_close(again, log_probs, atol=1e-5, rtol=0)  # the prefix stays as it is
    ids, at, _ = own.coded("two  stars")
    visible = [a for a in at if a >= 0]
    assert visible[0] == 0 and {"two  stars"[a] for a in visible} <= set("twostars")
    assert vlm.tokenizer.decode(ids) == "two  stars"


# steps, boxes


def test_steps_are_cut_inside_the_reasoning_only():
    own = defined(NOTEBOOK, ["step_spans"], torch=torch, re=re, ends=ENDS, answer_form=FORM)
    text = "<think>stars at row 1, row 2, , 2 = 2.</think>\\boxed{2}."
    assert [text[a:b] for a, b in own.step_spans(text)] == ["stars at row 1, ", "row 2, , ", "2 = 2."]
    assert own.step_spans("<think></think>\\boxed{2}.") == []


def test_the_truth_is_read_behind_every_step_as_in_a_chain_of_its_own():
    vlm, question = tiny_vlm(), Question(0, "What is it?", [noise_image(0, 56, 56)])
    own = defined(NOTEBOOK, ["forced", "step_spans"], torch=torch, np=np, re=re, vlm=vlm, ends=ENDS, answer_form=FORM,
                  as_choice=as_choice, unbox=unbox, parse_options=parse_options, pad_sequence=pad_sequence)  # fmt: skip
    prefix, _ = prefill_task(vlm, [question], CONFIG, prompts_of(CONFIG))
    text = "<think>a star, two rings.</think>\\boxed{2}."
    example = SimpleNamespace(solution="\\boxed{2}", question=question.text)
    found = own.truth_log_probs(prefix, text, own.step_spans(text), example)
    for value, chain in zip(found, ("<think>", "<think>a star,", "<think>a star, two rings."), strict=True):
        (log_probs,), _ = own.forced(prefix, own.coded(chain + FORM.replace("{answer}", "2"))[0])
        assert value == pytest.approx(log_probs[-len("2}.") :].sum().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("step", "boxes", "told"),
    [
        ("star at row 1 column 2", [(10, 0, 20, 10)], True),
        ("star at row 2 column 2", [(10, 0, 20, 10)], False),
        ("star at row 1", [(10, 0, 20, 10)], True),
        ("star at row 1 column 2", [], False),
        ("star at row 1 column 2", None, None),
        ("so 2", [(10, 0, 20, 10)], None),
    ],
)
def test_a_step_is_grounded_when_its_places_hold_what_was_asked_about(step, boxes, told):
    own = defined(NOTEBOOK, ["grounded"], place=PLACE, board=6, found=[], pd=pd)
    assert own.grounded(step, boxes, (60, 60)) is told


def test_patches_that_a_box_touches_and_what_lies_on_them():
    one = SimpleNamespace(inside=touched([(10, 0, 20.5, 10)], (60, 40), (4, 6)))
    assert np.flatnonzero(one.inside).tolist() == [1, 2]
    own = defined(NOTEBOOK, ["on_image"], np=np, plots=plots, found=[])
    assert own.on_image(one, np.ones((3, 30)))[one.inside].sum() == pytest.approx(2 / 24)  # six tokens of another image


# the notebook on the embedded model


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    path = notebooks.run(NOTEBOOK, {"end_data_idx": 10, "max_num_steps": 3}, folder / "out.ipynb")
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.slow
def test_every_figure_is_there_with_its_words(report):
    text = " ".join(report.get_text().split())
    assert all(f"figure {form}" in text for form in ("2 A", "3 A", "10 A", "10 B")) and "figures 3 B and 4" in text
    assert len(report.find_all("img")) == 6
    assert all(len(image["alt"]) > 20 for image in report.find_all("img"))
    assert external_requests(str(report)) == []
    assert "30 questions were looked into, 0 were left out." in text
    assert "Dependency (blur, nats) is higher for new colour words than for function words: " in text
    assert "nan" not in text.lower().split()


@pytest.mark.slow
def test_shares_inside_the_boxes_are_told_as_measured(report):
    table = next(t for t in report.find_all("table") if "points inside the boxes" in t.get_text())
    head, first, *more = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]
    assert head == ["points inside the boxes", "all", "visual", "mathematics", "composition"] and len(more) == 5
    assert first[0] == "vanilla's answer − chance"
    low, high = map(float, re.search(r"\[(.*), (.*)\]", first[1]).groups())
    verdict = "is higher" if low > 0 else "is lower" if high < 0 else "cannot tell"
    told = next(p.get_text() for p in report.find_all("p") if p.get_text().startswith("The share inside the boxes"))
    assert verdict in told and first[1] in told


@pytest.mark.slow
def test_without_images_the_sections_say_so(tmp_path):
    rows = [{"prompt": f"How many circles, {n}?", "solution": "\\boxed{3}", "idx": n} for n in range(3)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    given = {"dataset": str(tmp_path / "text.json"), "max_num_steps": 1}
    page = notebooks.run(NOTEBOOK, given, tmp_path / "text.ipynb").read_text(encoding="utf-8")
    text = " ".join(BeautifulSoup(page, "html.parser").get_text().split())
    assert "there is nothing to perturb" in text and "No record has object boxes" in text
    assert "this section and the next are skipped" in text and "The mean gain of a step" in text
