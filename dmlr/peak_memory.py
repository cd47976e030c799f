"""How much memory one call needs at its peak, over what was there before. Knows nothing about models."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch


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
    process = psutil.Process()
    _give_back_freed()
    before = process.memory_info().rss
    with _sampler(process) as seen:
        work()
    return max(seen) - before


def _give_back_freed() -> None:
    """Freed memory that the allocator keeps would be used again without being seen; glibc can return it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _sampler(process: psutil.Process) -> Iterator[list[int]]:
    seen, stop = [process.memory_info().rss], threading.Event()

    def sample():
        while not stop.wait(0.001):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
