"""Records of a run: an append-only log that survives kill -9, and results.json from it.

One finished example is one JSON line in `log.jsonl`, synced to disk before `append` returns; the last line of a row is
the one that counts, so judging again appends too. `run.json` beside it holds the configuration the log was made under.
Knows nothing about models or judges; it stores what they say.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dmlr.config import Config
from dmlr.json_files import as_plain, write_json
from dmlr.stats.outcomes import tally

LOG, SIDECAR, LOCK, RESULTS = "log.jsonl", "run.json", "run.lock", "results.json"

# Parameters that cannot change a record: they may differ on resume. Which examples run may be widened or narrowed,
# and each method has its own folder, named by the run's facts.
FREE_PARAMETERS = frozenset(
    "output_dir batch_size cuda_graphs num_workers worker_device_round_robin ray_address resume "
    "verify_only verbose visual_token_viz visual_token_viz_dir save_reward_csv start_data_idx end_data_idx methods "
    "use_llm_verify llm_verify_all".split()
)
REWARD_COLUMNS = ("step", "reward", "sigma", "is_new_best", "patch_count", "patch_budget")


class ResultsError(RuntimeError):
    """A run folder that cannot be used or written; the message says why and what was kept."""


@contextlib.contextmanager
def _writing(path: Path, kept: str = "") -> Iterator[None]:
    """What a disk refuses is a ResultsError that names the path, and what is `kept`."""
    try:
        yield
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror or error}{kept}") from None


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder, with all its datasets and methods, for the whole run.

    Raises ResultsError at once when another process holds it or when it cannot be written.
    """
    path = Path(folder)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(path / LOCK).acquire(timeout=0)
        except Timeout:
            raise ResultsError(f"{path}: another process is writing this run; wait for it or stop it") from None
    with lock:
        yield


class RunLog:
    """The log of one model, dataset and method in its own folder; whoever writes has the run's folder `held`.

    `config` is the run's parameters (a mapping, or a Config) and `facts` whatever else decides its records (method,
    checksum of the dataset). With `resume` an existing log is continued if both are as they were (see `check_same`);
    without it the files of an earlier run are put aside (`aside`: its log), and a new one begins. A context manager.

    `batch_size`, in examples, is that of a log which is continued, unless the configuration names one: company
    decides the last bits of an answer's reward.

    Raises ResultsError when the configuration differs (naming the parameters), the log is damaged before its last
    line, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any = None,
        *,
        resume: bool = False,
        facts: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        folder, self.aside = Path(folder), None
        self.path, self._records = folder / LOG, {}
        config, facts, saved = as_plain(dict(config or {})), as_plain(facts or {}), {}
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for half_written in folder.glob(".*.json.*"):  # by a process that was killed, see `write_json`
                half_written.unlink()
            if self.path.is_file() and self.path.stat().st_size:
                if resume:
                    saved = check_same(folder, config, facts)
                    self._records, size = _parse(self.path)
                    os.truncate(self.path, size)  # a torn last line: its example runs again
                else:
                    self.aside = put_aside(folder)
            self.facts = (saved.get("facts") or {}) | facts
            self.batch_size = config.get("batch_size") or saved.get("batch_size") or batch_size
            write_json(folder / SIDECAR, {"config": config, "facts": self.facts, "batch_size": self.batch_size})
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed at the end of the context)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record (`row` is its key), on disk when this returns.

        NaN and infinities become null. Raises ResultsError when the disk is full or the folder lost; what was
        finished before stays readable.
        """
        record = as_plain(dict(record))
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        kept = f"; {len(self._records)} finished records are kept, mend it and start again with resume"
        with _writing(self.path, kept):
            start = os.fstat(self._file.fileno()).st_size
            try:
                view = memoryview(line)
                while view:
                    view = view[self._file.write(view) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), start)  # no half line for the next writer to run into
                raise
        self._records[int(record["row"])] = record

    def records(self) -> list[dict]:
        """The latest record of each row, in the order of rows."""
        return [self._records[row] for row in sorted(self._records)]

    def finished(self) -> set[int]:
        """Rows that need no inference any more; those that ended in an error are tried again."""
        return {row for row, record in self._records.items() if record.get("stop_reason") != "error"}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def put_aside(folder: Path) -> Path:
    """Renames the files of an earlier run to log.1.jsonl, run.1.json and results.1.json (2, 3, ...); returns the log.

    The log goes first: whoever is killed in between leaves nothing that resume could take for a run.
    """
    number = next(n for n in count(1) if not (folder / f"log.{n}.jsonl").exists())
    aside = (folder / LOG).rename(folder / f"log.{number}.jsonl")
    for old in filter(Path.exists, (folder / SIDECAR, folder / RESULTS)):
        old.rename(old.with_suffix(f".{number}.json"))
    return aside


