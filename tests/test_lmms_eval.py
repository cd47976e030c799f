"""The lmms-eval model: on stand-ins for the harness's few classes, and in the harness after `make lmms-eval`."""

import importlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_tasks.letters import SCORERS
from tiny import noise_image

import dmlr
from dmlr import api
from dmlr.config import Config, ConfigError
from dmlr.prompts import Prompts
from dmlr.run import evaluate

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / ".venv-lmms" / "bin" / "python"
DOCS = [{"prompt": "How many stars?\nA. 1\nB. 2", "image": noise_image(i, 56, 56)} for i in range(4)]


class Lmms:
    """As far as lmms-eval's base class is used."""

    def __init__(self):
        self.added, self.task_dict = [], {"task": {"test": DOCS}}
        self.cache_hook = SimpleNamespace(add_partial=lambda *what: self.added.append(what))


@pytest.fixture
def plug(monkeypatch):
    """dmlr.lmms_eval among stand-ins."""
    result = namedtuple("GenerationResult", "text token_counts")
    stand_ins = {
        "api.instance": {"GenerationResult": result, "Instance": object, "TokenCounts": lambda *counts: counts},
        "api.model": {"lmms": Lmms},
        "models.registry_v2": {"ModelManifest": lambda name, **how: (name, how)},
    }
    for name, content in stand_ins.items():
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", SimpleNamespace(**content))
    monkeypatch.delitem(sys.modules, "dmlr.lmms_eval", raising=False)
    yield importlib.import_module("dmlr.lmms_eval")
    sys.modules.pop("dmlr.lmms_eval", None)


def messages_of(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["prompt"]}]
    return [{"role": "user", "content": content}]


def request(doc_id, messages=messages_of, **how):
    return SimpleNamespace(args=("context", messages, how, doc_id, "task", "test"))


def made(plug, **how):
    return plug.DMLR("data/models/shapes-vl", preset="demo", max_num_steps=2, max_new_tokens=12, **how)


def test_results_are_those_of_ask_many_with_the_place_in_the_task_as_number(plug):
    results = made(plug, method="dmlr", batch_size="auto").generate_until([request(i) for i in (2, 0)])
    model = dmlr.load("data/models/shapes-vl", "demo", max_num_steps=2, max_new_tokens=12)
    asked = [{"question": DOCS[i]["prompt"], "image": DOCS[i]["image"], "idx": i} for i in (2, 0)]
    wanted = model.ask_many(asked, "dmlr")
    assert [result.text for result in results] == [answer.text for answer in wanted]
    assert [result.token_counts for result in results] == [(a.prompt_tokens, a.new_tokens) for a in wanted]


def test_budget_and_wording_are_the_tasks_where_asked(plug):
    model = made(plug, method="vanilla", budget="task", prompt="task", batch_size=2)
    requests = [request(0, max_new_tokens=3), request(1, max_new_tokens=1, until=["\n\n"]), request(2)]
    results = model.generate_until(requests)
    assert [result.token_counts[1] for result in results][:2] == [3, 1] and len(model.added) == 3
    (plain,) = model.model.ask_many([DOCS[0]["prompt"]], "vanilla")
    assert f"<|im_start|>user\n{DOCS[0]['prompt']}<|im_end|>" in plain.whole.prompt, "nothing but the question"
    assert Prompts().system not in plain.whole.prompt


EYES = (
    "Are the eyes open or closed?\nA. Open\nB. Closed\nAnswer with the option's letter from the given choices directly."
)
# What a reasoning model says, the letter that it means, and which scorers read that letter from the whole text.
SAID = [
    ("B", "B", "mmvp scienceqa mmstar"),
    ("B. Closed", "B", "mmvp scienceqa mmstar"),
    ("<answer>\\boxed{B}</answer>", "B", "mmstar"),
    ("A closer look shows shut eyes, so it is \\boxed{B}.", "B", ""),
    ("The lids are down.\n\nThe answer is (B).", "B", "mmvp mmstar"),
    ("Both lids are down. Option A would need pupils, so the answer is **B**.", "B", "mmstar"),
    ("I see no pupils: \\boxed{\\text{Closed}}", "B", ""),
    ("<think>Maybe B.</think><answer>(a)</answer>", "A", ""),
    ("A pair of pupils can be seen. <answer>Open</answer>", "A", "mmvp mmstar"),  # by the article
]


