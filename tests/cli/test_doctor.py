"""The doctor says what is installed and what runs here, also where much is missing, and names no path."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llmcompress.cli import doctor
from llmcompress.formats import bitsandbytes_layout, integer_linear
from llmcompress.kernels import attention, column_loops, compiled, lut_gemm, packed_gemm


def what_runs(formats: str, device: str = "cpu") -> tuple[bool, str]:
    """Whether a kernel runs, and what does."""
    (found,) = (one for one in doctor.kernels() if formats in one["formats"] and one["device"] == device)
    return found["kernel"], found["runs"]


def test_it_says_what_is_here() -> None:
    facts = json.loads(json.dumps(doctor.examine()))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert what_runs("codebook")[0] == lut_gemm.KERNEL.available
    assert what_runs("calibration")[0] == column_loops.KERNEL.available
    packed = packed_gemm.KERNEL.available
    assert what_runs("w8a8")[0] == (integer_linear.KERNEL or packed)
    assert what_runs("nf4")[0] == (bitsandbytes_layout.multiplies_packed() or packed)
    assert what_runs("q4_0")[0] == packed


def test_what_is_printed_holds_all_of_it_and_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.print_facts(doctor.examine())
    printed = capsys.readouterr().out
    for word in (
        "versions",
        "transformers",
        "machine",
        "C compiler",
        "kernels",
        "codebook",
        "w8a8",
        "nf4, fp4",
    ):
        assert word in printed
    assert str(Path.home()) not in printed and str(Path.cwd()) not in printed


def test_where_things_are_missing_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setitem(lut_gemm.KERNEL.__dict__, "_attempt", (None, "there is no C compiler"))
    monkeypatch.setitem(packed_gemm.KERNEL.__dict__, "_attempt", (None, "there is no C compiler"))
    monkeypatch.setattr(integer_linear, "KERNEL", False)
    monkeypatch.setattr(bitsandbytes_layout, "multiplies_packed", lambda: False)
    assert doctor.versions()["no-such-package"] is None
    assert doctor.compiler() is None
    assert what_runs("codebook") == (False, "torch's look-up: there is no C compiler")
    monkeypatch.setitem(attention.KERNEL.__dict__, "_attempt", (None, "there is no C compiler"))
    assert what_runs("calibration") == (False, "torch for attention: there is no C compiler")
    assert what_runs("w8a8") == (
        False,
        "sums in float32, about as fast as float linears: this CPU has no AVX512",
    )
    assert what_runs("nf4")[1].endswith("this CPU has no AVX512-BF16")
    monkeypatch.setattr(bitsandbytes_layout, "has_native_library", lambda: False)
    assert what_runs("nf4")[1].endswith("bitsandbytes has no native library here")


def test_a_library_that_fails_is_part_of_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise OSError("libfoo.so: cannot open shared object file\nand more")

    monkeypatch.setattr(bitsandbytes_layout, "has_native_library", broken)
    assert what_runs("nf4") == (False, "failed: libfoo.so: cannot open shared object file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert what_runs("w8a8", "cuda") == (False, "there is no GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_a_name_and_memory() -> None:
    first = doctor.gpus()[0]
    assert first["name"] == torch.cuda.get_device_name(0)
    assert first["memory_bytes"] > 0
    assert what_runs("w8a8", "cuda")[0]
