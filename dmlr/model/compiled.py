"""Decoder layers through torch.compile: a layer's fifty kernels become twenty.

One layer is compiled, and all of them run it: each is given its own keys and values instead of the whole cache and its
number in it, which is all that would tell it from the others. Knows nothing about what runs through the layers.

On no GPU has this run yet: tests/test_compiled.py compiles for a CPU. What torch.compile generates for an H200 has been
counted (dev/LOG.md).
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch._dynamo.exc import TorchDynamoException

BACKEND = "inductor"
FORMS = 64  # of a layer, at most: with a probe or without, batch 1 or more, patches or none, and so for every model


def compile_layers(text_model: torch.nn.Module) -> None:
    """Makes the layers of a language model ones that `fused=True` sends through torch.compile, in place.

    A form of a layer is compiled when it is first asked for (some seconds); RuntimeError where that fails.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    for number, layer in enumerate(text_model.layers):
        if not hasattr(layer, "number"):
            layer.number, layer.__class__ = number, _compiled(type(layer))


@cache
def _compiled(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A class of decoder layers with two ways to run: transformers' own code, and the same compiled."""
    fused_forward = torch.compile(inspect.unwrap(kind.forward), dynamic=True, fullgraph=True, backend=BACKEND)

    class CompiledLayer(kind):
        def forward(self, hidden_states, *args, past_key_values=None, fused=False, **kw):
            if not fused:
                return super().forward(hidden_states, *args, past_key_values=past_key_values, **kw)
            own = past_key_values.layers[self.number]
            try:
                return fused_forward(self, hidden_states, *args, past_key_values=own, **kw)
            except TorchDynamoException as error:
                reason = str(error).split("\n")[0]
                raise RuntimeError(
                    f"this model's layers cannot be compiled here, take compile_layers = false ({reason})"
                ) from error

    return CompiledLayer
