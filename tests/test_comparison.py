"""Notebook 04 over written runs: what stands beside what, and which runs are the same but for the seed.

Its tables stand in its cells, which are executed here as they are.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from dmlr.config import root
from dmlr.run.collect import load_runs
from dmlr.run.records import write_results
from dmlr.show import page
from dmlr.stats import metrics, published

CELLS = nbformat.read(root() / "notebooks" / "04_compare.ipynb", as_version=4).cells
TABLES = ("table_1", "paired", "settings", "runs", "outcomes", "seeds", "groups", "calibration")  # as they are shown


def write_run(folder, label, method, outcomes, dataset="data/mmvp/mmvp.json", model="data/models/shapes-vl", **more):
    """A results.json; an outcome is True, False or a verdict, `fields` are per-record lists."""
    place = folder / label / Path(dataset).stem / method
    place.mkdir(parents=True)
    fields, config = more.pop("fields", {}), {"seed": 42, **more.pop("config", {})}
    entries = []
    for i, outcome in enumerate(outcomes):
        verdict = outcome if isinstance(outcome, str) else "correct" if outcome else "wrong"
        entry = {"row": i, "data_idx": i, "ground_truth": "x", "stop_reason": "eos_token", "seconds": {"decode": 0.5}}
        entry |= {"verdict": verdict, "is_correct": None if verdict == "judge_failed" else verdict == "correct"}
        if verdict == "error":
            entry |= {"stop_reason": "error", "is_correct": None, "verdict": None}
        entries.append(entry | {key: values[i] for key, values in fields.items()})
    write_results(place, entries, model=model, dataset=dataset, config=config, method=method, **more)
    return place


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Executes the notebook over the runs in `tmp_path`; its tables by name, each a list of rows, and its sentences."""

    def shown(baseline="vanilla"):
        tables, said = [], []
        monkeypatch.setattr(page, "show", lambda *figure: None)
        monkeypatch.setattr(page, "say", lambda *sentences: said.extend(sentences))
        monkeypatch.setattr(page, "show_table", lambda table, *captions, otherwise: tables.append(table))
        namespace = {}
        for cell in CELLS:
            if cell.cell_type == "code":
                exec(cell.source, namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace |= {"runs_folder": str(tmp_path), "baseline": baseline}
        rows = {name: table.to_dict("records") for name, table in zip(TABLES, tables, strict=True)}
        return SimpleNamespace(**rows, said=said)

    return shown


def test_runs_stand_in_order_with_everything_that_is_no_plain_right_or_wrong(tmp_path, shown):
    write_run(tmp_path, "a", "dmlr", [True, True, "unparsed", "judge_failed", "error", False])
    write_run(tmp_path, "a", "vanilla", [True, False, True, True, True, True])
    write_run(tmp_path, "b", "vanilla", ["error", "judge_failed"], "mine.json")
    tables, expected = shown(), metrics.wilson(2, 4)
    first, second, unjudged = tables.runs
    names = {"run": "a", "dataset": "MMVP", "method": "dmlr"}
    interval = f"{expected.low:.1%} – {expected.high:.1%}"
    assert first["method"] == "vanilla"
    assert (unjudged["accuracy"], unjudged["95 % interval"], unjudged["n"]) == ("–", "–", 0)
    assert tables.table_1[0]["mine"] == "–"
    assert second == names | {"seed": "42", "accuracy": "50.0%", "95 % interval": interval, "n": 4}, "one setting"
    counts = {"judged": 4, "abstained": 0, "unparsed": 1, "judge failed": 1, "errors": 1, "skipped": 0}
    assert tables.outcomes[1] == names | counts | {"s each": "0.50"}
    assert tables.seeds == tables.groups == tables.calibration == []


def test_a_difference_is_paired_with_the_baseline_of_the_same_run(tmp_path, shown):
    write_run(tmp_path, "a", "vanilla", [True] + [False] * 9)
    write_run(tmp_path, "a", "dmlr", [False] + [True] * 9)
    write_run(tmp_path, "b", "dmlr", [True] * 10)
    tables = shown()
    (row,) = tables.paired
    assert (row["run"], row["difference"], row["gained"], row["lost"], row["n"]) == ("a", "+80.0 points", 9, 1, 10)
    assert row["p"] == f"{metrics.mcnemar_exact(9, 1):.2g}"
    low, high = map(float, row["95 % interval"].split(" to "))
    assert low < 80 < high
    assert "3 runs of 1 model; of 1 differences to vanilla, 1 have p < 0.05" in tables.said[0]
    (row,) = shown(baseline="dmlr").paired
    assert (row["method"], row["difference"]) == ("vanilla", "-80.0 points")


def test_runs_of_one_folder_that_differ_in_what_must_be_equal_are_not_paired(tmp_path):
    """As a run under another seed leaves them that was stopped between two methods."""
    write_run(tmp_path, "a", "vanilla", [True] * 4, config={"seed": 7, "sigma": 0.1})
    write_run(tmp_path, "a", "dmlr", [False] * 4, config={"seed": 42, "sigma": 0.2})
    with pytest.warns(UserWarning, match="left unpaired: .*dmlr and its vanilla: seed was 7 and is now 42$"):
        assert list(load_runs(tmp_path, "vanilla")["beside"]) == [None, None]


def test_runs_that_differ_in_the_seed_alone_are_one_cell_with_mean_and_spread(tmp_path, shown):
    for seed, right in ((1, 5), (2, 6), (3, 7)):
        write_run(tmp_path, f"s{seed}", "vanilla", [True] * 5 + [False] * 5, config={"seed": seed, "output_dir": "x"})
        outcomes = [True] * right + [False] * (10 - right)
        write_run(tmp_path, f"s{seed}", "dmlr", outcomes, config={"seed": seed, "output_dir": f"y{seed}"})
    tables = shown()
    vanilla, dmlr = tables.seeds
    assert (dmlr["method"], dmlr["seeds"]) == ("dmlr", "1, 2, 3")
    assert dmlr["accuracy, mean ± s.d."] == "60.0 ± 10.0" and dmlr["lowest – highest"] == "50.0 – 70.0"
    assert dmlr["difference, mean ± s.d."] == "+10.0 ± 10.0"
    assert vanilla["accuracy, mean ± s.d."] == "50.0 ± 0.0" and vanilla["difference, mean ± s.d."] == ""
    assert [row["MMVP"] for row in tables.table_1] == ["50.0 ± 0.0 (3 seeds)", "60.0 ± 10.0 (3 seeds)"]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"seed": 2, "sigma": 0.3}},
        {"config": {"seed": 1}},  # the same seed again is no second draw
        {"config": {"seed": 2}, "fields": {"ground_truth": ["x", "x", "y"]}},  # other questions
        {"config": {"seed": 2}, "outcomes": [True, True]},  # fewer questions
        {"config": {"seed": 2}, "llm_judge": {"model": "m"}},
        {"config": {"seed": 2}, "model": "other"},
    ],
)
def test_whatever_else_differs_is_no_spread(tmp_path, shown, change):
    write_run(tmp_path, "a", "dmlr", [True, True, False], config={"seed": 1})
    write_run(tmp_path, "b", "dmlr", change.pop("outcomes", [True, False, False]), **change)
    tables = shown()
    assert tables.seeds == [] and "seeds" not in str(tables.table_1)
    assert str(tables.table_1).count(" [") == 2, "each run has its number"


