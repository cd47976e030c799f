"""reports/index.html: all runs and reports that lie under a folder."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dmlr.config import root
from dmlr.metrics import summary
from dmlr.notebooks import css
from dmlr.policy import policy
from dmlr.results import find_runs, read_results


def write_index(reports: str | Path | None = None) -> Path:
    """reports/index.html: every run found under `reports`, its headline table and its rendered notebooks."""
    reports = Path(reports or root() / "reports")
    folders: dict[Path, list[Path]] = {}
    for found in find_runs(reports / "runs"):
        folders.setdefault(found.parents[1], []).append(found)  # <run>/<dataset>/<method>
    for page in sorted(reports.glob("*/**/*.html")):
        folders.setdefault(page.parent, [])
    groups = []
    for folder in sorted(folders, key=lambda f: max(p.stat().st_mtime for p in f.iterdir()), reverse=True):
        runs = sorted(folders[folder], key=lambda run: (run.parent, run.name != "vanilla", run.name))
        rows = [_index_row(row) for _, row in summary(map(read_results, runs)).iterrows()]
        pages = sorted(folder.glob("*.html"))
        links = [{"href": page.relative_to(reports).as_posix(), "title": _title(page)} for page in pages]
        title = folder.relative_to(reports).as_posix().removeprefix("runs/")
        groups.append({"title": title, "reports": links, "rows": rows})
    loader = jinja2.FileSystemLoader(root() / "reports" / "template")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("runs.html.j2")
    page = template.render(groups=groups, css=Markup(css()), policy=policy(), made=f"{datetime.now():%Y-%m-%d %H:%M}")
    index = reports / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _index_row(row: Mapping[str, Any]) -> dict[str, str]:
    number = lambda value, text: "–" if value != value else text.format(value)  # noqa: E731
    interval = number(row["low"], "{:.1%}") + " – " + number(row["high"], "{:.1%}")
    return {
        "dataset": Path(str(row["dataset"])).stem,
        "method": row["method"],
        "accuracy": number(row["accuracy"], "{:.1%}"),
        "interval": interval,
        "total": f"{row['total']}",
        "unjudged": f"{row['errors'] + row['skipped'] + row['judge_failed']}",
        "seconds": number(row["seconds"], "{:.2f}"),
    }


def _title(page: Path) -> str:
    with open(page, encoding="utf-8") as file:
        found = re.search(r"<title>(.*?)</title>", file.read(4096))
    return html.unescape(found[1]) if found else page.stem
