"""What stages that rewrite linears have in common: which ones a recipe can mean, their bits, and putting them in place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from llmcompress import stored
from llmcompress.block import Block
from llmcompress.errors import ModelError
from llmcompress.residency import Resident
from llmcompress.sparse_linear import Sparse
from llmcompress.stages.coding import Coding

Written = Coding | Sparse  # how one linear is written


def inner(model: Resident, parts: Sequence[str]) -> dict[str, None]:
    """The full names that parts of a block have in all blocks, in order."""
    return {f"{model.block_name(index)}.{part}": None for index in range(len(model.layers)) for part in parts}


def require_known(what: str, patterns: Iterable[str], names: Collection[str], axes: Collection[str] = ()) -> None:
    """Refuse a pattern that matches no linear, and is no axis where those may stand. Errors: ModelError."""
    for pattern in patterns:
        if pattern not in axes and not any(fnmatchcase(name, pattern) for name in names):
            also = f", and axes {', '.join(axes)}" if axes else ""
            shown = min(name for name in names if "." in name)
            raise ModelError(f'{what} "{pattern}" matches no linear of this model; they have names like {shown}{also}')


def mean_bits(bits: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Bits a weight on disk in the mean of the linears in `shapes`."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def install(block: Block, written: Mapping[str, Written], tensors: Mapping[str, Tensor]) -> None:
    """What the journal holds in place of the block's weights and biases, with what kernels do to the inputs."""
    for linear, how in written.items():
        parts = stored.parts_of(f"{block.name}.{linear}", tensors)
        packed = how.read(parts, block.weight(linear).shape[1])
        block.set_weight(linear, stored.dequantize(packed))
        if (bias := tensors.get(f"{block.name}.{linear}.bias")) is not None:
            block.set_bias(linear, bias)
        scale = parts["input_scale"].to(block.device) if "input_scale" in parts else None
        if inputs := how.inputs(scale):
            block.rounds[linear] = inputs
