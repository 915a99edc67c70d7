"""Which engines read what a recipe would leave of a model, as it is or after an export, from outlines alone.

vLLM reads plain models, and integer formats after an export to compressed-tensors; its releases up to 0.27.1
read bitsandbytes' formats as well. llama.cpp reads what an export to GGUF makes.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.errors import ModelError
from llmcompress.exports.artefact import NativeScheme, PlannedArtefact
from llmcompress.exports.gguf_tokenizer import vocabulary_of
from llmcompress.exports.registry import target_of
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.plan import Foretold
from llmcompress.pipeline.resolve import Base
from llmcompress.recipe.catalogue import TRANSFORMERS

ENGINES = {"vllm": "compressed-tensors", "llama.cpp": "gguf"}  # what is exported for each
NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}
VLLM_NOW, VLLM_THEN = NAMES["vllm"], "vLLM up to 0.27.1"
NOTES = {
    "vllm": "vllm: what it reads by its source, which was not run here: plain models, and what the export "
    "makes of integer formats; releases up to 0.27.1 also read bitsandbytes' formats. It joins linears, so "
    "recipes that spare single ones (protect) are left out",
    "llama.cpp": "llama.cpp: bytes are those of the tensors in the file; it rounds inputs to 8 bits in "
    "groups of 32, and the KL is that of the artefact in transformers. The export needs pip install "
    "'llmcompress[gguf]'",
}


def require_engine(engine: str, base: Base, outline: MetaModel) -> None:
    """Refuse a model of a family or with a tokenizer that the engine lacks. Errors: ModelError."""
    why = target_of(ENGINES[engine]).unsupported(outline.config)
    if why is None and engine == "llama.cpp":
        try:
            vocabulary_of(base.folder, outline.text_config.vocab_size)
        except ModelError as error:
            why = str(error)
    if why is not None:
        raise ModelError(f"{NAMES[engine]} can't run this model: {why}; leave out the target {engine}")


def planned_of(base: Base, steps: Sequence[Foretold]) -> PlannedArtefact:
    """What the stages of a recipe would leave of a base."""
    left = steps[-1].left
    schemes = {name: how for step in steps for name, how in step.result.schemes.items()}
    native = {
        name: how for name, how in schemes.items() if isinstance(how, NativeScheme) and not left.layouts
    }
    return PlannedArtefact(base.folder, left, native)


def read_by(
    engine: str, planned: PlannedArtefact, *, spares: bool, loads_with: str
) -> tuple[str, str | None] | None:
    """What reads the result of a recipe, and the target of the export that it takes, if any; None if the
    engine reads neither. `spares` says whether a run would keep single linears, which only the run finds."""
    export = ENGINES[engine]
    if engine == "llama.cpp":
        # a spared linear of LLM.int8 stays plain, so the bytes are not known
        counted = not (spares and planned.schemes)
        return (NAMES[engine], export) if counted and not target_of(export).unfit(planned) else None
    if spares or planned.uneven:
        return None
    if loads_with == TRANSFORMERS:
        return VLLM_NOW, None
    if target_of(export).unfit(planned) is None:
        return VLLM_NOW, export
    return (VLLM_THEN, None) if planned.schemes.keys() >= planned.model.layer_linears.keys() else None
