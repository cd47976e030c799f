"""One command line: every command has its help, a misspelt option is status 2, and starting costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from dmlr import cli

COMMANDS = "run demo bench check judge data table1 serve doctor report".split()


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_help_and_refuses_an_unknown_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"usage: python -m dmlr {command}" in capsys.readouterr().out
    assert cli.main([command, "--no-such-option"]) == 2
    takes_arguments = "run check judge data table1 serve".split()  # whose lack is what is said
    assert "--no-such-option" in capsys.readouterr().err or command in takes_arguments


def test_no_command_and_an_unknown_one_are_status_2(capsys):
    assert cli.main([]) == cli.main(["dome"]) == 2
    assert "invalid choice: 'dome'" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["--batch 0", "--requests -1", "--seconds nan", "--seconds inf", "--quiet x"])
def test_a_limit_of_the_server_is_a_positive_number(limit, capsys):
    """Before a model is loaded."""
    assert cli.main(["serve", "no-model", *limit.split()]) == 2
    assert f"{limit.split()[0]}: invalid positive" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_and_a_fault_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "none.ipynb")]) == 1
    assert capsys.readouterr().err == f"error: no notebook {str(tmp_path / 'none.ipynb')!r}\n"
    assert cli.main(["bench", "9000B"]) == 1
    assert "unknown shape '9000B'" in capsys.readouterr().err
    monkeypatch.setattr("dmlr.index.write_index", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


def test_help_imports_neither_torch_nor_notebooks():
    code = "import sys; from dmlr.cli import main; main(['--help']); print([n for n in ('torch', 'papermill', 'pandas')"
    code += " if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.endswith("[]\n"), done.stderr
