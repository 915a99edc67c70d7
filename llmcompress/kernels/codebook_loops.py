"""The loops of `algorithms.codebook_loops` by small C kernels (csrc/codebook.c, csrc/solver.c) on CPUs.

Levels are those of the plain loops but for the last bits of a few sums. Anything but float32 on a CPU, and a
machine without a compiler, takes the plain loops; normal matrices of more than 16 levels do too.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llmcompress.algorithms import codebook_loops as plain
from llmcompress.algorithms.codebook_loops import CodebookLoops, Product
from llmcompress.kernels import column_loops
from llmcompress.kernels.compiled import CompiledKernel

LEVELS, FEW = 256, 16  # of a codebook, and of one whose normal matrix is computed
MOST = 2**32 - 8  # weights of a group
SORTED = 2**23  # weights that all threads sort at a time: 500 MB


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernel.codebook_cluster.argtypes = (*2 * (pointer,), *3 * (long,), *2 * (small,), *2 * (pointer,), small)
    kernel.codebook_normal.argtypes = (*2 * (pointer,), *2 * (long,), small, *3 * (pointer,), small)
    for size in (kernel.codebook_room, kernel.codebook_packed, kernel.codebook_ordered):
        size.argtypes, size.restype = (long,), long


KERNEL = CompiledKernel("codebook", ("codebook.c",), _declare, "torch finds the values of codebooks")


def cluster(W_GN: Tensor, h_C: Tensor, entries: int, steps: int) -> Tensor:
    """As `algorithms.codebook_loops.cluster`."""
    G, N = W_GN.shape
    if not (_takes(W_GN, entries, LEVELS) and N <= MOST):
        return plain.cluster(W_GN, h_C, entries, steps)
    threads = max(1, min(torch.get_num_threads(), SORTED // N, G))
    room = torch.empty(threads * KERNEL.required.codebook_room(N), dtype=torch.uint8)
    W, h, levels_GL = W_GN.contiguous(), h_C.contiguous(), torch.empty(G, entries)
    KERNEL.required.codebook_cluster(*_at(W, h), len(h), G, N, entries, steps, *_at(room, levels_GL), threads)
    return levels_GL


def normal_product(H_CC: Tensor, index_RC: Tensor, rows: int, entries: int) -> Product:
    """As `algorithms.codebook_loops.normal_product`."""
    if not _takes(H_CC, entries, FEW):
        return plain.normal_product(H_CC, index_RC, rows, entries)
    (R, C), threads = index_RC.shape, torch.get_num_threads()
    packed = torch.empty(KERNEL.required.codebook_packed(C))
    room = torch.empty(threads * KERNEL.required.codebook_ordered(C), dtype=torch.uint8)
    H, index, normal_RLL = H_CC.contiguous(), index_RC.contiguous(), torch.empty(R, entries, entries)
    KERNEL.required.codebook_normal(*_at(H, index), R, C, entries, *_at(packed, room, normal_RLL), threads)
    if rows > 1:
        normal_RLL = torch.stack([part.sum(0) for part in normal_RLL.split(rows)])
    return lambda levels_GL: (normal_RLL @ levels_GL[:, :, None]).squeeze(2)


LOOPS = CodebookLoops(column_loops.LOOPS, cluster, normal_product)


def _takes(floats: Tensor, entries: int, most: int) -> bool:
    """Whether the kernel takes such a tensor and so many levels."""
    return floats.is_cpu and floats.dtype == torch.float32 and entries <= most and KERNEL.available


def _at(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
