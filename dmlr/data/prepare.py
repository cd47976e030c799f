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
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from dmlr.config import check_names
from dmlr.data.benchmarks import BENCHMARKS, Benchmark
from dmlr.data.check import check_dataset, report
from dmlr.data.images import MAX_DOWNLOAD, ImageFile, open_image, shorten
from dmlr.data.manifest import ManifestFolder
from dmlr.json_files import as_json

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's library is imported, below

_SAMPLE = re.compile(r".+-(\d+)-seed(-?\d+)\.json")
_KEPT = {"PNG": ".png", "JPEG": ".jpg"}


class BenchmarkError(ValueError):
    """A benchmark that cannot be prepared; the message is one sentence with the reason."""


@dataclass
class Prepared:
    """What `prepare` made: the dataset file, its number of rows, files written this time, remarks for the reader."""

    path: Path
    rows: int
    written: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


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
    source cannot be read, ManifestError when it differs from that of the files which are there, OSError when nothing
    can be written.
    """
    if sample is not None and sample < 1:
        raise BenchmarkError(f"sample = {sample}: a sample has at least one row")
    name = _canonical(name)
    files = ManifestFolder(Path(out) / name)
    wanted = f"{name}.json" if sample is None else f"{name}-{sample}-seed{seed}.json"
    damaged, remarks = files.damaged(), []
    if damaged or wanted not in files.known:
        with files.lock():
            if damaged:
                more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
                remarks.append(f"missing or changed, made again: {', '.join(damaged[:3])}{more}")
            samples = {file: match for file in [wanted, *damaged] if (match := _SAMPLE.fullmatch(file))}
            if not files.known or set(damaged) - samples.keys():
                remarks += _make(name, files, source)
            rows = json.loads((files.folder / f"{name}.json").read_bytes())
            for file, match in samples.items():
                files.write(file, as_json(sample_rows(rows, int(match[1]), int(match[2]))))
            files.finish()
    path = files.folder / wanted
    return Prepared(path, len(json.loads(path.read_bytes())), files.written, remarks)


def sample_rows(rows: list[dict], count: int, seed: int) -> list[dict]:
    """`count` rows with the smallest hashes of (seed, idx), in file order: the same on every machine and version."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/{row['idx']}".encode()).digest())
    chosen = {row["idx"] for row in ranked[:count]}
    return [row for row in rows if row["idx"] in chosen]


def _canonical(name: str) -> str:
    """MathVista-mini, MM_Math, mm-math, ... as a key of BENCHMARKS. ConfigError names the nearest."""
    key = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("mini")
    if key not in BENCHMARKS:
        check_names([name.lower()], BENCHMARKS, "benchmark")
    return key


def _make(name: str, files: ManifestFolder, source: str | Path | None) -> list[str]:
    """Writes rows and images; returns remarks."""
    benchmark, rows, unusable = BENCHMARKS[name], [], []
    with _one_sentence(source or benchmark.repo):
        revision = None if source else commit(benchmark.repo, files.origin.get("revision"))
    files.origin = files.origin or {"repo": benchmark.repo, "revision": revision}
    for number, raw in enumerate(raw_rows(benchmark, source, revision)):
        try:
            row, image = row_of(benchmark, raw, number)
        except KeyError as error:
            unusable.append(f"row {number}: has no column {error} (columns: {', '.join(raw)})")
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            unusable.append(f"row {number}: {error}")
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
    if problems := check_dataset(files.folder / f"{name}.json"):
        remarks.append(f"{len(problems)} problems in the data as published:\n{report(problems)}")
    return remarks


def row_of(benchmark: Benchmark, raw: Mapping[str, Any], number: int) -> tuple[dict[str, Any], bytes | None]:
    """A raw row as one of the dataset file, and its image's file. KeyError for a missing column, ValueError, TypeError,
    AttributeError or IndexError for what cannot be read."""
    content, path = (raw.get(benchmark.image) or {}).get("bytes"), None
    if content is None and str(raw.get("visual_input")) != "0":  # HallusionBench's word for a question without image
        raise ValueError(f"has no image in column {benchmark.image!r} (columns: {', '.join(raw)})")
    fields = benchmark.fields(raw)
    if content is not None:
        content, suffix = image_file(content)
        path = f"images/{number:05d}{suffix}"
    first = {"prompt": fields.pop("prompt"), "solution": fields.pop("solution"), "image_path": path, "idx": number}
    return {**first, **fields}, content


def image_file(content: bytes) -> tuple[bytes, str]:
    """Content and suffix of an encoded image's file: as it is when it is PNG or JPEG, else PNG. ImageError."""
    image = open_image(ImageFile("its image", content))
    kind = Image.open(io.BytesIO(content)).format
    if kind in _KEPT:
        return content, _KEPT[kind]
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), ".png"


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


def commit(repo: str, revision: str | None = None) -> str:
    """The commit of a dataset on the hub: the newest, unless a revision is given."""
    from huggingface_hub import HfApi

    return HfApi(token=_token()).dataset_info(repo, revision=revision).sha


def _token() -> str | None:
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_TOKEN") or None


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
            yield from _archived_rows(Path(source or snapshot_download(benchmark.repo, token=_token(), **how)))
        for split in benchmark.splits:
            # Streaming reads the files where they lie; otherwise a second copy is made in the cache.
            how = {"split": split, "revision": revision, "token": _token(), "streaming": True}
            yield from datasets.load_dataset(str(source or benchmark.repo), benchmark.config, **how).decode(False)


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
