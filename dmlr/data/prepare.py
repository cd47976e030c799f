"""`python -m dmlr data NAME`: a benchmark of the hub -> a dataset file, its images and a manifest of checksums.

    data/<name>/<name>.json               all rows, in the hub's order
    data/<name>/<name>-<N>-seed<S>.json   a seeded sample of them, with the same idx and images
    data/<name>/images/00000.png          images as the hub has them (PNG or JPEG; other formats become PNG)
    data/<name>/manifest.json             SHA-256 of every file above, and the commit that they come from

Preparing again verifies the checksums and changes nothing; files that are missing or differ are made again. The
manifest is written last, so that a preparation that was interrupted is completed by the next. Nothing that a repository
contains is ever run or unpacked: its tables are read by `datasets`, the images of an archive one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from dmlr.config import check_names, hub_token
from dmlr.data.benchmarks import BENCHMARKS, Benchmark
from dmlr.data.check import check_dataset, report
from dmlr.data.images import MAX_DOWNLOAD, ImageFile, open_image, shorten
from dmlr.json_files import as_json, replace_file, write_json

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's library is imported, below

MANIFEST = "manifest.json"
_SAMPLE = re.compile(r".+-(\d+)-seed(-?\d+)\.json")
_KEPT = {"PNG": ".png", "JPEG": ".jpg"}


class BenchmarkError(ValueError):
    """A benchmark that cannot be prepared; the message is one sentence with the reason."""


@dataclass
class Prepared:
    """What `prepare` made: the dataset file, its number of rows, files written this time, remarks for the reader."""

    path: Path
    rows: int
    written: list[str]
    remarks: list[str]


class Folder:
    """A benchmark's files. `sums`: SHA-256 by name, and `origin`: what they were made of, both as the manifest has them
    (empty without one); `written`: names of those that were written by this object."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, []
        try:
            saved = json.loads((path / MANIFEST).read_bytes())
            self.sums, self.origin = dict(saved["files"]), dict(saved["source"])
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or one that cannot be trusted
            self.sums, self.origin = {}, {}

    def is_whole(self, name: str) -> bool:
        """Whether a file is there with the content that the manifest knows."""
        path = self.path / name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sums[name]

    def write(self, name: str, content: bytes) -> None:
        """Make sure that a file has this content, and write it whole or not at all; one that has it is not touched.

        BenchmarkError when the manifest knows the file with another content.
        """
        path, checksum = self.path / name, hashlib.sha256(content).hexdigest()
        if self.sums.setdefault(name, checksum) != checksum:
            raise BenchmarkError(
                f"{path}: the source now gives another content than the one the folder was made from; "
                f"give that source, or remove {self.path} to make it anew"
            )
        if not self.is_whole(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
            self.written.append(name)

    def finish(self) -> None:
        """Write the manifest."""
        write_json(self.path / MANIFEST, {"source": self.origin, "files": dict(sorted(self.sums.items()))})


def prepare(
    name: str,
    out: str | Path = "data",
    *,
    source: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Make (or verify) a benchmark's files under `out`, from the hub or from a local copy of its repository.

    A row that cannot be used is left out, and a remark says which and why. With `sample` the result is a file of at
    most that many rows, drawn by `seed`; a larger sample contains a smaller one of the same seed. Groups (MMVP's pairs,
    HallusionBench's figures) are not kept whole in it. Raises ConfigError for an unknown name, BenchmarkError when the
    source cannot be read, or differs from that of the files which are there, or when another process writes them,
    OSError when nothing can be written.
    """
    if sample is not None and sample < 1:
        raise BenchmarkError(f"sample = {sample}: a sample has at least one row")
    given, name = name.lower(), re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("mini")  # MathVista-mini, MM_Math
    check_names([name if name in BENCHMARKS else given], BENCHMARKS, "benchmark")
    files = Folder(Path(out) / name)
    wanted = f"{name}.json" if sample is None else f"{name}-{sample}-seed{seed}.json"
    damaged, remarks = [name for name in files.sums if not files.is_whole(name)], []
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        remarks.append(f"missing or changed, made again: {', '.join(damaged[:3])}{more}")
    if damaged or wanted not in files.sums:
        files.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(files.path / ".lock", timeout=0):
                if not files.sums or not all(map(_SAMPLE.fullmatch, damaged)):
                    remarks += _make(name, files, source)
                rows = json.loads((files.path / f"{name}.json").read_bytes())
                for drawn in filter(None, map(_SAMPLE.fullmatch, [wanted, *damaged])):
                    files.write(drawn[0], as_json(sample_rows(rows, int(drawn[1]), int(drawn[2]))))
                files.finish()
        except Timeout:
            raise BenchmarkError(f"{files.path}: another process is writing here; wait for it or stop it") from None
    path = files.path / wanted
    return Prepared(path, len(json.loads(path.read_bytes())), files.written, remarks)


def sample_rows(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`count` rows with the smallest hashes of (seed, idx), in file order: the same on every machine and version."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{row['idx']}".encode()).digest())
    return sorted(ranked[:count], key=lambda row: row["idx"])


def _make(name: str, files: Folder, source: str | Path | None) -> list[str]:
    """Writes all rows and images; returns remarks."""
    from huggingface_hub import HfApi

    benchmark, rows, unusable = BENCHMARKS[name], [], []
    revision = files.origin.get("revision")  # none: the newest
    with _one_sentence(source or benchmark.repo):
        revision = None if source else HfApi(token=hub_token()).dataset_info(benchmark.repo, revision=revision).sha
    files.origin = files.origin or {"repo": benchmark.repo, "revision": revision}
    for number, raw in enumerate(raw_rows(benchmark, source, revision)):
        try:
            row, image = row_of(benchmark, raw, number)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = f"has no column {error} (columns: {', '.join(raw)})" if isinstance(error, KeyError) else error
            unusable.append(f"row {number}: {reason}")
        else:
            if image is not None:
                files.write(row["image_path"], image)
            rows.append(row)
    if not rows:
        raise BenchmarkError(f"{benchmark.title}: no row can be used; {'; '.join(unusable[:1]) or 'there is none'}")
    files.write(f"{name}.json", as_json(rows))
    remarks, count = [], len(rows) + len(unusable)
    if unusable:
        remarks.append(f"{len(unusable)} rows cannot be used and are left out: {'; '.join(unusable[:3])}")
    if benchmark.rows and count != benchmark.rows:
        remarks.append(f"{count} rows, where the benchmark has {benchmark.rows}")
    if problems := check_dataset(files.path / f"{name}.json"):
        remarks.append(f"{len(problems)} problems in the data as published:\n{report(problems)}")
    return remarks


def row_of(benchmark: Benchmark, raw: Mapping[str, Any], number: int) -> tuple[dict[str, Any], bytes | None]:
    """A raw row as one of the dataset file, and its image's file: PNG or JPEG as it is, anything else as PNG.

    KeyError for a missing column, ValueError, TypeError, AttributeError or IndexError for what cannot be read.
    """
    content, path = (raw.get(benchmark.image) or {}).get("bytes"), None
    if content is None and str(raw.get("visual_input")) != "0":  # HallusionBench's word for a question without image
        raise ValueError(f"has no image in column {benchmark.image!r} (columns: {', '.join(raw)})")
    fields = benchmark.fields(raw)
    if content is not None:
        image = open_image(ImageFile("its image", content))
        kind = Image.open(io.BytesIO(content)).format
        if kind not in _KEPT:
            image.save(converted := io.BytesIO(), "PNG")
            content = converted.getvalue()
        path = f"images/{number:05d}{_KEPT.get(kind, '.png')}"
    first = {"prompt": fields["prompt"], "solution": fields["solution"], "image_path": path, "idx": number}
    return first | fields, content


# ---------------------------------------------------------------------------------------------- the hub's files


@contextlib.contextmanager
def _one_sentence(where: str | Path) -> Iterator[None]:
    """Whatever the hub, its client, a table or an archive raises, as a BenchmarkError."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:  # no connection, a gated repository, a damaged file: types of several libraries
        reason = shorten(" ".join(str(error).split()), 200)
        raise BenchmarkError(
            f"{where}: cannot be read ({type(error).__name__}: {reason}); where the hub asks for it set HF_TOKEN, or "
            "give a local copy of the repository with --source"
        ) from None


def raw_rows(benchmark: Benchmark, source: str | Path | None, revision: str | None) -> Iterator[dict[str, Any]]:
    """Rows of all splits as the hub has them, with images as {bytes, path}. BenchmarkError says what cannot be read."""
    with _one_sentence(source or benchmark.repo):
        if source and not Path(source).is_dir():  # which the library would take for a name on the hub
            raise BenchmarkError(f"{source}: no such folder")
        import datasets
        from huggingface_hub import snapshot_download

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every reading of a local file is reported to a server
        if not benchmark.splits:
            how = {"repo_type": "dataset", "revision": revision, "allow_patterns": ["*.jsonl", "*.zip"]}
            yield from _archived_rows(Path(source or snapshot_download(benchmark.repo, token=hub_token(), **how)))
        where = str(Path(source).resolve()) if source else benchmark.repo  # the library cannot name "."
        for split in benchmark.splits:
            # Streaming reads the files where they lie; otherwise a second copy is made in the cache.
            how = {"split": split, "revision": revision, "token": hub_token(), "streaming": True}
            yield from datasets.load_dataset(where, benchmark.config, **how).decode(False)


def _archived_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder's JSONL file, with the members of its ZIP archives that their `file_name` names as images."""
    tables, archives = sorted(folder.rglob("*.jsonl")), sorted(folder.rglob("*.zip"))
    if len(tables) != 1 or not archives:
        found = f"found {len(tables)} and {len(archives)}"
        raise BenchmarkError(f"{folder}: expected one .jsonl file and the .zip of its images, {found}")
    with contextlib.ExitStack() as stack:
        members = {}  # by file name
        for archive in [stack.enter_context(zipfile.ZipFile(path)) for path in archives]:
            for info in archive.infolist():
                if "__MACOSX" not in info.filename and info.file_size <= MAX_DOWNLOAD:
                    members[PurePosixPath(info.filename).name] = archive, info
        for line in stack.enter_context(open(tables[0], "rb")):
            if line.strip():
                row = json.loads(line)
                content = None
                with contextlib.suppress(Exception):  # not there, damaged or encrypted: a row that has lost its image
                    archive, info = members[row["file_name"]]
                    content = archive.read(info)
                yield {**row, "image": {"bytes": content}}
