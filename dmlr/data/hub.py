"""Files of a hub dataset, downloaded or in a local folder of the same layout -> raw rows, one at a time.

Knows file layouts (parquet shards per split, JSON lines with an archive of images) and not what a row means. Nothing
that a repository contains is ever run: only its parquet, JSONL and ZIP files are fetched, at one commit.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dmlr.data.images import shorten

# Read when the hub's library is imported, which happens inside the functions below.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_MAX_MEMBER = 64 * 2**20  # bytes of one unpacked image
_PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion of datasets that are stored otherwise


class SourceError(ValueError):
    """A dataset that cannot be fetched or read; the message is one sentence with the reason and what to do."""


class MissingSplitError(SourceError):
    """A dataset without files of the wanted split."""


@dataclass(frozen=True)
class Repository:
    """A dataset's files: `names` relative to its root, `path` gives a local copy (downloading it when needed)."""

    label: str
    names: tuple[str, ...]
    path: Callable[[str], Path]
    revision: str | None = None

    def with_suffix(self, suffix: str) -> list[str]:
        return [name for name in self.names if name.lower().endswith(suffix)]


def open_folder(folder: str | Path) -> Repository:
    """A local folder, such as a clone or a download of the repository. SourceError when it is none."""
    root = Path(folder)
    if not root.is_dir():
        raise SourceError(f"{folder}: no such folder")
    paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return Repository(str(folder), tuple(path.as_posix() for path in shown), lambda name: root / name)


def open_hub(repo: str, revision: str | None = None) -> Repository:
    """A dataset on the hub, at `revision` or at the newest commit. SourceError when it cannot be reached or read."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_TOKEN") or None
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="dmlr")
    with _hub_errors(repo):
        info = api.dataset_info(repo, revision=revision)
        names = [file.rfilename for file in info.siblings or ()]
        if revision is None and not any(name.endswith((".parquet", ".jsonl")) for name in names):
            info = api.dataset_info(repo, revision=_PARQUET_BRANCH)
            names = [file.rfilename for file in info.siblings or ()]

    def path(name: str) -> Path:
        with _hub_errors(repo):
            return Path(api.hf_hub_download(repo, name, repo_type="dataset", revision=info.sha))

    return Repository(repo, tuple(sorted(names)), path, info.sha)


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    elsewhere = "or give a local copy of the dataset with --source"
    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{repo}: gated on the hub; accept its conditions there and set HF_TOKEN, {elsewhere}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{repo}: the hub shows no such dataset; if it is private set HF_TOKEN, {elsewhere}"
        ) from None
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise SourceError(f"{repo}: the hub lacks a file or commit ({_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise SourceError(f"{repo}: the hub refused ({_line(error)}); try again later, {elsewhere}") from None
    except Exception as error:  # no connection, time-outs, offline mode: types of several HTTP libraries
        raise SourceError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}: {_line(error)}); try again later, {elsewhere}"
        ) from None


def _line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()), 160)


# ------------------------------------------------------------------------------------------------ parquet


def shards(names: list[str], config: str | None, split: str) -> list[str]:
    """Parquet files of one split, in order.

    The hub's layouts: `data/test-00000-of-00001.parquet`, `test.parquet`, `default/test/0000.parquet`, the
    configuration as a folder; a dataset whose file names say no split has one split only.
    """
    if config and (inside := [name for name in names if config in PurePosixPath(name).parts[:-1]]):
        names = inside
    chosen = []
    for name in names:
        path = PurePosixPath(name)
        if path.stem == split or path.stem.startswith(f"{split}-") or split in path.parts[:-1]:
            chosen.append(name)
    return sorted(chosen)


def parquet_rows(repository: Repository, config: str | None, split: str, *, only: bool = True) -> Iterator[dict]:
    """Rows of a split with images undecoded, as {bytes, path}; `only`: files that name no split are taken for it.

    SourceError when there is no such file or it cannot be read.
    """
    names = repository.with_suffix(".parquet")
    if not (chosen := shards(names, config, split)) and only:
        chosen = sorted(names)
    if not chosen:
        raise MissingSplitError(f"{repository.label}: holds no parquet file of split {split!r}")
    paths = [glob.escape(str(repository.path(name))) for name in chosen]  # the library takes names for patterns
    try:
        import datasets
    except ImportError as error:
        raise SourceError(f"the datasets library is needed to read parquet files ({error})") from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every reading of a local file is reported to a server
    try:
        # Streaming reads the files where they lie; otherwise a second copy is made in the cache.
        table = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True).decode(False)
        yield from table
    except Exception as error:  # of pyarrow and datasets: damaged files, schemas that differ between shards
        raise SourceError(
            f"{shorten(', '.join(chosen))}: cannot be read ({type(error).__name__}: {_line(error)})"
        ) from None


# ------------------------------------------------------------------------------------------ JSONL and ZIP


def jsonl_rows(repository: Repository, image_key: str) -> Iterator[dict]:
    """Rows of the only JSONL file; `image` is the archive's member that `image_key` names, as {bytes, path}.

    SourceError for a missing or damaged file, and for an archive with a member that would lie outside of it.
    """
    tables, archives = repository.with_suffix(".jsonl"), repository.with_suffix(".zip")
    if len(tables) != 1 or not archives:
        raise SourceError(
            f"{repository.label}: expected one .jsonl file and the .zip of its images, "
            f"found {len(tables)} and {len(archives)}"
        )
    with contextlib.ExitStack() as stack:
        members: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for name in archives:
            archive = stack.enter_context(_open_archive(repository.path(name), name))
            for info in archive.infolist():
                path = PurePosixPath(info.filename)
                if info.is_dir() or "__MACOSX" in path.parts:
                    continue
                members.setdefault(path.name, (archive, info))
                members[str(path)] = (archive, info)
        file = stack.enter_context(open(repository.path(tables[0]), "rb"))
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _json_object(line, f"{tables[0]}, line {number}")
                yield {**row, "image": _member(members, row.get(image_key), f"{tables[0]}, line {number}")}


def _json_object(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON ({_line(error)})") from None
    if not isinstance(row, dict):
        raise SourceError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _open_archive(path: Path, name: str) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{name}: cannot be read as a ZIP archive ({_line(error)})") from None
    for info in archive.infolist():
        if leaves_folder(info.orig_filename):
            archive.close()
            raise SourceError(f"{name}: refused, its member {shorten(info.orig_filename)!r} points outside the archive")
    return archive


def leaves_folder(name: str) -> bool:
    """Whether an archive member's name is absolute or climbs out, under the rules of POSIX or of Windows."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(PureWindowsPath(name).anchor)


def _member(members: dict, name: Any, where: str) -> dict:
    if not isinstance(name, str) or (member := members.get(name) or members.get(PurePosixPath(name).name)) is None:
        raise SourceError(f"{where}: its image {name!r} is not in the archive")
    archive, info = member
    if info.file_size > _MAX_MEMBER:
        raise SourceError(f"{where}: its image {name!r} is larger than {_MAX_MEMBER >> 20} MiB")
    try:
        return {"bytes": archive.read(info), "path": info.filename}
    except Exception as error:  # damaged, encrypted or of an unknown compression: zlib.error, RuntimeError, ...
        raise SourceError(f"{where}: its image {name!r} cannot be unpacked ({_line(error)})") from None
