"""Kernels recorded once and replayed: what a GPU needs when batches are small.

Each iteration of the loop runs the same kernels on tensors of the same shapes; at batch 1 the GPU would spend most of
its time waiting until Python has launched them. A recording holds addresses, not values: what it reads must stay where
it is in memory. Knows nothing about what the function computes.

On no GPU has this run yet: the tests replay the recorded operations on a CPU (tests/test_cuda_graphs.py); those marked
`gpu` do the same on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate their workspaces in the first call on a stream
        function(*inputs, **flags)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            outputs = function(*inputs, **flags)
    except torch.OutOfMemoryError:
        raise  # a smaller batch may fit
    except RuntimeError as error:
        raise RuntimeError(f"this model's loop cannot be a CUDA graph, take cuda_graphs = false ({error})") from error
    return Recording(inputs, outputs, graph.replay, graph.pool())


class Replayed:
    """`function` with its kernels recorded at the first call with new shapes and flags, and replayed from then on.

    Its recordings share their memory: none runs while another does, and what one returns is copied before the next.
    """

    def __init__(self, function: Callable[..., Outputs]):
        self.function = function
        self.pool: Any = None
        self.recordings: dict[Hashable, Recording] = {}

    def __call__(self, *inputs: torch.Tensor, **flags: bool) -> Outputs:
        key = (*((x.shape, x.dtype) for x in inputs), *flags.items())
        if key not in self.recordings:
            kept = [x.clone() for x in inputs]
            self.recordings[key] = record(self.function, kept, flags, self.pool)
            self.pool = self.recordings[key].pool
        recording = self.recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.replay()
        return tuple(x if x is None else x.clone() for x in recording.outputs)


class Kept:
    """Things by what they were made for."""

    def __init__(self) -> None:
        self.things: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], most: int) -> Any:
        """The thing of this key, made where there is none. Beyond `most` things the longest unused one leaves first."""
        if key not in self.things:
            while len(self.things) >= most:
                self.things.popitem(last=False)
            self.things[key] = make()
        self.things.move_to_end(key)
        return self.things[key]

    def __len__(self) -> int:
        return len(self.things)

    def clear(self) -> None:
        """Lets go of all of them, and of the memory that they hold."""
        self.things.clear()