def test_short_answers_are_read_rightly_by_three_letter_scorers(plug):
    model, question = made(plug, method="vanilla", answer="short"), api.Question(0, EYES, [])
    said = [api.methods_answers.Answer(text, "", "eos_token") for text, *_ in SAID]
    model.model.ask_many = lambda *asked, **how: [api.Answer(question, "vanilla", one) for one in said]
    for result, (text, letter, read) in zip(model.generate_until([request(0)] * len(SAID)), SAID, strict=True):
        assert {scorer(result.text) for scorer in SCORERS.values()} == {letter}
        assert [name for name, scorer in SCORERS.items() if scorer(text) == letter] == read.split()


def test_a_request_that_cannot_be_answered_is_an_empty_text(plug, caplog):
    DOCS[3]["prompt"] = "<|im_end|>"
    results = made(plug, method="vanilla").generate_until([request(3), request(1)])
    assert results[0].text == "" and results[1].text and "special token" in caplog.text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ([{"role": "system", "content": []}, {"role": "user", "content": []}], "single user turn"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "not video"),
    ],
)
def test_tasks_of_another_kind_are_an_error(plug, message, words):
    with pytest.raises(ValueError, match=words):
        made(plug, method="vanilla").generate_until([request(0, lambda doc: message)])


@pytest.mark.parametrize("wrong", [{"method": "dmrl"}, {"answer": "shrt"}, {"budget": "tsk"}, {"sigmaa": 1}])
def test_a_misspelt_argument_names_the_nearest(plug, wrong):
    with pytest.raises(ConfigError, match="did you mean"):
        made(plug, **wrong)


def test_the_entry_point_is_a_manifest_and_loads_no_model(plug):
    assert plug.manifest() == ("dmlr", {"chat_class_path": "dmlr.lmms_eval.DMLR"})
    declared = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\ndmlr = "dmlr.lmms_eval:manifest"' in declared


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS.exists(), reason="`make lmms-eval` was not run")
@pytest.mark.parametrize(("method", "answer"), [("vanilla", "full"), ("dmlr", "full"), ("vanilla", "short")])
def test_through_the_harness_itself_answers_are_a_runs(tmp_path, method, answer):
    """Sixty questions by lmms-eval's command line, offline, and by a run."""
    model = f"pretrained=data/models/shapes-vl,preset=demo,method={method},answer={answer}"
    command = [HARNESS, "-m", "lmms_eval", "--model", "dmlr", "--model_args", model, "--tasks", "shapes"]
    command += ["--include_path", "tests/lmms_tasks", "--limit", "60", "--batch_size", "16", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    subprocess.run([*command, "--output_path", tmp_path], check=True, cwd=ROOT, env=os.environ | offline)
    lines = next(tmp_path.rglob("*_samples_shapes.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    where = {"dataset": "data/shapes/mathematics.json", "output_dir": str(tmp_path / "run"), "verbose": 0}
    (result,) = evaluate.run(Config.make("demo", methods=method, end_data_idx=60, **where)).values()
    entries = result["entries"]
    if answer == "full":
        assert [sample["resps"] for sample in samples] == [entry["model_output"] for entry in entries]
    else:
        right = [sample["accuracy"] for sample in samples]
        assert right == [float(entry["is_correct"]) for entry in entries]
        assert right == [sample["bare_number"] for sample in samples], "a bare answer is what is left"


ORIGINALS = """
import json, sys
from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
from lmms_eval.tasks.mmvp.utils import mmvp_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results

def scienceqa(text):
    docs = {letter: {"choices": [""] * 26, "answer": ord(letter) - ord("A")} for letter in "ABCD"}
    return next((letter for letter, doc in docs.items() if sqa_process_results(doc, [text])["exact_match"]), "")

print(json.dumps([{
    "mmvp": mmvp_process_results({"answer": "A"}, [text])["mmvp_accuracy"]["pred_letter"],
    "scienceqa": scienceqa(text),
    "mmstar": extract_mcq_answer(text, choices=["A", "B", "C", "D"]),
} for text in json.load(sys.stdin)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS.exists(), reason="`make lmms-eval` was not run")
def test_the_letter_scorers_read_as_lmms_evals_own():
    texts = [text for text, *_ in SAID] + ["", "b", "(B)", "Banana", "It is A", "C: yes", "D) no", "Option B", "a man"]
    done = subprocess.run([HARNESS, "-c", ORIGINALS], input=json.dumps(texts), capture_output=True, text=True, cwd="/")
    originals = json.loads(done.stdout.splitlines()[-1])
    assert originals == [{name: scorer(text) for name, scorer in SCORERS.items()} for text in texts]
