"""Linear layers on a CPU through oneDNN instead of MKL.

torch multiplies float32 matrices with MKL. For the few rows of an iteration oneDNN, which torch brings too, takes half
of its time on this project's machines (AMD), and half for prefill as well; the sums differ in their last bits. Knows
nothing about models.
"""

from __future__ import annotations

import torch


class Linear(torch.nn.Linear):
    """torch.nn.Linear; float32 on a CPU goes through oneDNN where no gradient is wanted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if wants_gradient or x.device.type != "cpu" or x.dtype != torch.float32 or self.weight.dtype != x.dtype:
            return super().forward(x)
        return multiply(x, self.weight, self.bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias; not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def through_onednn(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its linear layers in that class, in place; weights stay what and where they are."""
    return _reclassed(model, torch.nn.Linear, Linear) if torch.backends.mkldnn.is_available() else model


def through_torch(model: torch.nn.Module) -> torch.nn.Module:
    """The same back in torch's own class."""
    return _reclassed(model, Linear, torch.nn.Linear)


def _reclassed(model: torch.nn.Module, before: type, after: type) -> torch.nn.Module:
    for module in model.modules():
        if type(module) is before:  # not of a subclass: quantised layers have their own product
            module.__class__ = after
    return model
