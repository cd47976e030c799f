"""Parameters: an error before anything runs, or what the caller meant, in the type that is wanted; and the files of
them, for the models and the benchmarks of the paper."""

import json
import re
from pathlib import Path

import pytest
from notebook_files import cell_parameters, notebook

from dmlr import index as report_index
from dmlr import notebooks
from dmlr.cli import main
from dmlr.config import LOOP, PRESETS, Config, ConfigError, declared
from dmlr.data.benchmarks import BENCHMARKS
from dmlr.judge import judge
from dmlr.methods import METHODS
from dmlr.methods.controls import CONTROLS
from dmlr.methods.prompting import prompts_of
from dmlr.parameters import check_parameters, config_of, defaults, read_parameters
from dmlr.planning import PAPER_MODELS
from dmlr.run.evaluate import plan
from dmlr.stats import published

FOLDER = Path(__file__).parents[1] / "notebooks"
BENCHMARK, WALKTHROUGH = (FOLDER / f"{name}.ipynb" for name in ("03_benchmark", "01_walkthrough"))
PARAMS = FOLDER / "params"
MODELS, DATA = (
    {path.stem: read_parameters(path) for path in sorted((PARAMS / kind).glob("*.yaml"))}
    for kind in ("models", "benchmarks")
)
SUITES = [name for name in DATA if name.startswith("shapes-")]
# A file's name, and how the model is called in the paper's table; VLAA-Thinker's size is not told there.
ROWS = {name: name for name in ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-4b", "qwen3-vl-8b")}
ROWS |= {"r1-onevision-7b": "r1-onevision", "vlaa-thinker-3b": "vlaa-thinking", "vlaa-thinker-7b": "vlaa-thinking"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_thought_token": 3}, "unknown parameter 'num_thought_token' .did you mean 'num_thought_tokens'"),
        ({"sigma": "wide"}, "sigma = 'wide': expected float"),
        ({"num_thought_tokens": 0}, "num_thought_tokens = 0 is out of range"),
        ({"reward": "entropie"}, "did you mean 'entropy'"),
        ({"sigma": 0}, "sigma = 0 gives REINFORCE nothing to learn from"),
        ({"ltpo_sigma": 0}, "ltpo_sigma = 0 gives LTPO nothing to learn from"),
        ({"start_data_idx": 101}, "is before start_data_idx = 101"),  # against the notebook's own end_data_idx
    ],
)
def test_a_bad_parameter_is_an_error_before_anything_runs(tmp_path, capsys, given, message):
    arguments = [text for name, value in given.items() for text in ("-p", name, str(value))]
    assert main(["run", str(BENCHMARK), *arguments, "--output", str(tmp_path / "run" / "out.ipynb")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_parameters_arrive_in_their_types():
    given = {"resume": "true", "lr": "1e-4", "end_data_idx": "none", "seed": "7", "sigma": 1}
    checked = check_parameters(BENCHMARK, given)
    assert checked == {"resume": True, "lr": 1e-4, "end_data_idx": None, "seed": 7, "sigma": 1.0}
    assert [type(value) for value in checked.values()] == [bool, float, type(None), int, float]
    with pytest.raises(ConfigError, match="seed = True: expected int"):
        check_parameters(BENCHMARK, {"seed": True})


def test_a_notebooks_own_parameters_are_checked_too(tmp_path):
    path = notebook(tmp_path / "own.ipynb")
    assert check_parameters(path, {"rounds": "3", "label": "12"}) == {"rounds": 3, "label": "12"}
    with pytest.raises(ConfigError, match="rounds = 'many': expected int"):
        check_parameters(path, {"rounds": "many"})
    with pytest.raises(ConfigError, match="unknown parameter 'lable' .did you mean 'label'"):
        check_parameters(path, {"lable": "x"})


@pytest.mark.parametrize("content", [None, "- a\n- b\n", "sigma: [1, 2]\n", "sigma: 'open\n", "just words\n"])
def test_a_parameter_file_is_one_flat_mapping(tmp_path, capsys, content):
    path = tmp_path / "parameters.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["run", str(BENCHMARK), "-f", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_command_line_values_win_over_files_and_later_files_over_earlier(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(notebooks, "run", lambda path, given, output: seen.update(given))
    monkeypatch.setattr(report_index, "write_index", lambda: None)
    (tmp_path / "a.yaml").write_text("seed: 1\nlr: 0.1\nsigma: 3\n")
    (tmp_path / "b.yaml").write_text("seed: 2\nlr: 0.2\n")
    files = ["-f", str(tmp_path / "a.yaml"), "-f", str(tmp_path / "b.yaml")]
    assert main(["run", str(BENCHMARK), *files, "-p", "seed", "3"]) == 0
    assert seen == {"seed": "3", "lr": 0.2, "sigma": 3}


def test_paths_mean_what_they_mean_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("[]")
    given = {"dataset": "mine.json,data/shapes/visual.json", "output_dir": "out", "model_name_or_path": "Qwen/a-model"}
    assert check_parameters(BENCHMARK, given) == {
        "dataset": f"{tmp_path / 'mine.json'},data/shapes/visual.json",
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": "Qwen/a-model",
    }


@pytest.mark.parametrize(
    ("preset", "given", "line"),
    [
        ("paper", {}, "sigma is 5 times the start's RMS, a step 0.1 times sigma"),
        ("released", {}, "Warning: a step is 1e-05 of sigma: the latents hardly move"),
        ("search", {}, "sigma is 15 times the start's RMS, a step 5 times sigma"),
        ("paper", {"lr": 2}, "Warning: a step is 200 times sigma: it leaves"),
        ("paper", {"use_auto_grad": True}, ""),
        ("paper", {"sigma": 0, "max_num_steps": 0}, ""),
    ],
)
def test_scales_warn_where_nothing_moves_or_everything(preset, given, line):
    scales = Config.make(preset, **given).scales(rms=0.02)
    assert line in Config.scales_line(scales)
    assert ("Warning" in line) == (scales["warning"] is not None)


def test_relative_scales_are_multiples_of_rms_and_sigma_squared():
    config = Config(sigma_relative=15, lr_relative=5).absolute(0.02)
    assert (config.sigma, config.lr) == (pytest.approx(0.3), pytest.approx(0.45))
    assert Config.make("paper").absolute(0.02) == Config.make("paper")
    assert Config.make("search", sigma=0.3).absolute(0.02).sigma == 0.3, "what is given is what runs"


# the benchmark notebook, its parameter files and Config agree


def test_the_benchmarks_parameters_are_configs():
    values = defaults(BENCHMARK)
    assert [name for name in values if name != "preset"] == list(Config.model_fields)
    assert Config.of_cell(values) == Config.make("demo")
    assert {name for name in LOOP if values[name] is not None} == set(), "the loop's values stand in presets only"


@pytest.mark.parametrize("path", [BENCHMARK, WALKTHROUGH])
def test_help_and_types_of_parameters_are_configs(path):
    shared = {name: p for name, p in cell_parameters(path).items() if name in Config.model_fields}
    assert "model_name_or_path" in shared
    for name, parameter in shared.items():
        kind, within, _ = declared(name)
        described = f"{Config.model_fields[name].description}{within}"
        full = described.replace(">=", "≥").replace("<=", "≤").replace("=", "is")
        assert parameter["inferred_type_name"] == kind.removesuffix(" | None")
        said = parameter["help"].removesuffix(" …")
        if path == WALKTHROUGH:  # there none is the preset's, whatever it is elsewhere
            said = said.partition(";")[0].partition(" [")[0]
        assert all(part in full for part in re.split(r"; | (?=\[)", said)), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_left_at_none_and_nothing_else(preset):
    values = check_parameters(BENCHMARK, {"preset": preset, "sigma": "0.3", "max_pixels": "none"})
    assert config_of(BENCHMARK, values) == Config.make(preset, sigma=0.3)
    with pytest.raises(ConfigError, match="unknown preset 'papr' .did you mean 'paper'"):
        check_parameters(BENCHMARK, {"preset": "papr"})


# the files


@pytest.mark.parametrize("name", [*MODELS, *DATA])
def test_no_parameter_file_repeats_what_a_preset_says(name):
    given = (MODELS | DATA)[name]
    preset = dict(Config.make(given["preset"])) if "preset" in given else {}
    assert {n for n in LOOP & preset.keys() & given.keys() if preset[n] == given[n]} == set()


def test_there_is_a_file_for_every_model_and_every_benchmark_of_the_paper():
    assert MODELS.keys() == {*ROWS, "shapes-vl", "shapes-seek"}
    assert DATA.keys() == {*published.BENCHMARKS, *SUITES}
    assert {MODELS[name]["model_name_or_path"] for name in ROWS} == set(PAPER_MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_combination_is_a_configuration(model):
    for data in DATA.values():
        values = MODELS[model] | data
        config = Config.of_cell(values)
        values.pop("preset")
        assert {name: getattr(config, name) for name in values} == values, "written in the type it has"
    assert config_of(BENCHMARK, check_parameters(BENCHMARK, MODELS[model] | values)) == config


@pytest.mark.parametrize("model", ROWS)
def test_a_model_of_the_paper_has_the_papers_loop_and_its_rows_methods(model):
    values = MODELS[model]
    assert values["preset"] == "paper" and not LOOP & values.keys()
    assert Config.of_cell(values).max_new_tokens == 2048
    first, *others = values["methods"].split(",")
    assert first == "vanilla", "the baseline comes first"
    assert {first, *others} == {method for row, method, _ in published.TABLE_1 if row == ROWS[model]}


@pytest.mark.parametrize("name", ["r1-onevision-7b", "vlaa-thinker-3b", "vlaa-thinker-7b"])
def test_models_tuned_to_answer_in_tags_are_asked_for_tags(name):
    prompts = prompts_of(Config.of_cell(MODELS[name]))
    assert all(tag in prompts.system for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    for way in range(3):
        assert "boxed" not in prompts.task("Which?", way) and prompts.task("Which?", way).startswith("Which?")
    assert judge("<think> B looks right, but no. </think> <answer> C </answer>", "C").status == "correct"


@pytest.mark.parametrize("name", published.BENCHMARKS)
def test_a_benchmarks_file_is_what_its_command_writes(name, monkeypatch):
    """The command in the first lines, through the real parser: the path that it would write is the file's dataset."""
    command = re.search(
        r"^# Made by: python -m dmlr data (.+)$", (PARAMS / "benchmarks" / f"{name}.yaml").read_text(), re.MULTILINE
    )[1]
    asked = {}
    monkeypatch.setattr("dmlr.data.prepare.prepare", lambda name, out, **more: asked.update(name=name, out=out, **more))
    with pytest.raises(AttributeError):  # nothing was prepared
        main(["data", *command.split()])
    file = f"{name}.json" if asked["sample"] is None else f"{name}-{asked['sample']}-seed{asked['seed']}.json"
    values = DATA[name]
    assert asked["name"] == name and values["dataset"] == f"{asked['out']}/{name}/{file}"
    assert published.benchmark_of(values["dataset"]) == name
    rows = BENCHMARKS[name].rows or 5900  # MM-Math's are not counted
    asked_for = min(asked["sample"] or rows, values["end_data_idx"] or rows)
    assert asked_for <= 1000, "the paper has at most 1000 of a benchmark"
    assert asked_for == min(rows, 1000) or name == "hallusionbench"


def test_of_hallusionbench_the_rows_with_an_image_are_asked():
    assert BENCHMARKS["hallusionbench"].splits == ("image", "non_image"), "they come last"
    assert DATA["hallusionbench"]["end_data_idx"] == BENCHMARKS["hallusionbench"].rows - 178


def test_the_battery_asks_every_control_that_needs_no_truth():
    methods = read_parameters(PARAMS / "battery.yaml")["methods"].split(",")
    assert len(set(methods)) == len(methods) and set(methods) < set(METHODS)
    assert {"dmlr", "unoptimised", *CONTROLS} - set(methods) == {"true-patches", "oracle-latents"}


def test_the_embedded_suites_are_there():
    assert len(SUITES) == 4
    for name in SUITES:
        config = Config.make(None, **DATA[name])
        (job, _) = plan(config)
        assert len(job.examples) == len(json.loads((FOLDER.parent / config.dataset).read_text()))
