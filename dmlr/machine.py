"""What a run runs on: versions, device, memory, speed. Knows nothing about runs and models."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import psutil
import torch

from dmlr.config import root


def environment() -> dict[str, str]:
    """Versions and the revision of this code, for the report's header."""
    try:
        git = ["git", "-C", str(root()), "describe", "--always", "--dirty"]
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "revision": revision or "unknown",
    }


def peak_memory() -> int:
    """Most bytes so far: allocated on all GPUs, or of this process where it uses none."""
    allocated = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return allocated or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most memory that a call adds: of the GPU, or of this process on a CPU (sampled every millisecond)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # freed memory that glibc keeps would be used again without being seen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def sample():
        while not done.wait(0.001):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max(seen) - seen[0]


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of a large tensor reads and writes."""
    block = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(block)
    return 2 * block.nbytes / median_seconds(lambda: target.copy_(block), device, 5)
