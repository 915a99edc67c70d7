"""What the tests of Triton kernels share.

They want a GPU. Where Triton is installed without one, `TRITON_INTERPRET=1` runs the kernels on the CPU
instead, one program after another: the same numbers, nothing of speed or of a GPU's memory. `make
test-kernels` does that.
"""

from __future__ import annotations

import os

import pytest
import torch

from llmcompress.kernels.triton_device import TritonKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def marks(kernels: TritonKernels) -> list[pytest.MarkDecorator]:
    """The marks of a module that tests some kernels."""
    runs = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(not (runs and kernels.installed), reason="needs Triton and a CUDA device"),
        # of NumPy, with which the interpreter computes
        pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    ]
