"""Workers on Ray: each holds a model in a process of its own, on this machine or on those of a cluster.

The driver opens images, hands out batches and takes answers back; a worker that is free gets the next batch. One that
dies is replaced and its batch done again, once. Knows nothing about ground truths or logs: only the driver writes.
The machines need this package in the same version and the model under the same name; a dataset only the driver needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dmlr.config import Config, ConfigError
from dmlr.data.examples import Example
from dmlr.machine import peak_memory
from dmlr.methods import Answer, Question
from dmlr.model.vlm import VLM
from dmlr.run.batches import Batch, ModelFacts, answer_batch

PATIENCE = 60  # seconds without a worker after which the driver says what it waits for
LOOPBACK = ("127.0.0.1", "localhost")


class WorkerError(RuntimeError):
    """Ray is missing or cannot be reached, or workers cannot start; the message says which and what to do."""


class ModelWorker:
    """What runs on Ray: a model, loaded once, that answers batches."""

    def load(self, config: Config, threads: int) -> ModelFacts:
        """ModelError as `VLM.load`; no work in the constructor, so that the driver sees it."""
        torch.set_num_threads(threads)
        self.config, self.vlm = config, VLM.load(config)
        return ModelFacts.of(self.vlm, config)

    def answer(self, method: str, questions: list[Question]) -> tuple[list[Answer], int]:
        """Answers, and the most bytes of memory so far."""
        return answer_batch(self.vlm, method, questions, self.config), peak_memory()


class Workers:
    """`config.num_workers` models on Ray, as the ones that answer (see `batches.InProcess`). A context manager.

    Entering starts Ray (or joins the cluster at `config.ray_address`) and waits for the first worker; the others join
    when their model is loaded. Raises WorkerError, ConfigError for a device that workers cannot share, and ModelError
    when the model cannot be loaded.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.peak_memory = config, 0
        self.facts: ModelFacts | None = None  # of the first worker that is ready; the others must be like it
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Batch | None, int]] = {}  # by ref: worker; batch (None: loads), which attempt
        self._died_loading = 0

    def __enter__(self) -> Workers:
        self._ray, self._disconnect = connect(self.config)
        try:
            device, needs = placement(self.config, self._ray.cluster_resources())
            nodes = sum(node["Alive"] for node in self._ray.nodes())
            self._threads = threads_per_worker(torch.get_num_threads(), nodes, self.config.num_workers)
            self._worker_config = for_workers(self.config, device)
            self._actor = self._ray.remote(ModelWorker).options(scheduling_strategy="SPREAD", **needs)
            for _ in range(self.config.num_workers):
                self._start()
            self._wait_for_the_first()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._idle + [worker for worker, *_ in self._busy.values()]:
            self._ray.kill(worker)
        self._disconnect()

    def answers(self, method: str, batches: Iterable[Batch]) -> Iterator[list[tuple[Example, Answer]]]:
        """Each batch's examples with their answers, in the order in which they are finished."""
        todo: Iterator[tuple[Batch, int]] = ((batch, 1) for batch in batches)
        task = next(todo, None)
        while task or any(batch for _, batch, _ in self._busy.values()):
            if task and not task[0].questions:
                yield task[0].answered([])
                task = next(todo, None)
            elif task and self._idle:
                worker, (batch, attempt) = self._idle.pop(), task
                self._busy[worker.answer.remote(method, batch.questions)] = worker, batch, attempt
                task = next(todo, None)
            else:
                batch, attempt, result = self._next_result()
                if batch is None:
                    continue
                if not isinstance(result, Exception):
                    yield batch.answered(result)
                elif attempt == 1:
                    todo = chain([(batch, 2)], todo)
                    task = task or next(todo)
                else:
                    yield batch.lost(result)

    def _start(self) -> None:
        worker = self._actor.remote()
        self._busy[worker.load.remote(self._worker_config, self._threads)] = worker, None, 1

    def _next_result(self) -> tuple[Batch | None, int, Any]:
        """Waits for any worker: its batch (None: it has loaded its model), attempt, and answers or why it died."""
        errors = self._ray.exceptions
        (ref,), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, batch, attempt = self._busy.pop(ref)
        try:
            result = self._ray.get(ref)
        except errors.RayTaskError as error:  # what the worker itself raised
            raise error.cause from None
        except errors.RayError as error:
            self._ray.kill(worker)
            self._died_loading += batch is None
            if self._died_loading > self.config.num_workers:
                why = f"workers die before they have loaded the model; is there memory for it? {_one_line(error)}"
                raise WorkerError(why) from None
            self._start()
            why = f"a worker died with this batch, and another before it: {_one_line(error)}"
            return batch, attempt, WorkerError(why)
        if batch is None:
            self._check_same(result)
        self._idle.append(worker)
        if batch is None:
            return None, attempt, None
        answers, memory = result
        self.peak_memory = max(self.peak_memory, memory)
        return batch, attempt, answers

    def _wait_for_the_first(self) -> None:
        while not self._idle:
            if self._ray.wait(list(self._busy), num_returns=1, timeout=PATIENCE)[0]:
                self._next_result()
            else:
                print("waiting for a worker: a model that loads, or a busy cluster", file=sys.stderr, flush=True)

    def _check_same(self, facts: ModelFacts) -> None:
        if self.facts is None:
            self.facts = facts
        if (facts.dtype, facts.device) != (self.facts.dtype, self.facts.device):
            raise WorkerError(
                f"one worker computes in {self.facts.dtype} on {self.facts.device}, another in {facts.dtype} on "
                f"{facts.device}: set dtype and device"
            )


