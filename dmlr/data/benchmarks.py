"""The seven benchmarks of the paper (its Table 1), each as a declaration: where it lies, and what a row says.

Every row gets `prompt` and `solution`, and `id` where the hub has one; multiple-choice rows get `choices`, `letter`,
`option` and kind "choice". `kind` and `precision` are what the judge takes; the other fields are what the benchmark's
own metric groups by (`pair_id`, `figure_group`, `question_group`, `l2_category`, ...). Pure functions, no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dmlr.judge.extract import boxed_groups, normalize_text, parse_options
from dmlr.judge.quantities import parse_number


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies on the hub, and how a raw row becomes fields.

    `splits` in order (none: JSON lines beside an archive of images); `rows` of all of them, where they were counted;
    `image`: the column of the image. A KeyError in `fields` is a column that is missing.
    """

    title: str
    repo: str
    splits: tuple[str, ...]
    rows: int | None
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: str | None = None
    image: str = "image"


# ------------------------------------------------------------------------------------------ common parts


def choice_fields(question: str, choices: list[str], index: int, *, listed: bool = False) -> dict[str, Any]:
    """Fields of a multiple-choice row; `listed`: the question names its options already. IndexError for no option."""
    if not 0 <= index < len(choices):
        raise IndexError(f"answer {index} of {len(choices)} options")
    letters, prompt = [chr(65 + i) for i in range(len(choices))], question
    if choices == letters and not listed:  # the options are marked in the image
        prompt = f"{question}\n\nOptions: {', '.join(letters)}"
    elif not listed:
        lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        prompt = "\n".join([f"{question}\n\nOptions:".lstrip(), *lines])
    letter, option = letters[index], choices[index]
    solution = letter if option in ("", letter) else f"{letter}. {option}"
    fields = {"prompt": prompt, "solution": solution, "kind": "choice"}
    return fields | {"choices": choices, "letter": letter, "option": option}


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
        words = [_PLACEHOLDER.sub(lambda mark: f" (Image {mark[1]})".replace(" )", ")"), text) for text in texts]
        return [text.strip() for text in words], len(named)
    # An option that consists of the marker keeps words to be chosen by.
    return [_PLACEHOLDER.sub("", text).strip() or _PLACEHOLDER.sub("the image", text) for text in texts], len(named)


def _texts(values: Any) -> list[str]:
    return [] if values is None else [str(value).strip() for value in values]


