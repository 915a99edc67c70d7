"""Names that no path can have, wherever a user gives one: one line that says why, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmcompress.cli.app import evaluate as evaluate_command
from llmcompress.errors import CompressError, ModelError, OutputError, RecipeError
from llmcompress.io.cache import cache_folder
from llmcompress.io.user_paths import SHOWN, path_of
from llmcompress.pipeline.compare import compare
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.resolve import find_base, pick_device
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report

pytestmark = pytest.mark.usefixtures("short_runs")

QUANTIZE = Recipe.parse("stages: [quantize]")
ODD = {
    "too long": ("x" * 5000, "File name too long"),
    "long in parts": ("/".join(["x" * 100] * 100), "File name too long"),
    "null byte": ("a\0b", "holds a null byte"),
    "nobody's home": ("~nobody-of-that-name/model", "no such home folder"),
    "bytes that are no text": (os.fsdecode(b"mod\xffel"), "is not Unicode text"),
    "half a code point": ("mod\ud800el", "is not Unicode text"),
}


def one_line(error: CompressError) -> str:
    """The message, which is one short line that any terminal and file can take."""
    text = str(error)
    assert "\n" not in text and text.isprintable() and text.encode()
    assert len(text) < SHOWN + 250
    return text


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("kind", [CompressError, RecipeError, ModelError, OutputError])
def test_words_that_name_no_path_are_refused_as_what_they_were_given_for(
    case: str, kind: type[CompressError]
) -> None:
    words, why = ODD[case]
    with pytest.raises(kind) as refused:
        path_of(words, "base", kind)
    assert (
        type(refused.value) is kind
        and why in one_line(refused.value)
        and str(refused.value).startswith("base ")
    )


@pytest.mark.parametrize("case", ODD)
def test_every_entry_refuses_a_name_that_no_path_has(case: str, tmp_path: Path) -> None:
    words, why = ODD[case]
    named = QUANTIZE.model_copy(update={"base": words})
    taught = Recipe.parse("stages: [{distill: {teacher: someone}}]").renamed(lambda *_: words)
    attempts: dict[str, Callable[[], object]] = {
        "recipe": lambda: Recipe.from_pretrained(words),
        "recipe file": lambda: Recipe.from_file(words),
        "base in a recipe": lambda: run_recipe(named, tmp_path / "out"),
        "--base of run": lambda: run_recipe(QUANTIZE, tmp_path / "out", base=words),
        "--base of plan": lambda: plan_recipe(QUANTIZE, base=words),
        "--out": lambda: run_recipe(QUANTIZE, words, base="demo"),
        "teacher": lambda: run_recipe(taught, tmp_path / "out", base="demo"),
        "model to evaluate": lambda: evaluate(words),
        "artefact": lambda: reproduce(words),
        "report": lambda: Report.of(words),
        "artefact to compare": lambda: compare([words, "some/model"]),
        "page to write": lambda: compare(["one", "other"], html=words),
    }
    for what, attempt in attempts.items():
        with pytest.raises(CompressError) as refused:
            attempt()
        assert why in one_line(refused.value), what
    assert not list(tmp_path.iterdir())


def test_a_path_is_what_it_was_where_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/model", "base") == tmp_path / "model"
    assert path_of("none/such", "base") == Path("none/such")
    (tmp_path / "file").write_text("")
    # left to who wants a folder there
    assert path_of(tmp_path / "file" / "below", "base") == tmp_path / "file" / "below"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="for root every folder can be read")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    try:
        with pytest.raises(ModelError, match="closed/model is no path that can be read"):
            find_base(str(tmp_path / "closed" / "model"))
    finally:
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.slow
def test_the_command_line_takes_bytes_that_are_no_text() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmcompress", "run", b"\xff.yaml"], capture_output=True, timeout=300
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(b"error: ")


DEVICES = (
    "cpu:x",
    "cpu:-1",
    "cpu:1",
    "cpu:",
    "cuda:99",
    "cuda:",
    "cuda:-1",
    "cuda:" + "9" * 5000,
    "meta",
    "mps",
    "\ud800",
)


@pytest.mark.parametrize("device", DEVICES, ids=range(len(DEVICES)))
def test_a_device_that_is_not_here_is_one_line(device: str) -> None:
    with pytest.raises(CompressError, match="there is no device") as refused:
        pick_device(device)
    one_line(refused.value)


def test_a_device_is_found_by_its_name() -> None:
    assert pick_device("cpu") == pick_device("cpu:0") == torch.device("cpu")


NO_HOME = """
import os, pwd
def nobody(*_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
os.environ.pop("LLMCOMPRESS_CACHE", None)
from collections.abc import Callable
from pathlib import Path
try:
    Path.home()
except RuntimeError:
    print("no home")
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import writing
print(cache_folder())
try:
    with writing(Path("/nowhere")):
        raise PermissionError(13, "Permission denied")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="homes of POSIX")
def test_a_user_without_a_home_has_a_cache_of_their_own(tmp_path: Path) -> None:
    def run() -> list[str]:
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", NO_HOME], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    place = tmp_path / f"llmcompress-{os.getuid()}"
    home, folder, error = run()
    assert (home, Path(folder)) == ("no home", place)
    assert error.startswith("OutputError can't write /nowhere (Permission denied)")
    assert place.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLMCOMPRESS_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    folder.chmod(0o777)
    with pytest.raises(OutputError, match="set LLMCOMPRESS_CACHE to a folder"):
        cache_folder()


def test_a_file_for_the_numbers_is_refused_before_they_are_measured(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        evaluate_command("demo", json_file=tmp_path / "none" / "numbers.json")