def test_settings_get_letters_and_say_in_what_they_differ(tmp_path, shown):
    write_run(tmp_path, "a", "dmlr", [True, False], config={"sigma": 0.1})
    write_run(tmp_path, "b", "dmlr", [True, True], config={"sigma": 0.3, "top_k": 5, "batch_size": 7})
    write_run(tmp_path, "c", "dmlr", [False, False], llm_judge={"model": "m", "every": True})
    tables = shown()
    settings = {row.pop("parameter"): row for row in tables.settings}
    assert settings["σ"] == {"A": "0.1", "B": "0.3", "C": "0.1"}
    assert settings["top_k"] == {"A": "10", "B": "5", "C": "10"}
    assert settings["judge"] == {"A": "rules", "B": "rules", "C": "m, every answer"}
    assert not {"batch_size", "lr"} & set(settings)
    assert [row["setting"] for row in tables.table_1] == [row["setting"] for row in tables.runs] == ["A", "B", "C"]


def test_table_1_has_a_column_per_benchmark_in_the_papers_order_and_the_papers_numbers(tmp_path, shown):
    qwen = "Qwen/Qwen2.5-VL-7B-Instruct"
    datasets = ["data/scienceqa/scienceqa.json", "mine.json", "data/mathvista/mathvista-500-seed0.json"]
    for dataset in datasets:
        write_run(tmp_path, "q", "vanilla", [True, True, False, False], dataset, qwen)
        write_run(tmp_path, "q", "dmlr", [True, True, True, False], dataset, qwen)
    write_run(tmp_path, "s", "dmlr", [True, False], datasets[0])
    tables, interval = shown(), metrics.wilson(3, 4)
    rows = tables.table_1
    assert list(rows[0]) == ["model", "method", "mathvista-500-seed0", "ScienceQA", "mine"]
    assert [(row["model"], row["method"]) for row in rows] == [
        ("Qwen2.5-VL-7B-Instruct", "vanilla"), ("Qwen2.5-VL-7B-Instruct", "dmlr"), ("shapes-vl", "dmlr"),
    ]  # fmt: skip
    ours = f"75.0 [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    assert rows[1]["ScienceQA"] == f"{ours}, paper 51.3" and rows[1]["mine"] == ours
    assert rows[1]["mathvista-500-seed0"] == f"{ours}, paper 59.1"
    assert "paper" not in str(rows[2]) and rows[2]["mine"] == ""
    assert {row["model"] for row in tables.runs} == {"Qwen2.5-VL-7B-Instruct", "shapes-vl"}


