"""Plans without weights, and Table 1 in one command: what is finished is skipped, what fails stops nothing else."""

import json
import re

import pytest
from saved_run import save_dataset

from dmlr import table1
from dmlr.cli import main
from dmlr.config import Config, ConfigError
from dmlr.model.loading import load_checkpoint
from dmlr.parameters import check_parameters, config_of
from dmlr.planning import as_text, earlier_pace, plan, settings_pace, time_of
from dmlr.run.evaluate import run
from dmlr.run.records import ResultsError, read_results
from dmlr.show.provenance import in_words

FAST = ["-p", "end_data_idx", "6", "-p", "max_num_steps", "2", "-p", "max_new_tokens", "48", "-p", "verbose", "0"]
NOTEBOOK = "notebooks/03_benchmark.ipynb"


@pytest.fixture
def no_model(monkeypatch):
    """Any attempt to load weights, or to call somebody, is an error."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a plan loads no weights and calls nobody")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(Exception, match="loads no weights"):
        load_checkpoint(Config())


def fast(tmp_path, **more):
    values = {"end_data_idx": 6, "max_num_steps": 2, "max_new_tokens": 48, "verbose": 0, "batch_size": 4}
    return Config.make("demo", **{**values, "output_dir": str(tmp_path / "run"), **more})


# plans


def test_a_plan_tells_what_is_finished_what_is_left_and_how_long_it_takes(tmp_path, no_model, capsys):
    asked = ["-p", "output_dir", str(tmp_path / "run"), "-p", "methods", "vanilla,dmlr,self-consistency"]
    assert main(["run", NOTEBOOK, "--dry-run", *asked, "-p", "end_data_idx", "20", "-p", "batch_size", "4"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"mathematics +dmlr +20 +0 +0 +20 ", told)
    assert "0.00408 billion parameters; settings from folder" in told
    assert re.search(r"batch +4\n", told) and str(tmp_path / "run") in told
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_a_run_left_and_takes_its_time_from_there(tmp_path, monkeypatch):
    config = fast(tmp_path)
    run(config)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    more = plan(config.replace(resume=True, end_data_idx=10))
    assert [(job.finished, job.todo) for job in more.jobs] == [(6, 4)] * 2 and not more.complete
    for job in more.jobs:
        speed = read_results(job.job.folder)["efficiency"]["examples_per_second"]
        assert job.pace.seconds == pytest.approx(1 / speed) and job.pace.source == "an earlier run"
    assert time_of([more, more]) == in_words(2 * sum(4 * job.pace.seconds for job in more.jobs))
    assert plan(config.replace(resume=True)).complete
    afresh = plan(config)
    assert [(job.finished, job.todo) for job in afresh.jobs] == [(0, 6)] * 2
    assert "an earlier run is moved aside" in as_text(afresh)

    changed = plan(config.replace(resume=True, sigma=0.05))
    assert "sigma was 0.04 and is now 0.05" in changed.errors[0] and not changed.complete
    with pytest.raises(ResultsError, match="sigma was 0.04 and is now 0.05"):
        run(config.replace(resume=True, sigma=0.05), vlm=_NoModel())


class _NoModel:
    """Enough of a model for a run to come to the place where it looks at its folder."""

    dtype, device, context_length = "torch.float32", type("Device", (), {"type": "cpu"}), 1024
    embedding_rms = 1.0

    def fitting_batch(self, *args):
        return 1


def test_an_error_is_tried_again_and_a_torn_line_does_not_count(tmp_path):
    dataset = save_dataset(tmp_path / "data", ["how many?"] * 3)
    config = fast(tmp_path, dataset=str(dataset), resume=True, methods="vanilla")
    run(config)
    (job,) = plan(config).jobs
    assert (len(job.job.examples), len(job.job.problems), job.finished, job.todo) == (2, 1, 2, 0)
    log = job.job.folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[-1]) | {"stop_reason": "error", "row": job.job.examples[0].row}
    log.write_bytes(b"".join(lines) + json.dumps(record).encode() + b"\n" + lines[0][:20])
    (job,) = plan(config).jobs
    assert (job.finished, job.todo) == (1, 1)


def test_earlier_runs_are_taken_by_method_and_by_how_like_they_are():
    config = Config.make("demo")
    like = {"environment": {"device": "?"}, "method": "dmlr", "dataset": "data/shapes/visual.json"}
    slow = {**like, "config": config.replace(max_num_steps=50).as_dict(), "efficiency": {"examples_per_second": 1}}
    same = {**like, "config": config.as_dict(), "efficiency": {"examples_per_second": 4}}
    none = {**like, "config": config.as_dict(), "efficiency": {"examples_per_second": None}}
    found = earlier_pace(config, "data/shapes/visual.json", "dmlr", [slow, same, none])
    assert found.seconds == 0.25
    found = earlier_pace(config, "data/shapes/mathematics.json", "dmlr", [slow])
    assert found.seconds == 1 and "max_num_steps was 50 and is now 10" in found.source
    assert "file was 'visual.json' and is now 'mathematics.json'" in found.source
    assert earlier_pace(config, "data/shapes/visual.json", "vanilla", [slow, same]) is None


def test_where_nothing_ran_before_time_is_from_settings_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("dmlr.planning.earlier_results", lambda *args: [])
    made = plan(fast(tmp_path, methods="vanilla,dmlr,ltpo,self-consistency"))
    vanilla, dmlr, ltpo, consistency = (job.pace for job in made.jobs)
    assert 0 < vanilla.seconds < min(dmlr.seconds, ltpo.seconds)
    assert "48 tokens in every answer" in dmlr.source and "as measured now" in dmlr.source
    assert consistency is None, "what depends on its answers is not guessed"
    assert re.search(r"^time +\d+ .*, unknown for self-consistency, loading the model not", as_text(made), re.MULTILINE)
    elsewhere = fast(tmp_path, device="cuda" if made.needs.device == "cpu" else "cpu")
    assert settings_pace(elsewhere, plan(elsewhere).needs, "vanilla") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "data/none.json"}, "dataset file data/none.json: No such file"),
        ({"methods": "dmrl"}, "unknown method 'dmrl' .did you mean 'dmlr'"),
        ({"num_thought_tokens": "0"}, "num_thought_tokens = 0 is out of range"),
        ({"use_llm_verify": "true"}, "needs OPENAI_API_KEY"),
        ({"model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct"}, "HF_HUB_OFFLINE keeps the hub from being asked"),
        ({"model_name_or_path": "models/none"}, "models/none"),
        ({"model_name_or_path": "my/models/none"}, "my/models/none: no such folder"),
    ],
)
def test_what_would_fail_is_said_before_it_does(tmp_path, monkeypatch, no_model, capsys, given, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    arguments = [text for name, value in given.items() for text in ("-p", name, value)]
    assert main(["run", NOTEBOOK, "--dry-run", "-p", "output_dir", str(tmp_path / "run"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_notebook_that_is_no_benchmark_run_shows_its_parameters(capsys, no_model):
    assert main(["run", "notebooks/04_compare.ipynb", "--dry-run", "-p", "baseline", "ltpo"]) == 0
    assert "baseline: ltpo" in capsys.readouterr().out
    assert main(["run", "notebooks/04_compare.ipynb", "--dry-run", "-p", "base", "ltpo"]) == 1
    assert "unknown parameter 'base'" in capsys.readouterr().err


# Table 1


def test_table_1_goes_on_where_it_was_and_skips_what_is_finished(tmp_path, capsys, monkeypatch):
    """A benchmark, one whose file is not there, then all in one table; what a kernel does is the notebooks' test."""
    compared = []

    def in_this_process(notebook, given, executed):
        if notebook == table1.COMPARE:
            compared.append(given["runs_folder"])
        else:
            run(config_of(notebook, check_parameters(notebook, given)))
            executed.with_suffix(".html").touch()
        return executed.with_suffix(".html")

    monkeypatch.setattr(table1.notebooks, "run", in_this_process)
    monkeypatch.setattr("dmlr.show.index.write_index", lambda: None)
    (tmp_path / "missing.yaml").write_text("dataset: data/none.json\n")
    command = ["table1", "shapes-vl", "--output", str(tmp_path / "table"), *FAST, "--benchmarks"]
    both = [*command, f"shapes-visual,{tmp_path / 'missing.yaml'}"]
    assert main([*both, "--dry-run"]) == 1
    assert re.search(r"visual +dmlr +6 +0 +0 +6 ", capsys.readouterr().out)
    assert not (tmp_path / "table").exists()

    assert main(both) == 1 and compared == [str(tmp_path / "table")]
    printed = capsys.readouterr().err
    assert "dataset file data/none.json: No such file" in printed and "1 failed, for the reasons above" in printed
    log = tmp_path / "table" / "shapes-visual" / "visual" / "dmlr" / "log.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:4]))  # it died here
    assert main([*command, "shapes-visual"]) == 0
    again = log.read_bytes().splitlines(keepends=True)
    assert again[:4] == whole[:4], "what was finished is not done again"
    assert [json.loads(line) | {"seconds": 0} for line in again] == [
        json.loads(line) | {"seconds": 0} for line in whole
    ]
    assert main([*command, "shapes-visual"]) == 0 and "finished already" in capsys.readouterr().out