def connect(config: Config) -> tuple[Any, Callable[[], None]]:
    """Ray's module, connected, and what undoes that. WorkerError when it is not possible.

    Without an address Ray starts here, for this process alone, and ends with it; it can be reached from this machine
    alone, unless the process had imported Ray before, without the switch for that. A Ray that the process is connected
    to already is used, and left as it is.
    """
    host, _, port = config.ray_address.rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not config.ray_address or host in LOOPBACK:
        # Ray's switch for staying on 127.0.0.1, its default on macOS and Windows; read when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise WorkerError(
            "several workers need Ray, which is not installed: pip install -e '.[ray]'; num_workers = 1 runs without"
        ) from None
    if ray.is_initialized():
        return ray, lambda: None
    undo, this_machine = contextlib.ExitStack(), ray.util.get_node_ip_address()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if not config.ray_address:
            from ray.cluster_utils import Cluster

            here = Cluster(initialize_head=True, head_node_args=node_here(config.num_workers, this_machine))
            undo.callback(here.shutdown)
        elif port.isdigit() and "/" not in host:
            host = this_machine if host in LOOPBACK else host  # as Ray reads it
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        undo.callback(ray.shutdown)
        ray.init(config.ray_address or here.address, **quiet)
    except Exception as error:  # Ray raises bare exceptions, too
        undo.close()
        where = f"no Ray cluster at {config.ray_address!r}" if config.ray_address else "Ray does not start"
        token = "; it asks for a token: set RAY_AUTH_MODE=token" if "InvalidAuthToken" in str(error.__cause__) else ""
        raise WorkerError(f"{where}: {_one_line(error)}{token}") from error
    return ray, undo.close


def node_here(workers: int, ip: str) -> dict[str, Any]:
    """What Ray is told about this machine, known by `ip`, when it starts here for so many workers.

    Ports are named (`ray.init` cannot) because Ray gives its helpers only seconds to choose their own, and dies where
    a busy machine takes longer. Closed again at once, they are free when Ray takes them.
    """
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((ip, 0))) for _ in names]
        ports = {name: listener.getsockname()[1] for name, listener in zip(names, listeners, strict=True)}
    resources = {"num_cpus": workers, "num_gpus": torch.cuda.device_count(), "object_store_memory": 2**31}  # bytes
    quiet = {"include_dashboard": False, "include_log_monitor": False}
    return {"node_ip_address": ip, **resources, **quiet, **ports}


def placement(config: Config, cluster: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """The device of every worker, and what each asks of Ray, given the cluster's resources in total.

    On GPUs each worker has one of its own, chosen by Ray, and sees only that. More workers than GPUs share them
    evenly if `worker_device_round_robin`; on CPUs Ray spreads them over the machines.
    """
    workers, gpus = config.num_workers, int(cluster.get("GPU", 0))
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"device = {config.device!r} names one GPU for all workers; take 'cuda', and CUDA_VISIBLE_DEVICES to choose"
        )
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    if device != "cuda":
        if workers > cluster.get("CPU", 0):
            raise WorkerError(f"num_workers = {workers}, but the cluster has {cluster.get('CPU', 0):g} CPUs")
        return device, {"num_cpus": 1}
    if not gpus:
        raise WorkerError("device = 'cuda', but Ray sees no GPU")
    if workers <= gpus:
        return device, {"num_cpus": 0, "num_gpus": 1}
    if not config.worker_device_round_robin:
        raise WorkerError(
            f"num_workers = {workers}, but there are {gpus} GPUs; worker_device_round_robin = true lets workers share"
        )
    if workers % gpus:
        raise WorkerError(f"num_workers = {workers} cannot share {gpus} GPUs evenly; take a multiple of {gpus}")
    return device, {"num_cpus": 0, "num_gpus": math.floor(10_000 * gpus / workers) / 10_000}  # Ray counts in 1/10,000


def threads_per_worker(threads: int, nodes: int, workers: int) -> int:
    """CPU threads of a worker: the driver's own count, shared by the workers of a machine; all machines alike."""
    return max(1, threads // math.ceil(workers / nodes))


def for_workers(config: Config, device: str) -> Config:
    """The configuration in a worker: its device, and paths that do not depend on the working folder.

    What lies in the project stays relative to it, since another machine may have the project elsewhere.
    """
    paths = {name: getattr(config, name) for name in ("model_name_or_path", "prompts_file")}
    project = Path(__file__).resolve().parents[1]
    moved = {
        name: str(Path(path).resolve())
        for name, path in paths.items()
        if path and Path(path).exists() and not (project / path).exists()
    }
    return config.replace(device=device, num_workers=1, ray_address="", **moved)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
