"""Shared fixtures, what counts as slow, and nothing that calls out."""

import os
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

import dmlr  # noqa: F401  # before torch: it says how threads wait

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Ray stays on 127.0.0.1 and reports nothing; read when it is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Names in a function's code that say that it starts a kernel, Ray, a browser or another process, all of them together.
STARTS = [{"notebooks", "run"}, {"nbval"}, {"Cluster"}, {"Popen"}, {"opened"}]


def pytest_collection_modifyitems(items):
    """A test is slow where it, or a fixture that it asks for, starts something anew; the others say so themselves."""
    for item in items:
        fixtures = [fixture.func for known in item._fixtureinfo.name2fixturedefs.values() for fixture in known[-1:]]
        functions = [item.function, *(function for function in fixtures if hasattr(function, "__code__"))]
        if any(names <= set(function.__code__.co_names) for function in functions for names in STARTS):
            item.add_marker("slow")


RAY = FileLock(Path(tempfile.gettempdir()) / "dmlr-tests-ray.lock")


@pytest.fixture(scope="module")
def alone_with_ray():
    """Two Rays on one machine get in each other's way: one module at a time, whatever runs beside it."""
    with RAY:
        yield


@pytest.fixture(scope="module")
def cluster(alone_with_ray):
    """Address of a Ray cluster of two nodes, both on this machine, with one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 2**28}
    started = Cluster(initialize_head=True, head_node_args=node)
    started.add_node(**node)
    yield started.address
    started.shutdown()
