"""What search does to an embedded model on the suite of searching questions, beside its controls.

`python -m notebooks.training.measure data/models/shapes-seek` writes measured.json beside the weights: an entry for
every row below, each paired with the start by question; `--sweep` writes sweep.json: sigma and lr on the validation
split; `--readme` puts what was written for three models into the README's table. Knows nothing about how a model was
trained.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from dmlr.config import Config
from dmlr.data.examples import load_dataset
from dmlr.methods import METHODS
from dmlr.model.vlm import VLM
from dmlr.run.batches import Batch, partners, prepare
from dmlr.run.evaluate import record_of
from dmlr.stats import metrics
from notebooks.training.examine import overview

ONE, PAPER = {"num_samples": 1}, {"num_samples": 1, "sigma": 0.1, "lr": 1e-3, "sigma_decay": 0.95}
PATCHES = {"initial_patch_count": 2, "patch_increment": 2, "max_total_patches": 16, "num_selected_patches": 16}
TWO = {"initial_patch_count": 2}
ROWS = {  # what -> method, and what differs from BASE
    "vanilla": ("vanilla", {}),
    "start": ("unoptimised", {}),
    "DMLR, 8 samples": ("dmlr", {}),
    "displaced, no reward": ("displaced", {}),
    "another question's latents": ("swapped", {}),
    "random by reward, as many evaluations": ("random", {}),
    "random by reward, as many as 1 sample's": ("random", ONE),
    "DMLR, 1 sample, lr 5σ²": ("dmlr", ONE),
    "DMLR, 1 sample, lr σ²": ("dmlr", ONE | {"lr": 4.0}),
    "DMLR, the paper's σ and lr, 1 sample": ("dmlr", PAPER),
    "exact gradient of the reward": ("dmlr", ONE | {"use_auto_grad": True, "lr": 0.05}),
    "patches of the true object": ("true-patches", TWO | {"max_num_steps": 0}),
    "patches of random places": ("random-patches", TWO | {"max_num_steps": 0}),
    "most attended patches": ("unoptimised", TWO),
    "the paper's preset": ("dmlr", PAPER | PATCHES),
    "DMLR with patches": ("dmlr", PATCHES),
}
SWEEP = {f"σ {s:g}, lr {k:g}σ²": ("dmlr", {"sigma": s, "lr": k * s * s}) for s in (0.5, 1, 2, 4) for k in (1, 5, 20)}
# sigma is the size of hypotheses that the models were taught, lr 5 sigma squared.
BASE = {"num_thought_tokens": 4, "max_num_steps": 15, "num_samples": 8, "sigma": 2.0, "lr": 20.0, "sigma_decay": 1.0}
BASE |= {"initial_patch_count": 0, "patch_increment": 0, "num_selected_patches": None, "max_total_patches": None}
BASE |= {"reward": "entropy", "reward_position": "think", "accept_at": "updated", "max_pixels": None}
BASE |= {"max_new_tokens": 64, "device": "cpu", "dtype": "float32"}


def run(vlm: VLM, batch: Batch, method: str, config: Config, size: int) -> list[dict]:
    """The records of a method, as a run writes them."""
    answers = []
    for at in range(0, len(batch.questions), size):
        answers += METHODS[method](vlm, batch.questions[at : at + size], config)
    return [record_of(example, answer) for example, answer in zip(batch.examples, answers, strict=True)]


def summary(records: list[dict], others: dict[str, list[dict]]) -> dict:
    """Per cent right and abstained, mean reward, its AUROC for being right, and against other rows by question."""
    found = {"right": percent(r["is_correct"] for r in records), "abstained": percent(r["abstained"] for r in records)}
    if records[0]["best_reward"] is not None:
        found["reward"] = round(sum(r["best_reward"] for r in records) / len(records), 3)
        if 0 < found["right"] < 100:
            found["auroc"] = round(metrics.auroc(records).value, 3)
    for name, theirs in others.items():
        pairs = [(a["is_correct"], b["is_correct"]) for a, b in zip(theirs, records, strict=True)]
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        changed = percent(a["model_output"] != b["model_output"] for a, b in zip(theirs, records, strict=True))
        p = metrics.mcnemar_exact(gained, lost)
        found[f"against {name}"] = {"gained": gained, "lost": lost, "p": p, "answers changed": changed}
    return found


def percent(values) -> float:
    values = list(values)
    return round(100 * sum(values) / len(values), 1)


MARKS = ("<!-- latents table: python -m notebooks.training.measure --readme -->", "<!-- end of the latents table -->")
SHOWN = ("vanilla", "start", "displaced, no reward", "another question's latents", "DMLR, 8 samples")


def readme_table(models: Path = Path("data/models")) -> str:
    """What measured.json of the three models says, as Markdown."""
    lines = [
        "| model | vanilla | start | displaced | swapped | **DMLR** | gained, lost | p | reward | AUROC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("shapes-seek", "shapes-seek-overconfident", "shapes-vl"):
        rows = json.loads((models / name / "measured.json").read_text(encoding="utf-8"))["rows"]
        vanilla, start, displaced, swapped, found = (rows[row] for row in SHOWN)
        pair = found["against start"]
        cells = [
            f"[{name}](data/models/{name}/README.md)",
            *(f"{row['right']:.1f}" for row in (vanilla, start, displaced, swapped)),
        ]
        cells += [f"**{found['right']:.1f}**", f"+{pair['gained']} −{pair['lost']}", f"{pair['p']:.1g}"]
        for what in ("reward", "auroc"):
            ends = (f"{row[what]:.2f}" if what in row else "–" for row in (start, found))
            cells += [" → ".join(ends)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme_table(readme: Path = Path("README.md")) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{readme_table()}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="checkpoint folder")
    parser.add_argument("--readme", action="store_true", help="only write the README's table from measured.json")
    parser.add_argument("--sweep", action="store_true", help="sigma and lr on the validation split instead")
    parser.add_argument("--suite", default="seek", help="seek, or seek_validation")
    parser.add_argument("--examples", type=int, default=None, help="the first so many questions")
    parser.add_argument("--rows", default="", help="comma-separated parts of rows' names; none: all")
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    if given.readme:
        write_readme_table()
    elif given.model:
        measure(given)
    else:
        parser.error("which model?")


def measure(given: argparse.Namespace) -> None:
    """Runs the wanted rows and writes measured.json, or sweep.json."""
    suite, rows = ("seek_validation", SWEEP) if given.sweep else (given.suite, ROWS)
    examples = load_dataset(f"data/shapes/{suite}.json")[0][: given.examples]
    batch = prepare(examples, partners(examples))
    vlm = VLM.load(base := Config(model_name_or_path=given.model, **BASE))
    wanted = [part.strip() for part in given.rows.split(",")]
    found, others = {}, {}
    for name, (method, changes) in rows.items():
        if not any(part in name for part in wanted):
            continue
        clock = time.time()
        records = run(vlm, batch, method, base.replace(**changes), given.batch)
        found[name] = summary(records, others)
        others |= {name: records} if name in ("start", "DMLR, 8 samples") else {}
        print(name, found[name], f"{time.time() - clock:.0f} s", flush=True)
    command = " ".join(["python -m notebooks.training.measure", *map(shlex.quote, sys.argv[1:])])
    told = {"command": command, "suite": suite, "n": len(examples)}
    if not given.rows and not given.sweep:
        shown = overview(vlm, base.replace(max_new_tokens=128), settings=((0, 0, 0), (4, 2, 0)))
        ordinary = shown.groupby(["think", "patches", "suite"])["right"].mean().mul(100).round(1)
        told["ordinary"] = {f"{t} think tokens, {k} patches each, {suite}": v for (t, k, suite), v in ordinary.items()}
    text = json.dumps(told | {"rows": found}, indent=1, ensure_ascii=False) + "\n"
    (Path(given.model) / f"{'sweep' if given.sweep else 'measured'}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
