"""A folder of generated files and the manifest of their checksums: what is there is verified before it is replaced.

Files are written whole or not at all, and the manifest last, so that a folder with a manifest is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dmlr.json_files import as_json, replace_file

MANIFEST = "manifest.json"


class ManifestError(ValueError):
    """Files that cannot be made because others are in their place; the message says what to do."""


class ManifestFolder:
    """`known`: checksum by file name, as the manifest had it (empty without one); `origin`: what they were made of;
    `written`: names of the files that were written by this object."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.written = Path(folder), []
        try:
            saved = json.loads((self.folder / MANIFEST).read_bytes())
            self.known: dict[str, str] = dict(saved["files"])
            self.origin: dict[str, Any] = dict(saved["source"])
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or one that cannot be trusted
            self.known, self.origin = {}, {}
        self._sums = dict(self.known)

    def damaged(self) -> list[str]:
        """Files of the manifest that are missing or have another content, in its order."""
        return [name for name, checksum in self.known.items() if self._checksum(name) != checksum]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process out while files are written; it gets a ManifestError at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise ManifestError(f"{self.folder}: another process is writing here; wait for it or stop it") from None

    def write(self, name: str, content: bytes) -> None:
        """Make sure that a file has this content; one that has it already is not touched.

        ManifestError when the manifest knows the file with another content.
        """
        path, checksum = self.folder / name, hashlib.sha256(content).hexdigest()
        if self.known.get(name, checksum) != checksum:
            raise ManifestError(
                f"{path}: the source now gives another content than the one the folder was made from; "
                f"give that source, or remove {self.folder} to make it anew"
            )
        self._sums[name] = checksum
        if self._checksum(name) != checksum:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
            self.written.append(name)

    def finish(self) -> None:
        """Write the manifest if it has changed."""
        content = as_json({"source": self.origin, "files": dict(sorted(self._sums.items()))})
        path = self.folder / MANIFEST
        if not path.is_file() or path.read_bytes() != content:
            replace_file(path, content)

    def _checksum(self, name: str) -> str | None:
        try:
            return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        except OSError:
            return None
