"""Notebook 05: its own functions against plain transformers and by hand, and what it says of the embedded model.

The functions stand in the notebook's cells; `defined` runs those cells with a tiny model around them.
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from notebook_files import defined, external_requests
from tiny import noise_image, tiny_vlm

from dmlr import notebooks
from dmlr.config import Config, root
from dmlr.data.boxes import touched
from dmlr.loop.reference import eager
from dmlr.methods.answers import Question
from dmlr.methods.prompting import prefill_task, prompts_of
from dmlr.model.encode import encode

NOTEBOOK = root() / "notebooks" / "05_perception_and_confidence.ipynb"
CONFIG = Config(max_new_tokens=12, max_pixels=None, max_num_steps=2, verbose=0)
FORM, ENDS = "</think>\\boxed{{answer}}.", re.compile(r"[,.]\s")
PLACE = re.compile(r"(?:row (?P<row>\d+) ?)?(?:column (?P<column>\d+))?")


# the model's view of its own answer


def literally(vlm, question, ids):
    """Plain transformers with eager attention: log π of `ids` after the prompt; attention of the rows before them."""
    prompts = prompts_of(CONFIG)
    encoded = encode(vlm, prompts.system, prompts.task(question.text), question.images)
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


def test_teacher_forcing_is_plain_transformers():
    vlm = tiny_vlm()
    forced = defined(NOTEBOOK, ["forced"], torch=torch, vlm=vlm).forced
    sizes = [(112, 112), (56, 112), (84, 56)]
    questions = [Question(i, "What is it" + "?" * 9 * i, [noise_image(i, *size)]) for i, size in enumerate(sizes)]
    prefix, _ = prefill_task(vlm, questions, CONFIG, prompts_of(CONFIG))
    ids = [list(range(5, 5 + 4 * n)) for n in (1, 3, 20)]  # the last is longer than what is read at once
    log_probs, attention = forced(prefix, ids, with_attention=True)
    for question, one, found, seen in zip(questions, ids, log_probs, attention, strict=True):
        expected, weights = literally(vlm, question, one)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(seen[1:, : weights.shape[1]], weights[1:], atol=1e-5, rtol=0)
    again, _ = forced(prefix, ids)
    torch.testing.assert_close(torch.cat(again), torch.cat(log_probs), atol=1e-5, rtol=0)  # the prefix stays as it is


# words, steps, boxes


def pieces(text, spans):
    return [text[a:b] for a, b in spans]


def test_steps_are_cut_inside_the_reasoning_only():
    own = defined(NOTEBOOK, ["step_spans"], re=re, NamedTuple=NamedTuple, ends=ENDS, answer_form=FORM)
    text = "<think>stars at row 1, row 2, , 2 = 2.</think>\\boxed{2}."
    assert pieces(text, own.step_spans(text)) == ["stars at row 1, ", "row 2, , ", "2 = 2."]
    assert own.step_spans("<think></think>\\boxed{2}.") == []
    words = pieces("it's 2 red_ stars", own.word_spans("it's 2 red_ stars"))
    assert words == ["it", "'", "s", "2", "red", "_", "stars"]
    ends = [2, 4, 9, 12]  # tokens "it", "'s", " 2 re", "d_ "
    assert own.places("it's 2 red_ stars", ends, own.word_spans("it's 2 red_ stars")) == [0, 1, 3, 4]


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
    own = defined(NOTEBOOK, ["grounded"], place=PLACE, board=6)
    assert own.grounded(step, boxes, (60, 60)) is told


def test_patches_that_a_box_touches_and_what_lies_on_them():
    inside = touched([(10, 0, 20.5, 10)], (60, 40), (4, 6))
    assert np.flatnonzero(inside).tolist() == [1, 2]
    shares = defined(NOTEBOOK, ["share_inside"], np=np, math=math, boxed=[])
    assert shares.share_inside(np.ones((3, 24)), inside) == pytest.approx(2 / 24)
    assert shares.share_kept([[1, 9], [2]], inside) == pytest.approx(2 / 3)
    assert math.isnan(shares.share_kept([[], []], inside))


# the notebook on the embedded model


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perception")
    given = {"end_data_idx": 10, "max_num_steps": 3, "geometry_examples": 12}
    path = notebooks.run(NOTEBOOK, given, folder / "out.ipynb")
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.slow
def test_every_figure_is_there_with_its_words(report):
    captions = " ".join(caption.get_text() for caption in report.select(".caption"))
    assert all(f"figure {form}" in captions for form in ("2 A", "3 A", "10 A", "10 B", "10 C"))
    assert len(report.find_all("img")) >= 11
    assert all(len(image["alt"]) > 20 for image in report.find_all("img"))
    assert external_requests(str(report)) == []
    for code in report.select("details.code"):
        code.decompose()
    text = " ".join(report.get_text().split())
    assert "30 questions were looked into, 0 were left out." in text
    for kind in ("noise", "blur", "blank"):  # of so few questions an interval may include zero, and then it is said
        told = rf"Dependency \({kind}\)( is higher for|,) colour words (than for|against) function words: \+[\d.]+ nats"
        assert re.search(told, text), kind
    assert "nan" not in text.lower().split()


@pytest.mark.slow
def test_shares_inside_the_boxes_are_told_as_measured(report):
    table = next(t for t in report.find_all("table") if "points inside the boxes" in t.get_text())
    head = [cell.get_text() for cell in table.find_all("th")]
    assert head == ["points inside the boxes", "all", "visual", "mathematics", "composition"]
    cells = [[cell.get_text() for cell in row.find_all("td")] for row in table.find_all("tr")[1:]]
    rows = {name: numbers for name, *numbers in cells}
    items = [item.get_text() for item in report.find_all("p")]
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


@pytest.mark.slow
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
