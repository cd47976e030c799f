"""The log under kill -9, full disks, other writers and changed parameters; results.json derived from it; JSON files."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dmlr.config import Config
from dmlr.json_files import as_plain, write_json
from dmlr.run.records import (
    LOG,
    RESULTS,
    REWARD_COLUMNS,
    ResultsError,
    RunLog,
    find_runs,
    held,
    read_log,
    read_results,
    write_reward_csv,
)


def record(row, verdict="correct", **more):
    return {"row": row, "data_idx": row, "verdict": verdict, "stop_reason": "eos_token"} | more


def test_resume_keeps_what_is_finished_and_tries_errors_again(tmp_path):
    with RunLog(tmp_path) as log:
        log.append(record(2, None, stop_reason="skipped_no_ground_truth"))
        log.append(record(0, text="half a character \ud800"))
        log.append(record(1, stop_reason="error"))
    with RunLog(tmp_path, resume=True) as log:
        assert log.finished() == {0, 2}
        log.append(record(1, "wrong"))
        assert [(r["row"], r["verdict"]) for r in log.records()] == [(0, "correct"), (1, "wrong"), (2, None)]
    assert [r["row"] for r in read_log(tmp_path)] == [0, 1, 2] and read_log(tmp_path)[0]["text"] == "half a character ?"


def test_without_resume_a_new_log_begins_and_the_old_one_is_kept(tmp_path):
    for sigma in (1, 2, 3):
        with RunLog(tmp_path, {"sigma": sigma}) as log:
            assert not log.finished()
            log.append(record(sigma))
            assert log.aside == (tmp_path / f"log.{sigma - 1}.jsonl" if sigma > 1 else None)
        if sigma != 2:  # the second one died
            write_json(tmp_path / "results.json", {"entries": [record(sigma)]})
    kept = {"log.1.jsonl", "log.2.jsonl", "log.jsonl", "run.1.json", "run.2.json", "run.json"}
    assert {p.name for p in tmp_path.glob("*.json*")} == kept | {"results.1.json", "results.json"}
    assert json.loads((tmp_path / "run.2.json").read_text())["config"] == {"sigma": 2}
    assert json.loads((tmp_path / "results.1.json").read_text())["entries"][0]["row"] == 1
    assert read_log(tmp_path) == [record(3)] and find_runs(tmp_path) == [tmp_path]


@pytest.mark.parametrize("tail", [b'{"row": 1, "verd', b'{"row": 1}', b"\xff\xfe", b"\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    with RunLog(tmp_path) as log:
        log.append(record(0))
    with open(tmp_path / LOG, "ab") as file:
        file.write(tail)
    assert read_log(tmp_path) == [record(0)]
    with RunLog(tmp_path, resume=True) as log:
        assert log.finished() == {0}
        log.append(record(1))
    assert read_log(tmp_path) == [record(0), record(1)]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / LOG).write_text('garbage\n{"row": 0}\n')
    write_json(tmp_path / "run.json", {})
    with pytest.raises(ResultsError, match="line 1"):
        RunLog(tmp_path, resume=True)
    assert (tmp_path / LOG).read_text() == 'garbage\n{"row": 0}\n'


def test_resume_under_another_configuration_names_the_difference(tmp_path):
    config = Config()
    saved = {name: value for name, value in config if name != "deep_patches"}  # a parameter that there was not yet
    with RunLog(tmp_path, saved, facts={"method": "dmlr"}) as log:
        log.append(record(0))
    same = config.replace(batch_size=3, end_data_idx=7, output_dir="x", verbose=0, save_reward_csv=False, resume=True)
    for other, method, message in [
        (config.replace(lr=0.5, seed=1), "dmlr", r"lr was 0\.001 and is now 0\.5; seed was 42 and is now 1"),
        (config.replace(deep_patches=True), "dmlr", "deep_patches was False and is now True"),
        (config, "vanilla", "method was 'dmlr' and is now 'vanilla'"),
    ]:
        with pytest.raises(ResultsError, match=message):
            RunLog(tmp_path, other, resume=True, facts={"method": method})
    for facts in ({"method": "dmlr"}, None):  # none: not compared
        with RunLog(tmp_path, same, resume=True, facts=facts) as log:
            assert log.finished() == {0} and log.facts == {"method": "dmlr"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    (tmp_path / LOG).symlink_to("/dev/full")
    with RunLog(tmp_path) as log, pytest.raises(ResultsError, match="No space left.*0 finished records are kept"):
        log.append(record(0))


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"), held(tmp_path / "file" / "run"):
        pass
    with pytest.raises(ResultsError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ResultsError, match="Permission denied"), held(tmp_path / "locked"):
            pass


def test_reading_what_is_not_there_or_not_results(tmp_path):
    with pytest.raises(ResultsError, match="No such file"):
        read_results(tmp_path)
    for content, reason in [("{", "not valid JSON"), ("[]", "expected an object")]:
        (tmp_path / RESULTS).write_text(content)
        with pytest.raises(ResultsError, match=reason):
            read_results(tmp_path)
    with pytest.raises(ResultsError, match="No such file"):
        read_log(tmp_path / "none")


def test_reward_csv(tmp_path):
    rows = [dict.fromkeys(REWARD_COLUMNS, 1) | {"reward": 0.5, "note": "x"}, {"step": 1, "reward": math.nan}]
    write_reward_csv(tmp_path / "rewards" / "0.csv", rows)
    with open(tmp_path / "rewards" / "0.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["step", "reward", "sigma", "is_new_best", "patch_count", "patch_budget", "note"]
    assert (first["reward"], second["reward"], second["sigma"]) == ("0.5", "", "")


# any object as JSON


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (math.nan, None),
        ([-math.inf, 1.5], [None, 1.5]),
        (np.float32(0.5), 0.5),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (torch.arange(3), [0, 1, 2]),
        (np.bool_(True), True),
        ({1: (2, None)}, {"1": [2, None]}),
        (Path("a/b"), "a/b"),
    ],
)
def test_everything_becomes_plain(value, plain):
    found = as_plain(value)
    assert found == plain
    assert json.loads(json.dumps(found, allow_nan=False)) == plain


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"text": "é\u2028\ud800"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "é\u2028?"}
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