def test_groups_are_shown_where_the_records_have_them(tmp_path, shown):
    hallusion = {"figure_group": ["f", "f", "g", None], "question_group": ["p", "q", "p", "q"]}
    write_run(tmp_path, "a", "vanilla", [True, True, False, True], "hallusionbench.json", fields=hallusion)
    pairs = {"pair_id": [0, 0, 1, 1, 2]}
    write_run(tmp_path, "a", "vanilla", [True, True, True, False, True], "mmvp.json", fields=pairs)
    star = {"category": ["x", "x", "y", "y"], "l2_category": ["p", "p", "q", "r"]}
    write_run(tmp_path, "a", "vanilla", [True, False, True, True], "mmstar.json", fields=star)
    write_run(tmp_path, "a", "vanilla", [True], "plain.json", fields={"category": ["x"]})
    assert {(row["dataset"], row["metric"]): (row["accuracy"], row["n"]) for row in shown().groups} == {
        ("HallusionBench", "aAcc (questions)"): ("75.0%", 4),
        ("HallusionBench", "fAcc (figures)"): ("50.0%", 2),
        ("HallusionBench", "qAcc (question groups)"): ("50.0%", 2),
        ("MMVP", "pairs"): ("50.0%", 2),
        ("MMStar", "mean over l2 categories"): ("83.3%", ""),
        ("MMStar", "category x"): ("50.0%", 2),
        ("MMStar", "category y"): ("100.0%", 2),
    }


def test_calibration_says_what_the_interval_says(tmp_path, shown):
    rewards = {"best_reward": [i / 60 for i in range(60)]}
    for label, outcomes in {"up": [False] * 30 + [True] * 30, "down": [True] * 30 + [False] * 30}.items():
        write_run(tmp_path, label, "dmlr", outcomes, fields=rewards)
    write_run(tmp_path, "none", "dmlr", [True, False] * 30, fields=rewards)
    write_run(tmp_path, "none", "vanilla", [True, False] * 30)
    said = {row["run"]: row["a higher reward is"] for row in shown().calibration}
    assert said == {"up": "more often right", "down": "more often wrong", "none": "cannot tell"}


def test_a_broken_run_costs_itself_only_and_where_a_run_lies_is_its_name(tmp_path):
    broken = write_run(tmp_path, "broken", "vanilla", [True])
    write_run(tmp_path / "deep", "a", "vanilla", [True])
    (broken / "results.json").write_text('{"entries": [')
    with pytest.warns(UserWarning, match="left out: .*broken.*not valid JSON"):
        assert list(load_runs(tmp_path, "vanilla")["run"]) == ["deep/a"]
    assert list(load_runs(tmp_path / "deep" / "a", "vanilla")["run"]) == ["a"]


# the paper's numbers


@pytest.mark.parametrize(
    ("model", "method", "dataset", "accuracy"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "icot", "data/mmmath/mmmath.json", 37.0),
        ("models/Qwen3-VL-4B-Instruct/", "dmlr", "mmvp-100-seed0.json", 72.3),
        ("Fancy-MLLM/R1-Onevision-7B", "vanilla", "mathvista.json", 51.2),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "vanilla", "mmvp.json", None),
        ("someone/Qwen2.5-VL-7B-Instruct-tuned", "vanilla", "mmvp.json", None),
        ("UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-7B", "vanilla", "mmvp.json", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "ltpo", "mmvp.json", None),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "icot", "mmvp.json", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "vanilla", "data/shapes/visual.json", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "vanilla", "my-mmvp.json", None),
    ],
)
def test_only_the_papers_models_methods_and_benchmarks_have_its_numbers(model, method, dataset, accuracy):
    assert published.accuracy(model, method, dataset) == accuracy
