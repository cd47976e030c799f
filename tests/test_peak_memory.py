"""Memory that a call needs is seen, however short, and what is freed before is not counted."""

import torch

from dmlr.machine import peak_bytes

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
