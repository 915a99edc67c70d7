"""Checkpoints some of whose tensors are others: written by hand, as our readers and as transformers see
them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import llmcompress  # noqa: F401  (teaches from_pretrained our formats)
from llmcompress.errors import ModelError
from llmcompress.formats.low_rank import FactoredLayout, FactoredLinear, FactoredWeight
from llmcompress.io.checkpoint import INDEX, Checkpoint
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import logits as streamed
from tests.artefacts import CPU
from tests.integrations.test_transformers_quantizer import LOADER, TOKENS, load, logits
from tests.models import noise, pico
from tests.stages.test_distill_student import turned

pytestmark = pytest.mark.usefixtures("short_runs")

LINEARS = {  # that are shared, in a layer
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2", "self_attn.k_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h",),
}
LAYERS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}
SHARED, ADDED, BASIS = FactoredLayout("shared"), FactoredLayout("shared", 4), FactoredLayout("basis", 8)
by_family = pytest.mark.parametrize("family", LINEARS)
by_layout = pytest.mark.parametrize("layout", [SHARED, ADDED, BASIS], ids=lambda layout: layout.name)


def names_of(family: str, index: int) -> list[str]:
    return [f"{LAYERS[family]}.{index}.{linear}" for linear in LINEARS[family]]


def ties_of(family: str, layout: FactoredLayout = SHARED) -> dict[str, str]:
    """Layer 1's are layer 0's."""
    pairs = zip(names_of(family, 1), names_of(family, 0), strict=True)
    return {f"{own}.{layout.common}": f"{first}.{layout.common}" for own, first in pairs}


def parts_of(W_RC: Tensor, layout: FactoredLayout, seed: int) -> FactoredWeight:
    """What is common is the same for all seeds."""
    rows, columns = W_RC.shape
    if layout.format == "basis":
        return FactoredWeight(
            layout, None, noise(rows, layout.rank, seed=seed) / 3, noise(layout.rank, columns) / 8
        )
    if not layout.rank:
        return FactoredWeight(layout, W_RC)
    return FactoredWeight(
        layout, W_RC, noise(rows, layout.rank, seed=seed) / 3, noise(layout.rank, columns, seed=seed) / 8
    )


def artefact(
    folder: Path,
    family: str = "llama",
    layout: FactoredLayout = SHARED,
    *,
    short: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """Write a checkpoint of two layers that share; the plain model that is the same function.

    `short`: the names in the file, and not those in config.json, lack what the model calls its base.
    """
    model = pico(family, **config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in (0, 1):
        for own, first in zip(names_of(family, index), names_of(family, 0), strict=True):
            module = model.get_submodule(own)
            W_RC = turned(module, pico(family, **config).get_parameter(f"{first}.weight").data).contiguous()
            found = parts_of(W_RC, layout, index)
            del state[f"{own}.weight"]
            state |= {f"{own}.{part}": tensor for part, tensor in found.tensors().items()}
            cast(Any, module).weight.data = turned(module, found.dequantize())
    ties = ties_of(family, layout)
    state = {name: tensor.clone() for name, tensor in state.items() if name not in ties}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if short:
        base = f"{LAYERS[family].partition('.')[0]}."
        state = {name.removeprefix(base): tensor for name, tensor in state.items()}
    linears = [*names_of(family, 0), *names_of(family, 1)]
    said = model.config.to_dict() | {"architectures": [type(model).__name__]}
    schemes = [{"format": layout.format, "rank": layout.rank, "linears": linears}]
    said["quantization_config"] = {"quant_method": "llmcompress", "schemes": schemes, "ties": ties}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(said))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


def retied(folder: Path, ties: Any) -> Path:
    """Another `ties` in config.json."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ties"] = ties
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, base=False)


def size_of(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# our own reader


@by_family
@by_layout
@pytest.mark.parametrize("short", [False, True])
def test_what_is_tied_is_there_under_both_names_and_lies_on_the_disk_once(
    family: str, layout: FactoredLayout, short: bool, tmp_path: Path
) -> None:
    artefact(tmp_path, family, layout, short=short)
    base = f"{LAYERS[family].partition('.')[0]}." if short else ""
    wanted = {
        own.removeprefix(base): first.removeprefix(base) for own, first in ties_of(family, layout).items()
    }
    checkpoint, stored = opened(tmp_path), load_file(tmp_path / "model.safetensors")
    assert checkpoint.aliases == wanted and not wanted.keys() & stored.keys()
    assert checkpoint.tensors.keys() == stored.keys() | wanted.keys()
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)
    for own, first in wanted.items():
        assert (
            torch.equal(checkpoint.read(own), stored[first])
            and checkpoint.tensors[own] == checkpoint.tensors[first]
        )
    assert checkpoint.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint.parameters == sum(tensor.numel() for tensor in stored.values()), "tied ones once"


