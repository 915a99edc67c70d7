"""Sparse linears: what lies on the disk, what they compute, and what transformers makes of a checkpoint that
has them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.algorithms.sparsegpt import keep_mask
from llmcompress.errors import ModelError
from llmcompress.formats import sparse
from llmcompress.formats.base import DTYPES
from llmcompress.formats.registry import dequantize, layouts_of, parts_of, quantized_linears
from llmcompress.formats.sparse import SparseLayout, SparseLinear, SparseWeight, read
from llmcompress.integrations import transformers_quantizer
from llmcompress.io.checkpoint import Checkpoint
from tests.artefacts import linears, write_in
from tests.integrations.test_transformers_quantizer import LOADER, TOKENS, distance, load, logits
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

LAYOUTS = (
    SparseLayout("2:4", "float32"),
    SparseLayout("4:8", "float32"),
    SparseLayout("1:3", "float32"),
    SparseLayout("unstructured", "float32", 0.5),
    SparseLayout("unstructured", "float32", 0.3),
)
by_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: f"{layout.name} {layout.keep or ''}".strip()
)


def weight(R: int, C: int, layout: SparseLayout, seed: int = 0) -> SparseWeight:
    W_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(seed))
    return SparseWeight.of(W_RC, keep_mask(W_RC.abs(), layout.choice(C)), layout)


def artefact(folder: Path, model: PreTrainedModel, layout: SparseLayout) -> PreTrainedModel:
    """Write a model whose linears lost their smallest weights, and set these to zero in the model itself."""

    def thinned(W_RC: Tensor) -> SparseWeight:
        return SparseWeight.of(W_RC, keep_mask(W_RC.abs(), layout.choice(W_RC.shape[1])), layout)

    return write_in(folder, model, layout, thinned)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 40),
    seed=st.integers(0, 99),
    pattern=st.sampled_from(["2:4", "4:8", "1:3", 0.5, 0.21, 0.9]),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_a_linear_comes_back_from_its_tensors_bit_for_bit(
    rows: int, columns: int, seed: int, pattern: str | float, dtype: str
) -> None:
    layout = (
        SparseLayout(pattern, dtype)
        if isinstance(pattern, str)
        else SparseLayout("unstructured", dtype, pattern)
    )
    made = weight(rows, columns, layout, seed)
    tensors = made.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout.shapes(rows, columns)
    again = layout.read(tensors, columns)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tensors.items())
    W_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again.dequantize(DTYPES[dtype]), torch.where(made.mask_RC, W_RC, 0).to(DTYPES[dtype]))
    assert made.zeros == rows * columns - len(tensors["weight"]) == int((~made.mask_RC).sum())
    stored = sum(t.nbytes for t in tensors.values())
    assert 8 * stored == pytest.approx(layout.bits((rows, columns)) * rows * columns)


def test_the_bits_of_a_weight_are_those_that_one_counts_by_hand() -> None:
    assert (
        SparseLayout("2:4", "bfloat16").bits((1, 64)) == 9
        and SparseLayout("unstructured", "float32", 0.25).bits((1, 64)) == 9
    )
    assert SparseLayout("4:8", "float16").bits((1, 12)) == pytest.approx(8 * (2 * 8 + 2) / 12), (
        "the last 4 of 12 all stay"
    )


@by_layout
def test_what_a_layout_says_is_read_back_from_json(layout: SparseLayout) -> None:
    config = json.loads(json.dumps(transformers_quantizer.quantization_config([(layout, ["a.b"])])))
    assert layouts_of(config["schemes"]) == {"a.b": layout}


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "4:2"},
        {"pattern": "2:2"},
        {"pattern": "0:4"},
        {"pattern": "2 of 4"},
        {"pattern": 124},
        {"pattern": "2:4", "keep": 0.5},
        {"pattern": "2:4", "keep": "half"},
        {"pattern": "unstructured"},
        {"pattern": "unstructured", "keep": 1.0},
        {"pattern": "unstructured", "keep": "0.5"},
        {"pattern": "2:4", "dtype": "int8"},
        {"pattern": "2:4", "group_size": 64},
    ],
)
def test_a_layout_that_can_not_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="that this llmcompress doesn't know"):
        layouts_of([{"format": "sparse", "dtype": "float32", "linears": ["a"], **fields}])


def test_a_mask_of_another_pattern_is_refused() -> None:
    layout, W_RC = SparseLayout("2:4", "float32"), torch.randn(4, 8)
    uneven = torch.zeros(4, 8, dtype=torch.bool)
    uneven[:, :4] = True
    with pytest.raises(ValueError, match="is not what Sparse"):
        SparseWeight.of(W_RC, uneven, layout)
    good = SparseWeight.of(W_RC, keep_mask(W_RC.abs(), (2, 4)), layout).tensors()
    for mask in (torch.full_like(good["weight_mask"], 0x0F), torch.full_like(good["weight_mask"], 0x01)):
        with pytest.raises(ModelError, match="the mask of a linear of 4 x 8 is not 2:4; it is damaged"):
            read({**good, "weight_mask": mask}, layout, 4, 8)
    for wrong in (
        {**good, "weight": good["weight"].half()},
        {**good, "weight": good["weight"][1:]},
        {"weight": good["weight"]},
    ):
        with pytest.raises(ModelError, match="a linear of 4 x 8 in Sparse"):
            read(wrong, layout, 4, 8)


def test_a_sparse_linear_is_found_among_the_tensors_of_a_checkpoint() -> None:
    tensors = {f"a.b.{name}": tensor for name, tensor in weight(8, 16, LAYOUTS[0]).tensors().items()} | {
        "c.weight": torch.ones(1)
    }
    assert quantized_linears(tensors) == ["a.b"]
    parts = parts_of("a.b", tensors)
    assert parts.keys() == {"weight", "weight_mask"}
    assert torch.equal(dequantize(LAYOUTS[0].read(parts, 16)), weight(8, 16, LAYOUTS[0]).dequantize())


# The module.


@by_layout
@pytest.mark.parametrize("bias", [True, False])
def test_a_module_computes_what_the_dense_weight_does(layout: SparseLayout, bias: bool) -> None:
    made, bias_R = weight(24, 37, layout), torch.randn(24) if bias else None
    module = sparse.linear(made, bias_R)
    x = torch.randn(2, 5, 37, requires_grad=True)
    plain = nn.functional.linear(x, made.dequantize(), bias_R)
    assert torch.equal(module(x), plain)
    (grad,), (expected,) = (torch.autograd.grad(out.square().sum(), x) for out in (module(x), plain))
    assert torch.equal(grad, expected)
    assert not any(p.requires_grad for name, p in module.named_parameters() if name != "bias")
    assert module.state_dict().keys() == {"weight", "weight_mask", *(("bias",) if bias else ())}, (
        "the dense weight is not saved"
    )
    module.dense = None
    assert torch.equal(module(x), plain), "as where the values are offloaded"


def test_values_keep_their_type_and_the_dense_weight_follows_the_model() -> None:
    made = weight(16, 24, SparseLayout("2:4", "float32"))
    module = sparse.linear(made, torch.randn(16))
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.float32 and module.weight_mask.dtype == torch.uint8
    assert module.dense is not None and module.bias.dtype == module.dense.dtype == torch.bfloat16
    assert module(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.to(torch.float32)
    assert torch.equal(module.dense, made.dequantize()), "what the dense weight lost is in the values"
    assert module.to("meta").dense is None


def test_a_module_that_gets_other_values_computes_with_them() -> None:
    layout = SparseLayout("unstructured", "float32", 0.5)
    module, other = SparseLinear(24, 16, layout, bias=False), weight(16, 24, layout, seed=1)
    module.load_state_dict(other.tensors())
    assert torch.equal(module(torch.eye(24)).T, other.dequantize())
    twin = copy.deepcopy(module)
    module.load_state_dict(weight(16, 24, layout, seed=2).tensors())
    assert torch.equal(twin(torch.eye(24)).T, other.dequantize()) and not torch.equal(
        module(torch.eye(24)).T, other.dequantize()
    )


# In a model.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_saves_the_same_bytes(family: str, tmp_path: Path) -> None:
    plain = artefact(tmp_path, pico(family), LAYOUTS[0])
    model = load(tmp_path)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == len(linears(plain))
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert torch.equal(logits(load(tmp_path / "again")), logits(plain))


@by_layout
def test_every_pattern_is_fewer_bytes_and_computes_what_the_zeros_do(
    layout: SparseLayout, tmp_path: Path
) -> None:
    for family in ("llama", "gpt2"):
        plain = artefact(tmp_path / family, pico(family), layout)
        assert torch.equal(logits(load(tmp_path / family)), logits(plain))
        plain.save_pretrained(tmp_path / f"{family}-plain")
        small, whole = (Checkpoint.open(tmp_path / name, base=False) for name in (family, f"{family}-plain"))
        zeros = sum(int((cast(Tensor, module.weight) == 0).sum()) for module in linears(plain).values())
        assert small.parameters == whole.parameters - zeros
        assert small.size_bytes < 0.8 * whole.size_bytes


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_every_pattern(tmp_path: Path) -> None:
    folders = []
    for family in ("llama", "gpt2", "qwen3_moe"):
        for i, layout in enumerate(LAYOUTS):
            folders.append(tmp_path / f"{family}-{i}")
            artefact(folders[-1], pico(family), layout)
    subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_values(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = artefact(tmp_path, pico("llama"), LAYOUTS[0])
    for model in (load(tmp_path, dtype=dtype), load(tmp_path).to(dtype)):
        assert model.dtype == dtype and distance(logits(model), logits(plain)) < 0.1
        for name, module in linears(plain).items():
            assert torch.equal(
                cast(Any, model.get_submodule(name)).dense, cast(Tensor, module.weight).to(dtype)
            )
        model.save_pretrained(tmp_path / "again")
        once, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
        assert all(torch.equal(tensor, again[name]) for name, tensor in once.items() if "_proj" in name)


def test_a_model_on_the_disk_computes_the_same(tmp_path: Path) -> None:
    plain = artefact(tmp_path, pico("llama"), LAYOUTS[3])
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(tmp_path, device_map=places | {"model.layers": "disk"}, offload_folder=str(tmp_path / "off"))
    assert any(p.device.type == "meta" for p in model.parameters())
    torch.testing.assert_close(logits(model), logits(plain))
    with pytest.raises(ModelError, match="offloaded"):
        model.dequantize()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dequantising_gives_a_plain_model_with_the_zeros(family: str, tmp_path: Path) -> None:
    plain = artefact(tmp_path, pico(family), LAYOUTS[1])
    model = load(tmp_path).dequantize()
    for name, module in linears(plain).items():
        assert type(model.get_submodule(name)) is type(module)
        assert torch.equal(model.get_parameter(f"{name}.weight"), module.get_parameter("weight"))
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))


def test_what_is_lost_or_damaged_is_an_error(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj"
    mask, values = whole[f"{name}.weight_mask"], whole[f"{name}.weight"]
    for part, tensor, why in (
        ("weight_mask", None, f"the checkpoint lacks {name}.weight_mask"),
        ("weight", None, f"the checkpoint lacks {name}.weight"),
        ("weight_mask", mask.int(), "int32 in the checkpoint, not torch.uint8"),
        ("weight_mask", torch.full_like(mask, 0x0F), "the mask of a linear of 64 x 320 is not 2:4"),
    ):
        changed = {key: value for key, value in whole.items() if key != f"{name}.{part}"}
        changed |= {} if tensor is None else {f"{name}.{part}": tensor}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=why):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(
        {**whole, f"{name}.weight": values[:-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_embedding_is_not_sparse(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["schemes"][0]["linears"].append("model.embed_tokens")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an embedding has int8 rows"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_whole_model_compiles_and_maps_and_writes_tokens(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    model = load(tmp_path, device_map="auto")
    torch.testing.assert_close(logits(torch.compile(model, backend="eager", fullgraph=True)), logits(model))
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(TOKENS),
    }
    with_cache, without = (
        model.generate(TOKENS, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without) and with_cache.shape[1] > TOKENS.shape[1]


# which peft 0.21 still asks for
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_lora_adapter_trains_on_top(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    model, before = load(tmp_path), logits(load(tmp_path))
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), before), "a new adapter changes nothing"
    adapted(TOKENS, labels=TOKENS).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if p.requires_grad]
    assert grads and all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
