"""What a fresh clone relies on: pins, the two ways in, make's targets, and nothing of anybody's machine."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


DECLARED = pins(asked_for())


def test_conda_and_pip_install_the_same_versions_each_with_a_reason():
    text = (ROOT / "environment.yml").read_text()
    by_pip = next(d["pip"] for d in yaml.safe_load(text)["dependencies"] if isinstance(d, dict))
    assert by_pip[-1] == "--editable ."
    assert pins(by_pip[:-1]) == DECLARED
    assert all(re.search(r"# \w", line) for line in text.splitlines() if "==" in line)


def test_python_3_10_has_a_pin_for_everything():
    marks = {}
    for requirement in asked_for():
        pin, _, mark = requirement.partition("; ")
        marks.setdefault(pin.partition("==")[0], set()).add(mark)
    both = {"python_version < '3.11'", "python_version >= '3.11'"}
    assert {name: found for name, found in marks.items() if found not in ({""}, both)} == {}


def test_what_is_imported_is_declared():
    """As a pinned package, or one that a pinned package asks for."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "dmlr").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    outside = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"dmlr", "lmms_eval"}
    needed = (Requirement(line) for name in DECLARED for line in metadata.requires(name) or ())
    known = {canonicalize_name(name) for name in DECLARED}
    known |= {canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    providers = metadata.packages_distributions()
    assert "torch" in outside
    assert {name for name in outside if not known & set(map(canonicalize_name, providers.get(name, [name])))} == set()


def test_installed_versions_are_the_pinned_ones():
    asked = [r for r in map(Requirement, asked_for()) if r.marker is None or r.marker.evaluate()]
    assert {r.name for r in asked} == DECLARED.keys()
    installed = {r.name: metadata.version(r.name).partition("+")[0] for r in asked}
    assert installed == {r.name: str(r.specifier).removeprefix("==") for r in asked}


def test_make_knows_its_targets_and_the_environment_depends_on_the_pins():
    targets = ["setup", "demo", "test", "lint", "notebooks", "table1", "lmms-eval", "report", "lab"]
    plan = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    again = ["make", "-n", "-W", "pyproject.toml", "test", "VENV=.venv"]
    always = subprocess.run(again, cwd=ROOT, capture_output=True, text=True).stdout
    assert "pip install" in always and "HF_HUB_OFFLINE=1" in always


def test_the_readme_names_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme) + re.findall(r"src=\"(?!https?:)([^\"]+)\"", readme)
    assert links and [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_readmes_tree_names_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## What is where")[2].partition("\n## ")[0]
    rooms = [path.parent.name for path in (ROOT / "dmlr").glob("*/__init__.py")]
    assert rooms and [name for name in rooms if f"  {name}/ " not in tree] == []


def test_no_file_names_a_private_place():
    places = r"(^|[^[:alnum:]_.])/(home|root|Users|work|opt)/[[:alnum:]_]"
    found = subprocess.run(["git", "grep", "-nIE", "--untracked", places], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), "1: git found none"
