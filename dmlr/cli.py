"""`python -m dmlr …`: the few things that are commands; everything else is a notebook.

Each command is a function with its arguments above it and its help as its docstring; what it needs is imported when it
runs, so that `--help` and a misspelt option cost nothing. Knows which room does the work, and none of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from dmlr.limits import Limits

Argument = tuple[tuple[str, ...], dict[str, Any]]
parser = argparse.ArgumentParser(prog="python -m dmlr", description="What is no notebook of DMLR.")
commands = parser.add_subparsers(required=True, metavar="COMMAND")


def argument(*names: str, **how: Any) -> Argument:
    """As argparse's `add_argument` takes it."""
    return names, how


def command(*arguments: Argument) -> Callable[[Callable], Callable]:
    """Makes a function from parsed arguments to an exit status (None: 0) the command of its name."""

    def declare(function: Callable[[argparse.Namespace], int | None]) -> Callable:
        one = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        one.set_defaults(command=function)
        for names, how in arguments:
            one.add_argument(*names, **how)
        return function

    return declare


flag = partial(argument, action="store_true")
PARAMETER = argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
PARAMETERS = (
    argument("-f", "--file", action="append", default=[], help="YAML file of parameters; later files win"),
    PARAMETER,
    flag("--dry-run", help="print what would be done, how long it takes, what would fail"),
)
HINTS = ("choices", "kind", "precision", "relative_tolerance", "question")  # that a case of `judge` may have


@command(
    argument("notebook"),
    *PARAMETERS,
    argument("--output", help="path of the executed copy (.ipynb); its report lies beside it"),
    flag("--keep", help="put the outputs into the notebook itself, as git keeps it"),
)
def run(args: argparse.Namespace) -> int:
    """execute a notebook with checked parameters and render its report"""
    from dmlr.parameters import read_parameters

    given = read_parameters(*args.file) | dict(args.parameter)
    if args.dry_run:
        from dmlr.planning import dry_run

        text, errors = dry_run(args.notebook, given, args.output)
        print(text)
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        return 1 if errors else 0
    from dmlr import notebooks
    from dmlr.index import write_index

    report = notebooks.run(args.notebook, given, args.output)
    if args.keep:
        notebooks.keep(report.with_suffix(".ipynb"), args.notebook)
    write_index()
    print(f"report: {report}")
    return 0


@command(argument("--model", default="", help="hub id or folder; the embedded models if none is given"))
def demo(args: argparse.Namespace) -> None:
    """do latents matter, the benchmark and the walkthrough on the embedded models, with tables and reports"""
    from dmlr.demo import demo

    demo(args.model)


@command(
    argument("shapes", nargs="*", metavar="SHAPE", help="A, B (default on a CPU), 3B, 7B (default on a GPU)"),
    flag("--quick", help="iteration, forward and example alone; printed, not written"),
)
def bench(args: argparse.Namespace) -> int:
    """how fast the loop is, beside the released behaviour and a prefix-cache peer"""
    from dmlr.bench import main

    return main(args.shapes, args.quick)


@command(argument("files", nargs="+", metavar="FILE", help="JSON list of {prompt, solution, image_path, idx}"))
def check(args: argparse.Namespace) -> int:
    """what is wrong with a dataset file; exit status 1 where anything is, 2 where a file cannot be used at all"""
    from dmlr.data.check import check_examples, report, summary
    from dmlr.data.examples import DatasetError, read_dataset

    status = 0
    for path in args.files:
        try:
            examples, problems = read_dataset(path)
        except DatasetError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        problems = check_examples(examples, problems)
        print(f"{path}: {summary(examples, problems)}\n{report(problems)}")
        status = max(status, 1 if problems else 0)
    return status


@command(
    argument("cases", metavar="CASES.json", help=f"a list of {{prediction, ground_truth, {'?, '.join(HINTS)}?}}"),
    flag(
        "--llm",
        help="an LLM judges what the rules cannot: OPENAI_API_KEY, OPENAI_API_BASE_URL, MODEL_TYPE (or .env); what it "
        'cost, if MODEL_PRICE says "dollars,dollars" per million prompt and completion tokens',
    ),
    flag("--llm-all", help="an LLM judges every case; how often the rules agree goes to stderr"),
)
def judge(args: argparse.Namespace) -> int:
    """one JSON verdict a line; exit status 2 where the file or the LLM's settings cannot be used"""
    from dmlr.judge import judge as by_rules

    try:
        cases = json.loads(Path(args.cases).read_text(encoding="utf-8"))
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise ValueError("expected a list of objects")
    except (OSError, ValueError, RecursionError) as error:
        print(f"{args.cases}: {error}", file=sys.stderr)
        return 2
    known = ("prediction", "ground_truth", *HINTS)
    verdicts = (by_rules(**{name: case.get(name) for name in known}) for case in cases)
    if args.llm or args.llm_all:
        from dmlr.judge.llm_judge import JudgeError, judge_cases

        try:
            verdicts = judge_cases(cases, verdicts, always=args.llm_all)
        except JudgeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for verdict in verdicts:
        line = json.dumps(asdict(verdict), ensure_ascii=False)
        print(line.encode("utf-8", "replace").decode(), flush=True)  # half a character (\ud83d) cannot be printed
    return 0