def _there(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


# Of a question without options, by its answer_type: what the judge takes, and what is asked for.
_FORMS = {
    "integer": ("number", "Answer with a whole number."),
    "float": ("number", "Answer with a number{rounded}."),
    "list": ("list", "Answer with a Python list, such as [1, 2, 3]."),
}


def _mathvista(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, answer_type, unit = _texts(row["choices"]), row["answer_type"], row["unit"] or None
    precision = None if row["precision"] is None or math.isnan(row["precision"]) else int(row["precision"])
    question = row["question"].strip() + (f" (Unit: {unit})" if unit else "")
    index = _index(row["answer"], choices, letter_first=False)
    if index is not None:
        fields = choice_fields(question, choices, index)
    else:
        rounded = "" if precision is None else f", rounded to {precision} decimal place{'' if precision == 1 else 's'}"
        kind, form = _FORMS.get(answer_type, (None, ""))
        prompt, solution = f"{question}\n{form.format(rounded=rounded)}".strip(), str(row["answer"]).strip()
        asked = {"kind": kind, "choices": choices or None, "precision": precision if answer_type == "float" else None}
        fields = {"prompt": prompt, "solution": solution, **_there(asked, asked)}
    kept = ("category", "task", "context", "skills", "source", "grade", "language")
    about = {"question_type": row["question_type"], "answer_type": answer_type, "unit": unit}
    return {"id": str(row["pid"]), **fields, **about, **_there(row.get("metadata") or {}, kept)}


def _mathvision(row: Mapping[str, Any]) -> dict[str, Any]:
    (question, *choices), pictures = _without_placeholders(row["question"], *_texts(row["options"]))
    answer = str(row["answer"]).strip()
    index = _index(answer, choices, letter_first=True)
    if index is not None:
        fields = choice_fields(question, choices, index)
    else:
        fields = {"prompt": question, "solution": answer} | ({"choices": choices} if choices else {})
    about = {"id": str(row["id"]), "category": row.get("subject"), "level": row.get("level")}
    return {**about, "pictures": max(1, pictures), **fields}


def _mm_math(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = [answer for _, group in boxed_groups(row["solution"] or "") for answer in group if answer]
    (question,), _ = _without_placeholders(row["question"])
    fields = {"id": row["file_name"], "answers": answers, "relative_tolerance": 0.01}
    fields |= {"solution": rf"\boxed{{{', '.join(answers)}}}" if answers else ""}
    if len(answers) > 1:
        question += (
            "\n\nSeveral answers are asked for: put all of them, in order and separated by commas, into one box."
        )
        if all(map(parse_number, answers)):
            fields |= {"kind": "list", "solution": repr(answers)}
    known = {"year": row.get("year"), "difficulty": row.get("difficult"), "category": row.get("knowledge")}
    return {"prompt": question, **fields, **known}


def _hallusionbench(row: Mapping[str, Any]) -> dict[str, Any]:
    questions = "/".join(str(row[name]) for name in ("category", "subcategory", "set_id"))
    figure, answer = f"{questions}/{row['figure_id']}", str(row["gt_answer"]).strip()
    if answer not in ("0", "1"):
        raise ValueError(f"gt_answer {row['gt_answer']!r} is neither 0 nor 1")
    return {
        "prompt": row["question"].strip(),
        "solution": "Yes" if answer == "1" else "No",
        "kind": "yesno",
        "id": f"{figure}/{row['question_id']}",
        "category": row["category"],
        "subcategory": row["subcategory"],
        "visual_input": str(row["visual_input"]),
        # A question without its figure belongs to no figure; it does belong to the question that it controls for.
        "figure_group": None if row.get("image") is None else figure,
        "question_group": f"{questions}/{row['question_id']}",
        "answer_details": row.get("gt_answer_details"),
    }


# Two pairs whose answers stand swapped in some copies of the data, the file of the released code among them. They are
# set, not swapped, so that it does not matter which copy is read.
_MMVP_ANSWERS = {99: "b", 100: "a", 279: "b", 280: "a"}


def _mmvp(row: Mapping[str, Any]) -> dict[str, Any]:
    number, choices = int(row["Index"]), list(parse_options(row["Options"]).values())
    answer = _MMVP_ANSWERS.get(number, row["Correct Answer"])
    index = _index(answer, choices, letter_first=True)
    if index is None:
        raise ValueError(f"answer {answer!r} is not among the options {row['Options']!r}")
    return {"id": number, "pair_id": (number - 1) // 2, **choice_fields(row["Question"].strip(), choices, index)}


def _mmstar(row: Mapping[str, Any]) -> dict[str, Any]:
    (question,), _ = _without_placeholders(row["question"])
    options, letter = parse_options(question) or inline_options(question), str(row["answer"]).strip().upper()
    fields = {"id": int(row["index"]), "category": row["category"], "l2_category": row["l2_category"]}
    if isinstance(about := row.get("meta_info"), Mapping) and about.get("source"):
        fields |= {"source": about["source"]}
    if letter in options:
        return fields | choice_fields(question, list(options.values()), ord(letter) - 65, listed=True)
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


def _scienceqa(row: Mapping[str, Any]) -> dict[str, Any]:
    hint = (row["hint"] or "").strip()
    (question,), _ = _without_placeholders(row["question"])
    fields = choice_fields(f"{hint}\n\n{question}".strip(), _texts(row["choices"]), int(row["answer"]))
    return fields | _there(row, ("task", "grade", "subject", "topic", "category", "skill"))


BENCHMARKS: dict[str, Benchmark] = {
    "mathvista": Benchmark(
        "MathVista-mini", "AI4Math/MathVista", ("testmini",), 1000, _mathvista, image="decoded_image"
    ),
    "mathvision": Benchmark(
        "MathVision-mini", "MathLLMs/MathVision", ("testmini",), 304, _mathvision, image="decoded_image"
    ),
    "mmmath": Benchmark("MM-Math", "THU-KEG/MM_Math", (), None, _mm_math),
    "hallusionbench": Benchmark(
        "HallusionBench", "lmms-lab/HallusionBench", ("image", "non_image"), 1129, _hallusionbench
    ),
    "mmvp": Benchmark("MMVP", "lmms-lab-eval/MMVP", ("train",), 300, _mmvp),
    "mmstar": Benchmark("MMStar", "Lin-Chen/MMStar", ("val",), 1500, _mmstar),
    "scienceqa": Benchmark("ScienceQA", "lmms-lab/ScienceQA", ("test",), 2017, _scienceqa, config="ScienceQA-IMG"),
}
