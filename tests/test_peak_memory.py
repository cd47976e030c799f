"""Memory that a call needs is seen, however short, and what is freed before is not counted."""

import torch

from dmlr.machine import peak_bytes, peak_memory

CPU = torch.device("cpu")


def test_peak_memory_is_seen():
    """Also the second time, when the allocator could serve it from what the first left behind."""
    for _ in range(2):
        small = [torch.ones(250_000) for _ in range(80)]
        del small
        assert peak_bytes(CPU, lambda: torch.stack([torch.ones(250_000) for _ in range(80)])) > 50_000_000


def test_what_was_there_before_is_not_counted():
    kept = torch.ones(25_000_000)
    assert peak_bytes(CPU, lambda: kept.sum()) < 50_000_000


def test_a_run_has_the_memory_of_the_gpus_that_it_uses_or_of_its_process(monkeypatch):
    taken = [0, 0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(taken))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: taken[device])
    assert peak_memory() > 10**6, "device = cpu beside GPUs"
    taken[1] = 5
    assert peak_memory() == 5, "device = cuda:1"
