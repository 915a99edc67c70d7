"""A safetensors file written tensor by tensor, and the bytes of tensors.

Each tensor is spooled to disk at once, and the header is put in front when the file is complete. Memory is
one tensor, whatever the size of the file; the price is that its bytes are written twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.errors import OutputError, argument
from llmcompress.io.cache import cache_folder
from llmcompress.io.scratch import is_scratch

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in shape, type and every bit, on whatever devices."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_flat(one), _flat(other))


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as safetensors stores them: row-major, little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    array: Any = _flat(tensor).numpy()
    return memoryview(array)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn file system errors inside the context into an OutputError with one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise OutputError(f"can't write {path} ({why}); free space there or {elsewhere(path)}") from error


def elsewhere(path: Path) -> str:
    """The advice how to use another place than `path`."""
    if path.is_relative_to(cache_folder()):
        return "set LLMCOMPRESS_CACHE to another folder"
    return "set TMPDIR to another folder" if is_scratch(path) else f"choose another {argument('out')}"


class Shard:
    """One safetensors file written tensor by tensor: spools by item size, then header and spools in one file.

    Wider items come first, so every tensor starts at a multiple of its item size.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._sizes: dict[int, int] = {}  # item size -> bytes spooled
        self._entries: dict[int, dict[str, dict[str, Any]]] = {}  # item size -> name -> entry of the header

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors added so far."""
        return sum(self._sizes.values())

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor to its spool."""
        width, data = tensor.dtype.itemsize, content(tensor)
        with self._spool(width).open("ab" if width in self._sizes else "wb") as spool:
            spool.write(data)
        start = self._sizes.get(width, 0)
        self._sizes[width] = start + data.nbytes
        span = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + data.nbytes],
        }
        self._entries.setdefault(width, {})[name] = span

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the file, flush it to the disk, and delete the spools."""
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        widths, start = sorted(self._sizes, reverse=True), 0
        for width in widths:
            for name, entry in self._entries[width].items():
                header[name] = {**entry, "data_offsets": [start + offset for offset in entry["data_offsets"]]}
            start += self._sizes[width]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.file.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in widths:
                with self._spool(width).open("rb") as spool:
                    shutil.copyfileobj(spool, file, 1 << 24)
                self._spool(width).unlink()
            sync(file)

    def _spool(self, width: int) -> Path:
        return self.file.with_suffix(f".{width}")


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def put(file: Path, content: str) -> None:
    """Write a text file, completely or not at all."""
    # a name per writer: of several writers, the last one's file stays
    half = file.with_name(f".{secrets.token_hex(8)}.half")
    try:
        with half.open("xb") as opened:
            opened.write(content.encode())
            sync(opened)
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def discard(path: Path) -> None:
    """Delete a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Return the sha256 of `about`, followed by the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()