def check_same(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says, if a log made under it may go on under these; else ResultsError with the differences.

    FREE_PARAMETERS may differ, and parameters for which a fact of the same name stands (a path, and the checksum of its
    file). Of facts those are compared that both have: judging again knows none, a plan not the model's.
    """
    saved = read_run(folder)
    before = saved.get("facts") or {}
    changes = differences(with_defaults(saved.get("config")), with_defaults(config), FREE_PARAMETERS | before.keys())
    if changes := changes + differences(before, facts, before.keys() ^ facts.keys()):
        raise ResultsError(
            f"{folder}: cannot resume under another configuration: {'; '.join(changes)}; "
            "take the old value, or another output_dir"
        )
    return saved


def with_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A saved configuration, with the defaults of parameters that there were not yet when it was saved."""
    return {name: field.default for name, field in Config.model_fields.items()} | dict(config or {})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()) -> list[str]:
    """What was one thing and is now another, but for the names that are `free` to change."""
    pairs = {name: (before.get(name), now.get(name)) for name in sorted((before.keys() | now.keys()) - set(free))}
    return [f"{name} was {one!r} and is now {other!r}" for name, (one, other) in pairs.items() if one != other]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None


def _parse(path: Path) -> tuple[dict[int, dict], int]:
    """Latest record by row, and the size of the log without a torn last line."""
    content = _read(path)
    end = content.rfind(b"\n") + 1
    records: dict[int, dict] = {}
    for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[int(record["row"])] = record
        except (ValueError, KeyError, TypeError):
            raise ResultsError(f"{path}, line {number}: not a record; the file was changed or damaged") from None
    return records, end


def read_log(folder: str | Path) -> list[dict]:
    """Finished records of a run, latest of each row, in the order of rows; also while it is being written."""
    records, _ = _parse(Path(folder) / LOG)
    return [records[row] for row in sorted(records)]


def read_run(folder: str | Path) -> dict[str, Any]:
    """`config` and `facts` under which a folder's log was made. ResultsError when there is no run."""
    return _read_object(Path(folder) / SIDECAR)


def read_results(folder: str | Path) -> dict[str, Any]:
    """Content of a folder's results.json (or of the file itself). ResultsError when absent, broken or another shape."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    content = _read_object(path)
    if not isinstance(content.get("entries"), list):
        raise ResultsError(f"{path}: expected an object with a list of entries")
    return content


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ResultsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: expected an object")
    return content


def write_results(
    folder: str | Path, records: Iterable[Mapping[str, Any]], *, model: str, dataset: str, config: Any, **more: Any
) -> dict[str, Any]:
    """Derive results.json from records, atomically, and return its content.

    Only rows in [start_data_idx, end_data_idx) of `config` enter. `more` are further top-level keys (method, seconds,
    git revision, ...). Raises ResultsError when it cannot be written.
    """
    config = as_plain(dict(config))
    start, end = config.get("start_data_idx") or 0, config.get("end_data_idx")
    entries = [dict(r) for r in records if start <= r["row"] < (math.inf if end is None else end)]
    content = {"model": model, "dataset": dataset, **tally(entries)}
    content = as_plain(content | {**more, "config": config, "args": {}, "entries": entries})
    with _writing(Path(folder) / RESULTS):
        write_json(Path(folder) / RESULTS, content)
    return content


def find_runs(root: str | Path) -> list[Path]:
    """Folders under `root` (itself included) that hold a results.json, sorted."""
    return sorted(path.parent for path in Path(root).rglob(RESULTS))


def write_reward_csv(path: str | Path, steps: Iterable[Mapping[str, Any]]) -> None:
    """One line per iteration with REWARD_COLUMNS first and the trace's other keys after them."""
    rows = [as_plain(dict(row)) for row in steps]
    columns = dict.fromkeys([*REWARD_COLUMNS, *(key for row in rows for key in row)])
    with _writing(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
