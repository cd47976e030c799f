"""A small run from files alone, as workers and other processes need it: a saved tiny model, a dataset, one
configuration; and what of its results must not depend on how the run went."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from tiny import noise_image, tiny_vlm

METHODS = ("vanilla", "dmlr")


def save_model(folder: Path) -> Path:
    """The tiny model as a checkpoint."""
    vlm = tiny_vlm()
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def save_dataset(folder: Path, prompts: list[str]) -> Path:
    """A row and a picture for each prompt; in the middle one row without a picture's file: an error record."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, prompt in enumerate(prompts):
        noise_image(i, width=112 + 28 * (i % 3)).save(folder / f"{i}.png")
        rows.append({"prompt": prompt, "solution": "3", "image_path": f"{i}.png", "idx": i})
    rows[len(rows) // 2]["image_path"] = "missing.png"
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def settings(model: Path, dataset: Path, folder: Path, **more) -> dict:
    """Parameters of the run."""
    fast = {"max_num_steps": 2, "max_new_tokens": 4, "batch_size": 4, "verbose": 0, "end_data_idx": None}
    where = {"model_name_or_path": str(model), "dataset": str(dataset), "output_dir": str(folder)}
    return {**fast, **where, "methods": ",".join(METHODS), "device": "cpu", "max_pixels": None, **more}


def outcome(folder: Path) -> dict:
    """Everything that a run left behind, but times, machines and how it was run. Checks that no row is there twice."""
    left = {}
    for method in METHODS:
        run = Path(folder) / "data" / method
        results = json.loads((run / "results.json").read_text())
        for changing in ("environment", "efficiency", "config"):
            del results[changing]
        for entry in results["entries"]:
            del entry["seconds"]
        rows = [json.loads(line)["row"] for line in (run / "log.jsonl").read_text().splitlines()]
        assert len(rows) == len(set(rows)) == len(results["entries"])
        csv = {path.name: path.read_text() for path in sorted((run / "rewards").glob("*"))}
        left[method] = {"results": results, "csv": csv, "hidden": [p.name for p in run.glob(".*")]}
    return left


def assert_same(left: object, right: object) -> None:
    """Equal outcomes; numbers up to 1e-5, since a worker with another number of threads adds in another order."""
    if isinstance(left, dict) and isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list) and isinstance(right, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, str) and "\n" in left:  # a CSV file
        assert_same([line.split(",") for line in left.splitlines()], [line.split(",") for line in right.splitlines()])
    elif left != right:
        assert float(left) == pytest.approx(float(right), abs=1e-5)


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
