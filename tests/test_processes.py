"""A run in several processes, as `accelerate launch` starts them: the same work, divided where there is training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import processes
from llmcompress.errors import CompressError
from llmcompress.report import Report
from llmcompress.stages.lesson import Lesson
from tests.bases import save_base, staged_recipe, write_text


def launch(recipe: Path, out: Path, count: int) -> subprocess.CompletedProcess[str]:
    """The command line in so many processes on the CPU, through torch's launcher, which is accelerate's for several GPUs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, "-m", "llmcompress", "run", str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LLMCOMPRESS_CACHE": str(out.parent / "cache")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    text = write_text(tmp_path / "facts.txt")
    save_base(tmp_path / "base")
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
        {"distill": {"steps": 4, "batch": 4, "learning_rate": 1e-4, "cache": True}},
    ]
    (tmp_path / "recipe.yaml").write_text(staged_recipe(text, tmp_path / "base", *stages).to_yaml())
    for count in (1, 2):
        done = launch(tmp_path / "recipe.yaml", tmp_path / str(count), count)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("The compressed model lies in") == 1
    one, two = (load_file(tmp_path / str(count) / "model.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    apart = torch.cat([(two[name] - one[name]).abs().flatten() for name in one])
    assert apart.quantile(0.99) < 1e-6  # Adam makes a step of what is left of a gradient that is nearly nothing
    first, second = (Report.of(tmp_path / str(count)).fidelity.kl_nats_mean for count in (1, 2))
    assert first is not None and second == pytest.approx(first, rel=1e-3)


def test_a_batch_that_does_not_divide_among_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.count() == 3
    with pytest.raises(CompressError, match="batch 16 does not divide among 3 processes"):
        Lesson().micro(128)
    assert Lesson(batch=12).micro(1024) == 4
    with pytest.raises(CompressError, match="batch 12 does not divide among 3 processes, 6 at once"):
        Lesson(batch=12, micro_batch=6).micro(128)


def test_one_process_waits_for_no_other() -> None:
    assert processes.count() == 1 and processes.first()
    processes.join(None)
    processes.wait()
    with processes.first_alone() as writes:
        assert writes
