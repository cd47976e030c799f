"""What a log keeps of one example and its answer: everything a reader needs to check the verdict. Pure functions."""

from __future__ import annotations

from typing import Any

from dmlr.data.examples import Example
from dmlr.judge.verdicts import verdict_of
from dmlr.methods.answers import Answer

# What metrics group records by, copied from the dataset where it is there, as text where it is no single value.
GROUPS = (
    *("suite", "category", "subcategory", "l2_category", "answer_type", "level"),
    *("pair_id", "figure_group", "question_group"),
)


def record_of(example: Example, answer: Answer) -> dict[str, Any]:
    """One line of the log."""
    record = {
        "row": example.row,
        "data_idx": example.idx,
        "question": example.question,
        "prompt": answer.prompt,
        "image_path": shown_path(example.images),
        "model_output": answer.text,
        **verdict_of(example, answer.text, answer.stop_reason),
        "ground_truth": example.solution,
        "best_reward": None,
        "best_reward_step": None,
        "stop_reason": answer.stop_reason,
        "error": answer.error,
        "num_new_tokens": answer.num_new_tokens,
        "seconds": answer.seconds,
    }
    if reasoning := answer.reasoning:
        record |= {
            "best_reward": reasoning.best_reward,
            "best_reward_step": reasoning.best_step,
            "initial_reward": reasoning.start_reward,
            "rewards": [step["reward"] for step in reasoning.steps],
            "patch_counts": [step["patch_count"] for step in reasoning.steps],
            "patches": reasoning.patches,
            "patch_grid": list(reasoning.patch_grid),
        }
    if answer.details:
        record["details"] = answer.details
    groups = {key: example.meta[key] for key in GROUPS if key in example.meta}
    record |= {key: str(value) if isinstance(value, list | dict) else value for key, value in groups.items()}
    return record | ({"boxes": example.meta["boxes"]} if "boxes" in example.meta else {})


def error_record(row: int | None, idx: int | str | None, message: str) -> dict[str, Any]:
    """A row of the dataset that never became an example."""
    example = Example(-1 if row is None else row, idx, "", "")
    return record_of(example, Answer("", "", "error", error=message))


def shown_path(images: tuple[str, ...]) -> str | list[str] | None:
    """As in the dataset file: one path, or several; images that lie in the file itself are not copied."""
    paths = [path for path in images if not path.startswith("data:")]
    return (paths[0] if len(paths) == 1 else paths) if paths else None
