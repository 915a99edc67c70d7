"""GGUF: one file that llama.cpp runs, with the codes of an artefact as they are.

`q4_0` and `iq4_nl` become Q4_0 and IQ4_NL, number for number. Integers of 8 bits become Q8_0 and those of 4
bits Q4_0, with scales in float16. What is plain stays in its dtype, except that vectors are float32, as
llama.cpp wants them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmcompress.errors import ModelError
from llmcompress.exports import gguf_families
from llmcompress.exports.artefact import Artefact, Matrix
from llmcompress.exports.gguf_blocks import PLAIN, Blocks, blocks_of, kind_of, refusal, size_of
from llmcompress.exports.gguf_families import FAMILIES
from llmcompress.exports.gguf_tokenizer import vocabulary_of
from llmcompress.exports.target import Written
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.sparse import SparseLayout
from llmcompress.io.companion_files import kept
from llmcompress.io.local_names import short_name
from llmcompress.io.output_folder import Writer
from llmcompress.io.safetensors_writer import sync, writing

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
ROPE = "rope_freqs.weight"  # the factors of the rotary embedding, of which transformers keeps no tensor
ROOM = 1 << 20  # bytes of the header beside tokens
# the name of a whole file after the type of most of its weights
FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "IQ4_NL": "MOSTLY_IQ4_NL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, its full name in the model with its keys in the artefact's files,
    its shape, and its type. `matrix` is given where it is stored as something else than plain numbers."""

    name: str
    source: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    matrix: Matrix | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return _bytes(self.kind, self.shape)


class Gguf:
    """The target `gguf`."""

    name = "gguf"
    extra = "gguf"
    loads_with = "llama.cpp"
    loading = f"llama-cli -m {{name}}/{FILE} -p 'Once upon a time'"
    loading_from_hub = "llama-cli -hf {name} -p 'Once upon a time'"
    language = "bash"

    def missing(self) -> str | None:
        """Return that the package gguf is missing, or None."""
        if find_spec("gguf") is None:
            return "that needs the package gguf: pip install 'llmcompress[gguf]'"
        return None

    def unsupported(self, config: PretrainedConfig) -> str | None:
        """Return why llama.cpp can't run a model of this config, or None."""
        return gguf_families.refusal(config.get_text_config(decoder=True))

    def refusal(self, artefact: Artefact) -> str | None:
        """Return why this artefact can't be written without quantising again, naming the linear; or None."""
        if why := self.missing() or self.unfit(artefact):
            return why
        try:
            entries = [*self._entries(artefact)]
            vocabulary_of(artefact.folder, artefact.model.text_config.vocab_size)
        except ModelError as error:
            return str(error)
        return None if entries else "it has no weights"

    def unfit(self, artefact: Artefact) -> str | None:
        """Return why the family or a matrix can't be written without quantising again; or None."""
        if why := self.unsupported(artefact.model.config):
            return why
        if artefact.uneven:
            return "its layers have widths of their own, and llama.cpp knows one width for all"
        for matrix in artefact.matrices.values():
            if why := refusal(matrix):
                return f"{matrix.name} is {matrix.format}: {why}"
        return None

    def size_bytes(self, artefact: Artefact) -> int:
        """The bytes that `write` will need on the disk, or a few more."""
        tokens = vocabulary_of(artefact.folder, artefact.model.text_config.vocab_size).size_bytes
        return ROOM + tokens + self.weight_bytes(artefact)

    def weight_bytes(self, artefact: Artefact) -> int:
        """The bytes of the tensors, without the factors of the rotary embedding."""
        shapes = {name: tuple(tensor.shape) for name, tensor in artefact.model.model.state_dict().items()}
        stored = [*artefact.plain, *(f"{name}.weight" for name in artefact.matrices)]
        return sum(_bytes(_kind(source, shapes[source], artefact), shapes[source]) for source in stored)

    def write(self, artefact: Artefact, writer: Writer) -> Written:
        """Write `model.gguf` and the licence beside it. Errors: CompressError."""
        from gguf import GGMLQuantizationType, GGUFWriter

        config, entries = artefact.model.text_config, [*self._entries(artefact)]
        file, changed = writer.artifact / FILE, 0.0
        with writing(writer.out):
            made = GGUFWriter(file, _architecture(config))
            try:
                _describe(made, artefact, entries)
                vocabulary_of(artefact.folder, config.vocab_size).add_to(made)
                for entry in entries:
                    raw = GGMLQuantizationType[entry.kind]
                    made.add_tensor_info(entry.name, entry.shape, _floats(), entry.size_bytes, raw)
                made.write_header_to_file()
                made.write_kv_data_to_file()
                made.write_ti_data_to_file()
                for entry in entries:
                    blocks = self._read(entry, artefact)
                    changed = max(changed, blocks.changed)
                    made.write_tensor_data(_array(blocks.data))
            finally:
                made.close()
            with file.open("rb") as opened:
                sync(opened)
            for name, content in kept(artefact.folder).items():
                if name.upper().startswith(("LICENSE", "NOTICE")):
                    (writer.artifact / name).write_bytes(content)
        converted = {entry.matrix.name: entry.kind for entry in entries if entry.matrix is not None}
        return Written(converted, tuple(_notes(artefact, entries, changed)))

    def _entries(self, artefact: Artefact) -> Iterator[Entry]:
        """The tensors of the file in the order of the model. Errors: ModelError for one that llama.cpp
        lacks."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        config = artefact.model.text_config
        kind = MODEL_ARCH[FAMILIES[config.model_type].architecture]
        names = get_tensor_name_map(kind, config.num_hidden_layers)
        if (factors := gguf_families.rope_factors(config)) is not None:
            yield Entry(ROPE, "", (), tuple(factors.shape), "F32")
        sources = dict(artefact.plain) | {f"{name}.weight": [] for name in artefact.matrices}
        shapes = {name: tuple(tensor.shape) for name, tensor in artefact.model.model.state_dict().items()}
        for source in (name for name in shapes if name in sources):
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            matrix = artefact.matrices.get(source.removesuffix(".weight"))
            if name is None:
                raise ModelError(f"llama.cpp's {config.model_type} has no {source}")
            if matrix is None and len(sources[source]) != 1:
                raise ModelError(f"{source} is stored in {len(sources[source])} parts")
            if not (stored := _kind(source, shapes[source], artefact)):
                raise ModelError(f"{source} is stored in a type that GGUF lacks")
            yield Entry(name, source, tuple(sources[source]), shapes[source], stored, matrix)

    def _read(self, entry: Entry, artefact: Artefact) -> Blocks:
        """The bytes of a tensor, in the order of llama.cpp's rows."""
        config, matrix = artefact.model.text_config, entry.matrix
        if entry.name == ROPE and (factors := gguf_families.rope_factors(config)) is not None:
            return Blocks(factors)
        if matrix is None:
            blocks = Blocks(artefact.tensor(entry.keys[0]))
        elif entry.kind in PLAIN.values():
            blocks = Blocks(artefact.weight(matrix, artefact.dense_dtype(matrix)))
        else:
            blocks = blocks_of(artefact.stored(matrix))
        data = blocks.data
        if (order := gguf_families.order_of_rows(entry.source, config)) is not None:
            data = data[order]
        if entry.kind == "F32":
            data = data.float()
            if FAMILIES[config.model_type].norms_plus_one and entry.source.endswith("norm.weight"):
                data = data + 1
        return Blocks(data, blocks.changed)


