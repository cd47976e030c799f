"""The methods: a batch of questions in, answers out. Each is a small function on the same core.

Every method gets the same images, and the same model and decoding; they differ in what the model may do before it
answers. Knows nothing about ground truth, judging or files.
"""

from __future__ import annotations

from functools import partial

from dmlr.methods.answers import Answer, Question, answered
from dmlr.methods.controls import CONTROLS
from dmlr.methods.icot import icot
from dmlr.methods.latent import dmlr, ltpo
from dmlr.methods.prompting import ccot, multimodal_cot, vanilla
from dmlr.methods.self_consistency import self_consistency
from dmlr.methods.ulr import ulr

__all__ = ["METHODS", "Answer", "Question"]

_METHODS = {
    "vanilla": vanilla,
    "multimodal-cot": multimodal_cot,
    "ccot": ccot,
    "icot": icot,
    "ltpo": ltpo,
    "ulr": ulr,
    "dmlr": dmlr,
    "self-consistency": self_consistency,
    **CONTROLS,
}
METHODS = {name: partial(answered, method) for name, method in _METHODS.items()}  # (VLM, questions, Config) -> answers
