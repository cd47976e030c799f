"""Workers on Ray: each holds a model in a process of its own, on this machine or on those of a cluster.

The driver reads image files, hands out batches and takes answers back; a worker that is free gets the next batch. One
that dies is started again and its batch done again, once, both by Ray. Knows nothing about judging or logs: only the
driver writes.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmlr.config import Config, ConfigError
from dmlr.data.examples import Example
from dmlr.data.images import ImageError, ImageFile, read_image_file
from dmlr.machine import peak_memory
from dmlr.methods import Answer
from dmlr.model.vlm import VLM
from dmlr.run.batches import ModelFacts, answer_batch, failed, prepare

PATIENCE = 60  # seconds without a worker after which the driver says what it waits for
LOOPBACK = ("127.0.0.1", "localhost")


class WorkerError(RuntimeError):
    """Ray is missing or cannot be reached, or workers cannot start; the message says which and what to do."""


class ModelWorker:
    """What runs on Ray: a model that answers batches. Ray starts one that dies again, and it loads its model anew."""

    def __init__(self, config: Config, threads: int) -> None:
        self.config, self.threads, self.vlm = config, threads, None  # no work: the driver would not see why it failed

    def load(self) -> ModelFacts:
        """ModelError as `VLM.load`."""
        if self.vlm is None:
            torch.set_num_threads(self.threads)
            self.vlm = VLM.load(self.config)
        return ModelFacts.of(self.vlm, self.config)

    def answer(self, method: str, examples: list[Example], partners: Mapping[int, Example]) -> tuple[list[Answer], int]:
        """Answers in the order of the examples, and the most bytes of memory so far."""
        self.load()
        batch = prepare(examples, partners)
        answers = batch.answered(answer_batch(self.vlm, method, batch.questions, self.config))
        return [answer for _, answer in answers], peak_memory()


class Workers:
    """`config.num_workers` models on Ray as an executor (see `batches.InProcess`). Use as a context manager.

    Entering starts Ray (or joins the cluster at `config.ray_address`) and waits until all have their model. Raises
    WorkerError, ConfigError for a device that workers cannot share, and ModelError when the model cannot be loaded.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.peak_memory = config, 0
        self.workers: list[Any] = []

    def __enter__(self) -> Workers:
        self._ray, self._disconnect = connect(self.config)
        try:
            device, needs = placement(self.config, self._ray.cluster_resources())
            nodes = sum(node["Alive"] for node in self._ray.nodes())
            threads = threads_per_worker(torch.get_num_threads(), nodes, self.config.num_workers)
            options = {"scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": 1}
            actor = self._ray.remote(ModelWorker).options(**options, **needs)
            config = for_workers(self.config, device)
            self.workers = [actor.remote(config, threads) for _ in range(self.config.num_workers)]
            self.facts = shared_facts(self._loaded([worker.load.remote() for worker in self.workers]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            self._ray.kill(worker)
        self._disconnect()

    def answers(
        self, method: str, batches: Iterable[list[Example]], partners: Mapping[int, Example]
    ) -> Iterator[list[tuple[Example, Answer]]]:
        """Each batch's examples with their answers, in the order in which they are finished."""
        partners = partners if method == "swapped" else {}  # the only one that asks for them, and they have images too
        idle, busy = list(self.workers), {}
        for examples in batches:
            if not idle:
                yield self._finished(idle, busy)
            worker = idle.pop()
            theirs = {e.row: with_image_files(partners[e.row]) for e in examples if e.row in partners}
            busy[worker.answer.remote(method, list(map(with_image_files, examples)), theirs)] = worker, examples
        while busy:
            yield self._finished(idle, busy)

    def _finished(self, idle: list[Any], busy: dict[Any, tuple[Any, list[Example]]]) -> list[tuple[Example, Answer]]:
        """Waits for any worker, which is idle then; its batch and answers, or why it has none."""
        (ref,), _ = self._ray.wait(list(busy), num_returns=1)
        worker, examples = busy.pop(ref)
        idle.append(worker)
        try:
            answers, memory = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # what the worker itself raised
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            lost = WorkerError(f"a worker died with this batch, and another before it: {_one_line(error)}")
            return [(example, failed(lost)) for example in examples]
        self.peak_memory = max(self.peak_memory, memory)
        return list(zip(examples, answers, strict=True))

    def _loaded(self, refs: list[Any]) -> list[ModelFacts]:
        """Facts of each worker's model, when all are there; says what it waits for."""
        waiting = refs
        while waiting:
            ready, waiting = self._ray.wait(waiting, num_returns=1, timeout=PATIENCE)
            if not ready:
                text = f"waiting for {len(waiting)} of {len(refs)} workers: a model that loads, or a busy cluster"
                print(text, file=sys.stderr, flush=True)
            try:
                self._ray.get(ready)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                why = "workers die before they have loaded the model; is there memory for it?"
                raise WorkerError(f"{why} {_one_line(error)}") from None
        return self._ray.get(refs)


def shared_facts(facts: list[ModelFacts]) -> ModelFacts:
    """What holds for all workers; the batch fits the one with the least memory. WorkerError where they differ."""
    first = facts[0]
    for other in facts:
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise WorkerError(
                f"one worker computes in {first.dtype} on {first.device}, another in {other.dtype} on "
                f"{other.device}: set dtype and device"
            )
    return replace(first, fitting_batch=min(one.fitting_batch for one in facts))


def with_image_files(example: Example) -> Example:
    """The example with its images as the bytes of their files, which a worker elsewhere need not have.

    What cannot be read stays as it is: the worker will say why.
    """

    def content(source: str) -> str | ImageFile:
        try:
            return read_image_file(source)
        except ImageError:
            return source

    return replace(example, images=tuple(map(content, example.images)))


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
