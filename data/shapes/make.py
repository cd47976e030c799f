"""Draws the committed suites: questions about scenes of the test split, balanced, as dataset files with images.

`python -m data.shapes.make` writes them again, byte for byte.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from data.shapes.questions import ABSTENTION, SUITES, Maker, Question, seek
from data.shapes.scenes import SEEK, Difficulty, Scene, random_scene, render

Suite = tuple[list[dict], dict[str, Scene]]  # records, and the scene of each image


def make_suite(
    suite: str,
    examples: int = 320,
    per_image: int = 4,
    seed: int = 0,
    hard: Difficulty | None = None,
    makers: Sequence[Maker] = (),
) -> Suite:
    """Records of one suite and the scene of each image: (records, {image name: Scene}).

    Every image carries `per_image` questions on different matters; makers (none: those of SUITES) take turns, and the
    answer that is so far rarest among a few candidates is taken, so that no answer can be guessed.
    """
    rng = random.Random(f"{suite} {seed}")
    makers = makers or list(SUITES[suite].values())
    seen: dict[str, Counter] = defaultdict(Counter)
    records, scenes = [], {}
    while len(records) < examples:
        scene = random_scene(rng, "test", hard)
        found: list[list[Question]] = []
        for i in range(per_image):
            maker = makers[(len(records) + i) % len(makers)]
            tries = [qs for qs in (maker(scene, rng) for _ in range(6)) if qs]
            taken = {q.prompt for qs in found for q in qs}
            tries = [qs for qs in tries if taken.isdisjoint(q.prompt for q in qs)]
            if tries:
                found.append(min(tries, key=lambda qs: seen[qs[0].category][qs[0].answer]))
                seen[found[-1][0].category].update(q.answer for q in found[-1])
        found = found[:per_image]
        if sum(len(qs) for qs in found) < per_image:
            continue
        name = f"images/{suite}_{len(scenes):03d}.png"
        scenes[name] = scene
        for qs in found:
            pair = {"pair_id": f"{suite}-{len(records)}"} if len(qs) == 2 else {}
            for q in qs:
                records.append(_record(q, name) | pair)
    return [r | {"idx": i} for i, r in enumerate(records)], scenes


def _record(q: Question, image: str) -> dict:
    record = {"prompt": q.prompt, "solution": q.solution, "image_path": image, "suite": q.suite, "category": q.category}
    record["boxes"] = [t.box for t in q.asked]
    if q.suite == "seek":  # what a right answer begins with after think tokens, and what is no answer
        record |= {"response": f"<answer>{q.solution}</answer>", "abstention": ABSTENTION}
    return record | ({"choices": list(q.choices)} if q.choices else {})


def all_suites() -> Iterator[tuple[str, Suite]]:
    """The three suites, and *seek* with the split on which its settings are chosen; their scenes are different ones."""
    for suite in SUITES:
        yield suite, make_suite(suite)
    yield "seek", make_suite("seek", 320, 2, hard=SEEK, makers=[seek])
    yield "seek_validation", make_suite("seek_validation", 160, 2, hard=SEEK, makers=[seek])


def write_suites(folder: str | Path) -> dict[str, int]:
    """Write all suites and their images; returns the number of examples of each."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sizes = {}
    for suite, (records, scenes) in all_suites():
        for name, scene in scenes.items():
            Image.fromarray(render(scene)).save(folder / name, optimize=True)
        (folder / f"{suite}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        sizes[suite] = len(records)
    return sizes


def chance_level(records: list[dict]) -> float:
    """Accuracy of the best blind guess: per question type the most frequent answer, or a random option."""
    groups = defaultdict(list)
    for r in records:
        groups[r["category"]].append(r)
    right = 0.0
    for group in groups.values():
        if "choices" in group[0]:
            right += sum(1 / len(r["choices"]) for r in group)
        else:
            right += Counter(r["solution"] for r in group).most_common(1)[0][1]
    return right / len(records)


if __name__ == "__main__":
    print(write_suites(Path(__file__).parent))
