"""The seven benchmarks of the paper (its Table 1): a row as the hub has it -> the fields of a dataset row.

`BENCHMARKS` says where each comes from and how a row is read. Every row gets `prompt` and `solution`, and `id` where
the hub has one; multiple-choice rows get `choices`, `letter`, `option` and kind "choice". `kind` and `precision` are
what the judge takes; the other fields are what the benchmark's own metric groups by. Pure functions, no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dmlr.judge.extract import boxed_groups, normalize_text, parse_options
from dmlr.judge.quantities import parse_number


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies on the hub. `build` turns a raw row into fields; a KeyError in it is a missing column.

    `optional` splits follow `split`; `rows` counts all of them; `image` is the column of the image.
    """

    title: str
    repo: str
    split: str
    rows: int | None
    build: Callable[[dict], dict]
    config: str | None = None
    image: str = "image"
    optional: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ common parts


def choice_fields(question: str, choices: list[str], index: int, *, listed: bool = False) -> dict[str, Any]:
    """Fields of a multiple-choice row; `listed`: the question names its options already. IndexError for no option."""
    if not 0 <= index < len(choices):
        raise IndexError(f"answer {index} of {len(choices)} options")
    letters = [chr(65 + i) for i in range(len(choices))]
    if listed:
        prompt = question
    elif choices == letters:  # the options are marked in the image
        prompt = f"{question}\n\nOptions: {', '.join(letters)}"
    else:
        lines = (f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        prompt = "\n".join([f"{question}\n\nOptions:".lstrip(), *lines])
    letter, option = letters[index], choices[index]
    solution = letter if option in ("", letter) else f"{letter}. {option}"
    return {
        "prompt": prompt,
        "solution": solution,
        "kind": "choice",
        "choices": choices,
        "letter": letter,
        "option": option,
    }


def _index(answer: Any, choices: list[str], *, letter_first: bool) -> int | None:
    """Position of the right option, given by its letter or its text; None when the answer is neither."""
    text = str(answer).strip()
    bare = re.fullmatch(r"\(?([A-Za-z])\)?\.?", text)
    by_letter = [ord(bare[1].upper()) - 65] if bare and ord(bare[1].upper()) - 65 < len(choices) else []
    same = [i for i, choice in enumerate(choices) if choice.strip() == text]
    same = same or [i for i, choice in enumerate(choices) if normalize_text(choice) == normalize_text(text)]
    return next(iter(by_letter + same if letter_first else same + by_letter), None)


_PLACEHOLDER = re.compile(r"\s*<image\s*(\d*)>")


def _without_placeholders(*texts: str) -> tuple[list[str], int]:
    """Texts with pictures named in words, as the captions of a composed image are, and how many they name.

    A question with one picture loses the marker: the image precedes it anyway.
    """
    named = {match for text in texts for match in _PLACEHOLDER.findall(text)}
    if len(named) > 1:
        return [
            _PLACEHOLDER.sub(lambda match: f" (Image {match[1]})".replace(" )", ")"), text).strip() for text in texts
        ], len(named)
    # An option that consists of the marker keeps words to be chosen by.
    return [_PLACEHOLDER.sub("", text).strip() or _PLACEHOLDER.sub("the image", text) for text in texts], len(named)


def _texts(values: Any) -> list[str]:
    return [] if values is None else [str(value).strip() for value in values]


def _number(value: Any) -> int | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return int(float(value))


# --------------------------------------------------------------------------------------- the benchmarks


def _mathvista(row: dict) -> dict:
    choices, answer_type = _texts(row["choices"]), row["answer_type"]
    metadata = row.get("metadata") if isinstance(row.get("metadata"), Mapping) else {}
    precision, unit = _number(row["precision"]), row["unit"] or None
    question = row["question"].strip() + (f" (Unit: {unit})" if unit else "")
    fields: dict[str, Any] = {"id": str(row["pid"])}
    index = _index(row["answer"], choices, letter_first=False)
    if choices and index is not None:
        fields |= choice_fields(question, choices, index)
    else:
        rounded = "" if precision is None else f", rounded to {precision} decimal place{'' if precision == 1 else 's'}"
        form = {
            "integer": "Answer with a whole number.",
            "float": f"Answer with a number{rounded}.",
            "list": "Answer with a Python list, such as [1, 2, 3].",
        }.get(answer_type, "")
        kind = {"integer": "number", "float": "number", "list": "list"}.get(answer_type)
        fields |= {"prompt": f"{question}\n{form}".strip(), "solution": str(row["answer"]).strip()}
        fields |= ({"kind": kind} if kind else {}) | ({"choices": choices} if choices else {})
        fields |= {"precision": precision} if answer_type == "float" and precision is not None else {}
    fields |= {"question_type": row["question_type"], "answer_type": answer_type, "unit": unit}
    kept = ("category", "task", "context", "skills", "source", "grade", "language")
    return fields | {key: metadata[key] for key in kept if metadata.get(key) is not None}


def _mathvision(row: dict) -> dict:
    (question, *choices), pictures = _without_placeholders(row["question"], *_texts(row["options"]))
    answer = str(row["answer"]).strip()
    fields = {
        "id": str(row["id"]),
        "category": row.get("subject"),
        "level": row.get("level"),
        "pictures": max(1, pictures),
    }
    index = _index(answer, choices, letter_first=True)
    if choices and index is not None:
        return fields | choice_fields(question, choices, index)
    return fields | {"prompt": question, "solution": answer} | ({"choices": choices} if choices else {})


def _mm_math(row: dict) -> dict:
    answers = [answer for _, group in boxed_groups(row["solution"] or "") for answer in group if answer]
    (question,), _ = _without_placeholders(row["question"])
    fields = {"id": row["file_name"], "answers": answers, "relative_tolerance": 0.01}
    if len(answers) > 1:
        question += (
            "\n\nSeveral answers are asked for: put all of them, in order and separated by commas, into one box."
        )
    if len(answers) > 1 and all(parse_number(answer) for answer in answers):
        fields |= {"kind": "list", "solution": repr(answers)}
    else:
        fields |= {"solution": rf"\boxed{{{', '.join(answers)}}}" if answers else ""}
    known = {"year": row.get("year"), "difficulty": row.get("difficult"), "category": row.get("knowledge")}
    return {"prompt": question, **fields, **known}


def _hallusionbench(row: dict) -> dict:
    key = [str(row[name]) for name in ("category", "subcategory", "set_id")]
    # A question without its figure belongs to no figure; it does belong to the question that it controls for.
    figure = "/".join([*key, str(row["figure_id"])]) if row.get("image") is not None else None
    answer = {"0": "No", "1": "Yes"}.get(str(row["gt_answer"]).strip())
    if answer is None:
        raise ValueError(f"gt_answer {row['gt_answer']!r} is neither 0 nor 1")
    return {
        "prompt": row["question"].strip(),
        "solution": answer,
        "kind": "yesno",
        "id": "/".join([*key, str(row["figure_id"]), str(row["question_id"])]),
        "category": row["category"],
        "subcategory": row["subcategory"],
        "visual_input": str(row["visual_input"]),
        "figure_group": figure,
        "question_group": "/".join([*key, str(row["question_id"])]),
        "answer_details": row.get("gt_answer_details"),
    }


# Two pairs whose answers stand swapped in some copies of the data, the file of the released code among them. They are
# set, not swapped, so that it does not matter which copy is read.
_MMVP_ANSWERS = {99: "b", 100: "a", 279: "b", 280: "a"}


def _mmvp(row: dict) -> dict:
    number = int(row["Index"])
    choices = list(parse_options(row["Options"]).values())
    answer = _MMVP_ANSWERS.get(number, row["Correct Answer"])
    index = _index(answer, choices, letter_first=True)
    if index is None:
        raise ValueError(f"answer {answer!r} is not among the options {row['Options']!r}")
    return {"id": number, "pair_id": (number - 1) // 2, **choice_fields(row["Question"].strip(), choices, index)}


def _mmstar(row: dict) -> dict:
    (question,), _ = _without_placeholders(row["question"])
    options = parse_options(question) or inline_options(question)
    choices, letter = list(options.values()), str(row["answer"]).strip().upper()
    source = row["meta_info"].get("source") if isinstance(row.get("meta_info"), Mapping) else None
    fields = {"id": int(row["index"]), "category": row["category"], "l2_category": row["l2_category"]}
    fields |= {"source": source} if source else {}
    if letter in options:
        return fields | choice_fields(question, choices, ord(letter) - 65, listed=True)
    return fields | {"prompt": question, "solution": letter, "kind": "choice", "letter": letter}


def inline_options(question: str) -> dict[str, str]:
    """Options of a line such as "Options: A: red, B: blue" by letter; empty when fewer than two are found."""
    _, marker, rest = question.rpartition("Options:")
    options: dict[str, str] = {}
    mark = re.compile(r"\s*A\s*[:.)]\s*").match(rest) if marker else None
    while mark:
        letter = chr(65 + len(options))
        following = re.compile(rf"[,;]?\s+{chr(ord(letter) + 1)}\s*[:.)]\s*").search(rest, mark.end())
        options[letter] = rest[mark.end() : following.start() if following else None].strip().rstrip(",;").rstrip()
        mark = following
    return options if len(options) > 1 else {}


def _scienceqa(row: dict) -> dict:
    hint = (row["hint"] or "").strip()
    (question,), _ = _without_placeholders(row["question"])
    fields = choice_fields(f"{hint}\n\n{question}".strip(), _texts(row["choices"]), int(row["answer"]))
    kept = ("task", "grade", "subject", "topic", "category", "skill")
    return fields | {key: row[key] for key in kept if row.get(key) is not None}


BENCHMARKS: dict[str, Benchmark] = {
    "mathvista": Benchmark("MathVista-mini", "AI4Math/MathVista", "testmini", 1000, _mathvista, image="decoded_image"),
    "mathvision": Benchmark(
        "MathVision-mini", "MathLLMs/MathVision", "testmini", 304, _mathvision, image="decoded_image"
    ),
    "mmmath": Benchmark("MM-Math", "THU-KEG/MM_Math", "jsonl", None, _mm_math),
    "hallusionbench": Benchmark(
        "HallusionBench", "lmms-lab/HallusionBench", "image", 1129, _hallusionbench, optional=("non_image",)
    ),
    "mmvp": Benchmark("MMVP", "lmms-lab-eval/MMVP", "train", 300, _mmvp),
    "mmstar": Benchmark("MMStar", "Lin-Chen/MMStar", "val", 1500, _mmstar),
    "scienceqa": Benchmark("ScienceQA", "lmms-lab/ScienceQA", "test", 2017, _scienceqa, config="ScienceQA-IMG"),
}
