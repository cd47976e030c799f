"""Workers on Ray give what one process gives: on one machine, on two, and when they die."""

import os
import signal
import sys
from pathlib import Path

import pytest
from saved_run import assert_same, free_port, outcome, save_dataset, save_model, settings
from tiny import noise_image

from dmlr.config import Config, ConfigError
from dmlr.data.examples import Example
from dmlr.data.images import ImageFile, open_image
from dmlr.model.families import ModelError
from dmlr.run import evaluate, workers
from dmlr.run.batches import prepare
from dmlr.run.records import read_results
from dmlr.run.workers import WorkerError, for_workers, placement, started, threads_per_worker, with_image_files

ROWS = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Files that say, with a line each, how often a worker is to die at their question."""
    folder = tmp_path_factory.mktemp("lives")
    (folder / "one").write_text("")
    (folder / "two").write_text("")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, lives):
    prompts = [f"How many? {i}" for i in range(ROWS)]
    prompts[1], prompts[12] = f"DIE {lives / 'one'}", f"DIE {lives / 'two'}"
    return save_dataset(tmp_path_factory.mktemp("data"), prompts)


@pytest.fixture(scope="module")
def alone(model, dataset, tmp_path_factory):
    """What one process, without Ray, leaves behind."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate.run(Config(**settings(model, dataset, folder)))
    left = outcome(folder)
    assert {len(method["results"]["entries"]) for method in left.values()} == {ROWS}
    assert len(left["dmlr"]["csv"]) == ROWS - 1
    return left


@pytest.mark.slow
@pytest.mark.usefixtures("alone_with_ray")
def test_two_workers_on_one_machine_answer_as_one_process(model, dataset, alone, tmp_path):
    ray = pytest.importorskip("ray")
    evaluate.run(Config(**settings(model, dataset, tmp_path, num_workers=2)))
    assert_same(outcome(tmp_path), alone)
    assert not ray.is_initialized()


def test_two_machines_answer_as_one_process(model, dataset, alone, cluster, tmp_path):
    evaluate.run(Config(**settings(model, dataset, tmp_path, num_workers=2, ray_address=cluster)))
    assert_same(outcome(tmp_path), alone)
    efficiency = read_results(tmp_path / "data" / "dmlr")["efficiency"]
    assert efficiency["peak_memory_bytes"] > 50e6  # the workers', who hold a model


def test_workers_are_spread_over_the_machines_and_a_missing_model_is_one_message(model, dataset, cluster, tmp_path):
    given = settings(model, dataset, tmp_path, num_workers=2, ray_address=cluster)
    with started(Config(**given)) as executor:
        import ray

        where = lambda _: ray.get_runtime_context().get_node_id()  # noqa: E731
        nodes = [worker.__ray_call__.remote(where) for worker in executor.workers]
        assert len(set(ray.get(nodes))) == 2
    with pytest.raises(ModelError, match="nowhere"):
        evaluate.run(Config(**given | {"model_name_or_path": "./nowhere"}))


def test_a_batch_is_done_again_once_when_its_worker_dies(model, dataset, alone, lives, cluster, tmp_path, monkeypatch):
    class MortalWorker(workers.ModelWorker):  # here, since Ray sends what is local to a function along
        def answer(self, method, examples, partners):
            for example in examples:
                _, _, lives = example.question.partition("DIE ")
                if lives and (left := Path(lives).read_text().splitlines()):
                    Path(lives).write_text("\n".join(left[1:]))
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(method, examples, partners)

    monkeypatch.setattr(workers, "ModelWorker", MortalWorker)
    (lives / "one").write_text("x")
    (lives / "two").write_text("x\nx")
    given = settings(model, dataset, tmp_path, methods="vanilla,dmlr", num_workers=2, ray_address=cluster)
    evaluate.run(Config(**given))
    assert [(lives / name).read_text() for name in ("one", "two")] == ["", ""]
    entries = read_results(tmp_path / "data" / "vanilla")["entries"]
    lost = {entry["row"]: entry["error"] for entry in entries if entry["stop_reason"] == "error"}
    assert set(lost) == {7, 9, 10, 11, 12}  # the missing picture, and the batch of the deadly question
    assert all("a worker died, and another in its place" in lost[row] for row in (9, 10, 11, 12))
    expected = alone["vanilla"]["results"]["entries"]
    for entry, known in zip(entries, expected, strict=True):
        if known["stop_reason"] == "error" or entry["row"] not in lost:
            assert {name: value for name, value in entry.items() if name != "seconds"} == known
    evaluate.run(Config(**given | {"resume": True, "methods": "vanilla"}))
    again = read_results(tmp_path / "data" / "vanilla")
    assert [entry["model_output"] for entry in again["entries"]] == [entry["model_output"] for entry in expected]
    assert again["errors"] == 1


