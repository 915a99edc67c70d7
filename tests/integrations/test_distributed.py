"""A run in several processes, as `accelerate launch` starts them: the same work, divided where there is
training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.errors import CompressError
from llmcompress.integrations import distributed
from llmcompress.report.schema import Report
from llmcompress.stages.distill.config import DistillConfig
from tests.bases import save_base, staged_recipe, write_text


def launch(recipe: Path, out: Path, count: int) -> subprocess.CompletedProcess[str]:
    """The command line in so many processes on the CPU, through torch's launcher, which is accelerate's for
    several GPUs."""
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
    # Adam makes a step of what is left of a gradient that is nearly nothing
    assert apart.quantile(0.99) < 1e-6
    first, second = (Report.of(tmp_path / str(count)).fidelity.kl_nats_mean for count in (1, 2))
    assert first is not None and second == pytest.approx(first, rel=1e-3)


def test_a_batch_that_does_not_divide_among_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert distributed.count() == 3
    with pytest.raises(CompressError, match="batch 16 does not divide among 3 processes"):
        DistillConfig().micro(128)
    assert DistillConfig(batch=12).micro(1024) == 4
    with pytest.raises(CompressError, match="batch 12 does not divide among 3 processes, 6 at once"):
        DistillConfig(batch=12, micro_batch=6).micro(128)


def test_one_process_waits_for_no_other() -> None:
    assert distributed.count() == 1 and distributed.first()
    distributed.join(None)
    distributed.wait()
    with distributed.first_alone() as writes:
        assert writes


SHARDED = """
import sys
from functools import partial
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from llmcompress.stages.distill.teacher import LiveTeacher, forward_arguments
from llmcompress.stages.distill.trainer import Objective, answering
from tests.models import pico

dist.init_process_group("gloo")
student, plain, other = pico("llama"), pico("llama"), pico("llama", num_hidden_layers=1)
teacher = LiveTeacher(other, student.config.vocab_size)
objective = Objective("forward_kl", 0.5, 1.0, None, teacher, teacher)
ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
taught = teacher({"input_ids": ids})
for model in (student, plain):
    answering(model.requires_grad_().train())
for layer in student.model.layers:
    fully_shard(layer)
fully_shard(student)
for model in (student, plain):
    model(**forward_arguments(ids), then=partial(objective.loss, model, ids, taught)).backward()
for (name, mine), yours in zip(student.named_parameters(), plain.parameters(), strict=True):
    assert mine.numel() == yours.numel() and mine.to_local().numel() < yours.numel(), name
    assert torch.allclose(mine.grad.full_tensor(), yours.grad, atol=1e-6), name
print("equal", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_student_spread_over_processes_has_the_gradients_of_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launcher, str(tmp_path / "sharded.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
