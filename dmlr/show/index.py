"""reports/index.html: all runs with their headline numbers, and all reports, the newest first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dmlr.config import root
from dmlr.run.records import RESULTS, ResultsError, find_runs, read_results
from dmlr.show.style import TEMPLATES, css, policy
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
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    text = template.get_template("runs.html.j2").render(
        groups=_newest_first(_group(folder, methods, reports) for folder, methods in runs.items()),
        others=_newest_first(_link(page, reports) for page in pages),
        css=Markup(css()),
        policy=policy(),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    index = reports / "index.html"
    index.write_text(text, encoding="utf-8")
    return index


def _newest_first(links: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(links, key=lambda one: (one["written"], one["title"]), reverse=True)


def _group(folder: Path, methods: list[Path], reports: Path) -> dict[str, Any]:
    """One run: its reports, and a row per dataset and method, the baseline first."""
    rows, broken, models, before = [], [], [], {}
    for path in sorted(methods, key=lambda path: (path.parent, path.name != BASELINE, path.name)):
        try:
            result = read_results(path)
        except ResultsError as error:
            broken.append(str(error).replace(f"{reports}/", ""))
            continue
        models.append(Path(str(result.get("model"))).name)
        before |= {path.parent: result} if path.name == BASELINE else {}
        rows.append(_row(result, before.get(path.parent)) | {"dataset": path.parent.name})
    return {
        "title": folder.relative_to(reports).as_posix().removeprefix("runs/"),
        "models": ", ".join(dict.fromkeys(models)),
        "written": _when(max(methods, key=lambda path: (path / RESULTS).stat().st_mtime) / RESULTS),
        "reports": [_link(page, reports) for page in sorted(folder.glob("*.html"))],
        "rows": rows,
        "broken": broken,
    }


def _row(result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, str]:
    number = lambda value, text: "–" if value != value else text.format(value)  # noqa: E731
    row = summary([result]).iloc[0]
    pair = paired(baseline["entries"], result["entries"]) if baseline and baseline is not result else None
    return {
        "method": row["method"],
        "accuracy": number(row["accuracy"], "{:.1%}"),
        "interval": number(row["low"], "{:.1%}") + " – " + number(row["high"], "{:.1%}"),
        "difference": number(100 * pair.difference, "{:+.1f}") if pair else "",
        "p": number(pair.p_value, "{:.2g}") if pair else "",
        "total": f"{row['total']}",
        "unjudged": f"{row['errors'] + row['skipped'] + row['judge_failed']}",
        "seconds": number(row["seconds"], "{:.2f}"),
    }


def _link(page: Path, reports: Path) -> dict[str, str]:
    return {"href": page.relative_to(reports).as_posix(), "title": _title(page), "written": _when(page)}


def _when(file: Path) -> str:
    return f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}"


def _title(page: Path) -> str:
    with open(page, encoding="utf-8") as file:
        title = re.search(r"<title>(.*?)</title>", file.read(4096))
    return html.unescape(title[1]) if title else page.stem
