"""What `python -m dmlr serve` allows. Imports nothing heavy: the command line is made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _limit(default: float, unit: str, what: str) -> Any:
    """A field with its option as argparse takes it; a number that is not positive and finite is refused."""
    kind = type(default)

    def positive(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise ValueError
        return value

    positive.__name__ = f"positive {kind.__name__}"  # argparse names it
    option = {"type": positive, "default": default, "metavar": unit, "help": f"{what} (default: %(default)s)"}
    return field(default=default, metadata=option)


@dataclass(frozen=True)
class Limits:
    """Limits of a server, each an option of its command."""

    quiet: float = _limit(0.015, "S", "a batch leaves when no request came for S seconds")
    longest: float = _limit(0.1, "S", "or after S seconds in any case")
    batch: int = _limit(16, "N", "or with N requests")
    requests: int = _limit(128, "N", "most under way; one more gets a 429")
    body: int = _limit(32 * 2**20, "BYTES", "most of a request")
    pixels: int = _limit(2**24, "N", "most of an image")
    seconds: float = _limit(600.0, "S", "most for a request, reading it included")
    fetch: bool = field(default=False, metadata={"action": "store_true", "help": "images by http(s), beside data URIs"})
