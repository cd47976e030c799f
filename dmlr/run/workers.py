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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from dmlr.config import Config, ConfigError, resolved
from dmlr.data.examples import Example
from dmlr.data.images import ImageError, ImageFile, read_image_file
from dmlr.machine import peak_memory
from dmlr.methods import Answer
from dmlr.model.vlm import VLM
from dmlr.run.batches import InProcess, ModelFacts, failed

PATIENCE = 60  # seconds without a worker after which the driver says what it waits for
LOOPBACK = ("127.0.0.1", "localhost")


class WorkerError(RuntimeError):
    """Ray is missing or cannot be reached, or workers cannot start; the message says which and what to do."""


class ModelWorker:
    """What runs on Ray: a model that answers batches. Ray starts one that dies again, and it loads its model anew."""

    def __init__(self, config: Config, threads: int) -> None:
        self.config, self.threads, self.model = config, threads, None  # no work: the driver would not see why it failed

    def load(self) -> ModelFacts:
        """ModelError as `VLM.load`."""
        if self.model is None:
            torch.set_num_threads(self.threads)
            self.model = InProcess(VLM.load(self.config), self.config)
        return self.model.facts

    def answer(self, method: str, examples: list[Example], partners: Mapping[int, Example]) -> tuple[list[Answer], int]:
        """Answers in the order of the examples, and the most bytes of memory so far."""
        self.load()
        return [answer for _, answer in self.model.answers(method, [examples], partners)], peak_memory()


@contextlib.contextmanager
def started(config: Config) -> Iterator[Workers]:
    """`config.num_workers` models on Ray, which is started, or joined at `config.ray_address`; all have their model.

    Raises WorkerError, ConfigError for a device that workers cannot share, and ModelError when the model cannot be
    loaded.
    """
    with connected(config) as ray:
        device, needs = placement(config, ray.cluster_resources())
        nodes = sum(node["Alive"] for node in ray.nodes())
        given = for_workers(config, device), threads_per_worker(torch.get_num_threads(), nodes, config.num_workers)
        options = {"scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": 1}
        actor = ray.remote(ModelWorker).options(**options, **needs)
        workers = [actor.remote(*given) for _ in range(config.num_workers)]
        try:
            loading = [worker.load.remote() for worker in workers]
            while waiting := ray.wait(loading, num_returns=len(loading), timeout=PATIENCE)[1]:
                text = f"waiting for {len(waiting)} of {len(loading)} workers: a model that loads, or a busy cluster"
                print(text, file=sys.stderr, flush=True)
            facts = [result(ray, ref) for ref in loading]
            yield Workers(ray, workers, replace(facts[0], fitting_batch=min(one.fitting_batch for one in facts)))
        finally:
            for worker in workers:
                ray.kill(worker)


class Workers:
    """Actors on Ray as an executor, like `batches.InProcess`."""

    def __init__(self, ray: Any, workers: list[Any], facts: ModelFacts) -> None:
        self.ray, self.workers, self.facts, self.peak_memory = ray, workers, facts, 0

    def answers(
        self, method: str, batches: Iterable[list[Example]], partners: Mapping[int, Example]
    ) -> Iterator[tuple[Example, Answer]]:
        """Examples with their answers, batch by batch, in the order in which they are finished."""
        partners = partners if method == "swapped" else {}  # the only one that asks for them, and they have images too
        idle, busy, left = list(self.workers), {}, iter(batches)
        while True:
            while idle and (examples := next(left, None)):
                theirs = {e.row: with_image_files(partners[e.row]) for e in examples if e.row in partners}
                worker = idle.pop()
                busy[worker.answer.remote(method, list(map(with_image_files, examples)), theirs)] = worker, examples
            if not busy:
                return
            (ref,), _ = self.ray.wait(list(busy), num_returns=1)
            worker, examples = busy.pop(ref)
            idle.append(worker)
            try:
                answers, memory = result(self.ray, ref)
            except WorkerError as lost:
                answers, memory = [failed(lost) for _ in examples], 0
            self.peak_memory = max(self.peak_memory, memory)
            yield from zip(examples, answers, strict=True)


def result(ray: Any, ref: Any) -> Any:
    """What a worker returns, or raises; WorkerError when it died, and died again in the second attempt."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # what the worker itself raised
        raise error.cause from None
    except ray.exceptions.RayError as error:
        why = f"a worker died, and another in its place; is there memory for the model? {_one_line(error)}"
        raise WorkerError(why) from None


def with_image_files(example: Example) -> Example:
    """The example with its images as the bytes of their files, which a worker elsewhere need not have.

    What cannot be read stays as it is: the worker will say why.
    """

    def content(source: str) -> str | ImageFile:
        with contextlib.suppress(ImageError):
            return read_image_file(source)
        return source

    return replace(example, images=tuple(map(content, example.images)))


@contextlib.contextmanager
def connected(config: Config) -> Iterator[Any]:
    """Ray's module, connected. WorkerError when it is not possible.

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
        yield ray
        return
    here = {"num_cpus": config.num_workers, "include_dashboard": False, "object_store_memory": 2**31}  # bytes
    try:
        if port.isdigit() and "/" not in host:
            host = ray.util.get_node_ip_address() if host in LOOPBACK else host  # as Ray reads it
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        given = {} if config.ray_address else here
        ray.init(config.ray_address or "local", log_to_driver=False, logging_level=logging.ERROR, **given)
    except Exception as error:  # Ray raises bare exceptions, too
        where = f"no Ray cluster at {config.ray_address!r}" if config.ray_address else "Ray does not start"
        raise WorkerError(f"{where}: {_one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def placement(config: Config, cluster: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """The device of every worker, and what each asks of Ray, given the cluster's resources in total.

    On GPUs each worker has one of its own, chosen by Ray, and sees only that. More workers than GPUs share them
    evenly if `worker_device_round_robin`; on CPUs Ray spreads them over the machines.
    """
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"device = {config.device!r} names one GPU for all workers; take 'cuda', and CUDA_VISIBLE_DEVICES to choose"
        )
    device = ("cuda" if cluster.get("GPU") else "cpu") if config.device == "auto" else config.device
    kind, workers = "GPU" if device == "cuda" else "CPU", config.num_workers
    there, share = int(cluster.get(kind, 0)), 1.0
    if workers > there:
        if kind == "CPU" or not there or not config.worker_device_round_robin or workers % there:
            hint = "; with worker_device_round_robin a multiple of them can share" if kind == "GPU" and there else ""
            raise WorkerError(f"num_workers = {workers}, but the cluster has {there} {kind}s{hint}")
        share = math.floor(10_000 * there / workers) / 10_000  # Ray counts in 1/10,000
    return device, {"num_cpus": 1} if kind == "CPU" else {"num_cpus": 0, "num_gpus": share}


def threads_per_worker(threads: int, nodes: int, workers: int) -> int:
    """CPU threads of a worker: the driver's own count, shared by the workers of a machine; all machines alike."""
    return max(1, threads // math.ceil(workers / nodes))


def for_workers(config: Config, device: str) -> Config:
    """The configuration in a worker: its device, and paths that do not depend on the working folder.

    What lies in the project stays relative to it, since another machine may have the project elsewhere.
    """
    moved = {name: resolved(getattr(config, name)) for name in ("model_name_or_path", "prompts_file")}
    return config.replace(device=device, num_workers=1, ray_address="", **moved)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
