"""Small C kernels for the CPU, compiled on first use.

A kernel is built by the system's C compiler for this processor. It is linked against the libgomp that torch
ships, so that there is one thread pool. It is kept in $LLMCOMPRESS_CACHE/kernels or
~/.cache/llmcompress/kernels for other processes to load. The name of the file holds the sha256 of its
content, so a damaged file is compiled again. Loading the file runs its code, so both file and folder must
belong to this user (or root) and be writable by nobody else. Otherwise each process compiles the kernel into
a private temporary folder. If any of this fails, or LLMCOMPRESS_KERNELS is 0, there is no kernel, and the
reason is known. On x86, ATEN_CPU_CAPABILITY restricts the kernels to the instructions that it restricts torch
to.
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
from collections.abc import Callable
from pathlib import Path

import torch

from llmcompress.errors import CompressError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import discard, sync
from llmcompress.io.scratch import scratch_folder

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "csrc"
FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
# what ATEN_CPU_CAPABILITY has torch take of an x86 processor, and the architecture that has as much
MARCHES = {"avx2": "-march=haswell", "default": "-march=x86-64"}


class CompiledKernel:
    """A kernel by its `name`, its files in csrc/ (the first is compiled, the others are headers), and a
    function that declares the argument and return types of what it exports. `without` says what happens
    where there is none."""

    def __init__(
        self, name: str, files: tuple[str, ...], declare: Callable[[ctypes.CDLL], None], without: str
    ) -> None:
        self.name, self.files, self.declare, self.without = name, files, declare, without

    @functools.cached_property
    def available(self) -> bool:
        """Whether there is a kernel. The first call may compile it, which takes seconds; a warning is logged
        if that fails."""
        if self.why_not is not None and not self.switched_off:
            logger.warning("%s, which is slower than the C kernel: %s", self.without, self.why_not)
        return self.why_not is None

    @property
    def loaded(self) -> ctypes.CDLL | None:
        """The compiled kernel, cached or new; None if there is none."""
        return self._attempt[0]

    @property
    def required(self) -> ctypes.CDLL:
        """The compiled kernel. Errors: ValueError if there is none."""
        if self.loaded is None:
            raise ValueError(f"there is no kernel {self.name} here; ask `loaded` first")
        return self.loaded

    @property
    def why_not(self) -> str | None:
        """Why there is no kernel, or None if there is one. The first call may compile it."""
        return self._attempt[1]

    @property
    def switched_off(self) -> bool:
        """Whether the user wants no kernels."""
        return os.environ.get("LLMCOMPRESS_KERNELS") == "0"

    def forget(self) -> None:
        """Look for the kernel again the next time."""
        self.__dict__.pop("_attempt", None)
        self.__dict__.pop("available", None)

    @functools.cached_property
    def _attempt(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The compiled kernel and None, or None and why there is no kernel."""
        if self.switched_off:
            return None, "LLMCOMPRESS_KERNELS is 0"
        try:
            kernel = self.load(cache_folder() / "kernels")
        except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError, CompressError) as error:
            return None, first_line(error)  # such as a full disk or a missing symbol
        return (None, self._lacking()) if kernel is None else (kernel, None)

    def _lacking(self) -> str:
        """Return why nothing was compiled."""
        if compiler() is None:
            return f"there is no C compiler ({', '.join(COMPILERS)}) on the PATH; install one"
        if not _libgomp():
            return "torch was installed without libgomp; install a torch wheel for this platform"
        return f"{self.files[0]} is compiled by none of {', '.join(COMPILERS)} here; install a newer compiler"

    def load(self, folder: Path) -> ctypes.CDLL | None:
        """Return the kernel of a folder, compiling it if it is not there; None if nothing compiles it.

        If others may write to the folder, it is compiled into a temporary folder instead.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder) and not any(map(_is_open, folder.parents)):
            return self._made(folder)
        with scratch_folder() as own:
            return self._made(own)

    def _made(self, folder: Path) -> ctypes.CDLL | None:
        """Return the kernel of a folder that only this user can write, compiling it if it is not there."""
        kernel = self._found(folder)
        if kernel is None:
            if not any(self._compile(path, folder) for path in filter(None, map(shutil.which, COMPILERS))):
                return None
            kernel = self._found(folder)
        if kernel is not None:
            self.declare(kernel)
        return kernel

    def _found(self, folder: Path) -> ctypes.CDLL | None:
        """Return the kernel that was compiled for this processor into a folder.

        Files of that name that were changed or that others can write are deleted.
        """
        for file in sorted(folder.glob(f"{self.name}-{self._digest()}-*.so")):
            with contextlib.suppress(OSError), file.open("rb") as opened:
                if file.name == self._file_name(opened.read()) and _is_private(file):
                    return ctypes.CDLL(str(file))
            discard(file)
        return None

    def _file_name(self, content: bytes) -> str:
        """Return the file name of a compiled kernel."""
        return f"{self.name}-{self._digest()}-{hashlib.sha256(content).hexdigest()[:32]}.so"

    def _digest(self) -> str:
        """Return a digest of what the compiled file depends on: source, flags, torch and the processor."""
        parts = [*((FOLDER / file).read_text() for file in self.files), *flags()]
        parts += [torch.__version__, platform.machine(), platform.processor()]
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            parts += [
                next((line for line in lines if line.startswith(kind)), "")
                for kind in ("model name", "flags", "Features")
            ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _compile(self, path: str, target: Path) -> bool:
        """Compile the kernel with the compiler at `path` into a folder and return whether that succeeded.

        The file appears whole or not at all, however many processes try.
        """
        threads = _libgomp()
        if not threads:
            return False
        with tempfile.TemporaryDirectory(dir=target) as folder:
            object_file, made = Path(folder) / f"{self.name}.o", Path(folder) / f"{self.name}.so"
            compile = [path, *flags(), "-c", str(FOLDER / self.files[0]), "-o", str(object_file)]
            found_at = f"-Wl,-rpath,{threads[0].parent}"
            link = [path, "-shared", str(object_file), str(threads[0]), found_at, "-lm", "-o", str(made)]
            for step in (compile, link):
                if subprocess.run(step, capture_output=True, timeout=120, check=False).returncode:
                    return False
            made.chmod(0o600)
            with made.open("rb+") as file:
                name = self._file_name(file.read())
                sync(file)
            made.replace(target / name)
        return True


def flags() -> tuple[str, ...]:
    """Return what the compiler is told beside the files."""
    march = MARCHES.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
    if march is None or platform.machine() not in ("x86_64", "AMD64"):
        return FLAGS
    return tuple(march if flag == "-march=native" else flag for flag in FLAGS)


def compiler() -> str | None:
    """Return the path of the first C compiler that is tried, or None if there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _libgomp() -> list[Path]:
    """Return the libgomp files that torch ships."""
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


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
