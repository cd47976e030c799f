"""What a fresh clone relies on: pins, the two ways in, make's targets, and nothing of anybody's machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {
    "bs4": "nbconvert",  # what these provide comes with the pinned package after the colon
    "dateutil": "pandas",
    "IPython": "ipykernel",
    "jupyter_client": "ipykernel",
    "markupsafe": "jinja2",
    "nbclient": "nbconvert",
    "PIL": "pillow",
    "packaging": "transformers",
    "pygments": "nbconvert",
    "dotenv": "python-dotenv",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
    "sympy": "math-verify",
    "threadpoolctl": "scikit-learn",
    "traitlets": "ipykernel",
    "urllib3": "requests",
    "yaml": "pyyaml",
}


def pins(requirements):
    """{name: version} for the newest Python; each must be exact."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w-]+)==([\w.+]+)(?:; python_version (>=|<) '3\.11')?", requirement)
        assert match, f"not an exact pin: {requirement}"
        if match[3] != "<":
            found[match[1]] = match[2]
    return found


def asked_for():
    """By one environment with all extras; lmms-eval has one of its own."""
    extras = [extra for name, extra in PROJECT["optional-dependencies"].items() if name != "lmms-eval"]
    return PROJECT["dependencies"] + [requirement for extra in extras for requirement in extra]


def declared():
    return pins(asked_for())


def test_conda_and_pip_install_the_same_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = next(d["pip"] for d in dependencies if isinstance(d, dict))
    assert by_pip[-1] == "--editable ."
    assert pins(by_pip[:-1]) == declared()


def test_every_line_of_the_conda_file_has_a_reason():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    pinned = [line for line in lines if "==" in line]
    assert len(pinned) == len(declared())
    assert all(re.search(r"# \w", line) for line in pinned)


def test_python_3_10_has_a_pin_for_everything():
    named = {re.split("==", r)[0] for r in PROJECT["dependencies"]}
    for name in named:
        marks = [r.partition(";")[2] for r in PROJECT["dependencies"] if r.startswith(f"{name}==")]
        assert marks == [""] or sorted(marks) == [" python_version < '3.11'", " python_version >= '3.11'"]


def test_what_is_imported_is_declared():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "dmlr").rglob("*.py")}
    imported = set()
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"dmlr"}
    names = {IMPORT_NAMES.get(name, name).replace("_", "-") for name in outside}
    assert "torch" in names
    pinned = {*declared(), "lmms-eval"}
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    wanted = {
        r.name: str(r.specifier) for r in map(Requirement, asked_for()) if r.marker is None or r.marker.evaluate()
    }
    assert wanted.keys() == declared().keys()
    assert {name: f"=={version(name).partition('+')[0]}" for name in wanted} == wanted


def test_make_knows_its_targets_and_the_environment_depends_on_the_pins():
    for target in ("setup", "demo", "test", "lint", "notebooks", "table1", "lmms-eval", "report", "lab"):
        plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0, plan.stderr
    always = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "test", "VENV=.venv"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "pip install" in always
    assert "HF_HUB_OFFLINE=1" in always


def test_the_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme) + re.findall(r"src=\"(?!https?:)([^\"]+)\"", readme)
    assert links
    missing = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


def test_the_readmes_tree_names_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## What is where")[2].partition("\n## ")[0]
    rooms = [path.parent.name for path in (ROOT / "dmlr").glob("*/__init__.py")]
    assert rooms and [name for name in rooms if f"  {name}/ " not in tree] == []


def test_no_file_names_a_private_place():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    places = [re.compile(rf"(?<![\w.]){place}/\w") for place in ("/home", "/root", "/Users", "/work", "/opt")]
    hits = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".j2", ".html", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            hits += [f"{name}: {place.pattern}" for place in places if place.search(text)]
    assert not hits
