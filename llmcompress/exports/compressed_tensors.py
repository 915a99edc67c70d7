"""compressed-tensors: integer codes for vLLM, and for transformers with the package compressed-tensors.

Our integer formats are its `int-quantized` and `pack-quantized` layouts with other names and another
packing, so codes are copied and scales are multiplied out: a group's scale is its row's scale times its
multiplier. Tensors and config are written here, without the package. R rows (out), C columns (in), G groups
of columns.

What a format becomes, by the names of compressed-tensors 0.20 (`quantization.QuantizationArgs`,
`compressors.pack_quantized`):

- `int-quantized`: `weight` int8 [R, C] and `weight_scale` float32 [R, 1]; inputs are rounded to int8, by a
scale
  per token, or by `input_scale` float32 [1].
- `pack-quantized`: `weight_packed` int32 [R, ceil(C * bits / 32)], codes plus 2^(bits - 1), the first code
in the
  lowest bits; `weight_scale` float32 [R, G], and `weight_shape` int64 [2].

Its sparse layouts are gone in 0.20, and vLLM 0.33 refuses a config that names one. Nothing in it says
codebooks, products of low rank or the tables of nf4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmcompress.exports.artefact import Artefact, Matrix
from llmcompress.exports.target import Written
from llmcompress.formats.ggml import GgmlLayout
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.sparse import SparseLayout
from llmcompress.integrations.transformers_compat import Conv1D
from llmcompress.io.output_folder import Writer

# Linears that vLLM 0.33 makes one, by the last part of their names (`packed_modules_mapping` of its models).
# All of a set need one scheme there (`compressed_tensors.utils.should_ignore_layer`, `_match_fused_layer`).
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
PACKED, PLAIN = "pack-quantized", "int-quantized"
GROUPS = (32, 64, 128)  # columns per scale that vLLM's Marlin kernel takes
LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)  # or: vllm serve {name}
prompt = tokenizer("The first", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))"""


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors stores a linear: an entry of its `config_groups`. `group_size` None is one
    scale per row, `activations` None leaves inputs as they are."""

    format: str  # PACKED or PLAIN
    bits: int
    group_size: int | None
    activations: tuple[int, bool] | None  # bits, and whether each token has its scale

    def __str__(self) -> str:
        groups = "one scale per row" if self.group_size is None else f"groups of {self.group_size}"
        if self.activations is None:
            inputs = "inputs as they are"
        else:
            bits, dynamic = self.activations
            inputs = f"inputs int{bits}, {'a scale per token' if dynamic else 'one stored scale'}"
        return f"{self.format} int{self.bits}, {groups}, {inputs}"

    def entry(self, targets: Iterable[str]) -> dict[str, Any]:
        """The entry of `config_groups`."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
        }
        inputs = None
        if self.activations is not None:
            bits, dynamic = self.activations
            inputs = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": dynamic}
            inputs |= {"strategy": "token" if dynamic else "tensor"}
        return {
            "targets": [*targets],
            "format": self.format,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }

    def tensors(self, weight: IntegerWeight) -> dict[str, Tensor]:
        """The tensors of a linear by their names in it, except its bias."""
        R, C = weight.codes_RC.shape
        scale_RG = weight.scale_R[:, None].float()
        if weight.multiplier_RG is not None:
            scale_RG = scale_RG * weight.multiplier_RG
        if self.format == PLAIN:
            found = {"weight": weight.codes_RC, "weight_scale": scale_RG}
        else:
            found = {"weight_packed": packed(weight.codes_RC, self.bits), "weight_scale": scale_RG}
            found["weight_shape"] = torch.tensor([R, C])
        if self.activations is not None and weight.input_scale is not None:
            found["input_scale"] = weight.input_scale.reshape(1)
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def size_bytes(self, rows: int, columns: int) -> int:
        """The bytes of these tensors, or a few more."""
        groups = 1 if self.group_size is None else columns // self.group_size
        return rows * (-(-columns * self.bits // 32) * 4 + 4 * groups) + 64


def packed(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack codes, int8 [R, C], into int32 [R, ceil(C * bits / 32)]: plus 2^(bits - 1), the first code in the
    lowest bits. `bits` is 4 or 8, so that no code crosses a byte."""
    biased_RC = (codes_RC.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    in_word = 32 // bits
    biased_RC = nn.functional.pad(biased_RC, (0, -codes_RC.shape[1] % in_word))
    if bits == 4:
        biased_RC = biased_RC[:, ::2] | (biased_RC[:, 1::2] << 4)
    return biased_RC.contiguous().view(torch.int32)  # little-endian, as every machine that torch runs on


class CompressedTensors:
    """The target `compressed-tensors`."""

    name = "compressed-tensors"
    extra = "vllm"
    loads_with = "vLLM, and for transformers with the package compressed-tensors"
    loading = LOADING
    loading_from_hub = LOADING
    language = "python"

    def missing(self) -> str | None:
        """Nothing is missing: files are written without the package."""
        return None

    def unsupported(self, config: PretrainedConfig) -> str | None:
        """Any family can be written."""
        return None

    def refusal(self, artefact: Artefact) -> str | None:
        """Return why an artefact can't be written, naming the linear, or None."""
        if artefact.uneven:
            return (
                "its layers have widths of their own (per_layer_config), which neither vLLM nor plain "
                "transformers builds; prune to one width for all layers"
            )
        if artefact.model.divided:
            return (
                f"the experts of {min(artefact.model.divided)} are linears with names that only llmcompress "
                "knows; keep experts as they are (experts: keep)"
            )
        for matrix in artefact.matrices.values():
            if (why := _refusal(matrix, artefact)) is not None:
                return f"{matrix.name} is {matrix.format}: {why}"
        schemes = schemes_of(artefact)
        if not schemes:
            return "no linear is stored in integers, so there is nothing to repack"
        return _refusal_of_fused(artefact, schemes)

    def unfit(self, artefact: Artefact) -> str | None:
        """Return why an artefact can't be written, naming the linear, or None."""
        return self.refusal(artefact)

    def size_bytes(self, artefact: Artefact) -> int:
        """The bytes of all tensors, and some for headers."""
        return self.weight_bytes(artefact) + 256 * len(artefact.checkpoint.tensors) + (1 << 16)

    def weight_bytes(self, artefact: Artefact) -> int:
        """The bytes of all tensors."""
        schemes, entries = schemes_of(artefact), artefact.checkpoint.tensors
        size = sum(entries[key].size_bytes for keys in artefact.plain.values() for key in keys)
        for name, matrix in artefact.matrices.items():
            R, C = matrix.shape
            dense = R * C * artefact.dense_dtype(matrix).itemsize
            size += schemes[name].size_bytes(R, C) if name in schemes else dense
        return size

    def write(self, artefact: Artefact, writer: Writer) -> Written:
        """Write weights, config and tokenizer. Errors: ModelError if stored tensors are damaged."""
        schemes, told = schemes_of(artefact), dict[str, str]()
        for name, matrix in artefact.matrices.items():
            if (scheme := schemes.get(name)) is None:
                dtype = artefact.dense_dtype(matrix)
                writer.add({f"{matrix.key}.weight": artefact.weight(matrix, dtype)})
                told[name] = f"{matrix.format} -> {str(dtype).removeprefix('torch.')}"
                continue
            stored = artefact.stored(matrix)
            weight = stored.as_integer() if isinstance(stored, Int8Weight) else stored
            assert isinstance(weight, IntegerWeight)
            writer.add({f"{matrix.key}.{part}": tensor for part, tensor in scheme.tensors(weight).items()})
            told[name] = f"{matrix.format} -> {scheme}"
        for key, tensor in artefact.tensors():
            writer.add({key: tensor})
        config = {key: value for key, value in artefact.config.items() if key != "quantization_config"}
        writer.close(config | {"quantization_config": config_of(artefact, schemes)})
        return Written(told, tuple(_notes(artefact, schemes)))


def schemes_of(artefact: Artefact) -> dict[str, Scheme]:
    """The scheme of each linear that stays in integers, by full name; an embedding and a shared matrix become
    plain numbers."""
    found = {name: _scheme(matrix, artefact) for name, matrix in artefact.matrices.items()}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _scheme(matrix: Matrix, artefact: Artefact) -> Scheme | None:
    layout = matrix.layout
    if matrix.is_embedding:
        return None
    if matrix.native:
        if matrix.format != "int8":
            return None
        return (
            Scheme(PLAIN, 8, None, (8, True)) if _threshold(artefact) == 0 else Scheme(PACKED, 8, None, None)
        )
    if not isinstance(layout, IntegerLayout):
        return None
    rounds = layout.activations != "none" and layout.activation_bits < 16
    activations = (layout.activation_bits, layout.activations == "dynamic") if rounds else None
    group_size = layout.group_size
    if group_size is not None and group_size > matrix.shape[1]:
        group_size = None
    whole = layout.weight_bits == 8 and activations is not None
    return Scheme(PLAIN if whole else PACKED, layout.weight_bits, group_size, activations)


def _threshold(artefact: Artefact) -> float:
    """From which magnitude LLM.int8 leaves columns of the inputs in floats; 0: none."""
    said = artefact.quantization.get("llm_int8_threshold")
    return 6.0 if said is None else float(said)


def _refusal(matrix: Matrix, artefact: Artefact) -> str | None:
    """Why one matrix can't be written, or None."""
    layout, module = matrix.layout, artefact.model.model.get_submodule(matrix.name)
    if matrix.format in ("nf4", "fp4"):
        return (
            "compressed-tensors has no such table of levels, so its codes would have to be rounded again; "
            + (
                "plain transformers loads the folder as it is, and so does vLLM up to 0.27.1"
                if matrix.native
                else "use w4a16 instead"
            )
        )
    if isinstance(layout, GgmlLayout):
        return "it is a format of llama.cpp; export it to gguf"
    if isinstance(module, Conv1D):
        return f"it is a {type(module).__name__}, and compressed-tensors takes nn.Linear alone"
    if isinstance(layout, IntegerLayout):
        C = matrix.shape[1]
        if layout.group_size is not None and layout.group_size < C and C % layout.group_size:
            return (
                f"its {C} columns don't divide into groups of {layout.group_size}, which compressed-tensors "
                "needs; choose another group_size"
            )
        if layout.activations == "static" and layout.weight_bits == 4 and layout.activation_bits < 16:
            return (
                "vLLM has no kernel for 4-bit weights with one stored scale of the inputs; use activations: "
                "dynamic"
            )
    elif isinstance(layout, FactoredLayout) and layout.rank:
        return "compressed-tensors has no layout for a product of two matrices"
    elif isinstance(layout, SparseLayout):
        return "compressed-tensors has no sparse layout since 0.20, and vLLM no kernel for one"
    elif not matrix.native and not isinstance(layout, FactoredLayout):
        return "compressed-tensors has no layout for a few values and their indices"
    return None


def _refusal_of_fused(artefact: Artefact, schemes: Mapping[str, Scheme]) -> str | None:
    """Why linears that vLLM makes one can't be it, or None."""
    for names in fused_in(artefact):
        kinds = [schemes.get(name) for name in names]
        if len({*kinds}) > 1:
            shown = ", ".join(f"{name} is {kind or 'plain'}" for name, kind in zip(names, kinds, strict=True))
            return f"vLLM makes these linears one, which needs one format for all: {shown}"
        if kinds[0] is not None and kinds[0].activations is not None and not kinds[0].activations[1]:
            scales = artefact.input_scales(names)
            if len({*scales}) > 1:
                return (
                    f"vLLM makes {', '.join(names)} one linear with one scale of its inputs, and theirs are "
                    f"{', '.join(f'{scale:.6g}' for scale in scales)}; use activations: dynamic"
                )
    return None


def fused_in(artefact: Artefact) -> Iterator[list[str]]:
    """The sets of linears that vLLM makes one, by full names."""
    siblings: dict[str, dict[str, str]] = {}
    for name, module in artefact.model.model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            siblings.setdefault(parent, {})[last] = name
    for inside in siblings.values():
        for parts in FUSED:
            if len(names := [inside[part] for part in parts if part in inside]) > 1:
                yield names


def config_of(artefact: Artefact, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Return config.json's `quantization_config`.

    With one scheme it targets every linear, and `ignore` lists those that are plain; with several each
    names its linears.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    linears = [name for name, module in artefact.model.model.named_modules() if isinstance(module, nn.Linear)]
    head = artefact.model.anatomy.head
    # the class of vLLM's head is no linear, so it is targeted by its name
    every = ["Linear", *([head] if head in schemes else [])]
    targets = [every] if len(groups) == 1 else [*groups.values()]
    formats = {scheme.format for scheme in groups}
    entries = {
        f"group_{index}": scheme.entry(names)
        for index, (scheme, names) in enumerate(zip(groups, targets, strict=True))
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": entries,
        "ignore": [name for name in linears if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _notes(artefact: Artefact, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """What was converted, and what differs when the export runs."""
    matrices = artefact.matrices
    kinds = {*schemes.values()}
    layouts = [matrices[name].layout for name in schemes]
    if any(scheme.group_size is not None for scheme in kinds):
        yield (
            "A row's scale and the multipliers of its groups became one float32 scale per group. vLLM and "
            "transformers hold group scales in the dtype of the model."
        )
    if any(isinstance(layout, IntegerLayout) and layout.activation_bits == 16 for layout in layouts):
        yield "Inputs are read as they are; the artefact rounds them to 16 bits."
    if any(matrices[name].native and scheme.activations is None for name, scheme in schemes.items()):
        yield (
            "Inputs are read as they are; LLM.int8 rounds them to int8, except columns from its threshold on "
            f"({_threshold(artefact):g}), which compressed-tensors can't say."
        )
    if any(scheme.activations is not None and scheme.activations[1] for scheme in kinds):
        yield (
            "In transformers, compressed-tensors rounds a token in steps of its largest magnitude / 127.5 "
            "(int4: / 7.5); the artefact takes / 127 (int4: / 7)."
        )
    if any(scheme.activations is not None and not scheme.activations[1] for scheme in kinds):
        yield (
            "Inputs beyond the stored scale are clipped at -128 and 127 steps, in the artefact at -127 and "
            "127."
        )
    if wide := sorted({scheme.group_size for scheme in kinds} - {None, *GROUPS}, key=lambda size: size or 0):
        yield (
            f"vLLM's fastest kernel takes groups of {', '.join(map(str, GROUPS))} and not of "
            f"{', '.join(map(str, wide))}; another is slower."
        )
    if any(matrix.is_embedding for matrix in matrices.values()):
        head = " The head, tied to it, multiplies inputs that are not rounded." if artefact.tied_head else ""
        dtype = str(artefact.dtype).removeprefix("torch.")
        yield f"The int8 embedding became {dtype}, as loaders of other versions know no other.{head}"
    if any(matrix.tied or isinstance(matrix.layout, FactoredLayout) for matrix in matrices.values()):
        yield "Matrices that layers share are written once for each layer."


TARGET = CompressedTensors()