# without Ray


def test_without_ray_one_process_works_and_several_say_what_is_missing(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"need Ray, which is not installed: pip install -e '\.\[ray\]'"):
        evaluate.run(Config(**settings(model, dataset, tmp_path, num_workers=2)))
    evaluate.run(Config(**settings(model, dataset, tmp_path, end_data_idx=1)))


def test_no_cluster_at_the_address_is_said_at_once(model, dataset, tmp_path):
    pytest.importorskip("ray")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(WorkerError, match=f"no Ray cluster at '{address}': .*refused"):
        evaluate.run(Config(**settings(model, dataset, tmp_path, ray_address=address)))


def test_a_loaded_model_cannot_go_to_workers(model, dataset, tmp_path):
    with pytest.raises(ConfigError, match="workers load the model themselves"):
        evaluate.run(Config(**settings(model, dataset, tmp_path, num_workers=2)), vlm=object())


@pytest.mark.parametrize(
    ("given", "cluster", "expected"),
    [
        ({}, {"CPU": 8}, ("cpu", {"num_cpus": 1})),
        ({"device": "cpu"}, {"CPU": 8, "GPU": 2}, ("cpu", {"num_cpus": 1})),
        ({}, {"CPU": 8, "GPU": 6}, ("cuda", {"num_cpus": 0, "num_gpus": 1})),
        ({"worker_device_round_robin": True}, {"GPU": 2}, ("cuda", {"num_cpus": 0, "num_gpus": 0.3333})),
    ],
)
def test_each_worker_has_a_gpu_or_shares_one_evenly(given, cluster, expected):
    assert placement(Config(num_workers=6, **given), cluster) == expected


@pytest.mark.parametrize(
    ("given", "cluster", "error", "message"),
    [
        ({}, {"CPU": 2}, WorkerError, "but the cluster has 2 CPUs"),
        ({}, {"GPU": 2}, WorkerError, "has 2 GPUs; with worker_device_round_robin"),
        ({"worker_device_round_robin": True}, {"GPU": 2}, WorkerError, "a multiple of them can share"),
        ({"device": "cuda"}, {"CPU": 8}, WorkerError, "the cluster has 0 GPUs"),
        ({"device": "cuda:1"}, {"CPU": 8, "GPU": 2}, ConfigError, "names one GPU for all workers"),
    ],
)
def test_what_workers_cannot_have_is_said(given, cluster, error, message):
    with pytest.raises(error, match=message):
        placement(Config(num_workers=3, **given), cluster)


@pytest.mark.parametrize(("threads", "nodes", "workers", "each"), [(8, 1, 2, 4), (8, 4, 6, 4), (2, 1, 4, 1)])
def test_threads_are_shared_by_the_workers_of_a_machine(threads, nodes, workers, each):
    assert threads_per_worker(threads, nodes, workers) == each


def test_images_travel_as_files_and_what_is_gone_is_the_workers_error(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    example = Example(0, 0, "?", "3", (str(tmp_path / "a.png"), str(tmp_path / "gone.png")))
    sent = with_image_files(example)
    assert sent.images == (ImageFile(str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()), example.images[1])
    assert open_image(sent.images[0]) == open_image(example.images[0])
    batch = prepare([sent])
    assert "gone.png: No such file" in batch.settled[0].error


def test_paths_reach_workers_in_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    config = Config(num_workers=2, ray_address="a:1", model_name_or_path="mine")
    moved = for_workers(config, "cpu")
    mine = {"model_name_or_path": str(tmp_path / "mine"), "device": "cpu", "num_workers": 1, "ray_address": ""}
    assert moved == config.replace(**mine)
    for kept in ("data/models/shapes-vl", "Qwen/some-model"):  # in the project, on the hub
        assert for_workers(config.replace(model_name_or_path=kept), "cpu").model_name_or_path == kept
