"""The walkthrough: what it shows of a moment is what the loop did there, and a what-if is the loop asked again.

The widgets are driven here without a browser; tests/test_browser.py drives them in one.
"""

import math
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from notebook_files import external_requests
from PIL import Image
from tiny import noise_image, tiny_vlm

from dmlr import notebooks
from dmlr.config import Config
from dmlr.data.examples import Example, load_dataset, open_image
from dmlr.loop.injection import Patches
from dmlr.loop.optimize import initial_latents
from dmlr.methods import METHODS
from dmlr.methods.answers import Answer
from dmlr.methods.latent import append_latents, prefill_latent
from dmlr.methods.prompting import decode, prompts_of
from dmlr.model.vlm import VLM
from dmlr.show import figures
from dmlr.show.style import table
from notebooks.walkthrough import view, widgets
from notebooks.walkthrough.walk import Moment, explore
from notebooks.walkthrough.what_if import Change, try_changes, usual_changes

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_walkthrough.ipynb"
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def walk():
    """The embedded model's, through a question whose answer changes on the way."""
    config, example = Config.make("demo", device="cpu"), load_dataset("data/shapes/mathematics.json")[0][2]
    return explore(VLM.load(config), config, example, [open_image(example.image)], top=config.top_k)


@pytest.fixture(scope="module")
def outcomes(walk):
    return try_changes(walk, usual_changes(walk))


@pytest.fixture(scope="module")
def tiny():
    return tiny_vlm()


def briefly(tiny, images=(), **more):
    """The tiny model's walk through a question of one's own."""
    brief = {"device": "cpu", "dtype": "float32", "max_num_steps": 2, "max_new_tokens": 6, "top_k": 5}
    return explore(tiny, Config.make("demo", **brief | more), Example(0, 0, "what?", ""), images)


def said(walk, latents, patches):
    """The answer after these latents [L, D] and patches, decoded alone from a prompt of its own."""
    prefix, _ = prefill_latent(walk.vlm, [walk.question], walk.config, prompts_of(walk.config))
    append_latents(walk.vlm, prefix, latents[None], Patches.of([patches], latents.device))
    return decode(walk.vlm, prefix, walk.config)[0].text


# moments


def test_moments_are_what_the_loop_did(walk):
    trace, (start,) = walk.trace, initial_latents(walk.vlm, walk.prefix, walk.config)
    did = [(trace.start_reward, False, [[]] * 4, start, trace.start_attention)]
    for step in trace.steps:
        tried = step.tried
        did.append((step.reward, bool(step.accepted), tried.patches.tolist()[0], tried.latents[0], step.attention))
    assert [m.iteration for m in walk.moments] == list(range(11))
    for moment, (reward, accepted, patches, latents, attention) in zip(walk.moments, did, strict=True):
        assert (moment.reward, moment.accepted) == (pytest.approx(reward.item()), accepted)
        assert moment.patches == patches
        assert torch.equal(moment.latents, latents) and torch.equal(moment.attention, attention[0, :, :36])


def test_an_answer_is_decoded_from_its_moments_own_state(walk):
    assert len({m.answer for m in walk.moments}) > 1  # else the next lines could not tell states apart
    for moment in walk.moments[::5]:
        assert moment.answer == said(walk, moment.latents, moment.patches)


def test_the_next_tokens_shown_are_those_that_the_reward_reads(walk):
    for moment in walk.moments:  # equations 6 and 7, by hand
        entropies = [-sum(p * math.log(p) for _, p in tokens) for tokens in moment.next_tokens]
        assert [len(tokens) for tokens in moment.next_tokens] == [walk.config.top_k] * 4
        assert moment.reward == pytest.approx(1 - sum(entropies) / 4, abs=1e-4)


def test_verdicts_need_a_truth(walk, tiny):
    assert [walk.is_right(Answer(rf"\boxed{{{n}}}", "", "eos_token")) for n in (1, 2)] == [True, False]
    assert walk.is_right(Answer("", "", "error")) is None
    assert {m.is_right for m in briefly(tiny).moments} == {None}


KINDS = [
    (0, {}),
    (2, {}),
    (1, {"max_num_steps": 0}),
    (1, {"use_auto_grad": True}),
    (1, {"accept_at": "candidate", "num_samples": 2, "reward_position": "think_next"}),
    (1, {"disable_best_reward": True}),
    (1, {"reward_threshold": 0.001, "reward": "logprob"}),
]


