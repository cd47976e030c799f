"""A whole run on a tiny model: bad input costs one record, interrupted runs resume, verdicts can be made again."""

import json
import re
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from judge_server import JudgeServer, refuses, says
from saved_run import assert_same
from tiny import noise_image, tiny_vlm

from dmlr.config import Config, ConfigError
from dmlr.data.examples import ImageError
from dmlr.judge import llm_judge
from dmlr.judge.llm_judge import JudgeError
from dmlr.methods import METHODS
from dmlr.run import batches, evaluate
from dmlr.run.records import ResultsError, held, read_log, read_results
from dmlr.stats.metrics import group_accuracy

FAST = {"max_num_steps": 2, "max_new_tokens": 4, "batch_size": 4, "verbose": 0, "end_data_idx": None}


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture
def dataset(tmp_path):
    """Six good rows."""
    rows = []
    for i in range(6):
        noise_image(i).save(tmp_path / f"image {i}.png")
        rows.append({"prompt": f"How many? {i}", "solution": "\\boxed{3}", "image_path": f"image {i}.png", "idx": i})
    return write(tmp_path, rows)


def write(folder, rows):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An LLM judge that finds everything right, with a key and a cache for this test alone."""
    monkeypatch.setattr(llm_judge, "shared_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-this-test")
    with JudgeServer(says({"answer": "a dog", "verdict": "correct"})) as server:
        monkeypatch.setenv("OPENAI_API_BASE_URL", server.url)
        yield server


def run(vlm, dataset, folder, **more):
    config = Config(**{**FAST, "dataset": str(dataset), "output_dir": str(folder), "methods": "vanilla,dmlr", **more})
    return {method: result for (_, method), result in evaluate.run(config, vlm).items()}


def comparable(results):
    """Everything but times."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in results["entries"]]


def test_results_and_files(vlm, dataset, tmp_path, capsys):
    results = run(vlm, dataset, tmp_path / "out", verbose=1)
    assert re.search(r"12/12 .*lately correct=\d/6, it/s=[\d.e+]+, tok/s=[\d.e+]+, GiB=[\d.]+", capsys.readouterr().err)
    for method, content in results.items():
        folder = tmp_path / "out" / "data" / method
        assert json.loads((folder / "results.json").read_text()) == content
        assert len(read_log(folder)) == 6
        assert content["total"] == 6 and content["correct"] <= 6
        assert {"model", "dataset", "accuracy", "correct", "total", "config", "args", "entries"} <= content.keys()
        for i, entry in enumerate(content["entries"]):
            assert entry["data_idx"] == i and entry["stop_reason"] in ("eos_token", "length")
            assert "<|im_start|>assistant" in entry["prompt"] and "<|image_pad|>" in entry["prompt"]
            assert entry["is_correct"] in (True, False) and entry["seconds"]["prefill"] > 0
        assert content["scales"] == Config(**content["config"]).scales(vlm.embedding_rms)
    first = results["dmlr"]["entries"][0]
    assert first["best_reward"] >= first["initial_reward"] and first["evaluations"] == 1 + 2 * len(first["rewards"])
    assert results["vanilla"]["entries"][0]["best_reward"] is None
    lines = (tmp_path / "out/data/dmlr/rewards/00003.csv").read_text().splitlines()
    assert lines[0].startswith("step,reward,sigma,is_new_best,patch_count,patch_budget") and len(lines) == 3


def test_questions_with_several_images_and_with_none(vlm, dataset, tmp_path):
    """Patches come from all images, or from none with a note; the record names the images as the dataset does."""
    rows = json.loads(dataset.read_text())[:3]
    rows[0]["image_path"], rows[1]["image_path"] = ["image 0.png", "image 1.png"], None
    results = run(vlm, write(tmp_path, rows), tmp_path / "out", methods="vanilla,dmlr")
    for method, content in results.items():
        two, none, one = content["entries"]
        assert [Path(path).name for path in two["image_path"]] == ["image 0.png", "image 1.png"]
        assert none["image_path"] is None and Path(one["image_path"]).name == "image 2.png"
        assert two["prompt"].count("<|image_pad|>") == 2 and "<|image_pad|>" not in none["prompt"]
        assert method == "vanilla" or none["details"]["note"] == "no image: no patches"
    assert results["dmlr"]["entries"][1]["patch_grid"] == [0, 0]


