"""The Triton kernels compile, for which no GPU is needed: the interpreter takes what the compiler refuses.

`make test-kernels` runs it, where Triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import pytest

from llmcompress.kernels import column_loops_gpu, int8_dispatch, lookup_dispatch
from llmcompress.kernels.triton_device import TritonKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),  # of what 3.10 will change
]
FLOATS, INTEGERS = "*fp32", "i32"
SOLVER = {
    "levels": FLOATS,
    "middles": FLOATS,
    "count": INTEGERS,
}
SEARCH = {
    "weight": FLOATS,
    "h_C": FLOATS,
    "ratios": FLOATS,
    "tried": INTEGERS,
    "scales": FLOATS,
    **dict.fromkeys(("groups", "of_row", "size"), INTEGERS),
}
COLUMNS = {
    **dict.fromkeys(("near", "square", "old", "scale", "step"), FLOATS),
    "index": "*i64",
    **dict.fromkeys(("stride", "width", "R"), INTEGERS),
}
TOKENS = {
    **dict.fromkeys(("x_TC", "step", "scale_T"), FLOATS),
    "codes": "*i8",
    **dict.fromkeys(("T", "C"), INTEGERS),
    **dict.fromkeys(("largest", "tiny"), "fp32"),
}
SCALED = {
    "sums": "*i32",
    **dict.fromkeys(("scale_T", "scale_R", "bias_R"), FLOATS),
    "out_TR": "*bf16",
    **dict.fromkeys(("T", "R"), INTEGERS),
}
FEW = {
    **dict.fromkeys(("codes_TC", "weight_RC"), "*i8"),
    **dict.fromkeys(("scale_T", "scale_R", "bias_R"), FLOATS),
    "out_TR": "*bf16",
    **dict.fromkeys(("T", "R", "C"), INTEGERS),
}
LOOKED_UP = {
    "x_TC": "*bf16",
    "packed_RB": "*u8",
    "levels_GL": FLOATS,
    **dict.fromkeys(("row_scale_R", "bias_R"), FLOATS),
    "out_TR": "*bf16",
    **dict.fromkeys(("T", "R", "C", "B", "sharing", "group_size", "groups"), INTEGERS),
}
HALVES, BYTES = LOOKED_UP | {"scale_RG": "*fp16"}, LOOKED_UP | {"scale_RG": "*u8"}
LOOPS, INT8, LOOKUP = column_loops_gpu.KERNELS, int8_dispatch.KERNELS, lookup_dispatch.KERNELS
FLAGS = {"PER_TOKEN": 1, "SPLIT": True, "BIAS": True}
TILE = {"ROWS": 16, "COLUMNS": 256, "TOKENS": 32}
UNITS = {"LOOKED_UP": True, "ROW_SCALED": False, "BIAS": True, "TOKENS": 32, "ROWS": 16, "UNITS": 64}
CASES: list[tuple[TritonKernels, str, Mapping[str, str], Mapping[str, Any], int]] = [
    (LOOPS, "search", SOLVER | SEARCH, {"HALVINGS": 4, "GROUPS": 16, "WIDE": 64}, 4),
    (LOOPS, "search", SOLVER | SEARCH, {"HALVINGS": 8, "GROUPS": 1, "WIDE": 1024}, 4),
    (LOOPS, "fix_columns", SOLVER | COLUMNS, {"MOVE": False, "HALVINGS": 4, "WIDTH": 64, "ROWS": 32}, 1),
    (LOOPS, "fix_columns", SOLVER | COLUMNS, {"MOVE": True, "HALVINGS": 8, "WIDTH": 64, "ROWS": 32}, 1),
    (INT8, "quantize_tokens", TOKENS, {"STATIC": False, "SPLIT": False, "WIDE": 1024}, 4),
    (INT8, "quantize_tokens", TOKENS, {"STATIC": True, "SPLIT": True, "WIDE": 1024}, 4),
    (INT8, "scaled", SCALED, {**FLAGS, "WIDE": 1024}, 4),
    (INT8, "few_tokens", FEW, {**FLAGS, **TILE}, 4),
    (LOOKUP, "few_tokens", HALVES, {**UNITS, "BITS": 4, "SCALED": True, "GROUPS": 4}, 4),
    (LOOKUP, "few_tokens", BYTES, {**UNITS, "BITS": 4, "SCALED": True, "GROUPS": 1, "ROW_SCALED": True}, 4),
    (LOOKUP, "few_tokens", HALVES, {**UNITS, "BITS": 3, "SCALED": False, "GROUPS": 1, "UNITS": 32}, 4),
    (LOOKUP, "few_tokens", HALVES, {**UNITS, "BITS": 8, "SCALED": False, "GROUPS": 1, "LOOKED_UP": False}, 4),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernels", "name", "types", "constants", "warps"),
    CASES,
    ids=[f"{name}-{'-'.join(map(str, constants.values()))}" for _, name, _, constants, _ in CASES],
)
def test_a_kernel_compiles(
    kernels: TritonKernels,
    name: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    capability: int,
) -> None:
    compiler: Any = importlib.import_module("triton.compiler")
    target: Any = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    kernel = getattr(kernels.module, name)
    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    source = compiler.ASTSource(
        fn=kernel,
        signature={each: types.get(each, "constexpr") for each in names},
        constexprs={(names.index(each),): value for each, value in constants.items()},
    )
    found = compiler.compile(source, target=target, options={"num_warps": warps})
    assert found.asm["cubin"] and found.metadata.name == name
