"""Products of inputs and packed indices on a CPU, by a small C kernel that is compiled on first use.

The kernel (csrc/lookup.c, csrc/lookup_wide.h) is built by the system's C compiler for this processor. It is
linked against the libgomp that torch ships, so that there is one thread pool. It is kept in
$LLMCOMPRESS_CACHE/kernels or ~/.cache/llmcompress/kernels for other processes to load. The name of the file
holds the sha256 of its content, so a damaged file is compiled again. Loading the file runs its code, so both
file and folder must belong to this user (or root) and be writable by nobody else. Otherwise each process
compiles the kernel into a private temporary folder. If any of this fails, or LLMCOMPRESS_KERNELS is 0, there
is no kernel and the caller uses another way. A failure is logged once, as a warning. R rows (out), C columns
(in), G codebooks, L levels, B bytes of a row, T tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.errors import CompressError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import discard, sync
from llmcompress.io.scratch import scratch_folder

logger = logging.getLogger(__name__)
SOURCE, HEADER = (Path(__file__).parent / "csrc" / name for name in ("lookup.c", "lookup_wide.h"))
FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
SMALL = 2**16  # up to this many weights a second thread does not pay off
# tokens at a time; for more, a CPU without AVX-512 is about as fast with expanded weights and a product of
# torch
FEW = 16
# weights expanded at a time: 16 MB; smaller pieces are no faster, and threads synchronise more often
PIECE = 2**22
# other CPUs multiply bfloat16 several times as slowly as float32
BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


@functools.cache
def available() -> bool:
    """Whether there is a kernel.

    The first call may compile it, which takes seconds. A warning is logged if that fails.
    """
    if (why := why_not()) is not None and not _switched_off():
        logger.warning(
            "torch looks up codebook linears in each forward, which is slower than the C kernel: %s", why
        )
    return why is None


def why_not() -> str | None:
    """Return why there is no kernel, or None if there is one. The first call may compile it."""
    return _attempt()[1]


def form() -> str | None:
    """Return the instruction set of the kernel: avx512, avx2, or plain; None if there is no kernel."""
    kernel = _kernel()
    return None if kernel is None else str(kernel.lookup_form().decode())


def halves(bits: int) -> bool:
    """Whether `matmul` takes inputs in bfloat16 without a conversion."""
    kernel = _kernel()
    return kernel is not None and bits != 8 and bool(kernel.lookup_halves())


def product(x_TC: Tensor, packed_RB: Tensor, levels_GL: Tensor, rows: int, bits: int) -> Tensor:
    """Return x W^T [T, R] in the dtype of x, which may be any float dtype.

    Few tokens use `matmul`; for many tokens the weight is expanded a piece at a time. Sums are float32. If x
    is bfloat16 and the processor multiplies bfloat16, levels are rounded to bfloat16.
    """
    (T, C), R, half = x_TC.shape, len(packed_RB), x_TC.dtype == torch.bfloat16 and halves(bits)
    few = 2 * FEW if half else FEW
    if few >= T or (form() == "avx512" and bits != 8 and not half):
        inputs, levels_GL = (x_TC if half else x_TC.float()).contiguous(), levels_GL.float()
        parts = [matmul(part, packed_RB, levels_GL, rows, bits) for part in inputs.split(FEW)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(x_TC.dtype)
    dtype = torch.bfloat16 if x_TC.dtype == torch.bfloat16 and BFLOAT16 else torch.float32
    x_CT, levels_GL = x_TC.to(dtype).t(), levels_GL.to(dtype)
    height = min(R, max(1, PIECE // C))
    piece_RC, out_RT = torch.empty(height, C, dtype=dtype), torch.empty(R, T, dtype=dtype)
    for start in range(0, R, height):
        part_RT = out_RT[start : start + height]
        part_RC = expand(packed_RB, levels_GL, rows, bits, C, start=start, out=piece_RC[: len(part_RT)])
        torch.mm(part_RC, x_CT, out=part_RT)
    return out_RT.t().to(x_TC.dtype).contiguous()


def matmul(x_TC: Tensor, packed_RB: Tensor, levels_GL: Tensor, rows: int, bits: int) -> Tensor:
    """Return x W^T, float32 [T, R], from x float32 [T, C], indices of 2, 3, 4 or 8 bits and levels float32
    [G, 2^bits].

    All tensors are contiguous and on the CPU; `rows` adjacent rows share a codebook. It is meant for few
    tokens. With `halves`, x may be bfloat16, and levels are then rounded to bfloat16. Errors: ValueError,
    MemoryError.
    """
    T, C = x_TC.shape
    R = _checked(packed_RB, levels_GL, C, rows, bits)
    half = x_TC.dtype == torch.bfloat16 and halves(bits)
    right = (half or x_TC.dtype == torch.float32) and levels_GL.dtype == torch.float32
    if not right or not _plain(x_TC, packed_RB, levels_GL):
        raise ValueError(
            f"inputs and levels must be float32 and contiguous, got {x_TC.dtype} and {levels_GL.dtype}"
        )
    out_TR = torch.empty(T, R)
    done = _loaded().lookup_matmul(
        x_TC.data_ptr(),
        packed_RB.data_ptr(),
        levels_GL.data_ptr(),
        out_TR.data_ptr(),
        T,
        R,
        C,
        rows,
        bits,
        half,
        _threads(R * C),
    )
    if not done:
        raise MemoryError(f"no memory for the inputs of a product of {T} tokens")
    return out_TR


def expand(
    packed_RB: Tensor,
    levels_GL: Tensor,
    rows: int,
    bits: int,
    columns: int,
    *,
    start: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight [R, columns] in the dtype of the levels, of 2 or 4 bytes.

    `out`, if given, receives as many rows as it has, beginning with row `start`. Errors: ValueError,
    MemoryError.
    """
    R = _checked(packed_RB, levels_GL, columns, rows, bits)
    out_RC = torch.empty(R - start, columns, dtype=levels_GL.dtype) if out is None else out
    fits = (
        out_RC.dtype == levels_GL.dtype
        and 0 <= start <= start + len(out_RC) <= R
        and out_RC.shape[1] == columns
    )
    if not fits or levels_GL.dtype.itemsize not in (2, 4) or not _plain(packed_RB, levels_GL, out_RC):
        raise ValueError(
            f"rows from {start} of {R} x {columns} do not go into {out_RC.dtype} {tuple(out_RC.shape)}"
        )
    done = _loaded().lookup_expand(
        packed_RB.data_ptr(),
        levels_GL.data_ptr(),
        out_RC.data_ptr(),
        start,
        len(out_RC),
        columns,
        rows,
        bits,
        levels_GL.dtype.itemsize,
        _threads(out_RC.numel()),
    )
    if not done:
        raise MemoryError(f"no memory for a row of {columns} indices")
    return out_RC


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a row of indices. Each row begins at a new byte; eight 3-bit indices fill three
    bytes."""
    return -(-columns // 8) * 3 if bits == 3 else -(-columns * bits // 8)


def _checked(packed_RB: Tensor, levels_GL: Tensor, columns: int, rows: int, bits: int) -> int:
    """Return the number of rows. Errors: ValueError for arguments with which the kernel would read out of
    bounds."""
    R = len(packed_RB)
    fits = bits in (2, 3, 4, 8) and rows > 0 and packed_RB.dtype == torch.uint8 and min(R, columns) > 0
    if (
        not fits
        or packed_RB.shape[1] != row_bytes(columns, bits)
        or levels_GL.shape != (-(-R // rows), 2**bits)
    ):
        raise ValueError(
            f"indices {tuple(packed_RB.shape)} of {bits} bits and levels {tuple(levels_GL.shape)} of {rows} "
            f"rows each are no weight of {columns} columns"
        )
    return R


def _plain(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)


def _threads(weights: int) -> int:
    return 1 if weights <= SMALL else torch.get_num_threads()


def _loaded() -> ctypes.CDLL:
    kernel = _kernel()
    if kernel is None:
        raise ValueError("there is no kernel here; ask `available` first")
    return kernel


def _kernel() -> ctypes.CDLL | None:
    """Return the compiled kernel, cached or new; None if there is none."""
    return _attempt()[0]


def _switched_off() -> bool:
    return os.environ.get("LLMCOMPRESS_KERNELS") == "0"


@functools.cache
def _attempt() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the compiled kernel and None, or None and why there is no kernel."""
    if _switched_off():
        return None, "LLMCOMPRESS_KERNELS is 0"
    try:
        kernel = _load(cache_folder() / "kernels")
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError, CompressError) as error:
        return None, first_line(error)  # such as a full disk or a missing symbol
    return (None, _lacking()) if kernel is None else (kernel, None)


