"""DMLR: test-time latent reasoning for frozen vision-language models (arXiv 2512.12623).

    model = dmlr.load("Qwen/Qwen2.5-VL-7B-Instruct", preset="paper")
    answer = model.ask("How many cups?", "photo.jpg")

`load`, `wrap`, `Config` and `METHODS` are imported when they are first used.
"""

import os
from importlib import import_module

# Read when torch is loaded, which nothing does before this line. libgomp's idle threads spin, and on a machine that
# does other work too they take its cores from whoever works.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOME = {"load": "api", "wrap": "api", "Config": "config", "METHODS": "methods"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
