"""Ctrl-C and SIGTERM: one line, the exit code of the signal, no traceback, nothing left behind; from the
first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.cli import interrupt
from llmcompress.cli.interrupt import GOES_ON, Interrupted, one_line
from llmcompress.io.output_folder import partial_folder
from tests.bases import save_base, small_recipe, write_text
from tests.clients import shell


def test_a_signal_is_one_line_and_an_exit_code(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in {
        "run recipe.yaml": f"interrupted: {GOES_ON}",
        "reproduce out --out=again": f"interrupted: {GOES_ON}",
        "reproduce out": "interrupted: nothing is left of it",
        "evaluate out": "interrupted: nothing is left of it",
        "push out user/name": "interrupted: the same command goes on, and what has arrived is not sent again",
    }.items():
        monkeypatch.setattr(sys, "argv", ["llmcompress", *arguments.split()])
        with pytest.raises(SystemExit) as exit, one_line():
            signal.raise_signal(signal.SIGINT)
        assert exit.value.code == 130 and capfd.readouterr().err == f"{said}\n"
    with pytest.raises(SystemExit) as exit, one_line():
        signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 143 and capfd.readouterr().err.startswith("stopped by SIGTERM: ")


def test_what_a_library_makes_of_a_signal_is_still_that_signal(capfd: pytest.CaptureFixture[str]) -> None:
    def imports() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except Interrupted as error:
            raise ImportError("initialization failed") from error

    with pytest.raises(SystemExit) as exit, one_line():
        imports()
    assert exit.value.code == 130 and len(capfd.readouterr().err.splitlines()) == 1
    with pytest.raises(ImportError), one_line():
        raise ImportError("another one")


def test_a_program_that_imports_the_package_keeps_its_signals() -> None:
    assert not interrupt.is_command()
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with one_line():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with one_line():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


RANK = """
import sys, time
from llmcompress.cli.interrupt import one_line

sys.argv = ["llmcompress", "run", "recipe.yaml"]
with one_line():
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a launcher has started")
@pytest.mark.parametrize("killed", [[], [0], [1], [0, 1]])
def test_one_process_of_a_run_tells_of_a_signal(killed: list[int]) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for process in ranks:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for rank in killed:
        ranks[rank].kill()
        ranks[rank].communicate(timeout=200)
    left = [rank for rank in range(3) if rank not in killed]
    told = list[str]()
    for rank in reversed(left):  # the one that tells is the last to end
        ranks[rank].send_signal(signal.SIGTERM)
        told.insert(0, ranks[rank].communicate(timeout=200)[1])
        assert ranks[rank].returncode == 143
    assert told == [f"stopped by SIGTERM: {GOES_ON}\n", *[""] * (len(left) - 1)]


def start(scratch: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command line, with a folder of temporary files of its own."""
    scratch.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(scratch), "COLUMNS": "200"}
    command = [sys.executable, "-m", "llmcompress", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a process does."""
    deadline = time.monotonic() + 600  # of a machine that does much else
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"nothing has happened: {process.communicate()[1]}")
        time.sleep(0.005)


def stopped(process: subprocess.Popen[str], number: int) -> str:
    """What a command says on a signal; it must be the last line, and no traceback."""
    process.send_signal(number)
    told = process.communicate(timeout=200)[1]
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    return told.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has loaded")
def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path) -> None:
    for command in ("run", "plan"):
        process = start(tmp_path / "tmp", command, tmp_path / "recipe.yaml")
        maps = Path(f"/proc/{process.pid}/maps")
        until(lambda maps=maps: "libtorch" in maps.read_text(), process)  # type: ignore[misc]
        assert (
            stopped(process, signal.SIGINT)
            == f"interrupted: {GOES_ON if command == 'run' else 'nothing is left of it'}"
        )
    assert not any((tmp_path / "tmp").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_so_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    base, text, out = (
        save_base(tmp_path / "base", num_hidden_layers=4),
        write_text(tmp_path / "facts.txt"),
        tmp_path / "out",
    )
    (tmp_path / "recipe.yaml").write_text(small_recipe(text, base, rounding="learned", steps=60).to_yaml())
    process = start(tmp_path / "tmp", "run", tmp_path / "recipe.yaml", "--out", out)
    until(lambda: any((partial_folder(out) / "journal").glob("quantize.*")), process)
    assert stopped(process, number).endswith(GOES_ON)
    assert not any((tmp_path / "tmp").iterdir()), "nothing of ours is left in TMPDIR"
    assert {path.name for path in partial_folder(out).iterdir()} == {"journal"}
    done = shell({}, "run", tmp_path / "recipe.yaml", "--out", out)
    assert done.code == 0 and "were done by an earlier run" in " ".join(done.out.split())
