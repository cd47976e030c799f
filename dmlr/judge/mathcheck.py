"""Equality of mathematical expressions by math-verify, in a child process that can be killed.

Computer algebra has no upper bound on time or memory (9^9^9, deep nesting), and math-verify's own guard is a
signal, which works in the main thread only. So one child process answers questions as JSON lines; when it is late,
dies or runs out of memory it is replaced and the question is answered "unknown". Safe to call from any thread.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from functools import lru_cache

CPU_S = 3.0  # for one question; measured in the child, so that a busy machine does not change verdicts
TIMEOUT_S = 30.0  # when the child sleeps or swaps
START_S = 90.0  # importing sympy on a loaded machine
MAX_CHARACTERS = 3000
_MEMORY_BYTES = 4 << 30


class _Child:
    """The process and a thread that reads its answers, so that waiting for one can time out on any system."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": "ignore"}
        env.pop("COVERAGE_PROCESS_START", None)
        command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        self.answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ask(None, START_S)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(b"")

    def ask(self, question: dict | None, timeout_s: float) -> dict:
        """The child's answer. Raises TimeoutError or ConnectionError; the child is then no longer of use."""
        try:
            if question is not None:
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
            line = self.answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        except OSError as error:
            raise ConnectionError(str(error)) from None
        if not line:
            raise ConnectionError("the child process ended")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


_lock = threading.Lock()
_child: _Child | None = None


@lru_cache(maxsize=4096)
def equal(truth: str, answer: str, decimals: int = 6, relative: float = 0.0) -> bool | None:
    """Whether two expressions are equal (numbers to `decimals` places, or within the share `relative` of the truth);
    None when that cannot be told.

    None stands for: one side is no expression, is longer than MAX_CHARACTERS, or it took more than CPU_S.
    Expressions may be LaTeX with or without dollars, plain, or prose that ends in one.
    """
    global _child
    if max(len(truth), len(answer)) > MAX_CHARACTERS:
        return None
    with _lock:
        try:
            if _child is None:
                _child = _Child()
            return _child.ask(
                {"truth": truth, "answer": answer, "decimals": decimals, "relative": relative}, TIMEOUT_S
            )["equal"]
        except (TimeoutError, ConnectionError):
            if _child is not None:
                _child.stop()
            _child = None
            return None


@atexit.register
def _stop() -> None:
    if _child is not None:
        _child.stop()


def _after_fork() -> None:
    """A forked copy of this process must not share the pipe, nor a lock that another thread held."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ------------------------------------------------------------------------------- in the child process


def _serve() -> None:
    import logging

    logging.disable(logging.CRITICAL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: the time limit remains
    from math_verify import parse, verify

    _equal(parse, verify, "$x=1/2$", "$\\frac{2}{4}$", 6, 0.0)  # loads what both load lazily
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever the library prints must not become an answer
    output.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        question = json.loads(line)
        try:
            _limit_cpu(CPU_S)
            result = _equal(parse, verify, **question)
        except Exception:  # RecursionError and MemoryError too
            result = None
        _limit_cpu(0)
        output.write(json.dumps({"equal": result}).encode() + b"\n")


def _limit_cpu(seconds: float) -> None:
    """End this process after so much CPU time, also inside a long operation on big integers; 0 switches it off."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF's default action ends the process


def _equal(parse, verify, truth: str, answer: str, decimals: int, relative: float) -> bool | None:
    gold, pred = _understood(parse, truth), _understood(parse, answer)
    if not gold or not pred:
        return None
    if verify(gold, pred, float_rounding=decimals, timeout_seconds=None):
        return True
    values = [_value(parsed) for parsed in (gold, pred)] if relative else [None]
    return None not in values and abs(values[1] - values[0]) <= relative * abs(values[0])


def _value(parsed: list) -> float | None:
    """What an expression is worth, of an equation its right side; None when it is no real number."""
    expression = getattr(parsed[0], "rhs", parsed[0])
    return float(expression) if getattr(expression, "is_real", False) and expression.is_number else None


def _understood(parse, text: str) -> list:
    """What math-verify makes of a text, taken as mathematics and then as prose; empty when nothing was understood."""
    for form in dict.fromkeys((text, text.strip("$"))):
        parsed = parse(form, parsing_timeout=None)
        if any(not isinstance(item, str) for item in parsed):  # its last element is the text itself
            return parsed
    return []
