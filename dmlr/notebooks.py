"""Notebooks as commands: checked papermill runs, HTML reports and the index of all runs.

Knows how to run and render a notebook; knows nothing about models, methods or what a notebook computes.
"""

from __future__ import annotations

import ast
import html
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import papermill
import yaml
from bs4 import BeautifulSoup
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from markupsafe import Markup
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune, strip_ansi
from papermill.exceptions import PapermillExecutionError
from pygments.formatters import HtmlFormatter
from traitlets import default

from dmlr.config import Config, ConfigError, check_names
from dmlr.metrics import summary
from dmlr.results import find_runs, read_results

PATHS = ("model_name_or_path", "dataset", "prompts_file", "image")
CONFIG_NAMES = tuple(f.name for f in fields(Config))


class RunError(RuntimeError):
    """A notebook that could not be run to its end; the message names the cell's error and the executed copy."""


def root() -> Path:
    """The project's folder, wherever a notebook or a command is started."""
    return Path(__file__).resolve().parents[1]


class _ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter that runs this, whatever `python3` kernelspec is registered where."""

    @default("transport_encryption")
    def _encrypted_where_possible(self) -> str:
        return "auto"

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--IPKernelApp.log_level=50"]  # its INFO lines and the interrupt at shutdown are no news
        return KernelSpec(**get_kernel_dict(quiet))


# parameters


def read_parameters(path: str | Path) -> dict[str, Any]:
    """A parameter file: one YAML mapping of flat values. ConfigError says what else it is."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"parameter file {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or any(isinstance(value, dict | list) for value in values.values()):
        raise ConfigError(f"parameter file {path}: expected one mapping of names to single values")
    return {str(name): value for name, value in values.items()}


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters in their types, or ConfigError before anything runs.

    Names must be in the notebook's `parameters` cell. Those that are Config's go through Config, together with the
    notebook's own values for the rest, so a range or a combination that the run would refuse is refused here.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        raise ConfigError(f"no notebook {str(notebook)!r}")
    cell = papermill.inspect_notebook(str(notebook))
    check_names(given, cell)
    settings = {name: _literal(p["default"]) for name, p in cell.items() if name in CONFIG_NAMES}
    config = Config.make(None, **{**settings, **{n: v for n, v in given.items() if n in CONFIG_NAMES}})
    return {
        name: getattr(config, name)
        if name in CONFIG_NAMES
        else _typed(name, value, cell[name]["inferred_type_name"], _literal(cell[name]["default"]))
        for name, value in given.items()
    }


def _from_here(values: dict[str, Any]) -> dict[str, Any]:
    """Paths as the caller means them: the kernel works in another folder.

    A path that the project's root has stays as it is; one that exists here, and any output folder, becomes absolute.
    """

    def absolute(path: str) -> str:
        here = path.strip()
        return str(Path(here).resolve()) if here and not (root() / here).exists() and Path(here).exists() else here

    moved = {name: str(values[name]) for name in PATHS if values.get(name)}
    moved = {name: ",".join(absolute(part) for part in value.split(",")) for name, value in moved.items()}
    if values.get("output_dir"):
        moved["output_dir"] = str(Path(values["output_dir"]).resolve())
    return {**values, **moved}


def _literal(source: str) -> Any:
    try:
        return ast.literal_eval(source)
    except (SyntaxError, ValueError):
        return source


def _typed(name: str, value: Any, kind: str, default: Any) -> Any:
    """A parameter that is the notebook's own, in the type its cell declares."""
    types = {"int": int, "float": float, "bool": bool, "str": str}
    wanted = types.get(kind) or type(default)
    if wanted is str:
        return value if isinstance(value, str) else str(value)
    parsed = yaml.safe_load(value) if isinstance(value, str) else value
    if parsed is None and default is None:
        return None
    try:
        if wanted is float and not isinstance(parsed, bool):
            return float(parsed)
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, wanted) or (wanted is int and isinstance(parsed, bool)):
        raise ConfigError(f"{name} = {value!r}: expected {wanted.__name__}")
    return parsed


def default_output(notebook: Path, values: Mapping[str, Any]) -> Path:
    """Where an executed copy goes: into the run's own folder, with model, dataset and methods in its name."""
    cell = {name: _literal(p["default"]) for name, p in papermill.inspect_notebook(str(notebook)).items()}
    told = {**cell, **values}
    if not set(CONFIG_NAMES) <= set(told):
        return root() / "reports" / "runs" / notebook.stem / f"{notebook.stem}.ipynb"
    from dmlr.evaluate import name, output_folder  # imports torch; a misspelt parameter does not wait for that

    config = Config.make(None, **{key: told[key] for key in CONFIG_NAMES})
    several = ("+".join(name(part) for part in text.split(",")) for text in (config.dataset, config.methods))
    stem = "_".join([notebook.stem, name(config.model_name_or_path), *several])
    return output_folder(config) / f"{stem}.ipynb"


