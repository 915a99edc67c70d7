"""How fast each format runs, as measured: times the speed of float32 on CPUs, and of bfloat16 on GPUs.

The numbers are those of evaluation/results/speed-*.json and lookup_speed-avx2.json, which a wheel does not
have; a test compares them. On CPUs they are of a model of 111 M parameters, on the GPU of one of 8 B.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Times the speed of the reference: writing one token after another, and reading a prompt."""

    writing: float
    reading: float
    model: str  # what it was measured on

    @property
    def rank(self) -> float:
        """The speed of writing in one digit: closer ones differ less than machines do."""
        return float(f"{self.writing:.0e}")


@dataclass(frozen=True)
class Machine:
    """A kind of machine that was measured."""

    name: str
    reference: str  # the dtype whose speed is 1
    dtypes: dict[str, Speed]  # of plain models
    formats: dict[str, Speed]


_111M, _8B = "a model of 111 M parameters", "a model of 8 B parameters"
AVX2 = Machine(
    "AVX2",
    "float32",
    {"float32": Speed(1.0, 1.0, _111M), "bfloat16": Speed(1.87, 0.19, _111M)},
    {
        "w8a8": Speed(0.9, 0.99, _111M),
        "w4a8": Speed(0.95, 0.91, _111M),
        "int8": Speed(0.53, 0.75, _111M),
        "nf4": Speed(0.49, 0.82, _111M),
        "codebook": Speed(4.48, 1.27, "one linear of 4096 x 11008"),
    },
)
AVX512 = Machine(  # codebooks are measured on single linears alone, where they are about as fast as nf4
    "AVX512",
    "float32",
    {"float32": Speed(1.0, 1.0, _111M), "bfloat16": Speed(2.15, 2.72, _111M)},
    {
        "w8a8": Speed(3.16, 4.17, _111M),
        "w4a8": Speed(3.17, 4.2, _111M),
        "int8": Speed(2.33, 3.3, _111M),
        "nf4": Speed(3.39, 2.82, _111M),
    },
)
H100 = Machine(
    "NVIDIA H100",
    "bfloat16",
    {"bfloat16": Speed(1.0, 1.0, _8B)},
    {
        "w8a8": Speed(0.59, 0.86, _8B),
        "w4a8": Speed(0.6, 0.82, _8B),
        "int8": Speed(0.4, 0.68, _8B),
        "nf4": Speed(0.73, 0.87, _8B),
    },
)
CPUS = {cpu.name: cpu for cpu in (AVX2, AVX512)}  # by what torch calls the instructions
