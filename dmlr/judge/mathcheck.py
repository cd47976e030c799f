"""Equality of mathematical expressions by math-verify, in a process of its own that can be killed.

Computer algebra has no upper bound on time or memory (9^9^9, deep nesting), and math-verify's own guard is a
signal, which works in the main thread only. pebble's pool of one worker is started by the first question, replaces a
worker that is late or dies, and ends with this process. Safe to call from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
from concurrent import futures
from functools import lru_cache
from multiprocessing.util import Finalize
from types import ModuleType

from pebble import ProcessExpired, ProcessPool

CPU_S = 3.0  # for one question; measured in the worker, so that a busy machine does not change verdicts
TIMEOUT_S = 30.0  # when the worker sleeps or swaps
MAX_CHARACTERS = 3000
_MEMORY_BYTES = 4 << 30

_lock = threading.Lock()
_pool: ProcessPool | None = None


@lru_cache(maxsize=4096)
def equal(truth: str, answer: str, decimals: int = 6, relative: float = 0.0) -> bool | None:
    """Whether two expressions are equal (numbers to `decimals` places, or within the share `relative` of the truth);
    None when that cannot be told.

    None stands for: one side is no expression, is longer than MAX_CHARACTERS, or it took more than CPU_S.
    Expressions may be LaTeX with or without dollars, plain, or prose that ends in one.
    """
    global _pool
    if max(len(truth), len(answer)) > MAX_CHARACTERS:
        return None
    with _lock:
        if _pool is None or not _pool.active:
            _pool = ProcessPool(max_workers=1, initializer=_prepare, context=_Apart())
            Finalize(None, _end, exitpriority=10)
        future = _pool.schedule(_equal, (truth, answer, decimals, relative), timeout=TIMEOUT_S)
    try:
        return future.result()
    except (futures.TimeoutError, futures.BrokenExecutor, ProcessExpired):
        return None


def _end() -> None:
    """Before multiprocessing waits for its children: pebble would replace the worker that ended."""
    if _pool is not None:
        _pool.stop()
        _pool.join()


class _Apart(multiprocessing.context.SpawnContext):
    """Workers that start anew and do not run the caller's script once more, guarded by `__main__` or not.

    All of them hash alike: sympy goes through sets, and what it finds in time must not depend on the process.
    """

    class Process(multiprocessing.context.SpawnProcess):
        def start(self) -> None:
            main, seed = sys.modules["__main__"], os.environ.pop("PYTHONHASHSEED", None)
            sys.modules["__main__"], os.environ["PYTHONHASHSEED"] = ModuleType("__main__"), "0"
            try:
                super().start()
            finally:
                sys.modules["__main__"] = main
                os.environ.pop("PYTHONHASHSEED")
                os.environ.update({} if seed is None else {"PYTHONHASHSEED": seed})


def _after_fork() -> None:
    """A forked copy of this process must not share the pool, nor a lock that another thread held."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


# ------------------------------------------------------------------------------- in the worker


def _prepare() -> None:
    logging.disable(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whatever the library prints is not this program's output
        os.dup2(nowhere, stream)
    with contextlib.suppress(ValueError, OSError):  # no such limit on this system: the time limit remains
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    _compare("$x=1/2$", "$\\frac{2}{4}$", 6, 0.0)  # loads what math-verify loads lazily


def _equal(truth: str, answer: str, decimals: int, relative: float) -> bool | None:
    from sympy.core import random

    try:
        random.seed(0)  # sympy asks for assumptions in a random order
        # SIGPROF's default action ends the process, also inside a long operation on big integers.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        return _compare(truth, answer, decimals, relative)
    except Exception:  # RecursionError and MemoryError too
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compare(truth: str, answer: str, decimals: int, relative: float) -> bool | None:
    from math_verify import verify

    gold, pred = _understood(truth), _understood(answer)
    if not gold or not pred:
        return None
    # "1 < x < 2" answers (1, 2] or (-∞, 2), but (1, 2) may as well be a point.
    interval = re.search(r"[\[\]]|\\in(?:fty)?\b|\\cup", truth) or re.search(r"[<>]|\\[lg]e", answer)
    if verify(gold, pred, float_rounding=decimals, allow_set_relation_comp=bool(interval), timeout_seconds=None):
        return True
    return relative > 0 and abs(_value(pred) - _value(gold)) <= relative * abs(_value(gold))


def _understood(text: str) -> list:
    """What math-verify makes of a text, taken as mathematics and then as prose; empty when nothing was understood."""
    from math_verify import parse

    for form in dict.fromkeys((text, text.strip("$"))):
        parsed = parse(form, parsing_timeout=None)
        if any(not isinstance(item, str) for item in parsed):  # its last element is the text itself
            return parsed
    return []


def _value(parsed: list) -> float:
    """What an expression is worth, of an equation its right side; nan when it is no real number, or beyond floats."""
    expression = getattr(parsed[0], "rhs", parsed[0])
    value = float(expression) if getattr(expression, "is_real", False) and expression.is_number else math.nan
    return value if math.isfinite(value) else math.nan
