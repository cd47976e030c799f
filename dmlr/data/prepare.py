"""`python -m dmlr data NAME`: a benchmark of the hub -> a dataset file, its images and a manifest of checksums.

    data/<name>/<name>.json               all rows, in the hub's order
    data/<name>/<name>-<N>-seed<S>.json   a seeded sample of them, with the same idx and images
    data/<name>/images/00000.png          images as the hub has them (PNG or JPEG; other formats become PNG)
    data/<name>/manifest.json             SHA-256 of every file above, and the commit that they come from

Preparing again verifies the checksums and changes nothing; files that are missing or differ are made again. The
manifest is written last, so that a preparation that was interrupted is completed by the next.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dmlr.config import check_names
from dmlr.data.benchmarks import BENCHMARKS, Benchmark
from dmlr.data.check import check_dataset, report
from dmlr.data.hub import (
    MissingSplitError,
    Repository,
    jsonl_rows,
    open_folder,
    open_hub,
    parquet_rows,
)
from dmlr.data.images import ImageError, open_image
from dmlr.data.manifest import ManifestFolder
from dmlr.json_files import as_json


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
    """Make (or verify) a benchmark's files under `out`, from the hub or from a local folder of the same layout.

    With `sample` the result is a file of at most that many rows, drawn by `seed`; a larger sample contains a smaller
    one of the same seed. Groups (MMVP's pairs, HallusionBench's figures) are not kept whole in it. Raises
    ConfigError for an unknown name, SourceError and BenchmarkError when the source cannot be read, ManifestError when
    it differs from that of the files which are there, OSError when nothing can be written.
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
                shown = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
                remarks.append(f"missing or changed since they were prepared, made again: {shown}")
            samples = {file: match for file in [wanted, *damaged] if (match := _SAMPLE.fullmatch(file))}
            if not files.known or set(damaged) - samples.keys():
                remarks += _make(name, files, source)
            rows = json.loads((files.folder / f"{name}.json").read_bytes())
            for file, match in samples.items():
                files.write(file, as_json(sample_rows(rows, int(match[1]), int(match[2]))), joins=True)
            files.finish()
    path = files.folder / wanted
    return Prepared(path, len(json.loads(path.read_bytes())), files.written, remarks)


_SAMPLE = re.compile(r".+-(\d+)-seed(-?\d+)\.json")


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


# ---------------------------------------------------------------------------------------- making the files


def _make(name: str, files: ManifestFolder, source: str | Path | None) -> list[str]:
    """Write rows and images; returns remarks."""
    benchmark, remarks = BENCHMARKS[name], []
    repository = open_hub(benchmark.repo, files.origin.get("revision")) if source is None else open_folder(source)
    if not files.known:
        files.origin = {"repo": benchmark.repo, "revision": repository.revision}
    rows: list[dict] = []
    for split, raw in _raw_rows(benchmark, repository, remarks):
        rows.append(_row(benchmark, split, raw, len(rows), files))
    if not rows:
        raise BenchmarkError(f"{benchmark.title}: the source has no rows")
    if benchmark.rows and len(rows) != benchmark.rows:
        remarks.append(f"{len(rows)} rows, where the benchmark has {benchmark.rows}")
    files.write(f"{name}.json", as_json(rows))
    problems = check_dataset(files.folder / f"{name}.json")
    if problems:
        remarks.append(f"{len(problems)} problems in the data as published:\n{report(problems)}")
    if fatal := [problem for problem in problems if problem.fatal]:
        raise BenchmarkError(f"{benchmark.title}: row {fatal[0].row} is unusable: {fatal[0].message}")
    return remarks


def _raw_rows(benchmark: Benchmark, repository: Repository, remarks: list[str]) -> Iterator[tuple[str, dict]]:
    if benchmark.split == "jsonl":
        yield from (("jsonl", row) for row in jsonl_rows(repository, "file_name"))
        return
    yield from ((benchmark.split, row) for row in parquet_rows(repository, benchmark.config, benchmark.split))
    for split in benchmark.optional:
        try:
            yield from ((split, row) for row in parquet_rows(repository, benchmark.config, split, only=False))
        except MissingSplitError:
            remarks.append(f"the source has no split {split!r}: left out")


def _row(benchmark: Benchmark, split: str, raw: dict, number: int, files: ManifestFolder) -> dict[str, Any]:
    where = f"{benchmark.title}, row {number}"
    try:
        images = image_bytes(raw.get(benchmark.image))
        content, suffix = encode_image(images) if images else (b"", "")
    except ImageError as error:
        raise BenchmarkError(f"{where}: {error}") from None
    if not images and split not in benchmark.optional and str(raw.get("visual_input")) != "0":
        raise BenchmarkError(f"{where}: has no image in column {benchmark.image!r} (columns: {', '.join(raw)})")
    try:
        fields = benchmark.build({**raw, benchmark.image: images or None})
    except KeyError as error:
        raise BenchmarkError(f"{where}: has no column {error} (columns: {', '.join(raw)})") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise BenchmarkError(f"{where}: cannot be read ({error})") from None
    path = None
    if images:
        path = f"images/{number:05d}{suffix}"
        files.write(path, content)
    first = {"prompt": fields.pop("prompt"), "solution": fields.pop("solution"), "image_path": path, "idx": number}
    return {**first, **fields}


# -------------------------------------------------------------------------------------------- images

_KEPT = {"PNG": ".png", "JPEG": ".jpg"}


def image_bytes(value: Any) -> list[bytes]:
    """The encoded images in a column's value: {bytes, path}, a list of those, or null. ImageError for another."""
    values = value if isinstance(value, list) else [value]
    encoded = [item.get("bytes") if isinstance(item, dict) else item for item in values]
    encoded = [item for item in encoded if item is not None]
    if not all(isinstance(item, bytes) for item in encoded):
        raise ImageError(f"its image is {type(encoded[0]).__name__}, not an encoded file")
    return encoded


def encode_image(images: list[bytes]) -> tuple[bytes, str]:
    """(file content, suffix) of one image, kept as it is when it is PNG or JPEG, or of several side by side.

    ImageError when one cannot be read.
    """
    opened = []
    for content in images:
        try:
            image = Image.open(io.BytesIO(content))
        except Exception as error:  # not an image, or a damaged one: decoders raise many types
            raise ImageError(f"its image cannot be read ({type(error).__name__}: {error})") from None
        opened.append((image.format, open_image(image)))
    if len(opened) == 1 and opened[0][0] in _KEPT:
        return images[0], _KEPT[opened[0][0]]
    image = opened[0][1] if len(opened) == 1 else side_by_side([image for _, image in opened])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), ".png"


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """One image of several, top-aligned on white, each under its caption "Image 1", "Image 2", ...

    A dataset row has a single image, and so have the methods that pick patches from it.
    """
    size = max(14, max(image.height for image in images) // 20)
    font = ImageFont.load_default(size)
    caption, gap = 2 * size, size
    # A narrow picture still needs room for its caption.
    widths = [max(image.width, 5 * size) for image in images]
    canvas = Image.new(
        "RGB", (sum(widths) + gap * (len(images) - 1), caption + max(image.height for image in images)), "white"
    )
    draw, left = ImageDraw.Draw(canvas), 0
    for number, (image, width) in enumerate(zip(images, widths, strict=True), 1):
        draw.text((left, size // 3), f"Image {number}", fill="black", font=font)
        canvas.paste(image, (left, caption))
        left += width + gap
    return canvas