def test_a_run_under_other_parameters_is_refused_before_a_kernel_starts(tmp_path, capsys, monkeypatch):
    table = table1.cells(["shapes-vl"], "shapes-visual", [], {"end_data_idx": 2, "methods": "vanilla"}, tmp_path)
    run(Config.make(**{**table[0].given, "verbose": 0, "max_new_tokens": 8}))
    monkeypatch.setattr("dmlr.notebooks.run", lambda notebook, *rest: _compare_only(notebook))
    assert "max_new_tokens was 8 and is now 128" in table1.run_all(table)["shapes-visual"]


def _compare_only(notebook):
    assert notebook.stem == "04_compare"
    return notebook


def test_parameters_compose_and_the_last_one_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text("sigma: 0.2\nlr: 0.5\nend_data_idx: 3\n")
    (cell,) = table1.cells(["qwen2.5-vl-7b"], "mmvp", [str(tmp_path / "mine.yaml")], {"lr": "0.7"}, None)
    assert cell.given["model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (cell.given["sigma"], cell.given["lr"], cell.given["end_data_idx"]) == (0.2, "0.7", None)
    assert cell.given["resume"] is True and cell.given["output_dir"].endswith("runs/table1/qwen2.5-vl-7b/mmvp")


def test_a_grid_has_a_folder_for_each_model_benchmark_and_seed(tmp_path, monkeypatch, capsys):
    table = table1.cells(["shapes-vl", "qwen2.5-vl-3b"], "shapes-visual,mmvp", [], {}, tmp_path, "0,1")
    names = [
        f"{m}/{b}/seed{s}" for m in ("shapes-vl", "qwen2.5-vl-3b") for b in ("shapes-visual", "mmvp") for s in "01"
    ]
    assert [cell.name for cell in table] == names
    assert [cell.given["output_dir"] for cell in table] == [str(tmp_path / name) for name in names]
    assert [cell.given["seed"] for cell in table] == ["0", "1"] * 4
    with pytest.raises(ConfigError, match="seed is what table1 sets itself"):
        table1.cells(["shapes-vl"], "mmvp", [], {"seed": 3}, tmp_path, "0,1")

    def stop(notebook, given, executed):
        raise table1.notebooks.RunError("no kernel") if given["seed"] == "0" else KeyboardInterrupt

    monkeypatch.setattr(table1.notebooks, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        table1.run_all(table[:2] + table[4:5])
    said = capsys.readouterr().out
    assert re.findall(r" +(failed|left)\n?", said) == ["failed", "left", "left"]


def test_bad_names_and_parameters_are_named(tmp_path):
    with pytest.raises(ConfigError, match="unknown file of models 'qwen2.5-vl-8b' .did you mean 'qwen2.5-vl-7b'"):
        table1.cells(["qwen2.5-vl-8b"], "mmvp", [], {}, None)
    with pytest.raises(ConfigError, match="unknown file of benchmarks 'mmpv' .did you mean 'mmvp'"):
        table1.cells(["qwen2.5-vl-7b"], "mmpv", [], {}, None)
    with pytest.raises(ConfigError, match="output_dir is what table1 sets itself; --output"):
        table1.cells(["qwen2.5-vl-7b"], "mmvp", [], {"output_dir": "x"}, None)
    assert main(["table1", "shapes-vl", "--benchmarks", " , "]) == 1
    (cell,) = table1.cells(["qwen2.5-vl-7b"], "mmstar", [], {}, tmp_path)
    with pytest.raises(ValueError, match=r"\(python -m dmlr data mmstar --sample 1000 makes it\)"):
        cell.plan()
