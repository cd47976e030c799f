"""Runs the families' proofs; what passed becomes the table of notebooks/README: `python tests/families_table.py`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- families table: python tests/families_table.py -->", "<!-- end of the families table -->"
NAMES = {
    "qwen2_5_vl": "Qwen2.5-VL, R1-OneVision, VLAA-Thinker",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava": "LLaVA 1.5",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL3 (-hf)",
    "smolvlm": "SmolVLM",
}
COLUMNS = {
    "test_loaded_from_a_folder_says_the_same": "loads",
    "test_vanilla_equals_generate": "vanilla is `generate`",
    "test_loop_equals_full_recomputation": "loop is full recomputation",
    "test_image_tokens_are_numbered_as_they_lie_on_the_picture": "heat maps lie right",
    "test_every_method_answers_with_one_two_and_no_images": "0, 1, 2 images, every method",
    "test_image_sizes_follow_max_pixels": "`max_pixels`",
}


def table(report: str) -> str:
    """Markdown from a JUnit report: passed of all checks, by family and kind of proof."""
    passed, total = defaultdict(int), defaultdict(int)
    for case in ElementTree.fromstring(report).iter("testcase"):
        found = re.fullmatch(r"(\w+)\[(\w+?)(-.*)?\]", case.get("name"))
        if found and found[1] in COLUMNS:
            key = found[2], found[1]
            total[key] += 1
            passed[key] += not list(case.iter("failure")) and not list(case.iter("error"))
    lines = ["| family (`model_type`) | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for family, name in NAMES.items():
        cells = [f"{passed[family, column]} of {total[family, column]}" for column in COLUMNS]
        lines.append(f"| {name} (`{family}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_families.py", f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        readme = ROOT / "notebooks" / "README.md"
        text = readme.read_text(encoding="utf-8")
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        readme.write_text(
            f"{before}{START}\n{table(report.read_text(encoding='utf-8'))}\n{END}{after}", encoding="utf-8"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
