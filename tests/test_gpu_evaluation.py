"""The measurements that want a GPU, on the CPU: models made on the spot, rows as they come, and the script's
steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import gpu, gpu_compression, machine, random_llamas, results, tables
from evaluation.cost import make_text
from evaluation.random_llamas import Shape
from evaluation.results import ROOT, GpuCompressionFailure, GpuCompressionRow, GpuRow, Head
from llmcompress.data.sources import DataSpec

CPU = torch.device("cpu")


def rows(file: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(file.read_text())["rows"]
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_llama_loads_whole_with_its_tokenizer(tied: bool, tmp_path: Path) -> None:
    shape = Shape(2, 32, 96, 4, 2, 300, tied)
    random_llamas.make(tmp_path / "model", shape, 64, CPU)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    model, told = loaded
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert model.config.num_hidden_layers == 2 and model.dtype == torch.bfloat16
    assert float(model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a word").input_ids
    assert len(ids) == 6 and max(ids) < 256


@pytest.mark.slow
def test_a_quantisation_is_measured_up_to_the_written_weights_and_an_absent_rival_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "found.json"
    asked = ["--device", "cpu", "--quick", "--threads", "1", "--models", "1b", "--out", str(out)]
    assert gpu_compression.main([*asked, "--methods", "nf4-gptq", "llmcompressor"]) == 0
    ours, theirs = rows(out)
    row = GpuCompressionRow.model_validate(ours)
    assert (row.model, row.method, row.layers, row.tokens) == ("1b", "nf4-gptq", 2, 128)
    assert row.seconds > 0 and row.peak_host_bytes > 1e8 and row.peak_gpu_bytes is None
    assert row.profile and all(":" in line or line == "elsewhere" for line in row.profile)
    assert list(row.phases) == ["quantize (nf4, gptq)"] and 0 < sum(row.phases.values()) < row.seconds
    assert theirs == {"model": "1b", "layers": 2, "method": "llmcompressor", "error": "not installed"}
    assert "1b, llmcompressor: not installed" in capsys.readouterr().out
    assert gpu_compression.main([*asked, "--methods", "nf4-gptq", "--limit", "0"]) == 1
    assert rows(out) == [ours, theirs], "rows that are not measured again stay"


def test_what_takes_too_long_is_given_up_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, shape = gpu_compression.Job("1b", "nf4-gptq", 60), gpu_compression.TINY
    spec = DataSpec(source=str(tmp_path), samples=2, length=64)
    found = gpu_compression.row_of(job, shape, tmp_path / "base", gpu_compression.Setting(spec, "cpu"), 0.01)
    assert isinstance(found, GpuCompressionFailure) and found.error == "took longer than 0 s"


RIVAL = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
place = Path(sys.argv[1])
assert load_file(place / "calibration.safetensors")["windows"].shape == (2, 64)
{then}
facts = dict(seconds=1.5, peak_memory_bytes=10, peak_gpu_bytes=None)
(place / "facts.json").write_text(json.dumps(facts))
"""


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("then", "limit_s", "error"),
    [
        ("", 60, None),
        ("raise SystemExit('no kernel for this GPU')", 60, "no kernel for this GPU"),
        ("import time; time.sleep(60)", 0.5, "took longer than 0 s"),
    ],
)
def test_a_rival_that_is_installed_is_timed_by_itself(
    then: str, limit_s: float, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_llamas.make(tmp_path / "base", gpu_compression.TINY, 64, CPU)
    make_text(tmp_path / "words.txt", 2000)
    script = tmp_path / "rival.py"
    script.write_text(RIVAL.format(then=then))
    monkeypatch.setattr(gpu_compression, "installed", lambda rival, packages: "1.2.3")
    monkeypatch.setattr(
        gpu_compression,
        "command_of",
        lambda base, rival, place, device: [sys.executable, str(script), str(place)],
    )
    spec = DataSpec(source=str(tmp_path / "words.txt"), samples=2, length=64, evaluation_samples=1)
    job = gpu_compression.Job("1b", "gptqmodel", 60)
    setting = gpu_compression.Setting(spec, "cpu")
    found = gpu_compression.row_of(job, gpu_compression.TINY, tmp_path / "base", setting, limit_s)
    assert (found.method, found.version) == ("gptqmodel", "1.2.3")
    if error is None:
        assert isinstance(found, GpuCompressionRow) and found.seconds == 1.5
    else:
        assert isinstance(found, GpuCompressionFailure) and found.error == error


def test_the_command_of_a_rival_names_its_paths_and_the_device(tmp_path: Path) -> None:
    command = gpu_compression.command_of(tmp_path / "base", "autoround", tmp_path, "cuda")
    assert command[1:3] == ["-m", "evaluation.rivals.rival_autoround"]
    assert command[-4:] == ["--group", "64", "--device", "cuda"]


@pytest.mark.slow
@pytest.mark.usefixtures("short_runs")
def test_losses_on_a_device_stand_beside_those_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    asked = ["--device", "cpu", "--quick", "--threads", "1", "--models", "demo", "--out", str(out)]
    assert gpu.main([*asked, "--recipes", "nf4-nearest"]) == 0
    (row,) = (GpuRow.model_validate(each) for each in rows(out))
    assert (row.model, row.recipe) == ("demo", "nf4-nearest")
    assert row.kl_nats_mean == row.kl_nats_mean_cpu > 0


def test_rows_of_another_machine_do_not_stand_under_this_ones_name(tmp_path: Path) -> None:
    file, row = tmp_path / "r.json", GpuCompressionFailure(model="1b", layers=2, method="w8a8", error="late")
    results.write("r", Head(command="c", hardware="one"), {"rows": [row]}, file)
    other = row.model_copy(update={"method": "nf4-gptq"})
    for hardware, count in (("one", 2), ("another", 1)):
        assert len(results.merge("r", ("model", "method"), other, file, hardware)) == count


def test_the_table_shows_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    assert tables.gpu_compression(tables.Results(tmp_path)) == ""
    facts = {"model": "8b", "layers": 32, "tokens": 262144, "seconds": 200.04, "peak_host_bytes": 30 * 10**9}
    measured = GpuCompressionRow.model_validate(
        {**facts, "method": "nf4-gptq", "peak_gpu_bytes": 5_500_000_000}
    )
    rival = GpuCompressionFailure(model="8b", layers=32, method="autoround", version="0.16", error="late")
    head = Head(command="c", hardware="a GPU; a CPU", commit="abc1234")
    results.write("gpu_compression", head, {"rows": [rival, measured]}, tmp_path / "gpu_compression.json")
    text = tables.gpu_compression(tables.Results(tmp_path))
    assert "Measured on a GPU; a CPU, commit abc1234." in text
    assert "| 8b | 32 | nf4-gptq | 200.0 | 5.50 | 30.00 |" in text
    assert "- 8b, autoround 0.16: late" in text


def test_a_copy_without_git_has_the_commit_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == ""
    monkeypatch.setenv("EVALUATION_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


# --- the script


def steps(folder: Path, limit: int) -> tuple[str, list[str]]:
    """What the script prints, and the commands that it runs; Python is a stub that writes them down."""
    stub, log = folder / "python", folder / "commands.txt"
    stub.write_text(f'#!/usr/bin/env bash\necho "$@" >> {log}\n')
    stub.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(stub), "LIMIT": str(limit)}
    command = ["bash", str(ROOT / "evaluation" / "gpu_run.sh"), str(folder / "results")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return done.stdout, log.read_text().splitlines() if log.exists() else []


def test_the_steps_come_in_the_order_of_their_worth_and_write_to_one_folder(tmp_path: Path) -> None:
    said, commands = steps(tmp_path, 480)
    names = [
        line.removeprefix("== ").partition(":")[0] for line in said.splitlines() if line.startswith("==")
    ]
    assert names == ["tests", "quantise", "quantise", "decode", "quantise", "quantise", "losses"]
    assert "tests: at most" in (tmp_path / "results" / "gpu_tests.txt").read_text()
    tests, layers, first, decode, rest, small, losses = commands
    assert "-m pytest -q -m gpu" in tests
    assert all(
        f"tests/kernels/test_{kernels}.py" in tests
        for kernels in ("int8_dispatch", "column_loops_gpu", "lookup_dispatch")
    )
    assert layers.endswith("gpu_compression.json --models 8b-4-layers --methods nf4-gptq")
    assert first.startswith("-m evaluation gpu-compression --limit 270 ")
    assert first.endswith("gpu_compression.json --models 8b --methods nf4-gptq")
    assert "speed --decode --eight-billion" in decode and "--methods w8a8 llmcompressor" in rest
    assert small.endswith("--models 1b")
    assert losses.startswith("-m evaluation gpu --models demo")
    assert all(str(tmp_path / "results") in command for command in (layers, first, decode, rest, losses))


def test_without_time_no_step_begins(tmp_path: Path) -> None:
    said, commands = steps(tmp_path, 5)
    assert not commands and said.count("no time is left") == 7
