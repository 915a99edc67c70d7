"""Second moments of inputs in bfloat16, by a C kernel (csrc/moments.c) on CPUs with AVX512-BF16.

A layer whose products are computed in bfloat16 reads its inputs rounded to it, and those are what is summed.
The sums themselves are float32. On a GPU the product is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import Moments
from llmcompress.kernels.compiled import CompiledKernel


def _declare(kernel: ctypes.CDLL) -> None:
    pointer, long, small, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    kernel.moments_works.restype = small
    if not kernel.moments_works():
        return
    kernel.moments_room.argtypes, kernel.moments_room.restype = (long,), long
    kernel.moments_add.argtypes = (
        *2 * (pointer, small),
        *2 * (long,),
        *2 * (number,),
        *6 * (pointer,),
        small,
    )
    kernel.moments_add.restype = None


KERNEL = CompiledKernel("moments", ("moments.c",), _declare, "torch sums second moments")


def takes(device: torch.device) -> bool:
    """Whether inputs on a device are summed as bfloat16 here."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and KERNEL.available and bool(KERNEL.required.moments_works())


class HalfMoments(Moments):
    """The moments of inputs rounded to bfloat16, summed in float32; the difference to the full model's inputs
    is rounded after it is taken. Only on a device that `takes` them; the full model is as wide as this one.
    """

    def _accumulate(self, X_TC: Tensor, F_TC: Tensor | None, total: int) -> None:
        if self._H_CC.is_cuda:
            self._accumulate_by_torch(X_TC, F_TC, total)
        else:
            self._accumulate_by_kernel(X_TC, F_TC, total)
        self._mirrored = False

    def _accumulate_by_torch(self, X_TC: Tensor, F_TC: Tensor | None, total: int) -> None:
        kept, share = self.tokens / total, 1 / total
        rounded_TC, X_TC = X_TC.bfloat16(), X_TC.float()
        full_TC, gap = X_TC if F_TC is None else F_TC.float(), None
        # all of it before a sum changes: memory may run out
        gram = torch.mm(rounded_TC.T, rounded_TC, out_dtype=torch.float32)
        if F_TC is not None:
            gap = torch.mm((full_TC - X_TC).bfloat16().T, rounded_TC, out_dtype=torch.float32)
        self._accumulate_columns(X_TC, full_TC, total)
        self._H_CC.mul_(kept).add_(gram, alpha=share)
        if gap is not None and self.gap_FC is not None:
            self.gap_FC.mul_(kept).add_(gap, alpha=share)

    def _accumulate_by_kernel(self, X_TC: Tensor, F_TC: Tensor | None, total: int) -> None:
        T, C = X_TC.shape
        kept, share = self.tokens / total, 1 / total
        kernel, x, f = KERNEL.required, _plain(X_TC), None if F_TC is None else _plain(F_TC)
        sum_C, full_C = torch.zeros(C), torch.zeros(C)
        room = torch.empty(2 * kernel.moments_room(C), dtype=torch.int32)
        kernel.moments_add(
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            _at(f),
            f is not None and f.dtype == torch.bfloat16,
            T,
            C,
            kept,
            share,
            _at(self._H_CC),
            _at(self.gap_FC),
            _at(sum_C),
            _at(full_C),
            _at(self.top_C),
            _at(room),
            torch.get_num_threads(),
        )
        self._accumulate_sums(sum_C, sum_C if f is None else full_C, total)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plain(X_TC: Tensor) -> Tensor:
    """Inputs as the kernel reads them: contiguous, in bfloat16 or float32."""
    return (X_TC if X_TC.dtype == torch.bfloat16 else X_TC.float()).contiguous()
