"""Plans without weights, and Table 1 in one command: what is finished is skipped, what fails stops nothing else."""

import json
import re
import shutil
import socket
from itertools import product
from unittest.mock import Mock

import pytest
import torch

from dmlr import table1
from dmlr.cli import main
from dmlr.config import Config, ConfigError, root
from dmlr.json_files import write_json
from dmlr.judge.llm_judge import JudgeError
from dmlr.machine import environment
from dmlr.model.loading import load_checkpoint
from dmlr.parameters import check_parameters, config_of
from dmlr.planning import Plan, dry_run, earlier_pace, free_memory, time_of
from dmlr.run.evaluate import run
from dmlr.run.records import ResultsError, read_results
from dmlr.show.provenance import in_words

QUICK = {"end_data_idx": 4, "max_num_steps": 1, "max_new_tokens": 8, "verbose": 0}
NOTEBOOK = "notebooks/03_benchmark.ipynb"


@pytest.fixture
def no_model(monkeypatch):
    """Any attempt to load weights, or to call somebody, is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a plan loads no weights and calls nobody")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(Exception, match="loads no weights"):
        load_checkpoint(Config())


def flags(given):
    return [text for name, value in given.items() for text in ("-p", name, str(value))]


def fast(tmp_path, **more):
    return Config.make("demo", **QUICK, **{"batch_size": 4, "output_dir": str(tmp_path / "run"), **more})


# plans


def test_a_plan_tells_what_is_finished_what_is_left_and_how_long_it_takes(tmp_path, no_model, capsys):
    given = {"output_dir": tmp_path / "run", "methods": "vanilla,dmlr,self-consistency"}
    assert main(["run", NOTEBOOK, "--dry-run", *flags(given | {"end_data_idx": 20, "batch_size": 4})]) == 0
    told = capsys.readouterr().out
    assert re.search(r"mathematics +dmlr +20 +0 +0 +20 ", told)
    assert "0.00408 billion parameters; settings from folder" in told
    assert re.search(r"batch +4\n", told) and str(tmp_path / "run") in told
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_a_run_left_and_takes_its_time_from_there(tmp_path, monkeypatch):
    config = fast(tmp_path)
    run(config)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.from_pretrained", None)
        more = Plan(config.replace(resume=True, end_data_idx=10))
        assert [(job.finished, job.todo) for job in more.jobs] == [(4, 6)] * 2 and not more.complete
        for job in more.jobs:
            speed = read_results(job.job.folder)["efficiency"]["examples_per_second"]
            assert job.seconds == pytest.approx(6 / speed) and job.source == f"the run in {job.job.folder}"
        assert time_of([more, more]) == in_words(2 * sum(job.seconds for job in more.jobs))
        assert Plan(config.replace(resume=True)).complete
        log = tmp_path / "run" / "mathematics" / "dmlr" / "log.jsonl"
        first, whole = log.read_bytes().split(b"\n")[0], log.read_bytes()
        error = json.dumps(json.loads(first) | {"stop_reason": "error"}).encode()
        log.write_bytes(whole + error + b"\n" + first[:20])
        assert Plan(config.replace(resume=True)).jobs[1].todo == 1, "an error is tried again, a torn line is none"
        log.write_bytes(whole)
        afresh = Plan(config)
        assert [(job.finished, job.todo) for job in afresh.jobs] == [(0, 4)] * 2
        assert "an earlier run is moved aside" in str(afresh)
    changed = config.replace(resume=True, sigma=0.05)
    assert "sigma was 0.04 and is now 0.05" in Plan(changed).errors[0] and not Plan(changed).complete
    with pytest.raises(ResultsError, match="sigma was 0.04 and is now 0.05"):
        run(changed)


def test_time_is_from_a_run_of_the_same_method_and_model_on_such_a_device(tmp_path):
    config = fast(tmp_path)
    made = {"entries": [], "model": config.model_name_or_path, "environment": environment()}
    others = [{"model": "another"}, {"environment": {"device": "another"}}, {"efficiency": {}}]
    for number, other in enumerate([{}, *others]):
        folder = tmp_path / "run" / str(number) / "dmlr"
        folder.mkdir(parents=True)
        write_json(folder / "results.json", made | {"efficiency": {"examples_per_second": 4}} | other)
    seconds, source = earlier_pace(config, "dmlr")
    assert seconds == 0.25 and source.endswith("run/0/dmlr")


def test_where_nothing_ran_before_time_is_from_settings_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("dmlr.planning.earlier_pace", lambda *args: None)
    made = Plan(fast(tmp_path, methods="vanilla,dmlr,random,ltpo,self-consistency"))
    vanilla, *loops, consistency = (job.seconds for job in made.jobs)
    assert all(0 < vanilla < loop for loop in loops)
    assert "8 tokens in every answer" in made.jobs[1].source and "as measured now" in made.jobs[1].source
    assert consistency is None, "what depends on its answers is not guessed"
    assert re.search(r"^time +\d+ .*, unknown for self-consistency, loading the model not", str(made), re.MULTILINE)
    elsewhere = Plan(fast(tmp_path, device="cuda" if made.device == "cpu" else "cpu"))
    assert {job.seconds for job in elsewhere.jobs} == {None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "data/none.json"}, "dataset file data/none.json: No such file"),
        ({"methods": "dmrl"}, "unknown method 'dmrl' .did you mean 'dmlr'"),
        ({"use_llm_verify": "true"}, "OPENAI_API_KEY"),
        ({"model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct"}, "HF_HUB_OFFLINE keeps the hub from being asked"),
        ({"model_name_or_path": "my/models/none"}, "my/models/none: no such folder"),
    ],
)
def test_what_would_fail_is_said_before_it_does(tmp_path, monkeypatch, no_model, capsys, given, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["run", NOTEBOOK, "--dry-run", *flags(given | {"output_dir": tmp_path / "run"})]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_notebook_that_is_no_benchmark_run_shows_its_parameters(capsys, no_model):
    assert main(["run", "notebooks/04_compare.ipynb", "--dry-run", "-p", "baseline", "ltpo"]) == 0
    assert "baseline: ltpo" in capsys.readouterr().out


def test_a_run_is_planned_with_the_memory_of_the_devices_that_it_uses(monkeypatch):
    gpus = {None: 5, "cuda": 5, "cuda:1": 7, 0: 5, 1: 7}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (gpus[device], 9))
    found = [free_memory(Config(device=name)) for name in ("auto", "cuda", "cuda:1")]
    assert found == [("cuda", 5), ("cuda", 5), ("cuda", 7)]
    assert free_memory(Config(device_map="auto")) == ("cuda", 12)
    assert free_memory(Config(device="cpu"))[1] > 2**20


def test_a_dry_run_finds_the_key_where_the_run_will_look(tmp_path, monkeypatch):
    """In the notebook's folder, in which its kernel works."""
    shutil.copy(root() / NOTEBOOK, tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("dmlr.judge.llm_judge.root", lambda: tmp_path / "elsewhere")
    given = {"use_llm_verify": True, "output_dir": str(tmp_path / "run"), "end_data_idx": 2}
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        dry_run(tmp_path / "03_benchmark.ipynb", given)
    (tmp_path / ".env").write_text("OPENAI_API_KEY=a-key\n")
    assert dry_run(tmp_path / "03_benchmark.ipynb", given)[1] == []


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
    monkeypatch.setattr("dmlr.index.write_index", lambda: None)
    (tmp_path / "missing.yaml").write_text("dataset: data/none.json\n")
    command = ["table1", "shapes-vl", *flags(QUICK), "--output", str(tmp_path / "table"), "--benchmarks"]
    both = [*command, f"shapes-visual,{tmp_path / 'missing.yaml'}"]
    assert main([*both, "--dry-run"]) == 1
    assert re.search(r"visual +dmlr +4 +0 +0 +4 ", capsys.readouterr().out)
    assert not (tmp_path / "table").exists()

    assert main(both) == 1 and compared == [str(tmp_path / "table")]
    printed = capsys.readouterr().err
    assert "dataset file data/none.json: No such file" in printed and "1 failed, for the reasons above" in printed
    log = tmp_path / "table" / "shapes-visual" / "visual" / "dmlr" / "log.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:2]))  # it died here
    assert main([*command, "shapes-visual"]) == 0
    again = log.read_bytes().splitlines(keepends=True)
    assert again[:2] == whole[:2], "what was finished is not done again"
    one, other = ([json.loads(line) | {"seconds": 0} for line in lines] for lines in (again, whole))
    assert one == other
    assert main([*command, "shapes-visual"]) == 0 and "finished already" in capsys.readouterr().out


def test_a_run_under_other_parameters_is_refused_before_a_kernel_starts(tmp_path, capsys, monkeypatch):
    table = table1.cells(["shapes-vl"], "shapes-visual", [], {"end_data_idx": 2, "methods": "vanilla"}, tmp_path)
    run(Config.make(**{**table[0].given, "verbose": 0, "max_new_tokens": 8}))
    started = Mock()
    monkeypatch.setattr("dmlr.notebooks.run", started)
    monkeypatch.setattr("dmlr.index.write_index", lambda: None)
    assert "max_new_tokens was 8 and is now 128" in table1.run_all(table)["shapes-visual"]
    assert [call.args[0] for call in started.call_args_list] == [table1.COMPARE]


def test_parameters_compose_and_the_last_one_wins(tmp_path):
    (tmp_path / "mine.yaml").write_text("sigma: 0.2\nlr: 0.5\nend_data_idx: 3\n")
    (cell,) = table1.cells(["qwen2.5-vl-7b"], "mmvp", [str(tmp_path / "mine.yaml")], {"lr": "0.7"}, None)
    assert cell.given["model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (cell.given["sigma"], cell.given["lr"], cell.given["end_data_idx"]) == (0.2, "0.7", None)
    assert cell.given["resume"] is True and cell.given["output_dir"].endswith("runs/table1/qwen2.5-vl-7b/mmvp")


def test_a_grid_has_a_folder_for_each_model_benchmark_and_seed(tmp_path, monkeypatch, capsys):
    table = table1.cells(["shapes-vl", "qwen2.5-vl-3b"], "shapes-visual,mmvp", [], {}, tmp_path, "0,1")
    grid = product(("shapes-vl", "qwen2.5-vl-3b"), ("shapes-visual", "mmvp"), ("seed0", "seed1"))
    names = ["/".join(parts) for parts in grid]
    assert [cell.name for cell in table] == names
    assert [cell.given["output_dir"] for cell in table] == [str(tmp_path / name) for name in names]
    assert [cell.given["seed"] for cell in table] == ["0", "1"] * 4
    with pytest.raises(ConfigError, match="unknown file of benchmarks 'elsewhere/mmvp'"):
        table1.cells(["shapes-vl"], "elsewhere/mmvp.yaml", [], {})
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