@pytest.mark.parametrize(("room", "times"), [(99, [1, 1, 1, 1]), (2.5, [1, 1, 3, 3])])
def test_an_image_is_opened_and_processed_once_as_long_as_it_is_kept(vlm, dataset, tmp_path, monkeypatch, room, times):
    """For all methods of a run and all questions about it. `room`: images that can be kept."""
    rows = json.loads(dataset.read_text())
    rows[1]["image_path"] = rows[5]["image_path"] = rows[0]["image_path"]
    size = batches.size_of((), batches.Images(vlm)((str(tmp_path / "image 0.png"),)))
    processor, open_image = vlm.processor.image_processor, Mock(wraps=batches.open_image)
    monkeypatch.setattr(batches, "KEPT", int(room * size))
    monkeypatch.setattr(batches, "open_image", open_image)
    monkeypatch.setattr(processor, "preprocess", Mock(wraps=processor.preprocess))
    results = run(vlm, write(tmp_path, rows), tmp_path / "out", methods="vanilla,dmlr,unoptimised", batch_size=1)
    assert [content["total"] for content in results.values()] == [6, 6, 6]
    opened = Counter(Path(call.args[0]).name for call in open_image.call_args_list)
    assert [opened[f"image {i}.png"] for i in (0, 2, 3, 4)] == times
    assert processor.preprocess.call_count == sum(times)
    alone = run(vlm, dataset, tmp_path / "alone", methods="dmlr", batch_size=1)
    assert comparable(alone["dmlr"]) == comparable(results["dmlr"])


def test_batch_size_and_range_change_no_record(vlm, dataset, tmp_path):
    whole = run(vlm, dataset, tmp_path / "a")
    single = run(vlm, dataset, tmp_path / "b", batch_size=1)
    part = run(vlm, dataset, tmp_path / "c", start_data_idx=2, end_data_idx=5)
    for method in whole:
        assert_same(comparable(single[method]), comparable(whole[method]))
        texts = [entry["model_output"] for entry in whole[method]["entries"]]
        assert [entry["model_output"] for entry in part[method]["entries"]] == texts[2:5]


BAD = [  # what differs from a good row, and what its record's error says; None: it is answered all the same
    ({}, None),
    ({"image_path": "missing.png"}, "missing.png"),
    ({"image_path": "truncated.png"}, "truncated.png"),
    ({"prompt": "  "}, "prompt is empty"),
    ({"prompt": "long " * 2000}, "context is 1024"),
    ({"prompt": "<|image_pad|> How many?"}, "special token"),
    ({"idx": None}, None),
    ({"idx": 0}, "idx 0 is already taken by row 0"),
]


