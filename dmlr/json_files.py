"""Python objects -> JSON files that any JSON reader takes, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON; raises what `replace_file` raises."""
    replace_file(path, as_json(content))


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it. Raises OSError."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def as_json(content: Any) -> bytes:
    """The bytes of a JSON file, the same for the same content; NaN becomes null, a lone surrogate a question mark."""
    return json.dumps(as_plain(content), ensure_ascii=False, allow_nan=False, indent=1).encode("utf-8", "replace")


def as_plain(value: Any) -> Any:
    """JSON-able copy: mappings, lists, tuples and arrays converted, NaN and infinities null, all else as text."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=_from_array)


def _from_array(value: Any) -> Any:
    """numpy's and torch's, neither of which is imported here."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
