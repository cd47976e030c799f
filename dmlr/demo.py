"""The demo: the embedded benchmark through vanilla and DMLR, then the reports. Calls notebooks and reads results."""

from __future__ import annotations

import base64
import re
import shutil
import time
from pathlib import Path

from bs4 import BeautifulSoup

from dmlr.config import root
from dmlr.notebooks import RunError, run
from dmlr.run.records import find_runs, read_results
from dmlr.show.index import write_index
from dmlr.stats.metrics import paired, summary

RUNS = root() / "reports" / "runs"
BENCHMARK_RUN = RUNS / "shapes-vl_mathematics+visual+composition"
WALKTHROUGH_RUN = RUNS / "01_walkthrough"
# Reports that git keeps, by name: the folder of the run that makes each, and its command.
EXAMPLES = {
    "benchmark": (BENCHMARK_RUN, "make demo"),
    "table1": (RUNS / "table1" / "shapes-vl", "make table1"),
}
SUITES = {
    "dataset": ",".join(f"data/shapes/{suite}.json" for suite in ("mathematics", "visual", "composition")),
    "end_data_idx": None,
    "batch_size": 32,
}
README_MARKS = ("<!-- demo table: python -m dmlr readme -->", "<!-- end of the demo table -->")


def demo(model: str = "") -> None:
    """Runs the three notebooks with that model (none: the embedded one), and ends with the table and the reports."""
    from dmlr.run.evaluate import name  # imports torch

    began, notebooks = time.perf_counter(), root() / "notebooks"
    chosen = {"model_name_or_path": model} if model else {}
    print("[1/3] 03_benchmark: three suites, vanilla and dmlr; the bar shows the time that is left", flush=True)
    benchmark = run(notebooks / "03_benchmark.ipynb", SUITES | chosen)
    print("\n[2/3] 04_compare: all runs in one table", flush=True)
    run(notebooks / "04_compare.ipynb")
    print("\n[3/3] 01_walkthrough: one question, seen from inside", flush=True)
    place = root() / "reports" / "runs" / f"01_walkthrough_{name(model)}" / "01_walkthrough.ipynb" if model else None
    walk = run(notebooks / "01_walkthrough.ipynb", chosen, place)
    index = write_index()
    print(f"\n{result_table(benchmark.parent)}\n\nmade in {(time.perf_counter() - began) / 60:.1f} minutes")
    print(f"report:      {benchmark}\nwalkthrough: {walk}\nall runs:    {index}")


def publish() -> None:
    """Table, figure and reports of a finished demo into the files that git keeps. RunError when it did not finish."""
    if missing := [folder for folder in (BENCHMARK_RUN, WALKTHROUGH_RUN) if not list(folder.glob("*.html"))]:
        raise RunError(f"no report in {missing[0]}: the demo has not run to its end; `make demo` does")
    write_readme_table()
    write_readme_figure()
    for line in keep_examples():
        print(line)


def result_table(run_folder: Path) -> str:
    """A run's methods side by side, as a Markdown table: accuracy with Wilson interval, paired difference, p."""
    results = {(path.parent.name, path.name): read_results(path) for path in find_runs(run_folder)}
    lines = ["| suite | method | accuracy | 95 % interval | n | difference | p |", "|---|---|---|---|---|---|---|"]
    ordered = sorted(results, key=lambda key: (key[0], key[1] != "vanilla", key[1]))
    for suite, method in ordered:
        row = summary([results[suite, method]]).iloc[0]
        cells = [suite, method, f"{row['accuracy']:.1%}", f"{row['low']:.1%} – {row['high']:.1%}", str(row["total"])]
        if method != "vanilla" and (suite, "vanilla") in results:
            pair = paired(results[suite, "vanilla"]["entries"], results[suite, method]["entries"])
            gains = f"{len(pair.gained)} gained, {len(pair.lost)} lost"
            cells += [f"{100 * pair.difference:+.1f} points ({gains})", f"{pair.p_value:.2g}"]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme_table(readme: Path | None = None, run_folder: Path | None = None) -> None:
    """Puts the demo's result table between its marks in the README, so that nobody types it."""
    readme = readme or root() / "README.md"
    start, end = (re.escape(mark) for mark in README_MARKS)
    text = readme.read_text(encoding="utf-8")
    if not re.search(f"{start}.*{end}", text, flags=re.DOTALL):
        raise ValueError(f"{readme}: no place for the table; expected the lines {README_MARKS}")
    table = f"{README_MARKS[0]}\n{result_table(run_folder or BENCHMARK_RUN)}\n{README_MARKS[1]}"
    readme.write_text(re.sub(f"{start}.*{end}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


def write_readme_figure(picture: Path | None = None, report: Path | None = None) -> None:
    """The last figure of the walkthrough's report, as the README's picture."""
    picture = picture or root() / "reports" / "figures" / "walkthrough.png"
    report = report or WALKTHROUGH_RUN / "01_walkthrough.html"
    page = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    figures = [image["src"].partition("base64,")[2] for image in page.select("img.plain")]
    if not figures:
        raise ValueError(f"{report}: no figure in it")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(figures[-1]))


def keep_examples(target: Path | None = None) -> list[str]:
    """Copies the newest report of every run in EXAMPLES to reports/examples/, which is in git; says what it did.

    A run that is not there leaves the report of before.
    """
    target, lines = target or root() / "reports" / "examples", []
    target.mkdir(parents=True, exist_ok=True)
    for name, (folder, command) in EXAMPLES.items():
        reports = sorted(folder.glob("*.html"), key=lambda report: report.stat().st_mtime)
        if reports:
            shutil.copyfile(reports[-1], target / f"{name}.html")
            lines.append(f"{name}.html: {reports[-1].stat().st_size / 1e6:.1f} MB")
        else:
            lines.append(f"{name}.html stays: {command} makes it anew")
    return lines
