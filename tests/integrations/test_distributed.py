"""A run in several processes, as `accelerate launch` starts them: the same work, divided among them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from llmcompress.algorithms.hessian import Moments
from llmcompress.errors import CompressError
from llmcompress.integrations import distributed
from llmcompress.io.output_folder import partial_folder
from llmcompress.report.schema import Report
from llmcompress.stages.distill.config import DistillConfig
from tests.bases import known, save_base, staged_recipe, write_text
from tests.caches import own_cache


def launched(count: int, cache: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """What starts so many processes on the CPU, through torch's launcher, which is accelerate's for several
    GPUs, and its environment."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [*launcher, *words], os.environ | {"OMP_NUM_THREADS": "1", "LLMCOMPRESS_CACHE": str(cache)}


def command(recipe: Path, out: Path, count: int) -> tuple[list[str], dict[str, str]]:
    """The command line in so many processes, and its environment."""
    cache = own_cache(out.parent / "cache")
    return launched(count, cache, "-m", "llmcompress", "run", str(recipe), "--out", str(out))


def launch(recipe: Path, out: Path, count: int) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    words, environment = command(recipe, out, count)
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def made(place: Path, name: str) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """The tensors of a recipe's result, and its KL, by one process and by two."""
    for count in "12":
        out = place / count / name
        yield load_file(out / "model.safetensors"), known(Report.of(out).fidelity.kl_nats_mean)


def share_that_differs(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The share of the bytes of codes that differ, among linears that read what no code has changed yet."""
    coded = [name for name in one if one[name].dtype in (torch.uint8, torch.int8)]
    first = [name for name in coded if re.search(r"layers\.0\.self_attn\.[qkv]_proj\.weight", name)]
    assert first
    return sum(int((one[name] != two[name]).sum()) for name in first) / sum(one[n].numel() for n in first)


# stages, the family of the base, and the share of the first codes that may differ
DIVIDED: dict[str, tuple[list[dict[str, Any]], str, float]] = {
    "gptq": ([{"quantize": {"format": "nf4"}}], "qwen2", 0.01),
    "nearest": ([{"quantize": {"format": "w8a8", "rounding": "nearest"}}], "llama", 0.0),
    "learned": ([{"quantize": {"format": "nf4", "rounding": "learned", "steps": 12}}], "llama", 0.01),
    # where the factors of a search move, so do all codes
    "smooth": ([{"quantize": {"format": "w8a8", "activations": "static", "smooth": {}}}], "llama", 1.0),
    "sparsify": ([{"sparsify": {"pattern": "2:4"}}], "llama", 0.01),
    "prune, then quantise": (
        [{"prune": {"axis": "ffn", "keep": 192}}, {"quantize": {"format": "nf4"}}],
        "llama",
        0.01,
    ),
    "taylor": (
        [{"prune": {"axis": "kv", "keep": 1, "score": "taylor"}}, {"quantize": {"format": "nf4"}}],
        "llama",
        0.01,
    ),
    "experts": (
        [{"prune": {"axis": "expert", "keep": 3}}, {"quantize": {"format": "nf4", "embedding": "int8"}}],
        "qwen3_moe",
        0.01,
    ),
    "experts with few values": ([{"codebook": {"entries": 8}}], "qwen3_moe", 0.01),
    "codebooks beside scales": (
        [{"quantize": {"format": "codebook", "entries": 8, "overrides": {"ffn": {"format": "nf4"}}}}],
        "llama",
        0.01,
    ),
}

TRAINED: list[dict[str, Any]] = [
    {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
    {"distill": {"steps": 4, "batch": 4, "learning_rate": 1e-4, "cache": True}},
]
# runs on one sequence, so that the second process has none
ONE_SEQUENCE: list[dict[str, Any]] = [
    {
        "quantize": {
            "format": "w8a8",
            "activations": "static",
            "rounding": "learned",
            "steps": 3,
            "smooth": {},
            "protect": 0.1,
            "embedding": "int8",
        }
    }
]
KILLED: list[dict[str, Any]] = [{"quantize": {"format": "nf4"}}]


RUNS = """
import sys
from pathlib import Path
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
recipes, outs = map(Path, sys.argv[1:])
for file in sorted(recipes.iterdir()):
    run_recipe(Recipe.from_file(file), outs / file.stem)
"""


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every recipe of DIVIDED and of the other tests, in `1` by one process and in `2` by two,
    which run them one after another; a launch for each would mostly import."""
    place = tmp_path_factory.mktemp("divided")
    text, script = write_text(place / "facts.txt"), place / "runs.py"
    script.write_text(RUNS)
    (place / "recipes").mkdir()
    for family in {family for _, family, _ in DIVIDED.values()}:
        save_base(place / family, family)
    save_base(place / "deep", num_hidden_layers=8)
    runs: dict[str, tuple[list[dict[str, Any]], str, int]] = {
        **{name: (stages, family, 128) for name, (stages, family, _) in DIVIDED.items()},
        "trained": (TRAINED, "llama", 16),
        "one sequence": (ONE_SEQUENCE, "qwen3_moe", 1),
        "killed": (KILLED, "deep", 128),
    }
    for name, (stages, base, samples) in runs.items():
        recipe = staged_recipe(text, place / base, *stages, samples=samples)
        (place / "recipes" / f"{name}.yaml").write_text(recipe.to_yaml())
    cache = own_cache(place / "cache")
    for count in (1, 2):
        outs = place / str(count)
        words, environment = launched(count, cache, str(script), str(place / "recipes"), str(outs))
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVIDED)
def test_two_processes_compress_as_one_does(name: str, divided: Path) -> None:
    (one, first), (two, second) = made(divided, name)
    assert one.keys() == two.keys() and share_that_differs(one, two) <= DIVIDED[name][2]
    assert second == pytest.approx(first, rel=0.1)