@command(
    argument("name", help="mathvista, mathvision, mmmath, hallusionbench, mmvp, mmstar or scienceqa"),
    argument("--out", default="data", help="its files go into a folder of its name in here (default: data)"),
    argument("--source", help="local folder with the hub's files; without it they are downloaded"),
    argument("--sample", type=int, metavar="N", help="also write a sample of at most N rows"),
    argument("--seed", type=int, default=0, metavar="S", help="of the sample (default: 0)"),
)
def data(args: argparse.Namespace) -> None:
    """prepare a benchmark of the hub, or verify the files that are there"""
    from dmlr.data.prepare import prepare

    made = prepare(args.name, args.out, source=args.source, sample=args.sample, seed=args.seed)
    for remark in made.remarks:
        print(remark)
    done = f"{len(made.written)} files written" if made.written else "unchanged, checksums verified"
    print(f"{made.path}: {made.rows} rows ({done})")


@command(
    argument("model", nargs="+", help="parameter file of a model, or its name in notebooks/params/models"),
    argument("--seeds", default="", metavar="S,S", help="a run for each seed (default: the parameter files' one)"),
    argument("--benchmarks", default="", help="names in notebooks/params/benchmarks, or files (default: Table 1's)"),
    *PARAMETERS,
    argument(
        "--output", type=Path, help="folder of all runs (default: reports/runs/table1, of one model its folder there)"
    ),
)
def table1(args: argparse.Namespace) -> int:
    """model × benchmark × seed (Table 1's benchmarks), then one table; what is finished is skipped"""
    from dmlr import table1

    cells = table1.cells(args.model, args.benchmarks, args.file, dict(args.parameter), args.output, args.seeds)
    failures = table1.run_all(cells, args.dry_run)
    if failures:
        print(f"\n{len(failures)} failed, for the reasons above: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


@command(
    argument("model", help="hub id or folder"),
    argument("--name", help="what requests call it, NAME:METHOD (default: the last part of MODEL)"),
    argument("--preset", help="paper, released, demo or search (default: the paper's values)"),
    PARAMETER,
    argument("--host", default="127.0.0.1", help="0.0.0.0: other machines may ask (default: 127.0.0.1)"),
    argument("--port", type=int, default=8000, help="default: 8000"),
    *(argument(f"--{limit.name}", **limit.metadata) for limit in fields(Limits)),
)
def serve(args: argparse.Namespace) -> None:
    """a model behind OpenAI's chat completions; a DMLR_API_KEY in the environment is demanded of clients"""
    # Read when torch is loaded. oneDNN and torch's layer over it each keep what they made for 1024 shapes; a server
    # sees ever new ones, and grew by 100 MiB and more.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    from dmlr.api import load
    from dmlr.serve import serve

    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    model, key = load(args.model, args.preset, **dict(args.parameter)), os.environ.get("DMLR_API_KEY", "")
    serve(model, args.name or Path(args.model).name, limits, key, args.host, args.port)


@command(
    argument("model", nargs="*", help="folder, or hub id in the cache, beside the paper's models"),
    argument("--memory", type=float, metavar="GIB", help="plan with a GPU of so much memory, not this one"),
)
def doctor(args: argparse.Namespace) -> int:
    """what this machine has, and which models fit in it; exit status 1 where something needed is broken"""
    from dmlr.doctor import examine

    report, broken = examine(args.model, None if args.memory is None else round(args.memory * 2**30))
    print(report)
    return 1 if broken else 0


@command()
def report(args: argparse.Namespace) -> None:
    """write reports/index.html from the runs that are there"""
    from dmlr.index import write_index

    print(f"index: {write_index()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 is success, 2 a misspelt option. Errors of this package are one line (or a few) on stderr."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.command(args) or 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
    except Exception as error:
        if not type(error).__module__.startswith("dmlr."):  # a fault of this program, which wants its traceback
            raise
        message = error
    print(f"error: {message}", file=sys.stderr)
    return 1
