"""Bytes of the tensors that exist at a time, whatever holds them: what an estimate from shapes can be held to."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within it, every storage that an operation makes is counted until it is freed; a model's weights are not.

    `peak`: most bytes at a time.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._sizes: dict[int, int] = {}
        self._weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_mkldnn:  # those are weights, packed for few rows
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes and storage._cdata not in self._weights:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