def test_a_model_that_shares_has_fewer_parameters_by_what_it_shares(tmp_path: Path) -> None:
    model = artefact(tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    shared = sum(model.get_parameter(name).numel() for name in ties_of("llama"))
    assert (
        opened(tmp_path / "ours").parameters
        == opened(tmp_path / "plain").parameters - shared
        == size_of(model) - shared
    )
    assert opened(tmp_path / "ours").size_bytes < opened(tmp_path / "plain").size_bytes - 4 * shared + 4096


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fingerprint_is_the_same_each_time_and_another_for_other_weights_or_ties(
    family: str, tmp_path: Path
) -> None:
    for short in (False, True):
        folder = tmp_path / str(short)
        artefact(folder, family, short=short)
        first = opened(folder).fingerprint()
        assert opened(folder).fingerprint() == first
        artefact(folder, family, short=short)
        assert opened(folder).fingerprint() == first, "written again"
        tensors = load_file(folder / "model.safetensors")
        name = next(iter(opened(folder).aliases.values()))
        changed = tensors | {name: tensors[name] + 1}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert opened(folder).fingerprint() != first
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert opened(folder).fingerprint() == first
        *some, _ = ties_of(family).items()
        assert opened(retied(folder, dict(some))).fingerprint() != first


def test_ties_reach_across_the_files_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    model = artefact(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    listed = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(listed.values()):
        save_file(
            {name: tensors[name] for name in tensors if listed[name] == file},
            tmp_path / file,
            {"format": "pt"},
        )
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    checkpoint = opened(tmp_path)
    assert checkpoint.aliases == ties_of("llama")
    assert all(torch.equal(checkpoint.read(own), tensors[first]) for own, first in ties_of("llama").items())
    assert torch.equal(logits(load(tmp_path)), logits(model)) and len(checkpoint.fingerprint()) == 64


def test_a_tensor_that_is_stored_is_no_alias_though_config_ties_it(tmp_path: Path) -> None:
    artefact(tmp_path)
    tensors, (own, first) = load_file(tmp_path / "model.safetensors"), next(iter(ties_of("llama").items()))
    save_file({**tensors, own: tensors[first] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = opened(tmp_path)
    assert own not in checkpoint.aliases and torch.equal(checkpoint.read(own), tensors[first] + 1)


@pytest.mark.parametrize("short", [False, True])
def test_a_tie_to_a_tensor_that_is_not_there_is_refused_in_one_line(short: bool, tmp_path: Path) -> None:
    artefact(tmp_path, short=short)
    own = next(iter(ties_of("llama")))
    for source in ("model.layers.7.mlp.up_proj.weight", "nothing", ""):
        with pytest.raises(
            ModelError, match=f"has no tensor {source}, to which config.json ties {own}"
        ) as told:
            opened(retied(tmp_path, {own: source}))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "ties", [["a.weight"], "a.weight", 3, {"a.weight": 3}, {"a.weight": None}, {"a.weight": ["b.weight"]}]
)
def test_ties_that_are_no_names_are_refused_in_one_line(ties: Any, tmp_path: Path) -> None:
    artefact(tmp_path)
    with pytest.raises(ModelError, match="has ties that are not names of tensors") as told:
        opened(retied(tmp_path, ties))
    assert "\n" not in str(told.value)


def test_a_model_that_shares_is_no_base(tmp_path: Path) -> None:
    artefact(tmp_path)
    with pytest.raises(ModelError, match="quantised already"):
        Checkpoint.open(tmp_path)


@by_family
@by_layout
@pytest.mark.parametrize("short", [False, True])
def test_block_by_block_it_computes_what_the_plain_model_does(
    family: str, layout: FactoredLayout, short: bool, tmp_path: Path
) -> None:
    model = artefact(tmp_path, family, layout, short=short)
    resident = DiskModel(tmp_path, CPU, quantized=True)
    assert resident.ties == ties_of(family, layout) and set(resident.layouts.values()) == {layout}
    plain = InMemoryModel(model.config, model.state_dict(), CPU)
    assert torch.equal(next(streamed(resident, TOKENS)), next(streamed(plain, TOKENS)))
    for name in (*names_of(family, 0), *names_of(family, 1)):
        found = resident.codes(name)
        assert isinstance(found, FactoredWeight) and found.layout == layout
        module = model.get_submodule(name)
        assert torch.equal(found.dequantize(), turned(module, cast(Tensor, module.weight).data))


# transformers


def require_shared(model: nn.Module, family: str, layout: FactoredLayout, prefix: str = "") -> None:
    """What is tied is one tensor, and nothing else is."""
    ties = ties_of(family, layout)
    for own, first in ties.items():
        one, other = (model.get_parameter(name.removeprefix(prefix)) for name in (own, first))
        assert one is other and one.data_ptr() == other.data_ptr()
    for own, first in zip(names_of(family, 1), names_of(family, 0), strict=True):
        parts = {name for name, _ in model.get_submodule(own.removeprefix(prefix)).named_parameters()} - {
            layout.common
        }
        for part in parts:
            one, other = (model.get_parameter(f"{name.removeprefix(prefix)}.{part}") for name in (own, first))
            assert one is not other and not torch.equal(one, other), f"{own}.{part}"


@by_family
@by_layout
@pytest.mark.parametrize("short", [False, True])
def test_from_pretrained_loads_one_tensor_for_all_that_share_it(
    family: str, layout: FactoredLayout, short: bool, tmp_path: Path
) -> None:
    plain = artefact(tmp_path, family, layout, short=short)
    model = load(tmp_path)
    require_shared(model, family, layout)
    assert sum(isinstance(module, FactoredLinear) for module in model.modules()) == 2 * len(LINEARS[family])
    assert float((logits(model) - logits(plain)).abs().max()) <= 1e-5 * float(logits(plain).abs().max())
    assert layout is not SHARED or torch.equal(logits(model), logits(plain))
    assert size_of(model) == opened(tmp_path).parameters
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "config"),
    [("opt", {}), ("gpt2", {}), ("gpt_neox", {}), ("llama", {"mlp_bias": True, "attention_bias": True})],
)
@by_layout
def test_biases_stay_each_layers_own_and_whole(
    family: str, config: dict[str, Any], layout: FactoredLayout, tmp_path: Path
) -> None:
    plain = artefact(tmp_path, family, layout, **config)
    stored = load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    biases = [f"{name}.bias" for index in (0, 1) for name in names_of(family, index)]
    for step in ("loaded", "tied again", "cast"):
        for name in biases:
            found = model.get_parameter(name)
            assert found.shape == stored[name].shape and torch.equal(found, stored[name]), f"{name} {step}"
        assert torch.equal(model.get_parameter(biases[0]), plain.get_parameter(biases[0]))
        require_shared(model, family, layout)
        model.tie_weights()
        if step == "tied again":
            model = model.to(torch.float64).to(torch.float32)


@by_family
@by_layout
def test_a_loaded_model_is_saved_as_the_same_bytes(
    family: str, layout: FactoredLayout, tmp_path: Path
) -> None:
    artefact(tmp_path / "once", family, layout)
    model = load(tmp_path / "once")
    model.save_pretrained(tmp_path / "again")
    once, again = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "again"))
    assert again.keys() == once.keys() and all(
        torch.equal(again[name], tensor) for name, tensor in once.items()
    )
    said = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("once", "again")
    ]
    assert said[1]["ties"] == said[0]["ties"] == ties_of(family, layout)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    require_shared(load(tmp_path / "again"), family, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_layout
def test_in_half_precision_it_is_still_one_tensor(
    dtype: torch.dtype, layout: FactoredLayout, tmp_path: Path
) -> None:
    plain = artefact(tmp_path, "llama", layout)
    for model in (
        load(tmp_path, dtype=dtype),
        load(tmp_path).to(dtype),
        copy.deepcopy(load(tmp_path)).to(dtype),
    ):
        require_shared(model, "llama", layout)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert float((logits(model) - logits(plain)).norm() / logits(plain).norm()) < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("short", [False, True])
def test_a_model_without_its_head_shares_too(family: str, short: bool, tmp_path: Path) -> None:
    plain = artefact(tmp_path, family, short=short)
    model = AutoModel.from_pretrained(tmp_path)
    require_shared(model, family, SHARED, prefix=f"{LAYERS[family].partition('.')[0]}.")
    with torch.no_grad():
        found = model(TOKENS).last_hidden_state
        assert torch.equal(found, cast(Any, plain).base_model(TOKENS).last_hidden_state)


@by_layout
def test_what_is_shared_is_one_parameter_for_an_optimizer(layout: FactoredLayout, tmp_path: Path) -> None:
    artefact(tmp_path, "llama", layout)
    model = load(tmp_path)
    own, first = next(iter(ties_of("llama", layout).items()))
    before = logits(model)
    with torch.no_grad():
        model.get_parameter(own).mul_(1.5)
    assert torch.equal(model.get_parameter(first), model.get_parameter(own)) and not torch.equal(
        logits(model), before
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@by_layout
def test_dequantised_it_is_a_plain_model_whose_layers_share_nothing(
    family: str, layout: FactoredLayout, tmp_path: Path
) -> None:
    plain = artefact(tmp_path, family, layout)
    model = load(tmp_path).dequantize()
    assert torch.equal(logits(model), logits(plain))
    for own, first in zip(names_of(family, 1), names_of(family, 0), strict=True):
        assert type(model.get_submodule(own)) is type(plain.get_submodule(own))
        assert (
            model.get_parameter(f"{own}.weight").data_ptr()
            != model.get_parameter(f"{first}.weight").data_ptr()
        )
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))
    assert opened(tmp_path / "plain").parameters == size_of(plain)