def test_bad_rows_cost_one_record_each(vlm, tmp_path):
    noise_image(0).save(tmp_path / "good.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    row = {"prompt": "How many?", "solution": "3", "image_path": "good.png"}
    rows = [row | {"idx": i} | changes for i, (changes, _) in enumerate(BAD)]
    rows += ["no object", row | {"idx": 99, "solution": None}]
    content = run(vlm, write(tmp_path, rows), tmp_path / "out", methods="dmlr")["dmlr"]
    *entries, skipped = content["entries"]
    assert [entry["row"] for entry in content["entries"]] == list(range(len(rows)))
    assert skipped["stop_reason"] == "skipped_no_ground_truth" and content["skipped"] == 1
    errors = [error for _, error in BAD] + ["expected an object"]
    for entry, error in zip(entries, errors, strict=True):
        if error:
            assert entry["stop_reason"] == "error" and error in entry["error"] and entry["is_correct"] is None
        else:
            assert entry["stop_reason"] in ("eos_token", "length") and entry["data_idx"] == entry["row"], entry["error"]
    assert content["errors"] == sum(map(bool, errors)) and content["total"] == errors.count(None)


def test_a_method_with_nothing_but_errors_fails_the_run_in_the_end(vlm, dataset, tmp_path, monkeypatch):
    """A fault in its code, say; one bad example, or all but one, is none."""
    monkeypatch.setitem(batches.METHODS, "vanilla", Mock(side_effect=TypeError("this method is broken")))
    message = r"\(data, vanilla: 6 errors .*; the first: TypeError: this .* broken\)"
    with pytest.raises(evaluate.NoAnswers, match=message):
        run(vlm, dataset, tmp_path / "out")
    vanilla, dmlr = (read_results(tmp_path / "out" / "data" / method) for method in ("vanilla", "dmlr"))
    assert [entry["stop_reason"] for entry in vanilla["entries"]] == ["error"] * 6 and vanilla["accuracy"] is None
    assert dmlr["errors"] == 0 and dmlr["total"] == 6
    rows = json.loads(dataset.read_text())
    some = write(tmp_path, [row | {"image_path": "gone.png"} for row in rows[:5]] + rows[5:])
    assert run(vlm, some, tmp_path / "some", methods="dmlr")["dmlr"]["errors"] == 5


def test_interrupted_run_resumes_without_loss_or_repetition(vlm, dataset, tmp_path, monkeypatch):
    fine = run(vlm, dataset, tmp_path / "a", batch_size=2)
    prefill, calls = vlm.prefill, []

    def dies(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefill(batch)

    monkeypatch.setattr(vlm, "prefill", dies)
    with pytest.raises(KeyboardInterrupt):
        run(vlm, dataset, tmp_path / "b", batch_size=2)
    assert len(read_log(tmp_path / "b/data/vanilla")) == 4
    resumed = run(vlm, dataset, tmp_path / "b", batch_size=2, resume=True)
    assert sum(calls[3:]) == 2 + 6  # the last vanilla batch, and all of dmlr
    for method in fine:
        assert comparable(resumed[method]) == comparable(fine[method])


def test_an_llm_judge_that_fails_counts_neither_way_and_verify_only_mends_it(
    vlm, dataset, server, tmp_path, monkeypatch
):
    rows = json.loads(dataset.read_text())
    for row in rows[:4]:
        row["solution"] = "a long story about a dog"  # a tiny model's noise is no such story: the rules cannot tell
    dataset.write_text(json.dumps(rows))
    plain = run(vlm, dataset, tmp_path / "plain", methods="vanilla")["vanilla"]
    undecided = {e["row"] for e in plain["entries"] if e["verdict"] == "unparsed" and e["model_output"].strip()}
    assert undecided
    llm = {"methods": "vanilla", "use_llm_verify": True}
    right, server.behave = server.behave, refuses(400)
    failed = run(vlm, dataset, tmp_path / "out", **llm)["vanilla"]
    server.behave = right
    mended = run(None, dataset, tmp_path / "out", **llm, verify_only=True)["vanilla"]
    all_asked = run(None, dataset, tmp_path / "out", **llm, verify_only=True, llm_verify_all=True)["vanilla"]
    server.behave = refuses(400)  # and nothing in another cache: what was judged stays judged
    monkeypatch.setattr(llm_judge, "shared_cache", lambda: tmp_path / "other")
    for again in ({"resume": True}, {"verify_only": True}):
        kept = run(vlm, dataset, tmp_path / "out", **llm, **again)["vanilla"]
        assert kept["llm_judge"]["failed"] == len(undecided) and comparable(kept) == comparable(mended)
    assert {e["row"] for e in failed["entries"] if e["verdict"] == "judge_failed"} == undecided
    assert failed["judge_failed"] == failed["llm_judge"]["failed"] == len(undecided) == 6 - failed["total"]
    assert {e["row"] for e in mended["entries"] if e["rule"].startswith("llm:") and e["is_correct"]} == undecided
    assert mended["judge_failed"] == 0 and mended["llm_judge"]["agreement"]["unparsed"]["correct"] >= len(undecided)
    assert all_asked["llm_judge"]["cached"] == len(undecided)
    assert sum(sum(row.values()) for row in all_asked["llm_judge"]["agreement"].values()) == 6
    assert not any("sk-secret-of-this-test" in path.read_text() for path in tmp_path.rglob("*.json*"))
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.chdir(tmp_path)  # where no .env lies
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        run(None, dataset, tmp_path / "out", **llm)  # before the model is needed


def test_a_second_process_with_another_seed_is_kept_out_of_the_whole_folder(vlm, dataset, tmp_path):
    run(vlm, dataset, tmp_path / "out", methods="vanilla")
    with held(tmp_path / "out"), pytest.raises(ResultsError, match="another process is writing this run"):
        run(vlm, dataset, tmp_path / "out", seed=7)
    assert not list((tmp_path / "out").rglob("log.1.jsonl"))


def test_a_resumed_run_takes_the_batches_of_the_run_before(vlm, dataset, tmp_path, monkeypatch):
    given = {"batch_size": None, "methods": "vanilla"}
    monkeypatch.setattr(vlm, "fitting_batch", lambda work: 2)
    run(vlm, dataset, tmp_path / "out", **given, end_data_idx=1)
    monkeypatch.setattr(vlm, "fitting_batch", lambda work: 5)
    sizes, prefill = [], vlm.prefill
    monkeypatch.setattr(vlm, "prefill", lambda batch: sizes.append(len(batch)) or prefill(batch))
    run(vlm, dataset, tmp_path / "out", **given, resume=True)
    assert sizes == [2, 2, 2], "row 0 again: it goes through the model with row 1"
    about = tmp_path / "out" / "data" / "vanilla" / "run.json"
    assert json.loads(about.read_text())["batch_size"] == 2
    run(vlm, dataset, tmp_path / "out", **given | {"batch_size": 3}, resume=True)
    assert json.loads(about.read_text())["batch_size"] == 3, "another one was named"


def test_a_drawing_that_cannot_be_made_costs_no_run(vlm, dataset, tmp_path, monkeypatch, capsys):
    """An image from a server is fetched again for the drawing, and may be gone by then."""

    def gone(source):
        raise ImageError(f"{source}: cannot be fetched")

    monkeypatch.setattr(evaluate, "open_image", gone)
    found = run(vlm, dataset, tmp_path / "out", methods="dmlr", end_data_idx=1, visual_token_viz=True)["dmlr"]
    assert found["total"] == 1 and "cannot be fetched" in capsys.readouterr().err


def test_verify_only_takes_the_datasets_ground_truth_and_refuses_other_questions(vlm, dataset, tmp_path):
    first = run(vlm, dataset, tmp_path / "out", methods="vanilla")["vanilla"]
    again = {"methods": "vanilla", "verify_only": True}
    rows = json.loads(dataset.read_text())
    rows[2]["solution"] = first["entries"][2]["model_output"] or "?"
    dataset.write_text(json.dumps(rows))
    judged = run(None, dataset, tmp_path / "out", **again)["vanilla"]
    assert judged["entries"][2]["ground_truth"] == rows[2]["solution"] and judged["entries"][2]["is_correct"] is True
    assert [e["model_output"] for e in judged["entries"]] == [e["model_output"] for e in first["entries"]]
    assert judged["environment"] == first["environment"] and judged["total"] == 6
    log = (tmp_path / "out/data/vanilla/log.jsonl").read_bytes()
    dataset.write_text(json.dumps(rows[1:]))  # every row has moved up: each answer would meet another's truth
    with pytest.raises(ResultsError, match="row 0 .* another question"):
        run(None, dataset, tmp_path / "out", **again)
    assert (tmp_path / "out/data/vanilla/log.jsonl").read_bytes() == log


def test_an_llms_verdicts_go_when_it_is_no_longer_asked(vlm, dataset, server, tmp_path, monkeypatch):
    """Results that say "judged by rules" hold what the rules said, also after a run that an LLM judged."""
    rows = json.loads(dataset.read_text())
    said = run(vlm, dataset, tmp_path / "x", methods="vanilla", end_data_idx=2)["vanilla"]["entries"]
    for row, entry in zip(rows, said, strict=False):
        row["solution"] = entry["model_output"]  # which the rules find correct
    dataset.write_text(json.dumps(rows))
    plain = run(vlm, dataset, tmp_path / "plain", methods="vanilla")["vanilla"]
    assert {entry["rule_verdict"] for entry in plain["entries"]} == {"correct", "unparsed"}
    llm = {"methods": "vanilla", "use_llm_verify": True}
    run(vlm, dataset, tmp_path / "out", **llm, llm_verify_all=True)
    some = run(vlm, dataset, tmp_path / "out", **llm, resume=True)["vanilla"]
    undecided = [e for e in some["entries"] if e["rule_verdict"] == "unparsed"]
    by_llm = {e["row"] for e in some["entries"] if e["rule"].startswith("llm:")}
    assert by_llm == {e["row"] for e in undecided if e["model_output"].strip()}
    log = tmp_path / "out" / "data" / "vanilla" / "log.jsonl"
    kept = log.read_text()
    log.write_text("".join(line for line in kept.splitlines(keepends=True) if json.loads(line)["row"] != 5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(METHODS, "vanilla", Mock(side_effect=KeyboardInterrupt))
        run(vlm, dataset, tmp_path / "out", **llm, resume=True)
    assert read_results(log.parent)["llm_judge"] == some["llm_judge"], "what is in it was judged so"
    log.write_text(kept)
    none = run(vlm, dataset, tmp_path / "out", methods="vanilla", resume=True)["vanilla"]
    assert none["llm_judge"] is None and comparable(none) == comparable(plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start_data_idx": 6, "end_data_idx": 9}, r"no row is in the range .* = 6:9; it has 6 rows, 0 to 5"),
        ({"methods": "vanilla,dmlr, vanilla"}, "data, vanilla is there twice in one run"),  # they would have one folder
        ({"dataset": "data.json,other/data.json"}, "data, vanilla is there twice in one run"),
        ({"prompts_file": "none.yaml"}, "prompts_file: .*No such file"),
        ("solver: 'no place for it'\n", "prompts_file: .*must contain {question} exactly once"),
        ("sistem: x\n", "prompts_file: .*found ..sistem"),
        ("solver: [a, 5, c]\n", "prompts_file: .*solver must be text"),
        ("a: 'open\n", "prompts_file: .*not YAML"),
    ],
)
def test_what_cannot_be_run_ends_before_the_model_is_loaded(dataset, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", json.loads(dataset.read_text()))
    if isinstance(given, str):
        (tmp_path / "prompts.yaml").write_text(given)
        given = {"prompts_file": "prompts.yaml"}
    with pytest.raises(ConfigError, match=message):
        run(None, **{"dataset": dataset, "folder": tmp_path / "out", "model_name_or_path": "nobody/nothing"} | given)
    assert not (tmp_path / "out").exists()


def test_other_prompts_are_another_run(vlm, dataset, tmp_path):
    """By what the file says, not by where it lies."""
    mine, moved = tmp_path / "mine.yaml", tmp_path / "moved.yaml"
    for path in (mine, moved):
        path.write_text("system: Be brief.\n")
    first = run(vlm, dataset, tmp_path / "out", prompts_file=str(mine))
    assert "Be brief." in first["dmlr"]["entries"][0]["prompt"]
    again = run(vlm, dataset, tmp_path / "out", prompts_file=str(moved), resume=True)
    assert first["dmlr"]["entries"] == again["dmlr"]["entries"]
    mine.write_text("system: Be very brief.\n")
    for other in (str(mine), ""):
        with pytest.raises(ResultsError, match="cannot resume under another configuration: prompts_file was"):
            run(vlm, dataset, tmp_path / "out", prompts_file=other, resume=True)


def test_groups_that_are_lists_do_not_end_the_tables(vlm, dataset, tmp_path):
    rows = json.loads(dataset.read_text())
    odd = [["a", 1], {"b": 2}, "c", 3, None, ["a", 1]]
    write(tmp_path, [row | {"pair_id": group, "category": group} for row, group in zip(rows, odd, strict=True)])
    entries = run(vlm, dataset, tmp_path / "out", methods="vanilla")["vanilla"]["entries"]
    assert [entry["pair_id"] for entry in entries] == ["['a', 1]", "{'b': 2}", "c", 3, None, "['a', 1]"]
    assert group_accuracy(entries, "pair_id").total == 4
