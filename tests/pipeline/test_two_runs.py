"""The command line where two runs, or a run and somebody else, want the same --out: nobody loses anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcompress.io.output_folder import partial_folder
from tests.bases import save_base, small_recipe, write_text
from tests.clients import Result, shell


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, text = save_base(tmp_path / "base", num_hidden_layers=2), write_text(tmp_path / "facts.txt")
    (tmp_path / "recipe.yaml").write_text(small_recipe(text, base, rounding="nearest").to_yaml())
    return tmp_path / "recipe.yaml"


@pytest.fixture
def first(recipe: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has just begun to work, and is held there."""
    command = [sys.executable, "-m", "llmcompress", "run", str(recipe), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            held(tmp_path / "out", process)
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


def held(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process holds the lock of what works on `out`, and has seen what is there: it then makes
    `artifact`."""
    deadline, partial = time.monotonic() + 250, partial_folder(out)
    while not ((partial / "artifact").is_dir() and (partial / "lock").read_bytes().endswith(b"}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def refused(done: Result, message: str) -> None:
    assert done.code == 2 and "Traceback" not in done.err, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_was_killed(
    first: subprocess.Popen[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = files(partial_folder(out))
    for overwrite in ((), ("--overwrite",)):
        done = shell({}, "run", recipe, "--out", out, *overwrite)
        refused(
            done,
            f"--out {out} is in use by process {first.pid} on {socket.gethostname()}; wait for it, or "
            "choose another",
        )
        assert files(partial_folder(out)) == before and not out.exists()
    first.kill()
    first.wait()
    assert shell({}, "run", recipe, "--out", out).code == 0
    assert {"model.safetensors", "report.json", "README.md"} <= set(files(out)) and not partial_folder(
        out
    ).exists()


@pytest.mark.slow
def test_a_folder_that_appears_under_the_name_of_out_stays(
    first: subprocess.Popen[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    first.send_signal(signal.SIGCONT)
    told = first.communicate(timeout=300)[1]
    assert (
        first.returncode == 2
        and f"move {out} away and give the same command again" in told
        and "Traceback" not in told
    )
    assert files(out) == {"letter.txt": b"dear"}
    kept = files(partial_folder(out) / "artifact")
    out.rename(tmp_path / "moved")
    assert shell({}, "run", recipe, "--out", out).code == 0
    assert files(out)["model.safetensors"] == kept["model.safetensors"] and not partial_folder(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [os.fsdecode(b"not-\xff"), "dangling", "x" * 5000, "a/b/c"], ids=["utf8", "link", "long", "base"]
)
def test_a_refused_run_leaves_nothing(name: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = {path.name for path in tmp_path.iterdir()}
    given = ("--base", tmp_path / "no-base") if name == "a/b/c" else ()
    refused(shell({}, "run", recipe, "--out", tmp_path / name, *given), "no-base" if given else "--out ")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_an_evaluation_that_could_not_be_written_is_refused_before_it_is_made(
    recipe: Path, tmp_path: Path
) -> None:
    base, text = tmp_path / "base", tmp_path / "facts.txt"
    refused(
        shell({}, "evaluate", base, "--data", text, "--json", tmp_path / "none" / "x.json"),
        "give another --json file",
    )
    given = ("evaluate", base, "--data", text, "--length", 16, "--samples", 2, "--json", "/dev/stdout")
    done = shell({}, *given)
    assert done.code == 0 and json.loads(done.out[done.out.index("{") :])["tokens"] == 30