def compiler() -> str | None:
    """Return the path of the first C compiler that is tried, or None if there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _lacking() -> str:
    """Return why nothing was compiled."""
    if compiler() is None:
        return f"there is no C compiler ({', '.join(COMPILERS)}) on the PATH; install one"
    if not _libgomp():
        return "torch was installed without libgomp; install a torch wheel for this platform"
    return f"{SOURCE.name} is compiled by none of {', '.join(COMPILERS)} here; install a newer compiler"


def _libgomp() -> list[Path]:
    """Return the libgomp files that torch ships."""
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


def _load(folder: Path) -> ctypes.CDLL | None:
    """Return the kernel of a folder, compiling it if it is not there.

    If others may write to the folder, it is compiled into a temporary folder instead.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_private(folder) and not any(map(_is_open, folder.parents)):
        return _made(folder)
    with scratch_folder() as own:
        return _made(own)


def _made(folder: Path) -> ctypes.CDLL | None:
    """Return the kernel of a folder that only this user can write, compiling it if it is not there."""
    kernel = _found(folder)
    if kernel is None:
        if not any(_compile(compiler, folder) for compiler in filter(None, map(shutil.which, COMPILERS))):
            return None
        kernel = _found(folder)
    return None if kernel is None else _declared(kernel)


def _found(folder: Path) -> ctypes.CDLL | None:
    """Return the kernel that was compiled for this processor into a folder, or None.

    Files of that name are deleted if they were changed, if others can write to them, or if they fail to load.
    """
    for file in sorted(folder.glob(f"lookup-{_digest()}-*.so")):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if file.name == _name(opened.read()) and _is_private(file):
                return ctypes.CDLL(str(file))
        discard(file)
    return None


