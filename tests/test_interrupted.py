"""Runs that are killed or run out of disk: what was done is kept, and resume ends where an unharmed run does."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from saved_run import METHODS, outcome, save_dataset, save_model, settings

ROWS = 32
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_with_ray")]

KILLS = {1: 10, 2: 2}  # by number of workers: these take seconds to start, a process alone a fraction of one


class Runs:
    """Benchmark runs as forks of one process that has imported everything, see forked_runs.py."""

    def __init__(self):
        code = Path(__file__).with_name("forked_runs.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
        self.server = subprocess.Popen([sys.executable, str(code)], **pipes, env=environment)

    def start(self, given):
        """Process id of a new run."""
        self.server.stdin.write(json.dumps(given) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self):
        """Exit status and last words of the run."""
        return json.loads(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait(30)


@pytest.fixture(scope="module")
def runs():
    started = Runs()
    yield started
    started.close()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Parameters of the run, but for the folder."""
    model = save_model(tmp_path_factory.mktemp("model"))
    dataset = save_dataset(tmp_path_factory.mktemp("data"), [f"How many? {i}" for i in range(ROWS)])
    return settings(model, dataset, "nowhere")


@pytest.fixture(scope="module")
def uninterrupted(runs, given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs.start(given | {"output_dir": str(folder)})
    assert runs.wait() == [0, ""]
    left = outcome(folder)
    assert all(len(method["results"]["entries"]) == ROWS for method in left.values())
    return left


def logged(folder):
    """Records in the run's logs; a line that a kill tore is none."""
    return sum(path.read_bytes().count(b"\n") for path in Path(folder).glob("data/*/log.jsonl"))


@pytest.mark.parametrize("workers", list(KILLS))
def test_kill_9_at_any_moment_changes_nothing(workers, runs, given, uninterrupted, tmp_path, request):
    here = given | {"output_dir": str(tmp_path), "resume": True, "num_workers": workers}
    if workers > 1:
        here["ray_address"] = request.getfixturevalue("cluster")
    rng, killed, before = random.Random(workers), 0, 0
    each = 2 * ROWS * len(METHODS) // (KILLS[workers] + 2)  # records that a run gets to write at most, about
    for _ in range(KILLS[workers]):
        pid, goal, patience = runs.start(here), before + rng.randrange(each), time.monotonic() + 120
        while logged(tmp_path) <= goal and Path(f"/proc/{pid}").exists() and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
        killed += runs.wait()[0] == -signal.SIGKILL
        assert logged(tmp_path) >= before
        before = logged(tmp_path)
    runs.start(here)
    assert runs.wait() == [0, ""]
    assert killed >= KILLS[workers] / 2  # the last ones may find nothing left to do
    assert outcome(tmp_path) == uninterrupted


def test_a_disk_that_fills_up_is_one_message_and_resume_ends_as_if_it_had_not(runs, given, uninterrupted, tmp_path):
    here = given | {"output_dir": str(tmp_path), "resume": True}
    runs.start(here | {"file_limit": 12_000})
    status, said = runs.wait()
    kept = logged(tmp_path)
    assert status == 1 and 0 < kept < ROWS
    assert re.match(rf"ResultsError: .*log\.jsonl: cannot be written: .*; {kept} finished records are kept", said)
    runs.start(here)
    assert runs.wait() == [0, ""]
    assert outcome(tmp_path) == uninterrupted
