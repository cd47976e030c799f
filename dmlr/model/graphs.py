"""Kernels recorded once and replayed: what a GPU needs when batches are small.

An iteration of the loop, and a decoded token, runs the same kernels on tensors of the same shapes again and again; at
batch 1 the GPU would spend most of its time waiting until Python has launched them. A recording holds addresses, not
values: so a batch is copied into a buffer that stays where it is, rounded up to few shapes, and every batch of its
shape is served by the same recording. Knows nothing about what the recorded functions compute.

On no GPU has this run yet: the tests replay the recorded operations on a CPU (tests/test_cuda_graphs.py); those marked
`gpu` do the same on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dmlr.model.cache import Prefix

ROUNDED = 128  # columns, image tokens and slots of a buffer are multiples of it
MOST = 4  # buffers of a model at a time, each with its recordings

Outputs = tuple[torch.Tensor | None, ...]


@dataclass
class Recording:
    """`inputs` and `outputs` are the tensors that `replay` reads and writes; `pool`: the memory of what is between."""

    inputs: list[torch.Tensor]
    outputs: Outputs
    replay: Callable[[], None]
    pool: Any = None


def record(function: Callable[..., Outputs], inputs: list[torch.Tensor], flags: dict, pool: Any) -> Recording:
    """A CUDA graph of function(*inputs, **flags). RuntimeError for what no graph can hold, and where memory runs out.

    pool: that of a graph that never runs at the same time, whose memory may be used again.
    """
    device = inputs[0].device
    with torch.cuda.device(device):  # a graph is of the current device, wherever its tensors are
        side, graph = side_stream(device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces in the first call on a stream
            function(*inputs, **flags)
        torch.cuda.current_stream().wait_stream(side)
        capture = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(side), capture:  # a capture that fails does not leave its stream itself
                outputs = function(*inputs, **flags)
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit
        except RuntimeError as error:
            why = f"this model's loop cannot be a CUDA graph, take cuda_graphs = false ({error})"
            raise RuntimeError(why) from error
    return Recording(inputs, outputs, graph.replay, graph.pool())


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where recordings are made: one for all, for a pool's memory and the workspaces of libraries are a stream's."""
    return torch.cuda.Stream(device)


class Recorded:
    """A buffer for batches of one shape, and what has been recorded over it.

    The recordings share their memory: none runs while another does, and what one returns is copied before the next.
    """

    def __init__(self, buffer: Prefix) -> None:
        self.buffer = buffer
        self.pool: Any = None
        self.recordings: dict[Hashable, Recording] = {}

    def __call__(self, function: Callable[..., Outputs], *inputs: torch.Tensor, **flags: bool) -> Outputs:
        """function(*inputs, **flags): recorded at the first call with these shapes and flags, replayed from then on.

        The function must compute the same at every call, from its inputs and the buffer alone; it is not kept, and may
        run twice while it is recorded.
        """
        key = (*((x.shape, x.dtype) for x in inputs), *flags.items())
        if key not in self.recordings:
            self.recordings[key] = record(function, [x.clone() for x in inputs], flags, self.pool)
            self.pool = self.recordings[key].pool
        recording = self.recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.replay()
        return tuple(x if x is None else x.clone() for x in recording.outputs)


class Recordings(OrderedDict[Hashable, Recorded]):
    """Those of one model, for MOST purposes and shapes at a time; beyond, the longest unused leaves first."""

    def over(self, prefix: Prefix, slots: int, purpose: Hashable) -> Recorded:
        """A buffer that holds this batch, with space for `slots` behind it, and what was recorded over it before.

        purpose: what tells apart functions that take inputs of the same shapes, and no more: a seed would record anew.
        """
        sizes = prefix.mask.shape[1], prefix.images.shape[1], slots
        columns, tokens, slots = (-(-n // ROUNDED) * ROUNDED for n in sizes)
        key = purpose, len(prefix.mask), columns, tokens, slots
        if key not in self:
            while len(self) >= MOST:
                self.popitem(last=False)
            self[key] = Recorded(prefix.buffer(columns, tokens, slots))
        self.move_to_end(key)
        prefix.copy_to(self[key].buffer)
        return self[key]

    @property
    def nbytes(self) -> int:
        """Of the keys and values in their buffers."""
        return sum(recorded.buffer.cache.nbytes for recorded in self.values())
