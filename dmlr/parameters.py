"""Parameters of a notebook: from files and the command line, checked and in their types before anything runs."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
import yaml
from pydantic import TypeAdapter, ValidationError

from dmlr.config import Config, ConfigError, check_names, resolved, root

PATHS = ("model_name_or_path", "dataset", "prompts_file", "image")  # each may be several, separated by commas


def read_parameters(*paths: str | Path) -> dict[str, Any]:
    """Parameter files, each one YAML mapping of flat values; later files win. ConfigError says what else one is."""
    given: dict[str, Any] = {}
    for path in paths:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"parameter file {path}: {error}") from None
        values = {} if values is None else values
        if not isinstance(values, dict) or any(isinstance(value, dict | list) for value in values.values()):
            raise ConfigError(f"parameter file {path}: expected one mapping of names to single values")
        given |= {str(name): value for name, value in values.items()}
    return given


def check_parameters(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters in their types, or ConfigError before anything runs.

    Names must be in the notebook's `parameters` cell. Those that are Config's go through Config, together with the
    notebook's own values for the rest, so a range or a combination that the run would refuse is refused here. Paths
    come back as the caller means them, since the kernel works in another folder (`config.resolved`).
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        raise ConfigError(f"no notebook {str(notebook)!r}")
    cell, own = papermill.inspect_notebook(notebook), defaults(notebook)
    check_names(given, cell)
    config = Config.of_cell({**own, **given})
    checked = {}
    for name, value in given.items():
        shared = name in Config.model_fields
        value = getattr(config, name) if shared else _typed(name, value, cell[name]["inferred_type_name"], own[name])
        if value and name in PATHS:
            value = ",".join(resolved(part) for part in value.split(","))
        elif value and name == "output_dir":
            value = str(Path(value).resolve())
        checked[name] = value
    return checked


def defaults(notebook: str | Path) -> dict[str, Any]:
    """The values in a notebook's `parameters` cell; what is no Python literal, as it is written."""
    values = {name: known["default"] for name, known in papermill.inspect_notebook(notebook).items()}
    for name, source in values.items():
        with suppress(SyntaxError, ValueError):
            values[name] = ast.literal_eval(source)
    return values


def _typed(name: str, value: Any, kind: str, default: Any) -> Any:
    """A parameter that is the notebook's own, in the type its cell declares."""
    wanted = {"int": int, "float": float, "bool": bool, "str": str}.get(kind) or type(default)
    if wanted is str:
        return str(value)
    if default is None and (value is None or value == "none"):
        return None
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError:
        raise ConfigError(f"{name} = {value!r}: expected {wanted.__name__}") from None


def config_of(notebook: str | Path, values: Mapping[str, Any]) -> Config | None:
    """The whole configuration of a notebook's run; None where its cell lacks some of Config's parameters."""
    cell = defaults(notebook)
    return Config.of_cell({**cell, **values}) if set(Config.model_fields) <= set(cell) else None


def default_output(notebook: Path, values: Mapping[str, Any]) -> Path:
    """Where an executed copy goes: into the run's own folder, with model, dataset and methods in its name."""
    config = config_of(notebook, values)
    if config is None:
        return root() / "reports" / "runs" / notebook.stem / f"{notebook.stem}.ipynb"
    from dmlr.run.evaluate import name, output_folder  # imports torch; a misspelt parameter does not wait for that

    several = ("+".join(name(part) for part in text.split(",")) for text in (config.dataset, config.methods))
    stem = "_".join([notebook.stem, name(config.model_name_or_path), *several])
    return output_folder(config) / f"{stem}.ipynb"