def _kind(source: str, shape: tuple[int, ...], artefact: Artefact) -> str:
    """The type in the file of a tensor of the model; empty if GGUF has none for it."""
    if (matrix := artefact.matrices.get(source.removesuffix(".weight"))) is not None:
        return kind_of(matrix, artefact)
    if len(shape) == 1:
        return "F32"
    return PLAIN.get(artefact.checkpoint.tensors[artefact.plain[source][0]].dtype, "")


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of the data of a tensor in the file."""
    return size_of(kind, shape[0] if len(shape) == 2 else 1, shape[-1])


def _architecture(config: Any) -> str:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[MODEL_ARCH[FAMILIES[config.model_type].architecture]]


def _floats() -> Any:
    """The dtype that tells a GGUFWriter that the shape it is given is that of the weight."""
    import numpy as np

    return np.dtype(np.float32)


def _describe(made: GGUFWriter, artefact: Artefact, entries: list[Entry]) -> None:
    """Tell what the file is, and the sizes of the model."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    weights = Counter[str]()
    for entry in entries:
        if len(entry.shape) == 2:
            weights[entry.kind] += entry.shape[0] * entry.shape[1]
    most = weights.most_common(1)[0][0]
    made.add_type("model")
    made.add_name(short_name(str(artefact.folder)))
    made.add_quantization_version(GGML_QUANT_VERSION)
    made.add_file_type(LlamaFileType[FILE_TYPES[most]])
    gguf_families.describe(artefact.model.text_config, made)


def _array(data: Tensor) -> Any:
    """The bytes of a tensor as numpy has them, which lacks bfloat16."""
    plain = data.contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()


def _notes(artefact: Artefact, entries: list[Entry], changed: float) -> Iterator[str]:
    """What was converted, and what differs when the file runs."""
    layouts = [matrix.layout for matrix in artefact.matrices.values()]
    if changed:
        yield f"Scales became float16; the largest change of one is {changed:.2g} of itself."
    if {"Q4_0", "IQ4_NL", "Q8_0"} & {entry.kind for entry in entries}:
        yield (
            "llama.cpp rounds what a linear in Q4_0, IQ4_NL or Q8_0 reads to 8 bits in groups of 32, "
            "whatever the artefact does."
        )
    if any(isinstance(layout, IntegerLayout) and layout.weight_bits == 4 for layout in layouts):
        yield "4-bit codes with whole multipliers became Q4_0: 4.5 bits per weight."
    if any(isinstance(layout, SparseLayout) for layout in layouts):
        yield "Sparse matrices are written with their zeros."
    tied = any(matrix.tied for matrix in artefact.matrices.values())
    if tied or any(isinstance(layout, FactoredLayout) for layout in layouts):
        yield "Matrices that layers share are written once for each layer."
    yield from gguf_families.notes(artefact.model.text_config)


TARGET = Gguf()
