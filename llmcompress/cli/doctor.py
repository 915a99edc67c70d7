"""What is installed, what the machine can do, and which kernels run here: `llmcompress doctor`.

It names no path, so its output can go into a bug report unchanged.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.cli.terminal import print_table
from llmcompress.errors import first_line
from llmcompress.io.units import amount

if TYPE_CHECKING:  # it brings torch
    from llmcompress.kernels.triton_device import TritonKernels

PACKAGES = (
    "llmcompress",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "peft",
    "triton",
)
# CPU flags, as Linux names them
FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
Facts = dict[str, Any]


def examine() -> Facts:
    """Versions, CPU, compiler, GPUs and kernels, as JSON-compatible values. The first call may compile the
    codebook kernel."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "compiler": compiler(),
        "gpus": gpus(),
        "kernels": kernels(),
    }


def versions() -> dict[str, str | None]:
    """The version of Python and of each package; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu() -> Facts:
    """The processor: its name, the number of torch threads, memory, and the instruction sets that kernels
    need."""
    import psutil
    import torch

    lines = dict[str, str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return {
        "name": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in FEATURES if feature in flags],
        "memory_bytes": psutil.virtual_memory().total,
    }


def compiler() -> str | None:
    """The version line of the C compiler that builds the kernels; None if there is none."""
    from llmcompress.kernels import compiled

    path = compiled.compiler()
    if path is None:
        return None
    name = Path(path).name
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return name
    return next(iter(said.splitlines()), name)


def gpus() -> list[Facts]:
    """Each GPU that torch sees."""
    import torch

    found = list[Facts]()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "memory_bytes": about.total_memory,
                "capability": f"{about.major}.{about.minor}",
                "cuda": torch.version.cuda,
            }
        )
    return found


def kernels() -> list[Facts]:
    """For each kind of linear and device: whether its kernel runs here, and what runs instead."""
    asked: tuple[tuple[str, str, Callable[[], tuple[bool, str]]], ...] = (
        ("nf4, fp4", "cpu", _four_bit),
        ("w8a8, w8a16, w4a8, w4a4, w4a16", "cpu", _integer),
        ("q4_0, iq4_nl", "cpu", _ggml),
        ("codebook", "cpu", _codebook),
        ("calibration", "cpu", _solver),
        ("w8a8, w8a16, w4a8, w4a4, w4a16", "cuda", _integer_gpu),
        ("q4_0, iq4_nl, codebook", "cuda", _lookup_gpu),
        ("calibration", "cuda", _solver_gpu),
    )
    found = list[Facts]()
    for formats, device, ask in asked:
        try:
            runs, what = ask()
        except Exception as error:  # whatever a library raises is reported
            runs, what = False, f"failed: {first_line(error)}"
        found.append({"formats": formats, "device": device, "kernel": runs, "runs": what})
    return found


def _four_bit() -> tuple[bool, str]:
    from llmcompress.formats import bitsandbytes_layout

    if not bitsandbytes_layout.has_native_library():
        return (
            False,
            "torch, after the weight is dequantised in each forward: bitsandbytes has no native library here",
        )
    if bitsandbytes_layout.multiplies_packed():
        return True, "bitsandbytes' native AVX512-BF16 kernel, on packed weights"
    return _few_tokens(
        "torch, after bitsandbytes' native library dequantised the weight: this CPU has no AVX512-BF16"
    )


def _integer() -> tuple[bool, str]:
    from llmcompress.formats import integer_linear

    if integer_linear.KERNEL:
        return True, _few_tokens("torch's int8 products, for AVX512")[1]
    return _few_tokens("sums in float32, about as fast as float linears: this CPU has no AVX512")


def _ggml() -> tuple[bool, str]:
    return _few_tokens("torch, after the weight is dequantised")


def _few_tokens(other: str) -> tuple[bool, str]:
    """Whether our C kernel runs, and with what is said of many tokens."""
    from llmcompress.kernels import packed_gemm

    if packed_gemm.KERNEL.why_not is not None:
        return False, other
    return True, f"the C kernel, for {packed_gemm.form()}, on few tokens; for many, {other}"


def _codebook() -> tuple[bool, str]:
    from llmcompress.kernels import lut_gemm

    why = lut_gemm.KERNEL.why_not
    return (
        (True, f"the C kernel, for {lut_gemm.form()}") if why is None else (False, f"torch's look-up: {why}")
    )


def _solver() -> tuple[bool, str]:
    import torch

    from llmcompress.kernels import attention, codebook_loops, column_loops, moments

    kernels = {
        "the solver": column_loops,
        "codebooks": codebook_loops,
        "second moments": moments,
        "attention": attention,
    }
    for what, module in kernels.items():
        if (why := module.KERNEL.why_not) is not None:
            return False, f"torch for {what}: {why}"
    if not attention.takes(torch.device("cpu")):
        return True, "the C kernel of the solver; torch for attention: this CPU has no AVX512-BF16"
    return True, "the C kernels of the solver, second moments and attention"


def _integer_gpu() -> tuple[bool, str]:
    from llmcompress.kernels import int8_dispatch

    return _triton(
        int8_dispatch.KERNELS,
        "Triton kernels, and bitsandbytes' int8 product for many tokens",
        "bitsandbytes' int8 product and slower torch operations around it",
    )


def _lookup_gpu() -> tuple[bool, str]:
    from llmcompress.kernels import lookup_dispatch

    other = "torch, after the weight is dequantised"
    return _triton(lookup_dispatch.KERNELS, f"a Triton kernel, on few tokens; for many, {other}", other)


def _solver_gpu() -> tuple[bool, str]:
    from llmcompress.kernels import column_loops_gpu

    return _triton(column_loops_gpu.KERNELS, "Triton kernels", "torch's loops")


def _triton(kernels: TritonKernels, which: str, without: str) -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, "there is no GPU"
    if kernels.compiles(torch.device("cuda")):
        return True, which
    return False, f"{without}: Triton cannot compile here"


def print_facts(facts: Facts) -> None:
    """Print the result of `examine`."""
    installed = [(name, version or "not installed") for name, version in facts["versions"].items()]
    print_table("versions", ("", ""), installed)
    processor = facts["cpu"]
    machine = [
        ("platform", facts["platform"]),
        (
            "CPU",
            f"{processor['name']}, {processor['cores']} cores, torch uses {processor['torch_threads']} "
            "threads",
        ),
        (
            "instructions",
            f"{' '.join(processor['features']) or 'unknown'} (torch: {processor['torch_capability']})",
        ),
        ("memory", amount(processor["memory_bytes"], "B")),
        ("C compiler", facts["compiler"] or "none"),
    ]
    for gpu in facts["gpus"]:
        memory = amount(gpu["memory_bytes"], "B")
        machine.append(
            ("GPU", f"{gpu['name']}, {memory}, compute capability {gpu['capability']}, CUDA {gpu['cuda']}")
        )
    if not facts["gpus"]:
        machine.append(("GPU", "none that torch sees"))
    print_table("machine", ("", ""), machine)
    rows = [
        (one["formats"], one["device"], "yes" if one["kernel"] else "no", one["runs"])
        for one in facts["kernels"]
    ]
    print_table("kernels", ("formats", "device", "kernel", "what runs"), rows)