@pytest.mark.slow
def test_two_processes_train_as_one_does(divided: Path) -> None:
    (one, first), (two, second) = made(divided, "trained")
    assert one.keys() == two.keys()
    apart = torch.cat([(two[name] - one[name]).abs().flatten() for name in one])
    # Adam makes a step of what is left of a gradient that is nearly nothing
    assert apart.quantile(0.99) < 1e-6
    assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.slow
def test_a_process_without_a_sequence_changes_nothing(divided: Path) -> None:
    (one, first), (two, second) = made(divided, "one sequence")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one) and first == second


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_which_a_process_is_killed_ends_with_a_line_and_goes_on(
    rank: int, divided: Path, tmp_path: Path
) -> None:
    whole, recipe = (
        load_file(divided / "2" / "killed" / "model.safetensors"),
        divided / "recipes" / "killed.yaml",
    )
    journal = partial_folder(tmp_path / "out") / "journal"
    words, environment = command(recipe, tmp_path / "out", 2)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        deadline = time.monotonic() + 200
        while len(list(journal.glob("quantize.*"))) < 2:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        of_rank(launcher.pid, rank).kill()
        told = launcher.communicate(timeout=60)[1]
    lines = ("another process of this run has ended", "the same command goes on where it was")
    assert launcher.returncode and any(line in told for line in lines), told
    assert not (tmp_path / "out").exists() and len(list(journal.glob("quantize.*"))) >= 2
    done = launch(recipe, tmp_path / "out", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The compressed model lies in") == 1
    (note,) = Report.of(tmp_path / "out").stages[0].notes
    assert "were done by an earlier run that was interrupted" in note
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def of_rank(launcher: int, rank: int) -> psutil.Process:
    """The process of a rank that a launcher has started."""
    children = psutil.Process(launcher).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.parametrize("by", ["batch", "sequence"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processes_have_every_sequence_once(by: distributed.By, count: int) -> None:
    batches = list(torch.arange(11)[:, None].split(3))
    shards = [distributed.Processes(rank, count, by).shard(batches) for rank in range(count)]
    sequences = sorted(int(n) for shard in shards for batch in shard.batches for n in batch.flatten())
    assert sequences == list(range(11))
    for shard in shards:
        assert shard.sizes == (3, 3, 3, 2) and len(shard.numbers) == len(shard.batches)
        for number, batch in zip(shard.numbers, shard.batches, strict=True):
            assert set(batch.flatten().tolist()) <= set(batches[number].flatten().tolist())
    if by == "sequence" and count == 2:
        assert [shard.numbers for shard in shards] == [(0, 1, 2, 3)] * 2
    if by == "batch" and count == 3:
        assert [shard.numbers for shard in shards] == [(0, 3), (1,), (2,)]
        assert [shard.first(2) for shard in shards] == [1, 1, 0]


def test_the_costliest_work_is_divided_first() -> None:
    costs = {"k": 2, "q": 8, "v": 2, "gate": 5}
    assert distributed.Processes(0, 2).owners(costs) == {"q": 0, "gate": 1, "k": 1, "v": 1}
    assert set(distributed.ALONE.owners(costs).values()) == {0}


def test_pooled_moments_are_those_of_all_tokens() -> None:
    x, full = torch.randn(7, 4), torch.randn(7, 4)
    parts = [Moments(4) for _ in range(3)]
    parts[0].add(x[:5], full[:5])
    parts[1].add(x[5:], full[5:])  # the third sees none
    whole = Moments(4)
    whole.add(x, full)
    pooled = together(parts)
    for each in pooled:
        assert each.tokens == 7
        for name in ("H_CC", "gap_FC", "mean_C", "full_C", "top_C"):
            torch.testing.assert_close(getattr(each, name), getattr(whole, name))


def together(parts: list[Moments]) -> list[Moments]:
    """Pool moments as processes do, each in a thread that waits for the others."""
    barrier, given = threading.Barrier(len(parts)), dict[int, tuple[torch.Tensor, ...]]()

    def exchanged(rank: int, tensors: tuple[torch.Tensor, ...], largest: bool) -> None:
        given[rank] = tuple(tensor.clone() for tensor in tensors)
        barrier.wait()
        for number, tensor in enumerate(tensors):
            every = torch.stack([given[other][number] for other in range(len(parts))])
            tensor.copy_(every.amax(0) if largest else every.sum(0))
        barrier.wait()

    def pool(rank: int) -> None:
        parts[rank].pool(
            lambda *tensors: exchanged(rank, tensors, False), lambda *tensors: exchanged(rank, tensors, True)
        )

    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(pool, range(len(parts))))
    return parts


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
    alone, tensor = distributed.ALONE, torch.ones(2)
    alone.sum_(tensor)
    assert tensor.equal(torch.ones(2)) and alone.mean(0.1, 3) == 0.1
    assert alone.sent({"x": tensor}, 0)["x"] is tensor and alone.gathered({1: "b", 0: "a"}) == {
        0: "a",
        1: "b",
    }


SHARDED = """
import os
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
dist.barrier()  # or one process takes the group down while the other still answers
dist.destroy_process_group()
os._exit(0)  # torch aborts now and then while its threads are taken down, when all is done
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
