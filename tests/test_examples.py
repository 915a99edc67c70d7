"""The scripts of examples/, run as a user runs them, on the demo model and little text."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmcompress
from tests.caches import own_cache
from tests.pages import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LITTLE = {  # what keeps a run short
    "lora_on_native.py": ["--length", "64", "--steps", "6"],
    "prune_heal_quantize.py": ["--length", "128", "--steps", "10"],
    "quantize_and_share.py": ["--samples", "32", "--length", "128"],
}
LEAVES = {  # what it leaves, and what its last line begins with
    "lora_on_native.py": (["quantized-for-lora/config.json", "adapter/adapter_config.json"], ""),
    "prune_heal_quantize.py": ([f"chain-{n}/report.json" for n in (1, 2, 3)], "pruned, healed, quantised"),
    "quantize_and_share.py": (["quantized/report.json"], "ready to share: llmcompress push quantized"),
}

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)


def test_every_script_is_run() -> None:
    assert {script.name for script in SCRIPTS} == {*LITTLE} == {*LEAVES}


@every_script
def test_a_script_imports_public_names_and_says_how_it_is_run(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmcompress"):
            assert node.module == "llmcompress"
            assert {alias.name for alias in node.names} <= {*llmcompress.__all__}
    assert f"python examples/{script.name}\n" in (ast.get_docstring(tree) or "")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one script keeps for the next."""
    return own_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@every_script
def test_a_script_runs_on_the_demo_model(script: Path, cache: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LLMCOMPRESS_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), *LITTLE[script.name]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    files, last = LEAVES[script.name]
    assert all((tmp_path / file).is_file() for file in files)
    assert done.stdout.splitlines()[-1].startswith(last)
