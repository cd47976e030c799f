"""Parameter files: each parses, each name exists, each value is in range; models and data are those of the paper."""

import json
import re
from pathlib import Path

import pytest

from dmlr.cli import main
from dmlr.config import LOOP, Config
from dmlr.data.benchmarks import BENCHMARKS
from dmlr.judge import judge
from dmlr.methods import METHODS
from dmlr.methods.controls import CONTROLS
from dmlr.methods.prompting import prompts_of
from dmlr.parameters import check_parameters, config_of, read_parameters
from dmlr.planning import PAPER_MODELS
from dmlr.run.evaluate import plan
from dmlr.stats import published

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_benchmark.ipynb"
PARAMS = NOTEBOOK.parent / "params"
MODELS = {path.stem: path for path in sorted((PARAMS / "models").glob("*.yaml"))}
DATA = {path.stem: path for path in sorted((PARAMS / "benchmarks").glob("*.yaml"))}
SUITES = [name for name in DATA if name.startswith("shapes-")]
# A file's name, and how the model is called in the paper's table; VLAA-Thinker's size is not told there.
ROWS = {name: name for name in ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-4b", "qwen3-vl-8b")}
ROWS |= {"r1-onevision-7b": "r1-onevision", "vlaa-thinker-3b": "vlaa-thinking", "vlaa-thinker-7b": "vlaa-thinking"}


def test_there_is_a_file_for_every_model_and_every_benchmark_of_the_paper():
    assert MODELS.keys() == {*ROWS, "shapes-vl", "shapes-seek"}
    assert DATA.keys() == {*published.BENCHMARKS, *SUITES}
    assert {read_parameters(MODELS[name])["model_name_or_path"] for name in ROWS} == set(PAPER_MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_combination_is_a_configuration(model):
    for data in DATA.values():
        values = read_parameters(MODELS[model]) | read_parameters(data)
        config = Config.of_cell(values)
        values.pop("preset")
        assert {name: getattr(config, name) for name in values} == values, "written in the type it has"
    values = read_parameters(MODELS[model]) | values
    assert config_of(NOTEBOOK, check_parameters(NOTEBOOK, values)) == config


@pytest.mark.parametrize("model", ROWS)
def test_a_model_of_the_paper_has_the_papers_loop_and_its_rows_methods(model):
    values = read_parameters(MODELS[model])
    assert values["preset"] == "paper" and not LOOP & values.keys()
    assert Config.of_cell(values).max_new_tokens == 2048
    rows = {method for row, method, _ in published.TABLE_1 if row == ROWS[model]}
    assert set(values["methods"].split(",")) == rows
    assert values["methods"].startswith("vanilla,"), "the baseline comes first"


@pytest.mark.parametrize("name", ["r1-onevision-7b", "vlaa-thinker-3b", "vlaa-thinker-7b"])
def test_models_tuned_to_answer_in_tags_are_asked_for_tags(name):
    config = Config.of_cell(read_parameters(MODELS[name]))
    prompts = prompts_of(config)
    assert all(tag in prompts.system for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    for way in range(3):
        assert "boxed" not in prompts.task("Which?", way) and prompts.task("Which?", way).startswith("Which?")
    assert judge("<think> B looks right, but no. </think> <answer> C </answer>", "C").status == "correct"


@pytest.mark.parametrize("name", published.BENCHMARKS)
def test_a_benchmarks_file_is_what_its_command_writes(name, monkeypatch):
    """The command in the first lines, through the real parser: the path that it would write is the file's dataset."""
    command = re.search(r"^# Made by: python -m dmlr data (.+)$", DATA[name].read_text(), re.MULTILINE)[1]
    asked = {}
    monkeypatch.setattr("dmlr.data.prepare.prepare", lambda name, out, **more: asked.update(name=name, out=out, **more))
    with pytest.raises(AttributeError):  # nothing was prepared
        main(["data", *command.split()])
    file = f"{name}.json" if asked["sample"] is None else f"{name}-{asked['sample']}-seed{asked['seed']}.json"
    values = read_parameters(DATA[name])
    assert asked["name"] == name and values["dataset"] == f"{asked['out']}/{name}/{file}"
    assert published.benchmark_of(values["dataset"]) == name
    rows = BENCHMARKS[name].rows or 5900  # MM-Math's are not counted
    asked_for = min(asked["sample"] or rows, values["end_data_idx"] or rows)
    assert asked_for <= 1000, "the paper has at most 1000 of a benchmark"
    assert asked_for == min(rows, 1000) or name == "hallusionbench"


def test_of_hallusionbench_the_rows_with_an_image_are_asked():
    assert BENCHMARKS["hallusionbench"].splits == ("image", "non_image"), "they come last"
    assert read_parameters(DATA["hallusionbench"])["end_data_idx"] == BENCHMARKS["hallusionbench"].rows - 178


def test_the_battery_asks_every_control_that_needs_no_truth():
    methods = read_parameters(PARAMS / "battery.yaml")["methods"].split(",")
    assert len(set(methods)) == len(methods) and set(methods) < set(METHODS)
    assert {"dmlr", "unoptimised", *CONTROLS} - set(methods) == {"true-patches", "oracle-latents"}


def test_the_embedded_suites_are_there():
    assert len(SUITES) == 4
    for name in SUITES:
        config = Config.make(None, **read_parameters(DATA[name]))
        (job, _) = plan(config)
        assert len(job.examples) == len(json.loads((PARAMS.parents[1] / config.dataset).read_text()))
