"""Kernels recorded once and replayed: what a GPU needs when batches are small.

Each iteration of the loop runs the same kernels on tensors of the same shapes; at batch 1 the GPU would spend most of
its time waiting until Python has launched them. Knows nothing about what the function computes.

On no GPU has this run yet: the tests replay the recorded operations on a CPU (tests/test_cuda_graphs.py); those marked
`gpu` do the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

Outputs = tuple[torch.Tensor | None, ...]


@dataclass
class Recording:
    """`inputs` and `outputs` are the tensors that `replay` reads and writes."""

    inputs: list[torch.Tensor]
    outputs: Outputs
    replay: Callable[[], None]


def record(function: Callable[..., Outputs], inputs: list[torch.Tensor]) -> Recording:
    """A CUDA graph of function(*inputs). RuntimeError where it does what no graph can hold, or memory runs out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate their workspaces in the first call on a stream
        function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    except torch.OutOfMemoryError:
        raise  # a smaller batch may fit
    except RuntimeError as error:
        raise RuntimeError(f"this model's loop cannot be a CUDA graph, take cuda_graphs = false ({error})") from error
    return Recording(inputs, outputs, graph.replay)


class Replayed:
    """`function` with its kernels replayed whenever the same shapes come again.

    The first call with new shapes runs plainly (and reserves whatever room the function wants), the second one
    records. Whatever else the function reads or writes (weights, the prefix's keys and values) must stay where it is
    in memory; `place()` names where that is, and a new place is recorded anew.
    """

    def __init__(self, function: Callable[..., Outputs], place: Callable[[], Hashable]):
        self.function, self.place = function, place
        self.recordings: dict[Hashable, Recording | None] = {}

    def __call__(self, *inputs: torch.Tensor, **flags: bool) -> Outputs:
        key = (*((x.shape, x.dtype) for x in inputs), *flags.items(), self.place())
        if key not in self.recordings:
            outputs = self.function(*inputs, **flags)
            self.recordings[(*key[:-1], self.place())] = None
            return outputs
        if self.recordings[key] is None:
            kept = [x.clone() for x in inputs]
            self.recordings[key] = record(lambda *x: self.function(*x, **flags), kept)
        recording = self.recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.replay()
        return tuple(x if x is None else x.clone() for x in recording.outputs)
