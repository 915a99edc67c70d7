"""The sdist and the wheel are whole: the wheel, installed alone, runs a shipped recipe by its name outside
the checkout.

Nothing is fetched: the build uses the setuptools that is installed, and the environment of the wheel sees the
dependencies that this one has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import llmcompress
from llmcompress.recipe import shipped

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
LOAD = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("small")
inputs = AutoTokenizer.from_pretrained("small")("Return the number of", return_tensors="pt")
import llmcompress
written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(json.dumps({
    "tokens": written.shape[1] - inputs.input_ids.shape[1],
    "linear": type(model.model.layers[0].mlp.up_proj).__name__,
    "package": str(Path(llmcompress.__file__).parent),
}))
"""
pytestmark = pytest.mark.slow


class Built(NamedTuple):
    """What was built, and the environment that the wheel is installed in."""

    sdist: Path
    wheel: Path
    bin: Path
    site: Path


def call(command: list[str | Path], folder: Path) -> str:
    """Run a command without the checkout on its path; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=env | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build an sdist or a wheel of a source tree, offline and without a build environment of its own."""
    target.mkdir(exist_ok=True)
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    call([sys.executable, "-c", script], source)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of this tree, the wheel of what the sdist holds, and an environment with that wheel."""
    place = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, place / "tree", ignore=NOT_COPIED)
    sdist = build("sdist", place / "tree", place / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    wheel = build("wheel", source, place / "wheel")
    venv.create(place / "env", with_pip=False)
    bin_ = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    call(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            bin_ / "python",
            "install",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        place,
    )
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call([bin_ / "python", "-c", script], place).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Built(sdist, wheel, bin_, site)


def test_the_sdist_holds_what_builds_tests_and_documents_it(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "constraints.txt",
        "recipes/demo.yaml",
        "tests/test_packaging.py",
    ):
        assert name in names
    assert "docs/getting-started.md" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        about = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    package = ROOT / "llmcompress"
    expected = {f"llmcompress/{file.relative_to(package).as_posix()}" for file in package.rglob("*.py")}
    expected |= {f"llmcompress/demo/{file.name}" for file in (package / "demo").iterdir() if file.is_file()}
    expected |= {f"llmcompress/kernels/csrc/{file.name}" for file in (package / "kernels" / "csrc").iterdir()}
    templates = (package / "report" / "templates").iterdir()
    expected |= {f"llmcompress/report/templates/{file.name}" for file in templates}
    expected |= {f"llmcompress/recipe/shipped_recipes/{name}.yaml" for name in shipped.names()} | {
        "llmcompress/py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert f"\nVersion: {llmcompress.__version__}\n" in about
    assert "\nRequires-Dist: transformers<5.24,>=5.23\n" in about
    assert "Project-URL" not in about


def test_the_installed_wheel_lists_the_recipes_of_the_checkout(built: Built, tmp_path: Path) -> None:
    listed = json.loads(call([built.bin / "llmcompress", "recipes", "--json"], tmp_path))
    assert sorted(entry["name"] for entry in listed) == list(shipped.names())
    versions = json.loads(call([built.bin / "llmcompress", "doctor", "--json"], tmp_path))["versions"]
    assert versions["llmcompress"] == llmcompress.__version__


def test_a_recipe_by_its_name_makes_a_model_that_from_pretrained_loads(built: Built, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "\n".join(f"Return the number of items in list {n}." for n in range(1000))
    )
    data = "{source: text.txt, samples: 8, length: 64, evaluation_samples: 4}"
    call([built.bin / "llmcompress", "run", "demo", "--data", data, "--out", "small"], tmp_path)
    found = json.loads(call([built.bin / "python", "-c", LOAD], tmp_path).splitlines()[-1])
    assert found == {"tokens": 3, "linear": "Linear4bit", "package": str(built.site / "llmcompress")}