@pytest.mark.parametrize(("images", "settings"), KINDS)
def test_any_number_of_images_and_every_kind_of_loop_can_be_walked_through(tiny, images, settings):
    shown = briefly(tiny, [noise_image(i, 112, 84) for i in range(images)], **settings)
    (answer,) = METHODS["dmlr"](tiny, [shown.question], shown.config)
    assert shown.dmlr.text == answer.text
    assert [m.attention.shape[1] for m in shown.moments] == [12 * images] * (1 + len(shown.trace.steps))
    assert try_changes(shown, usual_changes(shown))[0].answer == shown.dmlr.text
    heats = [view.heat(shown.moments[-1], token) for token in (None, 0, 1, 2, 3)]
    assert len(figures.strip((shown.question.images or [None])[0], shown.grid, heats).axes) == 8
    assert view.caption(shown.moments[-1], shown.grid)


def test_as_many_states_go_together_as_fit(tiny, monkeypatch):
    def states():
        shown = briefly(tiny, [noise_image(0)])
        return [*shown.moments, *try_changes(shown, usual_changes(shown))]

    together = states()
    monkeypatch.setattr(type(tiny), "fitting_batch", lambda *_: 2)
    for one, other in zip(states(), together, strict=True):
        assert (one.answer, one.reward) == (other.answer, pytest.approx(other.reward, abs=1e-5))
        ours, theirs = ([p for tokens in state.next_tokens for _, p in tokens] for state in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_reward_that_is_no_number_is_said_and_shown(tiny):
    explorer = widgets.Explorer(briefly(tiny, [noise_image(0)], sigma=1e38, lr=1e38))
    explorer.slider.value = 2
    assert "Iteration 2" in explorer.picture.value
    assert "not a finite number" in explorer.answers.value and explorer.walk.dmlr.error


# what if


def test_the_usual_changes_are_all_of_them(walk, outcomes):
    kept = [(token, patch) for token, patches in enumerate(walk.dmlr.reasoning.patches) for patch in patches]
    changes = [o.change for o in outcomes]
    assert kept
    assert len(set(changes)) == len(changes) == 1 + len(kept) + 1 + 4 + 3
    assert {pair for change in changes for pair in change.drop} == set(kept)
    assert len({o.answer for o in outcomes}) > 1  # on this question something changes


def test_a_dropped_patch_is_left_out_of_what_is_decoded(walk, outcomes):
    kept = walk.dmlr.reasoning.patches
    for outcome in [o for o in outcomes if o.change.drop][::3]:
        left = [[p for p in patches if (t, p) not in outcome.change.drop] for t, patches in enumerate(kept)]
        assert outcome.patches == left != kept
        assert outcome.answer == said(walk, walk.trace.final.latents[0], left)


def test_a_frozen_token_stays_at_the_start_and_the_others_move(tiny):
    moving = briefly(tiny, [noise_image(0)], disable_best_reward=True)  # whatever was accepted, latents moved
    start = initial_latents(tiny, moving.prefix, moving.config)[0]
    (outcome,) = try_changes(moving, [Change(freeze=frozenset([1, 2]))])
    assert (outcome.latents != start).any(dim=1).tolist() == [True, False, False, True]


def test_another_seed_is_the_method_with_another_seed(walk, outcomes):
    outcome = outcomes[-1]
    assert outcome.change.seed == walk.config.seed + 3
    (answer,) = METHODS["dmlr"](walk.vlm, [walk.question], walk.config.replace(seed=outcome.change.seed))
    assert (outcome.answer, outcome.patches) == (answer.text, answer.reasoning.patches)
    assert outcome.reward == pytest.approx(answer.reasoning.best_reward, abs=1e-5)


def test_the_exact_gradient_has_no_noise_to_change(tiny):
    exact = briefly(tiny, use_auto_grad=True)
    with pytest.raises(ValueError, match="uses no noise"):
        try_changes(exact, [Change(seed=1)])


# what is shown


def made_up(iteration=1, answer="yes", accepted=True):
    state = {"reward": 0.5, "patches": [[5], [2, 6]], "next_tokens": [], "latents": None, "is_right": None}
    attention = torch.arange(2 * 7).view(2, 7) / 100
    return Moment(**state, answer=answer, iteration=iteration, accepted=accepted, sigma=0.1, attention=attention)


def test_a_caption_says_what_the_picture_shows():
    assert view.caption(made_up(), (2, 3)) == (
        "Iteration 1, kept: reward 0.50000. Attention of all think tokens (mean). Patches: "
        "think token 1 at row 2, column 3, think token 2 at row 1, column 3 and image token 6."
    )
    assert "think token 1 at" not in view.caption(made_up(), (2, 3), token=1)
    assert "tried and dropped again" in view.caption(made_up(accepted=False), (2, 3))


def test_moments_to_print_hold_the_turns_and_the_best():
    moments = [made_up(t, "no" if t == 13 else "yes", t == 4) for t in range(21)]
    shown = [m.iteration for m in view.chosen(moments)]
    assert {0, 4, 13, 14, 20} <= set(shown) and shown == sorted(shown) and len(shown) == 8
    assert view.chosen(moments[:1]) == moments[:1]


def test_tables_hold_what_was_decoded(walk, outcomes):
    table = view.moments_table(walk)
    assert list(table["answer"]) == [f"{view.final(m.answer)} {'✓' if m.is_right else '✗'}" for m in walk.moments]
    assert [float(r) for r in table["reward"]] == pytest.approx([m.reward for m in walk.moments], abs=1e-4)
    changed = view.outcomes_table(walk, outcomes)
    assert changed["what if"].iloc[0] == "as it is"
    told = [view.final(o.answer) != view.final(walk.dmlr.text) for o in outcomes]
    assert [bool(text) for text in changed["changed"]] == told and any(told)
    answers = view.answers_table(walk)
    assert {answer[:-2] for answer in answers["answer"]} == {m.answer for m in walk.moments}
    assert sorted(int(i) for text in answers["iterations"] for i in text.split(", ")) == list(range(11))


def test_changes_in_words():
    one = Change(drop=frozenset([(1, 5)]), freeze=frozenset([0]), seed=7)
    words = "without think token 2's patch at row 2, column 3; think token 1 frozen; seed 7"
    changes = {Change(): "as it is", one: words, Change(drop=frozenset([(0, 1), (1, 5)])): "without 2 patches"}
    assert [view.describe(change, (2, 3)) for change in changes] == list(changes.values())


def test_next_tokens_are_text_with_bars():
    html = view.next_tokens_html([[(ATTACK, 0.5)], [("a b", 0.25)]])
    assert external_requests(html) == []
    assert ATTACK in BeautifulSoup(html, "html.parser").get_text().replace("␣", " ")
    assert "50.0%" in html and "25.0%" in html
    assert "a␣b" in html and "a␣b" not in view.next_tokens_html([[(ATTACK, 0.5)], [("a b", 0.25)]], token=0)


@pytest.mark.parametrize(("token", "least", "outlined"), [(None, 0.035, 2), (1, 0.07, 1)])
def test_the_figure_marks_its_iteration_and_darkens_what_is_not_attended_to(token, least, outlined):
    """By one think token's attention or the mean of all; of the three patches one lies beyond the grid."""
    image, grid, heat = Image.new("RGB", (60, 40), "white"), (2, 3), view.heat(made_up(), token)
    fig = figures.moment(image, grid, heat, [(0.1, False), (0.4, True), (0.2, False)], 2)
    left, right = fig.axes
    attention = least + np.arange(6).reshape(grid) / 100
    assert np.allclose(left.images[-1].get_array()[..., 3], 0.5 * (1 - attention / attention.max()), atol=1e-6)
    assert len(left.patches) == outlined
    best, kept, dropped, _, ring = right.lines
    assert list(best.get_ydata()) == [0.1, 0.4, 0.4]
    assert np.isnan(kept.get_ydata()).tolist() == [False, False, True]  # filled: the start, and what was kept
    assert (dropped.get_xdata(), dropped.get_markerfacecolor()) == ([2], "white")
    assert (ring.get_xdata(), ring.get_ydata()) == ([2], [0.2])


# the widgets, without a browser


def uploaded(name, content):
    """What a FileUpload holds after one file."""
    about = {"name": name, "type": "image/png", "size": len(content), "last_modified": datetime.now(timezone.utc)}
    return ({**about, "content": memoryview(content)},)


@pytest.fixture(scope="module")
def small(tiny):
    return briefly(tiny, [noise_image(0)], disable_best_reward=True)  # so that patches are kept, whatever is accepted


@pytest.fixture
def explorer(small):
    return widgets.Explorer(small, [Example(0, idx, f"what {idx}?", "", (noise_image(idx),)) for idx in range(2)])


def test_the_slider_moves_everything_together(explorer, small):
    seen = []
    for moment in small.moments:
        explorer.slider.value = moment.iteration
        seen.append((explorer.picture.value, explorer.tokens.value))
        assert view.caption(moment, small.grid) in explorer.picture.value
        assert explorer.answers.value == table(view.answers(small, moment))
        assert f"from iteration {moment.iteration}" in explorer.answers.value
    assert len(set(seen)) == 3


def test_a_what_if_is_added_to_its_table(explorer, small):
    explorer.drop.value = tuple(value for _, value in explorer.drop.options)
    explorer.wonder.click()
    explorer.drop.value, explorer.seed.value = (), small.config.seed + 1
    explorer.wonder.click()
    assert [o.change.seed for o in explorer.tried] == [small.config.seed + 1, None]
    assert explorer.tried[1].patches == [[]] * 4 and explorer.outcomes.value.count("<tr>") == 3


def test_another_example_resets_everything(explorer):
    explorer.slider.value, explorer.token.value, explorer.freeze.value = 2, 1, (0,)
    explorer.wonder.click()
    assert "think token 1 frozen" in explorer.outcomes.value
    explorer.example.value = 1
    assert explorer.walk.example.question == "what 1?" and "what 1?" in explorer.status.value
    assert (explorer.slider.value, explorer.token.value, explorer.outcomes.value) == (0, widgets.ALL, "")
    assert "Iteration 0, the start" in explorer.picture.value


def test_ones_own_image_and_question(explorer, tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    explorer.upload.value = uploaded("red.png", (tmp_path / "red.png").read_bytes())
    explorer.question.value = f"What is there? {ATTACK}"
    explorer.ask.click()
    asked = explorer.walk.question
    assert (asked.text, asked.images[0].size) == (f"What is there? {ATTACK}", (90, 60))
    assert "<script" not in explorer.status.value
    assert not {"✓", "✗"} & set(explorer.answers.value)  # nobody said what is right
    explorer.example.value, explorer.question.value = 1, "What else is there?"
    shown = explorer.walk.question.images
    explorer.ask.click()
    assert explorer.walk.question.images == shown  # of the example, not the upload of before


def test_what_goes_wrong_is_said_in_the_status_line(explorer, small):
    explorer.wonder.click()
    assert "choose patches to leave out" in explorer.status.value
    for question, complaint in {"": "type a question first", "what <|im_end|>?": "special token"}.items():
        explorer.question.value = question
        explorer.ask.click()
        assert complaint in explorer.status.value
    explorer.upload.value, explorer.question.value = uploaded("bad.png", b"no image"), "What is there?"
    explorer.ask.click()
    assert "bad.png: not an image" in explorer.status.value
    assert explorer.walk is small  # what was shown stays


# the notebook


@pytest.mark.slow
def test_a_report_of_ones_own_question_is_static_and_whole(tmp_path):
    image = next((NOTEBOOK.parents[1] / "data" / "shapes" / "images").glob("*.png"))
    given = {"question": f"How many circles are there? {ATTACK}", "image": str(image), "truth": "3", "max_num_steps": 3}
    report = notebooks.run(NOTEBOOK, given, tmp_path / "walk.ipynb")
    page = report.read_text(encoding="utf-8")
    soup = BeautifulSoup(page, "html.parser")
    assert external_requests(page) == [] and ATTACK in soup.get_text()
    leftovers = ("IProgress", "widget-view", "VBox(", "HBox(", "Dropdown(", "  0%|", "Warning")
    assert not [leftover for leftover in leftovers if leftover in page]
    assert len(soup.find_all("img")) == len(soup.select(".caption")) == 6
    assert all(image["alt"] for image in soup.find_all("img"))
    iterations, whatifs = (
        soup.find(id=name).find_next("table").find("tbody").find_all("tr")
        for name in ("Every-state,-and-the-answer-from-it", "What-if")
    )
    assert len(iterations) == 4 and len(whatifs) >= 1 + 4 + 3
    assert "as `optimize` has them" in soup.get_text() and "lead to another answer" in soup.get_text()