# run and render


def run(notebook: str | Path, given: Mapping[str, Any] | None = None, output: str | Path | None = None) -> Path:
    """Executes a notebook in a kernel of its own and renders it; returns the path of the HTML report.

    `output` is the executed copy's path; the report lies beside it. The kernel works in the notebook's folder. What
    cells print, progress bars included, goes to this process's terminal as it comes.

    Raises ConfigError before anything runs, RunError when a cell fails (the executed copy is kept, and no report of
    an earlier run is left beside it) or when the output cannot be written.
    """
    notebook, given = Path(notebook).resolve(), dict(given or {})
    values = _from_here(check_parameters(notebook, given))
    output = Path(output or default_output(notebook, values)).resolve()
    report = output.with_suffix(".html")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        papermill.execute_notebook(
            str(notebook),
            str(output),
            values,
            kernel_name="python3",
            kernel_manager_class=_ThisInterpreter,
            cwd=str(notebook.parent),
            progress_bar=False,
            stdout_file=sys.stderr,
            stderr_file=sys.stderr,
            coalesce_streams=True,
        )
        render(output, report)
    except PapermillExecutionError as error:
        where = f"cell [{error.exec_count}]: {error.ename}: {strip_ansi(str(error.evalue))}"
        raise RunError(f"{notebook.name} failed in {where}\n{_place(error)}executed copy: {output}") from None
    except DeadKernelError as error:
        raise RunError(f"{notebook.name}: the kernel died ({error}); executed copy so far: {output}") from None
    except OSError as error:
        raise RunError(
            f"{notebook.name}: {output.parent} cannot be written: {error.strerror or error}; records that were "
            "finished are kept, and resume = true goes on from them"
        ) from None
    return report


def _place(error: PapermillExecutionError) -> str:
    """The source line of the cell that failed, from IPython's arrow."""
    lines = [line for frame in error.traceback for line in strip_ansi(frame).splitlines()]
    return next((f"  {line}\n" for line in lines if re.match("-+> ", line)), "")


def render(executed: str | Path, report: str | Path) -> None:
    """Executed notebook -> one HTML file with everything in it: no script, nothing fetched."""
    executed, report = Path(executed), Path(report)
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _one_log(cell.outputs)
    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(root() / "reports")])
    exporter.register_filter("settled", settled)
    exporter.register_filter("fold_label", _fold_label)
    contents = _headings(notebook)
    title = next((text for level, _, text in contents if level == 1), executed.stem)
    resources = {
        "title": title,
        "css": _css(),
        "masthead": f"DMLR · {executed.stem} · {datetime.now():%Y-%m-%d %H:%M}",
        "contents": [entry for entry in contents if entry[0] > 1],
    }
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    # Warnings and tracebacks name files; where the project lies on this machine is nobody's business.
    report.write_text(page.replace(f"{root()}{os.sep}", ""), encoding="utf-8")


def settled(text: str) -> str:
    """What a terminal shows in the end: of a progress bar that overwrites itself, its last state."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _one_log(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """A cell's outputs with its stderr in one piece at the end; a progress bar comes in hundreds."""
    log = [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    rest = [output for output in outputs if output not in log]
    merged = [nbformat.v4.new_output("stream", name="stderr", text="".join(output.text for output in log))]
    return rest + (merged if log else [])


def _fold_label(cell: Mapping[str, Any]) -> str:
    tags = cell["metadata"].get("tags", [])
    return {"parameters": "parameters: defaults", "injected-parameters": "parameters: this run"}.get(
        next((tag for tag in tags if "parameters" in tag), ""), "code"
    )


def _headings(notebook: nbformat.NotebookNode) -> list[tuple[int, str, str]]:
    """Level, anchor and text of each heading, as nbconvert will write them."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            page = BeautifulSoup(markdown2html_mistune(cell.source), "html.parser")
            for heading in page.find_all(["h1", "h2", "h3"]):
                for link in heading.find_all("a", class_="anchor-link"):
                    link.decompose()
                found.append((int(heading.name[1]), heading.get("id", ""), heading.get_text().strip()))
    return found


def _css() -> str:
    """Page style and code colours, for light and dark."""
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    page = (root() / "reports" / "template" / "page.css").read_text(encoding="utf-8")
    clear = ".highlight, .highlight pre { background: var(--tint); }"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{page}\n{clear}"


# the index


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
    page = template.render(groups=groups, css=Markup(_css()), made=f"{datetime.now():%Y-%m-%d %H:%M}")
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
