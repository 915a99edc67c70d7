"""Compiled kernels: what is compiled once, what is never loaded, and that nothing breaks without one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmcompress.kernels import compiled, lut_gemm

needs_kernel = pytest.mark.skipif(
    not lut_gemm.KERNEL.available,
    reason="no kernel: there is no C compiler, no libgomp beside torch, or LLMCOMPRESS_KERNELS is 0",
)


def test_a_switch_turns_the_kernel_off(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "0")
    assert not lut_gemm.KERNEL.available and lut_gemm.form() is None
    assert lut_gemm.KERNEL.why_not == "LLMCOMPRESS_KERNELS is 0"
    assert not caplog.records, "who switches it off knows"
    with pytest.raises(ValueError, match="no kernel lookup here"):
        lut_gemm.matmul(torch.ones(1, 4), torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 16), 1, 4)


WHY = {
    "no compiler": "there is no C compiler (no-such-compiler) on the PATH",
    "no such flag": "lookup.c is compiled by none of",
    "no folder": "Not a directory",
    "no libgomp": "without libgomp",
}


@pytest.mark.parametrize("broken", WHY)
def test_without_what_it_takes_there_is_no_kernel_and_one_warning(
    broken: str,
    fresh: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    if broken == "no compiler":
        monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    elif broken == "no such flag":
        monkeypatch.setattr(compiled, "FLAGS", ("-march=no-such-processor",))
    elif broken == "no folder":
        (tmp_path / "cache").write_text("a file where the folder would be")
    else:
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert not lut_gemm.KERNEL.available
    assert not lut_gemm.KERNEL.available
    assert not list(tmp_path.glob("cache/kernels/*"))
    (record,) = caplog.records  # once a process
    assert record.levelname == "WARNING" and str(lut_gemm.KERNEL.why_not) in record.getMessage()
    assert WHY[broken] in record.getMessage()


@pytest.mark.slow
@needs_kernel
def test_many_that_compile_at_once_make_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lut_gemm.KERNEL.load, [tmp_path / "kernels"] * 4))
    assert all(kernel is not None for kernel in found)
    (made,) = (tmp_path / "kernels").iterdir()
    assert made.name.startswith("lookup-") and made.suffix == ".so"
    stamp = made.stat().st_mtime_ns
    assert lut_gemm.KERNEL.load(tmp_path / "kernels") is not None and made.stat().st_mtime_ns == stamp, (
        "it is compiled once"
    )


KILLED = """
import sys, torch
from pathlib import Path
from llmcompress.kernels import lut_gemm
kernel = lut_gemm.KERNEL.load(Path(sys.argv[1]))
print(kernel.lookup_form().decode())
"""


def loads(folder: Path) -> str:
    """The form of the kernel that another process loads from a folder."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@needs_kernel
@pytest.mark.slow
def test_a_kernel_that_was_cut_short_is_compiled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert lut_gemm.KERNEL.load(folder) is not None
    (made,) = folder.iterdir()
    sound = made.read_bytes()
    for damaged in (sound[: len(sound) // 2], b"", sound[:-1] + bytes([sound[-1] ^ 1])):
        made.unlink()  # the file that this process has loaded stays as it is
        made.write_bytes(damaged)
        made.chmod(0o600)
        assert loads(folder) == lut_gemm.form()
        assert [file.read_bytes() for file in folder.iterdir()] == [sound]


@pytest.mark.slow(keep=1)
@needs_kernel
@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
@pytest.mark.parametrize("open_to", ["the folder", "the one above", "another owner", "a link"])
def test_what_others_may_write_is_never_loaded(
    open_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "temporary"  # what other processes make in the system's is theirs
    own.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    folder = tmp_path / "above" / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    if open_to == "the folder":
        folder.chmod(0o770)
    elif open_to == "the one above":
        folder.parent.chmod(0o777)
    elif open_to == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        pytest.skip("only root may give a folder away")
    assert lut_gemm.KERNEL.load(folder) is not None, "it is compiled elsewhere"
    assert not any(folder.iterdir()) and not any(own.iterdir())


@pytest.mark.slow
@needs_kernel
def test_a_kernel_that_others_may_write_is_compiled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert lut_gemm.KERNEL.load(folder) is not None
    (made,) = folder.iterdir()
    assert not made.stat().st_mode & 0o077
    made.chmod(0o666)
    assert lut_gemm.KERNEL.load(folder) is not None
    assert [file.stat().st_mode & 0o777 for file in folder.iterdir()] == [0o600]
