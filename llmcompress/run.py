"""compress(): the whole flow, from a recipe to an artefact on disk that carries its own report.

Order is what this file is about: everything that can be refused is refused before the first hour is spent, each finished block
is in the journal, the artefact is measured from the disk it was written to, and it appears under its name only when it is
whole and within what the recipe accepts. A run that died is started again with the same arguments and goes on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llmcompress import four_bit, integer_linear, native, stored
from llmcompress.artifact import Writer, partial_folder
from llmcompress.checkpoint import Journal
from llmcompress.contents import (
    companions,
    finished,
    native_kind,
    quantization_of,
    read_entry,
    tensors_of,
    ties_of,
    write_weights,
)
from llmcompress.data import Blocks
from llmcompress.errors import ModelError
from llmcompress.evaluate import speed_of
from llmcompress.integer import Int8Weight
from llmcompress.prepare import blocks_for, config_of, find_base, pick_device, tokenizer_of
from llmcompress.recipe import Recipe
from llmcompress.report import CostFacts, DataFacts, EnvironmentFacts, FidelityFacts, ModelFacts, Report, StageFacts
from llmcompress.report.measure import Fidelity, environment, fidelity, parameters, peak_memory_bytes
from llmcompress.residency import Live, OnDisk, Resident
from llmcompress.stages.coding import Coding, Int8
from llmcompress.stages.context import Context
from llmcompress.stages.quantize import STAGE, Quantize
from llmcompress.stored import Stored
from llmcompress.walk import Track, logits, untracked


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
    track: Track = untracked,
) -> Report:
    """Run a recipe on a base and write the artefact to the folder `out`; run again after a crash, it goes on.

    `base` and `data` take the place of the recipe's. Raises CompressError for whatever is wrong with the input, AcceptError
    where the result misses the recipe's bounds: then nothing is published, and the finished blocks are kept.
    """
    start = time.monotonic()
    found = find_base(base or recipe.base, recipe.revision if base is None else None)
    config_of(found.folder, base=True)
    model = OnDisk(found.folder, pick_device(device))
    stage = recipe.stages[0].stage
    stage.choose(model)
    rotation = stage.rotation(model, recipe.data.seed)
    _require_sound(model)
    if rotation:
        model.turn(rotation)
    checkpoint = model.checkpoint
    with Writer(out, found.folder, size_bytes=checkpoint.size_bytes, overwrite=overwrite, ties=ties_of(model)) as writer:
        spec = recipe.data.model_copy(update={"source": data}) if data else recipe.data
        blocks = blocks_for(model, spec, tokenizer_of(found.folder))
        journal = Journal(partial_folder(out) / "journal", _key(recipe, checkpoint.fingerprint(), blocks))
        with tempfile.TemporaryDirectory(dir=partial_folder(out)) as scratch:
            facts = _apply(stage, model, Context(blocks, journal, Path(scratch), spec.seed, track))
        folder = write_weights(writer, model, stage, journal)
        written = OnDisk(folder, model.device, quantized=True)
        base_model = OnDisk(found.folder, model.device)  # as it is on disk, whatever the stage did to the other
        measured = fidelity(
            logits(written, blocks.evaluation, track), blocks.evaluation, logits(base_model, blocks.evaluation, track)
        )
        peak = peak_memory_bytes(model.device)
        before = ModelFacts(
            model=found.name,
            revision=found.revision,
            parameters=checkpoint.parameters,
            size_bytes=checkpoint.size_bytes,
            perplexity=measured.base_perplexity,
            perplexity_ci95=measured.base_perplexity_ci95,
            **_speed(found.folder, blocks, model.device),
        )
        after = ModelFacts(
            model=str(out),
            parameters=written.checkpoint.parameters,
            size_bytes=written.checkpoint.size_bytes,
            perplexity=measured.perplexity,
            perplexity_ci95=measured.perplexity_ci95,
            **_speed(folder, blocks, model.device),
        )
        cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak)
        report = _report(recipe, before, after, measured, blocks, [facts], cost, model.device)
        report.require(**recipe.accept.model_dump())
        writer.publish(companions(report, recipe, found.folder))
        return report


def apply(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str | None = None,
    track: Track = untracked,
) -> tuple[PreTrainedModel, Report]:
    """Compress a model in memory: changed in place and returned with its report; `Recipe.apply` is this.

    The recipe's `base` is not looked at. Raises CompressError as `compress` does; the model is then as it was.
    """
    start = time.monotonic()
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("the model in memory is quantised already; give the model that it was made from")
    state, where, stage = dict(model.state_dict()), pick_device(device), recipe.stages[0].stage
    source = Live(model.config, state, where)
    blocks = blocks_for(source, recipe.data, tokenizer)
    if rotation := stage.rotation(source, recipe.data.seed):
        source.turn(rotation)
    packed: dict[str, Stored] = {}
    dense: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal", "in memory")
        facts = _apply(stage, source, Context(blocks, journal, Path(folder), recipe.data.seed, track))
        chosen, kept = stage.settled(source, journal)
        for tensors in finished(journal, source):
            linears, changed = read_entry(tensors, chosen, source)
            packed, dense = packed | linears, dense | changed
    compressed = state | dense
    for name, codes in packed.items():
        weight = stored.dequantize(codes)
        compressed[f"{name}.weight"] = weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
    windows, result = blocks.evaluation, Live(model.config, compressed, where)
    for name, codes in packed.items():
        if inputs := chosen[name].inputs(getattr(codes, "input_scale", None)):
            result.round_inputs(name, inputs)
    base_model = Live(model.config, state, where)
    measured = fidelity(logits(result, windows, track), windows, logits(base_model, windows, track))
    name, size = str(model.config._name_or_path or type(model).__name__), sum(t.nbytes for t in _distinct(model))
    before = ModelFacts(
        model=name, parameters=parameters(model), size_bytes=size,
        perplexity=measured.base_perplexity, perplexity_ci95=measured.base_perplexity_ci95,
    )  # fmt: skip
    native_layout = native_kind(chosen) is not None
    written = {name: tensors_of(codes, native_layout) for name, codes in packed.items()}
    smaller = sum(sum(t.nbytes for t in parts.values()) - state[f"{n}.weight"].nbytes for n, parts in written.items())
    after = before.model_copy(
        update={"size_bytes": size + smaller, "perplexity": measured.perplexity, "perplexity_ci95": measured.perplexity_ci95}
    )
    cost = CostFacts(seconds=time.monotonic() - start, peak_memory_bytes=peak_memory_bytes(where))
    report = _report(recipe, before, after, measured, blocks, [facts], cost, where)
    report.require(**recipe.accept.model_dump())
    for name, tensor in dense.items():
        model.get_parameter(name).data.copy_(tensor)
    _install(model, packed, chosen)
    model.config.quantization_config = quantization_of(chosen, kept)
    return model, report


def _require_sound(model: OnDisk) -> None:
    """Refuse a base with lost, misshapen or non-finite weights now, not hours later: it costs one read of the base."""
    for index in range(len(model.layers)):
        with model.block(index):
            pass


def _install(model: PreTrainedModel, packed: dict[str, Stored], chosen: dict[str, Coding]) -> None:
    """Put the modules that run on the kernels in place of the linears."""
    native_layout = native_kind(chosen) is not None
    for name, codes in packed.items():
        kept, coding = model.get_submodule(name).bias, chosen[name]
        bias = kept if isinstance(kept, nn.Parameter) else None
        module: nn.Module
        if isinstance(codes, native.Packed):
            module = (native if native_layout else four_bit).linear(codes, bias, device=model.device)
        elif isinstance(codes, Int8Weight):
            threshold = coding.threshold if isinstance(coding, Int8) else 0.0
            module = integer_linear.stock(codes, bias, threshold=threshold, device=model.device)
        else:
            module = integer_linear.linear(codes, bias, device=model.device)
        model.set_submodule(name, module)


def _distinct(model: PreTrainedModel) -> list[torch.Tensor]:
    """The tensors that the model's checkpoint would hold, tied ones once."""
    return list({(t.data_ptr(), t.shape): t for t in model.state_dict().values()}.values())


