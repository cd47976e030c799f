"""Shared fixtures: tiny random models of the real architecture, and nothing that calls out."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Ray stays on 127.0.0.1 and reports nothing; read when it is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def cluster():
    """Address of a Ray cluster of two nodes with one CPU each. Ports are named, so that a slow start is waited for."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    from saved_run import free_port

    def node():
        ports = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
        where = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "include_dashboard": False}
        return {**where, "include_log_monitor": False, **{name: free_port() for name in ports}}

    started = Cluster(initialize_head=True, head_node_args=node())
    started.add_node(**node())
    yield started.address
    started.shutdown()
