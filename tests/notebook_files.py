"""Notebooks for tests: small ones, stored ones with other parameters; what nbval says, what a report fetches."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import papermill
from bs4 import BeautifulSoup
from papermill.parameterize import parameterize_notebook

from dmlr.show.style import gallery_script


def notebook(path, *cells, parameters='rounds: int = 1  # how often\nlabel: str = "a"  # any text'):
    """A small notebook at `path`: a title, a parameters cell and the given code."""
    nb = nbformat.v4.new_notebook()
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nb.cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell(parameters)]
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nb, path)
    return path


def cell_parameters(path):
    return papermill.inspect_notebook(str(path))


def defined(path, names, **namespace):
    """What those cells of a notebook define that define any of `names`, executed here with `namespace` around them."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and any(re.search(rf"^(def|class) {name}\b", cell.source, re.M) for name in names):
            exec(compile(cell.source, path.name, "exec"), namespace)
    return SimpleNamespace(**namespace)


def filled(path, values, folder):
    """A copy in `folder` of the stored notebook with those of the values that it has; its path and its code cells."""
    stored, known = papermill.iorw.load_notebook_node(str(path)), cell_parameters(path)
    given = parameterize_notebook(stored, {name: value for name, value in values.items() if name in known})
    nbformat.write(given, folder / path.name)
    return folder / path.name, sum(cell.cell_type == "code" for cell in given.cells)


def nbval(path):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(path.parent), str(path)],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )


def external_requests(page):
    """What a browser would fetch or run: sources that are no data, style sheets, handlers, any script but ours."""
    soup = BeautifulSoup(page, "html.parser")
    fetched = [t.get("src") for t in soup.find_all(src=True) if not t["src"].startswith("data:image/")]
    fetched += [t["href"] for t in soup.find_all(["link", "use", "image"]) if not t["href"].startswith(("#", "data:"))]
    fetched += re.findall(r"@import|url\((?!data:)", page)
    running = soup.find_all(["iframe", "object", "embed", "form", "base"])
    running += [script for script in soup.find_all("script") if script.string != gallery_script()]
    running += [t for t in soup.find_all(True) if any(name.startswith("on") for name in t.attrs)]
    return fetched + running
