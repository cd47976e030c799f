"""Where an executed notebook comes from: when, how long it took, the command that makes it again. Pure.

Reads what papermill left in the notebook; a notebook that was run by hand in JupyterLab has none of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def provenance(metadata: Mapping[str, Any], project: Path, defaults: Mapping[str, Any] | None = None) -> dict[str, str]:
    """`started` (UTC), `took` and `command` of an executed notebook's metadata; what is not known is not there.

    The command is meant for the folder `project`: paths in it are relative. It names the parameters that differ from
    `defaults`, the notebook's own.
    """
    made = metadata.get("papermill") or {}
    facts = {}
    if made.get("start_time"):
        began = datetime.fromisoformat(made["start_time"]).astimezone(timezone.utc)
        facts["started"] = f"{began:%Y-%m-%d %H:%M} UTC"
    if made.get("duration") is not None:
        facts["took"] = in_words(made["duration"])
    if made.get("input_path"):
        words = ["python", "-m", "dmlr", "run", _inside(made["input_path"], project)]
        for name, value in (made.get("parameters") or {}).items():
            if name not in (defaults or {}) or defaults[name] != value:
                words += ["-p", name, _as_given(value, project)]
        facts["command"] = shlex.join(words)
    return facts


def in_words(seconds: float) -> str:
    """A duration as people say it: 8 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _as_given(value: Any, project: Path) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(_inside(part, project) for part in value.split(",")) if isinstance(value, str) else str(value)


def _inside(path: str, project: Path) -> str:
    return path.removeprefix(f"{project}/")
