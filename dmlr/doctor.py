"""`python -m dmlr doctor`: what this machine has, and which models fit in it. Nothing is fetched, no weights are read.

Knows how to look and how to print; what a model needs is planning.py's. Of secrets it tells only whether they are set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from dmlr.config import locate
from dmlr.data.check import check_dataset
from dmlr.data.examples import DatasetError
from dmlr.judge.llm_settings import JudgeError, JudgeSettings
from dmlr.machine import environment
from dmlr.planning import PAPER_MODELS, fit, fits_text, size

EMBEDDED_MODEL = "data/models/shapes-vl"
EMBEDDED_DATA = tuple(f"data/shapes/{suite}.json" for suite in ("mathematics", "visual", "composition"))
OPTIONAL = {
    "ray": "several workers",
    "bitsandbytes": "weights in 4 or 8 bits",
    "flash_attn": "not needed: attention is this project's own",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def examine(models: Sequence[str] = (), memory: int | None = None) -> dict[str, Any]:
    """Everything that is reported, as plain values; `broken` lists what is needed and does not work.

    models: folders or hub ids beside the paper's and the embedded one. memory: bytes to plan with, instead of what is
    free here.
    """
    facts: dict[str, Any] = {"software": software(), "machine": machine()}
    facts |= {"hub": hub(), "judge": judge(), "embedded": embedded()}
    free, kind = facts["machine"]["free_bytes"], facts["machine"]["device"]
    if memory is not None:
        free, kind = memory, "cuda"
    facts["planned"] = {"device": kind, "free_bytes": free}
    facts["models"] = [fit(name, free, kind) for name in dict.fromkeys([EMBEDDED_MODEL, *models, *PAPER_MODELS])]
    missing = [f"{name} is not installed" for name in facts["software"]["missing"]]
    unknown = [row["error"] for row in facts["models"] if "error" in row]
    facts["broken"] = missing + [problem for problems in facts["embedded"].values() for problem in problems] + unknown
    return facts


def software() -> dict[str, Any]:
    """Versions; of the packages that pyproject.toml pins, what is missing or another version; what is optional."""
    pins: dict[str, set[str]] = {}
    try:
        requires = importlib.metadata.requires("dmlr") or []
    except importlib.metadata.PackageNotFoundError:
        requires = []
    for requirement in requires:
        pinned, _, marker = requirement.partition(";")
        if "extra" not in marker and (match := re.fullmatch(r"([\w.-]+)==([\w.+]+)", pinned.strip())):
            pins.setdefault(match[1], set()).add(match[2])
    installed = {name: _version(name) for name in pins}
    other = {name: version for name, version in installed.items() if version and version not in pins[name]}
    versions = {name: value for name, value in environment().items() if name != "device"}
    optional = {name: _version(name) for name in OPTIONAL}
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    return versions | {
        "pinned": len(pins),
        "missing": sorted(name for name, version in installed.items() if version is None),
        "other_versions": other,
        "optional": optional | {"chromium": Path(browser).name if browser else None},
    }


def _version(name: str) -> str | None:
    """Installed version without what follows a plus sign (torch's +cpu); None: not there."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "present" if importlib.util.find_spec(name) else None


def machine() -> dict[str, Any]:
    """GPUs, cores, memory and disk. `free_bytes` is what models can have: of the freest GPU, else of RAM."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory_bytes": total, "free_bytes": free})
    ram, disk = psutil.virtual_memory(), shutil.disk_usage(locate("."))
    return {
        "device": "cuda" if gpus else "cpu",
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cpu": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "ram_bytes": ram.total,
        "disk_free_bytes": disk.free,
        "free_bytes": max((gpu["free_bytes"] for gpu in gpus), default=ram.available),
    }


def hub() -> dict[str, Any]:
    """How the hub would be reached. It is not called."""
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_TOKEN"))
    token = token or Path(constants.HF_TOKEN_PATH).is_file()
    cache = Path(constants.HF_HUB_CACHE)
    cached = [path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*")]
    return {"offline": constants.HF_HUB_OFFLINE, "token_set": token, "cached_models": sorted(cached)}


def judge() -> dict[str, Any]:
    """Whether an LLM could judge, and which of its settings are set."""
    names = ("OPENAI_API_KEY", "OPENAI_API_BASE_URL", "MODEL_TYPE", "MODEL_PRICE", "JUDGE_CACHE")
    try:
        JudgeSettings.from_environment()
        usable, why = True, ""
    except JudgeError as error:
        usable, why = False, str(error)
    return {"usable": usable, "why_not": why, "set": {name: bool(os.environ.get(name)) for name in names}}


def embedded() -> dict[str, list[str]]:
    """What is wrong with the embedded datasets and the embedded model, by path; empty lists: all is whole."""
    problems = {}
    for dataset in EMBEDDED_DATA:
        try:
            rows = check_dataset(dataset)
            problems[dataset] = [f"{dataset}, row {problem.row}: {problem.message}" for problem in rows]
        except DatasetError as error:
            problems[dataset] = [str(error)]
    problems[EMBEDDED_MODEL] = weights_problems(Path(locate(EMBEDDED_MODEL)))
    return problems


def weights_problems(folder: Path) -> list[str]:
    """What a checkpoint's files lack of the tensors that its settings call for; reads headers only."""
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(settings)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except Exception as error:  # whatever a damaged file causes
        return [f"{folder.name}: {_first_line(error)}"]
    there, wanted = set(shapes.values()), {tuple(p.shape) for p in model.parameters()}
    count = sum(math.prod(shape) for shape in shapes.values())
    once, twice = (sum(p.numel() for _, p in model.named_parameters(remove_duplicate=one)) for one in (True, False))
    if there != wanted or count not in (once, twice):  # a tied head may be stored beside its embedding
        return [f"{folder.name}: its files hold {count} parameters, its settings call for {once}"]
    files = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [f"{folder.name}: {name} is missing" for name in files if not (folder / name).is_file()]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# ----------------------------------------------------------------------------------------------- as text


def as_text(facts: dict[str, Any]) -> str:
    """The facts of `examine` for people."""
    soft, here, embedded_, hub_ = (facts[name] for name in ("software", "machine", "embedded", "hub"))
    other = [f"{name} {version}" for name, version in soft["other_versions"].items()]
    pins = f"{soft['pinned']} pinned packages" if soft["pinned"] else "package not installed, pins not compared"
    pins += f"; missing: {', '.join(soft['missing'])}" if soft["missing"] else ""
    pins += f"; not as pinned: {', '.join(other)}" if other else ""
    gpus = [f"{gpu['name']}, {size(gpu['free_bytes'])} of {size(gpu['memory_bytes'])} free" for gpu in here["gpus"]]
    none = f"none that torch sees (built for {'CUDA ' + here['cuda'] if here['cuda'] else 'CPUs'})"
    wrong = [problem for problems in embedded_.values() for problem in problems]
    key = "can be asked" if facts["judge"]["usable"] else facts["judge"]["why_not"].partition(" (")[0]
    named = [name for name, there in facts["judge"]["set"].items() if there]
    cached = len(hub_["cached_models"])
    lines = [
        ("software", f"Python {soft['python']}, torch {soft['torch']}, transformers {soft['transformers']}; {pins}"),
        ("GPU", "; ".join(gpus) or none),
        ("CPU", f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads; {size(here['ram_bytes'])} of RAM"),
        ("disk", f"{size(here['disk_free_bytes'])} free"),
        *((name, f"{soft['optional'][name] or 'not there'} ({why})") for name, why in OPTIONAL.items()),
        ("chromium", f"{soft['optional']['chromium'] or 'not there'} (tests of reports in a browser)"),
        ("hub", f"{'offline (HF_HUB_OFFLINE)' if hub_['offline'] else 'not called'}; token "
                f"{'set' if hub_['token_set'] else 'not set'}; {cached} models in the cache"),
        ("LLM judge", f"{key}; set: {', '.join(named) or 'nothing'}"),
        ("embedded", "; ".join(wrong) or f"{len(EMBEDDED_DATA)} suites and the model are whole"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines) + 2
    plan = facts["planned"]
    parts = ["\n".join(f"{name:<{width}}{text}" for name, text in lines)]
    parts.append(fits_text(facts["models"], plan["free_bytes"], plan["device"]))
    return "\n\n".join([*parts, *(f"broken: {problem}" for problem in facts["broken"])])
