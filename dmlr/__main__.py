"""`python -m dmlr …`: the few things that are commands; everything else is a notebook."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from dmlr.config import ConfigError

# Commands that read their own arguments; each module is imported only when its command runs.
ELSEWHERE = {
    "check": ("data.check", "main_check"),
    "judge": ("judge", "main_judge"),
    "data": ("data.benchmarks", "main_data"),
    "bench": ("bench", "main"),
    "doctor": ("planning.doctor", "main"),
    "table1": ("table1", "main"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 is success. Errors are one line (or a few) on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ELSEWHERE:
        module, function = ELSEWHERE[argv[0]]
        try:
            return getattr(import_module(f".{module}", __package__), function)(argv[1:])
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return _notebook_command(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dmlr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute a notebook with checked parameters and render its report")
    run.add_argument("notebook")
    run.add_argument("-f", "--file", action="append", default=[], help="YAML file of parameters; later files win")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--output", help="path of the executed copy (.ipynb); its report lies beside it")
    run.add_argument(
        "--dry-run", action="store_true", help="print what would be done, how long it takes, what would fail"
    )
    commands.add_parser("report", help="write reports/index.html from the runs that are there")
    show = commands.add_parser("demo", help="vanilla and DMLR on the embedded benchmark, with tables and reports")
    show.add_argument("--model", default="", help="hub id or folder; the embedded model if none is given")
    commands.add_parser("readme", help="put the demo's table, figure and reports where git keeps them")
    commands.add_parser("data.check", help="what is wrong with a dataset file", add_help=False)
    commands.add_parser("judge", help="judge cases from a file", add_help=False)
    commands.add_parser("data", help="prepare a benchmark of the hub", add_help=False)
    commands.add_parser("bench", help="how fast the loop is, beside the released behaviour", add_help=False)
    commands.add_parser("doctor", help="what this machine has, and which models fit in it", add_help=False)
    commands.add_parser("table1", help="every benchmark of Table 1 for one model, then one table", add_help=False)
    return parser


def _notebook_command(args: argparse.Namespace) -> int:
    from dmlr import demo, notebooks, parameters
    from dmlr.show import index as report_index

    try:
        if args.command == "run":
            given = {}
            for path in args.file:
                given |= parameters.read_parameters(path)
            given |= dict(args.parameter)
            if args.dry_run:
                return _dry_run(args.notebook, given, args.output)
            report = notebooks.run(args.notebook, given, args.output)
            report_index.write_index()
            print(f"report: {report}")
        elif args.command == "report":
            print(f"index: {report_index.write_index()}")
        elif args.command == "readme":
            demo.publish()
        else:
            demo.demo(args.model)
    except (ConfigError, notebooks.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _dry_run(notebook: str, given: dict, output: str | None) -> int:
    """Prints the plan; 1 where the run would fail."""
    from dmlr.data.examples import DatasetError
    from dmlr.judge.llm_settings import JudgeError
    from dmlr.model.families import ModelError
    from dmlr.planning.dry_run import dry_run

    try:
        text, errors = dry_run(notebook, given, output)
    except (DatasetError, ModelError, JudgeError) as error:
        raise ConfigError(str(error)) from error
    print(text)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