def _key(recipe: Recipe, fingerprint: str, blocks: Blocks) -> str:
    """Digest of all that decides what a block becomes: what is done, to which weights, on which tokens, by which versions."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")}
    stages = recipe.model_dump(mode="json")["stages"]
    text = json.dumps([stages, recipe.data.seed, fingerprint, blocks.sha256, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _apply(stage: Quantize, model: Resident, context: Context) -> StageFacts:
    start = time.monotonic()
    done = sum(context.journal.has(STAGE, index) for index in range(len(model.layers) + 1))
    facts = stage.apply(model, context)
    if done:
        facts.notes.append(f"{done} blocks were done by an earlier run that was interrupted; the seconds are those of this run")
    fixed = {"name": facts.name, "linears": facts.linears, "kept": facts.kept, "notes": facts.notes, "blocks": facts.blocks}
    return StageFacts.model_validate(facts.details | fixed | {"seconds": time.monotonic() - start})


def _speed(folder: Path, blocks: Blocks, device: torch.device) -> dict[str, Any]:
    fast = speed_of(folder, blocks.evaluation, device)
    return {"tokens_per_s": fast.prefill_tokens_per_s, "decode_tokens_per_s": fast.decode_tokens_per_s} if fast else {}


def _report(
    recipe: Recipe,
    before: ModelFacts,
    after: ModelFacts,
    measured: Fidelity,
    blocks: Blocks,
    stages: Sequence[StageFacts],
    cost: CostFacts,
    device: torch.device,
) -> Report:
    return Report(
        recipe_digest=recipe.digest,
        base=before,
        compressed=after,
        fidelity=FidelityFacts.model_validate(measured.facts()),
        data=DataFacts(
            source=blocks.source,
            sha256=blocks.sha256,
            calibration_tokens=blocks.calibration_tokens,
            evaluation_tokens=blocks.evaluation_tokens,
        ),
        stages=tuple(stages),
        cost=cost,
        environment=EnvironmentFacts.model_validate(environment(device)),
    )
