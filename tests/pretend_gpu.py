"""A GPU that is not there: tensors that say that they are on `cuda:0`, and keep their numbers on the CPU.

Every operation is done for real. One that mixes them with tensors of the CPU is refused, as a GPU refuses it, and
attention lays its output out as a GPU's kernels do (torch/_meta_registrations.py says how). What kernels compute, how
fast, and in which memory, this cannot tell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
# Between devices, and indexing by what lies on the CPU: torch allows that.
MAY_MIX = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.__getitem__, torch.Tensor.__setitem__}
NOT_THERE = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnGPU(torch.Tensor):
    """By `tensor.as_subclass(OnGPU)`."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def tolist(self):
        return self.as_subclass(torch.Tensor).tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendGPU(TorchFunctionMode):
    """While it is on, `device="cuda:0"` makes such tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    with torch._C.DisableTorchFunction():
        there = [x for x in tensors if isinstance(x, OnGPU)]
        if there and function not in MAY_MIX:
            mixed = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
            assert not mixed, f"{function}: a tensor on the CPU, {tuple(mixed[0].shape)}, among those on the GPU"
        assert not (there and function in NOT_THERE), f"{function} needs the tensor on the CPU"
        stays = lands_on_gpu(function, args, kwargs, bool(there))
        assert not (stays and any(isinstance(x, torch.Generator) for x in leaves)), f"{function}: a CPU's generator"
        args, kwargs = tree_map(on_the_cpu, (args, kwargs))
        out = function(*args, **kwargs)
        if there and function is F.scaled_dot_product_attention:  # [B, H, S, d] in memory as [B, S, H, d]
            out, mask = out.transpose(1, 2).contiguous().transpose(1, 2), kwargs.get("attn_mask")
            copied = mask is not None and mask.dtype != torch.bool and any(step % 8 for step in mask.stride()[:-1])
            assert not copied, "a mask whose rows do not begin at multiples of 8 is copied in every layer"
        if isinstance(out, torch.Size):
            return out
        return tree_map(lambda x: there_is(x) if stays and isinstance(x, torch.Tensor) else x, out)


def lands_on_gpu(function, args, kwargs, there):
    """Where the result of a call is."""
    if function is torch.Tensor.cpu:
        return False
    if function in MAY_MIX - {torch.Tensor.to}:
        return isinstance(args[0], OnGPU)
    if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return isinstance(args[1], OnGPU)
    asked = [x for x in (*args, *kwargs.values()) if is_device(x)]
    return torch.device(asked[0]).type == "cuda" if asked else there


def is_device(x):
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda"))


def there_is(tensor):
    made = tensor.as_subclass(OnGPU)
    made.held = tensor  # the one that is part of a graph of gradients
    return made


def on_the_cpu(x):
    if isinstance(x, OnGPU):
        return x.held if hasattr(x, "held") else x.as_subclass(torch.Tensor)
    return torch.device("cpu") if is_device(x) else x


def to_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its weights there, in place."""
    for part in module.modules():
        for name, value in [*part._parameters.items()]:
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().as_subclass(OnGPU), requires_grad=False)
        for name, value in [*part._buffers.items()]:
            if value is not None:
                part._buffers[name] = value.as_subclass(OnGPU)
    return module
