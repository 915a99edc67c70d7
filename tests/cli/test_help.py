"""Help: the same option has the same words everywhere, and showing it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

from llmcompress.cli.app import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SHARED = {
    "--base": {"run", "plan", "reproduce"},
    "--data": {"run", "plan", "search", "evaluate", "reproduce"},
    "--effort": {"run", "plan", "search"},
    "--time": {"run", "plan", "advise"},
    "--device": {"run", "plan", "search", "evaluate", "reproduce"},
    "--out": {"run", "search", "reproduce", "export"},
    "--overwrite": {"run", "reproduce", "export"},
}
HELP = """
import sys
from llmcompress.cli.app import main
sys.argv[0] = "llmcompress"
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {"torch", "transformers", "yaml", "numpy", "datasets", "bitsandbytes", "huggingface_hub"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def options_of(command: str) -> dict[str, tuple[str, str]]:
    """What each option of a command is called in its help, and what it says."""
    return {
        parameter.opts[0]: (parameter.metavar, parameter.help)
        for parameter in COMMANDS[command].params
        if parameter.opts[0].startswith("--")
    }


def test_there_are_these_commands() -> None:
    known = {"run", "plan", "evaluate", "report", "push", "reproduce", "export"}
    known |= {"advise", "search", "compare", "recipes", "families", "doctor", "schema"}
    assert COMMANDS.keys() == known


@pytest.mark.parametrize("option", SHARED)
def test_an_option_has_the_same_words_on_every_command(option: str) -> None:
    users = {command for command in COMMANDS if option in options_of(command)}
    assert users >= SHARED[option]
    assert len({options_of(command)[option] for command in users}) == 1


def test_every_option_and_command_says_what_it_is_for() -> None:
    for name, command in COMMANDS.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.opts)
            assert parameter.help.endswith("."), (name, parameter.opts)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-c", HELP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: llmcompress" in done.stdout
