"""What a run runs on: versions, device, memory. Knows nothing about runs."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """Most bytes so far: allocated on the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, str]:
    """Versions and the revision of this code, for the report's header."""
    import transformers

    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "revision": revision or "unknown",
    }