@pytest.mark.parametrize(
    ("tie", "why"),
    [
        (
            ("model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            "the model has no model.layers.7",
        ),
        (
            ("model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"),
            "tied tensors have one shape",
        ),
    ],
)
def test_ties_that_the_model_can_not_have_are_refused(tie: tuple[str, str], why: str, tmp_path: Path) -> None:
    artefact(tmp_path)
    with pytest.raises(ModelError, match=why) as told:
        AutoModelForCausalLM.from_pretrained(retied(tmp_path, dict([tie])))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("ties", [["a.weight"], "a.weight", 3])
def test_ties_that_are_no_names_are_refused_by_from_pretrained_too(ties: Any, tmp_path: Path) -> None:
    artefact(tmp_path)
    with pytest.raises(ModelError) as told:
        AutoModelForCausalLM.from_pretrained(retied(tmp_path, ties))
    assert "\n" not in str(told.value)


@by_layout
def test_a_model_on_the_disk_computes_the_same(layout: FactoredLayout, tmp_path: Path) -> None:
    plain = artefact(tmp_path, "llama", layout)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load(tmp_path, device_map=places | {"model.layers": "disk"}, offload_folder=str(tmp_path / "off"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(plain))


def test_a_device_map_that_tears_layers_apart_is_refused_and_says_which(tmp_path: Path) -> None:
    artefact(tmp_path)
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
    )
    apart = places | {"model.layers.1": "disk"}
    with pytest.raises(
        ModelError, match="are one tensor, and the device_map puts them on disk and cpu; give one that keeps"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=apart, offload_folder=str(tmp_path / "off"))


def test_a_tensor_that_is_neither_stored_nor_tied_is_missed(tmp_path: Path) -> None:
    artefact(tmp_path)
    *some, (own, _) = ties_of("llama").items()
    with pytest.raises(ModelError, match=f"the checkpoint lacks {own}"):
        AutoModelForCausalLM.from_pretrained(retied(tmp_path, dict(some)))


def test_the_class_of_a_model_that_shares_ties_nothing_in_others(tmp_path: Path) -> None:
    artefact(tmp_path, "opt")
    shared, plain = load(tmp_path), pico("opt")
    assert set(ties_of("opt")) <= set(shared._tied_weights_keys)
    assert not set(ties_of("opt")) & {*(plain._tied_weights_keys or {}), *plain.all_tied_weights_keys}
    before = logits(plain)
    plain.tie_weights()
    assert torch.equal(logits(plain), before)


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_what_is_shared(tmp_path: Path) -> None:
    folders = []
    for family in ("llama", "gpt2"):
        for layout in (SHARED, ADDED, BASIS):
            folders.append(tmp_path / f"{family}-{layout.name}")
            artefact(folders[-1], family, layout, short=family == "gpt2")
    subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, cwd=tmp_path, timeout=300)
