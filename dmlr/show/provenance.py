"""Where an executed notebook comes from: when, how long it took, the command that makes it again. Pure.

Reads what papermill left in the notebook; a notebook that was run by hand in JupyterLab has none of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def provenance(metadata: Mapping[str, Any], project: Path, defaults: Mapping[str, Any]) -> dict[str, str]:
    """`started` (UTC), `took` and `command` of an executed notebook's metadata; nothing without papermill's.

    The command is meant for the folder `project`: paths in it are relative. It names the parameters that differ from
    `defaults`, the notebook's own.
    """
    made = metadata.get("papermill")
    if not made:
        return {}
    command = ["python", "-m", "dmlr", "run", made["input_path"]]
    for name, value in made["parameters"].items():
        if name not in defaults or defaults[name] != value:
            command += ["-p", name, str(value).lower() if value is None or isinstance(value, bool) else str(value)]
    began = datetime.fromisoformat(made["start_time"]).astimezone(timezone.utc)
    return {
        "started": f"{began:%Y-%m-%d %H:%M} UTC",
        "took": in_words(made["duration"]),
        "command": shlex.join(command).replace(f"{project}/", ""),
    }


def in_words(seconds: float) -> str:
    """A duration as people say it: 8 s, 3 min 5 s, 2 h 10 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
