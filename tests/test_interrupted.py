"""Runs that are killed or run out of disk: what was done is kept, and resume ends where an unharmed run does."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from saved_run import METHODS, outcome, save_dataset, save_model, settings

from dmlr.config import Config
from dmlr.run import evaluate

ROWS = 32
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_with_ray")]

KILLS = {1: 10, 2: 2}  # by number of workers: these take seconds to start, a process alone a fraction of one
FORKS = multiprocessing.get_context("forkserver")  # of one process that has imported everything
FORKS.set_forkserver_preload(["pytest", "dmlr.run.evaluate", "dmlr.model.loading"])


def run(given, file_limit, said):
    """What a process does; never returns. `file_limit`: bytes that a file may have; `said`: where an error goes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    status = 1
    try:
        evaluate.run(Config(**given))
        status = 0
    except Exception as error:
        said.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def started(given, file_limit=resource.RLIM_INFINITY, said=None):
    process = FORKS.Process(target=run, args=(given, file_limit, said))
    process.start()
    return process


def status(process):
    """Exit status at the end; negative: the signal."""
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Parameters of the run, but for the folder."""
    model = save_model(tmp_path_factory.mktemp("model"))
    dataset = save_dataset(tmp_path_factory.mktemp("data"), [f"How many? {i}" for i in range(ROWS)])
    return settings(model, dataset, "nowhere")


@pytest.fixture(scope="module")
def uninterrupted(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert status(started(given | {"output_dir": str(folder)})) == 0
    left = outcome(folder)
    assert all(len(method["results"]["entries"]) == ROWS for method in left.values())
    return left


def logged(folder):
    """Records in the run's logs; a line that a kill tore is none."""
    return sum(path.read_bytes().count(b"\n") for path in Path(folder).glob("data/*/log.jsonl"))


@pytest.mark.parametrize("workers", list(KILLS))
def test_kill_9_at_any_moment_changes_nothing(workers, given, uninterrupted, tmp_path, request):
    here = given | {"output_dir": str(tmp_path), "resume": True, "num_workers": workers}
    if workers > 1:
        here["ray_address"] = request.getfixturevalue("cluster")
    rng, killed, before = random.Random(workers), 0, 0
    each = 2 * ROWS * len(METHODS) // (KILLS[workers] + 2)  # records that a run gets to write at most, about
    for _ in range(KILLS[workers]):
        process, goal, patience = started(here), before + rng.randrange(each), time.monotonic() + 120
        while logged(tmp_path) <= goal and process.is_alive() and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        killed += status(process) == -signal.SIGKILL
        assert logged(tmp_path) >= before
        before = logged(tmp_path)
    assert status(started(here)) == 0
    assert killed >= KILLS[workers] / 2  # the last ones may find nothing left to do
    assert outcome(tmp_path) == uninterrupted


def test_a_disk_that_fills_up_is_one_message_and_resume_ends_as_if_it_had_not(given, uninterrupted, tmp_path):
    here = given | {"output_dir": str(tmp_path), "resume": True}
    heard, said = FORKS.Pipe(duplex=False)
    assert status(started(here, 12_000, said)) == 1
    kept, words = logged(tmp_path), heard.recv()
    assert words.startswith("ResultsError: ") and 0 < kept < ROWS
    assert f"log.jsonl: cannot be written: File too large; {kept} finished records are kept" in words
    assert status(started(here)) == 0
    assert outcome(tmp_path) == uninterrupted
