"""Linear layers on a CPU through oneDNN instead of MKL.

torch multiplies float32 matrices with MKL. oneDNN, which torch brings too, takes half of its time on this project's
machines (AMD), and for the few rows of an iteration another third less with weights laid out in its own blocks: a
second copy of the layers that few rows go through (the language model's), which only models get that are small beside
this machine's memory. The sums differ in their last bits. Knows nothing about what a model is.
"""

from __future__ import annotations

import psutil
import torch

SMALL = 4  # models that fit so often into this machine's memory get a second copy
TINY = 2**18  # multiplications, up to which MKL is done before oneDNN has begun
FEW = 256  # rows, up to which a packed copy is worth its memory; it saves a tenth at most beyond


class Linear(torch.nn.Linear):
    """torch.nn.Linear; float32 on a CPU goes through oneDNN where no gradient is wanted."""

    packs = False  # whether few rows are worth a second copy of the weight
    _packed: tuple[int, torch.Tensor] | None = None  # of which version of the weight, and its copy in oneDNN's blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        tiny = x.numel() * self.out_features <= TINY
        if wants_gradient or tiny or x.device.type != "cpu" or not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        few = self.packs and x.numel() <= FEW * self.in_features
        return multiply(x, self._blocks() if few else self.weight, self.bias)

    def _blocks(self) -> torch.Tensor:
        """The weight in oneDNN's layout, made when it is first wanted and again after the weight was changed."""
        version = self.weight._version
        if self._packed is None or self._packed[0] != version:
            self._packed = version, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        return self._packed[1]

    def __getstate__(self) -> dict:
        """Blocks can be neither copied nor stored: who copies a layer makes them again."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias; not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def through_onednn(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its linear layers in that class, in place; weights stay what and where they are."""
    if not torch.backends.mkldnn.is_available():
        return model
    small = SMALL * sum(p.nbytes for p in model.parameters()) <= psutil.virtual_memory().total
    return _reclassed(model, torch.nn.Linear, Linear, packs=small)


def through_torch(model: torch.nn.Module) -> torch.nn.Module:
    """The same back in torch's own class."""
    return _reclassed(model, Linear, torch.nn.Linear)


def _reclassed(model: torch.nn.Module, before: type, after: type, **state: bool) -> torch.nn.Module:
    for module in model.modules():
        if type(module) is before:  # not of a subclass: quantised layers have their own product
            module.__class__ = after
            module.__dict__.pop("_packed", None)
            module.__dict__.update(state)
    return model