def _is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user or root and nobody else may write to it."""
    if not hasattr(os, "geteuid"):  # not POSIX; only the owner can write to a home there
        return True
    about = path.lstat()
    return about.st_uid in (0, os.geteuid()) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_open(folder: Path) -> bool:
    """Whether anyone may replace the folders inside a folder."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _name(content: bytes) -> str:
    """Return the file name of a compiled kernel."""
    return f"lookup-{_digest()}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _declared(kernel: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument and return types of the functions of the kernel."""
    pointer, long, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernel.lookup_form.restype, kernel.lookup_form.argtypes = ctypes.c_char_p, ()
    kernel.lookup_halves.restype, kernel.lookup_halves.argtypes = small, ()
    kernel.lookup_matmul.argtypes = (*4 * (pointer,), *4 * (long,), small, small, small)
    kernel.lookup_expand.argtypes = (*3 * (pointer,), *4 * (long,), small, small, small)
    return kernel


def _digest() -> str:
    """Return a digest of what the compiled file depends on: source, flags, torch and the processor."""
    parts = [
        SOURCE.read_text(),
        HEADER.read_text(),
        *FLAGS,
        torch.__version__,
        platform.machine(),
        platform.processor(),
    ]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [
            next((line for line in lines if line.startswith(kind)), "")
            for kind in ("model name", "flags", "Features")
        ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> bool:
    """Compile the kernel into a folder and return whether that succeeded.

    The file appears whole or not at all, however many processes try.
    """
    threads = _libgomp()
    if not threads:
        return False
    with tempfile.TemporaryDirectory(dir=target) as folder:
        object_file, made = Path(folder) / "lookup.o", Path(folder) / "lookup.so"
        for step in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(object_file)],
            [
                compiler,
                "-shared",
                str(object_file),
                str(threads[0]),
                f"-Wl,-rpath,{threads[0].parent}",
                "-o",
                str(made),
            ],
        ):
            if subprocess.run(step, capture_output=True, timeout=120, check=False).returncode:
                return False
        made.chmod(0o600)
        with made.open("rb+") as file:
            name = _name(file.read())
            sync(file)
        made.replace(target / name)
    return True
