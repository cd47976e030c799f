"""Notebooks as commands: papermill runs with checked parameters, and their HTML reports.

Knows how to run and render a notebook; knows nothing about models, methods or what a notebook computes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from bs4 import BeautifulSoup
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune, strip_ansi
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from dmlr.config import root, shown
from dmlr.parameters import check_parameters, default_output, defaults
from dmlr.show.provenance import provenance
from dmlr.show.style import css, policy

RESULT = "**In the stored run:**"  # what follows in a notebook's first cell comes from the run


class RunError(RuntimeError):
    """A notebook that could not be run to its end; the message names the cell's error and the executed copy."""


class _ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter that runs this, whatever `python3` kernelspec is registered where."""

    @default("transport_encryption")
    def _encrypted_where_possible(self) -> str:
        return "auto"

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--IPKernelApp.log_level=50"]  # its INFO lines and the interrupt at shutdown are no news
        return KernelSpec(**get_kernel_dict(quiet))


def run(notebook: str | Path, given: Mapping[str, Any] | None = None, output: str | Path | None = None) -> Path:
    """Executes a notebook in a kernel of its own and renders it; returns the path of the HTML report.

    `output` is the executed copy's path; the report lies beside it. The kernel works in the notebook's folder. What
    cells print, progress bars included, goes to this process's terminal as it comes.

    Raises ConfigError before anything runs, RunError when a cell fails (the executed copy is kept, and no report of
    an earlier run is left beside it) or when the output cannot be written.
    """
    notebook = Path(notebook).resolve()
    values = check_parameters(notebook, given or {})
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
    """The source line of the cell that failed, from IPython's arrow; not one of what was the cause further down."""
    cells = [frame for frame in map(strip_ansi, error.traceback) if "Cell In[" in frame]
    lines = [line for frame in cells for line in frame.splitlines()]
    return next((f"  {line}\n" for line in lines if re.match("-+> ", line)), "")


def render(executed: str | Path, report: str | Path) -> None:
    """Executed notebook -> one HTML file with everything in it: nothing fetched, no script but the gallery's."""
    executed, report = Path(executed), Path(report)
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs.sort(key=lambda output: output.get("name") == "stderr")  # the log comes last
        else:
            cell.source = cell.source.partition(RESULT)[0]  # of the run that is stored, and this is another
    contents = _headings(notebook)
    resources = {
        "title": next((text for level, _, text in contents if level == 1), executed.stem),
        "css": css(),
        "notebook": executed.stem,
        "provenance": provenance(notebook.metadata, root(), defaults(executed)),
        "policy": policy(),
        "contents": [entry for entry in contents if entry[0] > 1],
    }
    exporter = HTMLExporter(template_name="template", extra_template_basedirs=[str(root() / "reports")])
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    report.write_text(shown(page), encoding="utf-8")  # warnings and tracebacks name files


def _headings(notebook: nbformat.NotebookNode) -> list[tuple[int, str, str]]:
    """Level, anchor and text of each heading, as nbconvert will write them."""
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    page = BeautifulSoup(markdown2html_mistune(prose), "html.parser")
    return [
        (int(h.name[1]), h.get("id", ""), h.get_text().removesuffix("¶")) for h in page.find_all(["h1", "h2", "h3"])
    ]


def keep(executed: str | Path, notebook: str | Path) -> None:
    """Puts the outputs of an executed copy into the notebook itself, as git keeps them and a code host shows them.

    Without logs, widgets, what only a report can show (cells tagged `report`) and where the project lies on this
    machine; with a hash of the code that made them. What is said last in the cell tagged `result` opens the
    notebook; the figure of the cell tagged `front-page` becomes reports/figures/<notebook>.png, which README shows.
    """
    stored, ran = (nbformat.read(path, as_version=4) for path in (notebook, executed))
    ran.cells = [cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell, made in zip(stored.cells, ran.cells, strict=True):
        if cell.cell_type != "code":
            continue
        if cell.source != made.source:
            raise RunError(f"{executed} is no run of {notebook} as it is; its code differs: {made.source[:60]!r} …")
        tags = cell.metadata.get("tags", [])
        cell.outputs = [] if "report" in tags else _kept(made.outputs)
        cell.execution_count = made.execution_count
        if "front-page" in tags:
            picture = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            (root() / "reports" / "figures" / f"{Path(notebook).stem}.png").write_bytes(base64.b64decode(picture))
        if "result" in tags:
            result = " ".join(cell.outputs[-1].data["text/plain"].split())
            head = stored.cells[0].source.partition(RESULT)[0].rstrip()
            stored.cells[0].source = f"{head}\n\n{RESULT} {result}"
    stored.metadata["dmlr"] = {"code": code_hash(stored)}
    nbformat.write(stored, notebook)


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Of the sources of all code cells: what the outputs of a stored notebook were made by."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode("utf-8")).hexdigest()[:16]


def _kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without logs, widgets and where the project lies on this machine."""
    widget = "application/vnd.jupyter.widget-view+json"
    kept = [output for output in outputs if output.get("name") != "stderr" and widget not in output.get("data", {})]
    return nbformat.from_dict(json.loads(shown(json.dumps(kept))))
