"""reports/index.html: all runs with their headline numbers, and all reports, the newest first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from dmlr.config import root
from dmlr.run.records import RESULTS, ResultsError, find_runs, read_results
from dmlr.show.style import css, policy, table, template
from dmlr.stats.metrics import paired, summary

BASELINE = "vanilla"


def write_index(reports: str | Path | None = None) -> Path:
    """reports/index.html: every run found under `reports`/runs with its table, then every other report.

    A results.json that cannot be read is named in its run's place. Without `reports`: the project's own.
    """
    reports = Path(reports or root() / "reports")
    runs: dict[Path, list[Path]] = {}
    for path in find_runs(reports / "runs"):
        runs.setdefault(path.parents[1], []).append(path)  # <run>/<dataset>/<method>
    pages = {page for page in reports.glob("*/**/*.html") if page.parent not in runs}
    text = template("runs.html.j2").render(
        groups=_newest_first(_group(folder, methods, reports) for folder, methods in runs.items()),
        others=_newest_first(_link(page, reports) for page in pages),
        css=Markup(css()),
        policy=policy(),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    index = reports / "index.html"
    index.write_text(text, encoding="utf-8")
    return index


def headlines(results: Mapping[Path, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per run, by its folder <dataset>/<method>, the baseline first: accuracy with Wilson interval, and the
    difference to the baseline on the same dataset, paired, with p."""
    rows = []
    for path in sorted(results, key=lambda path: (path.parent, path.name != BASELINE, path.name)):
        found, baseline = summary([results[path]]).iloc[0], results.get(path.parent / BASELINE)
        row = {"dataset": path.parent.name, "method": found["method"], "accuracy": f"{found['accuracy']:.1%}"}
        row |= {"95 % interval": f"{found['low']:.1%} – {found['high']:.1%}", "difference": "", "p": ""}
        if baseline and path.name != BASELINE:
            pair = paired(baseline["entries"], results[path]["entries"])
            gains = f"{len(pair.gained)} gained, {len(pair.lost)} lost"
            row |= {"difference": f"{100 * pair.difference:+.1f} points ({gains})", "p": f"{pair.p_value:.2g}"}
        row |= {"judged": found["total"], "not judged": found["errors"] + found["skipped"] + found["judge_failed"]}
        rows.append(row | {"s / example": f"{found['seconds']:.2f}"})
    frame, numbers = pd.DataFrame(rows), ["accuracy", "95 % interval", "difference", "s / example"]
    frame[numbers] = frame[numbers].replace(r"\+?nan%?", "–", regex=True)
    return frame


def _newest_first(links: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(links, key=lambda one: (one["written"], one["title"]), reverse=True)


def _group(folder: Path, methods: list[Path], reports: Path) -> dict[str, Any]:
    """One run: its reports, its table, and what of it cannot be read."""
    results, broken = {}, []
    for path in methods:
        try:
            results[path] = read_results(path)
        except ResultsError as error:
            broken.append(str(error).replace(f"{reports}/", ""))
    models = [Path(str(result.get("model"))).name for result in results.values()]
    return {
        "title": folder.relative_to(reports).as_posix().removeprefix("runs/"),
        "models": ", ".join(dict.fromkeys(models)),
        "written": max(_when(path / RESULTS) for path in methods),
        "reports": [_link(page, reports) for page in sorted(folder.glob("*.html"))],
        "table": Markup(table(headlines(results))) if results else "",
        "broken": broken,
    }


def _link(page: Path, reports: Path) -> dict[str, str]:
    with open(page, encoding="utf-8") as file:
        title = re.search(r"<title>(.*?)</title>", file.read(4096))
    name = html.unescape(title[1]) if title else page.stem
    return {"href": page.relative_to(reports).as_posix(), "title": name, "written": _when(page)}


def _when(file: Path) -> str:
    return f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}"
