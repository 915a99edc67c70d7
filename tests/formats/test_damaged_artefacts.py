"""Artefacts whose values or config are damaged are refused in one line by whoever reads them, and zeros are
no damage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.algorithms.codebook import Palette
from llmcompress.algorithms.quantize_weight import RoundedWeight
from llmcompress.algorithms.sparsegpt import keep_mask
from llmcompress.architectures.per_layer import ALLOW
from llmcompress.errors import CompressError, ModelError
from llmcompress.formats import bitsandbytes_layout, integer_embedding, registry
from llmcompress.formats.codebook import CodebookLayout, CodebookWeight
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.ggml import GgmlLayout
from llmcompress.formats.integer import Int8Weight, IntegerLayout, IntegerWeight
from llmcompress.formats.integer_embedding import IntegerEmbedding
from llmcompress.formats.low_rank import FactoredLayout, FactoredWeight
from llmcompress.formats.registry import AnyLayout, StoredWeight
from llmcompress.formats.schemes import GgmlScheme, IntegerScheme
from llmcompress.formats.sparse import SparseLayout, SparseWeight
from llmcompress.integrations import transformers_quantizer
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import CPU, distance, live, load, measured, write_in
from tests.bases import VOCABULARY, save_base, staged_recipe, write_text
from tests.models import noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

LAYOUTS: tuple[AnyLayout, ...] = (
    IntegerLayout("w8a8"),
    IntegerLayout("w8a8", "static"),
    IntegerLayout("w8a16"),
    IntegerLayout("w4a8", group_size=32),
    IntegerLayout("w4a4", "static", 16),
    IntegerLayout("w4a16", "none", 64),
    FourBitLayout("nf4", 64),
    FourBitLayout("fp4", 32, double_quant=True),
    GgmlLayout("q4_0"),
    GgmlLayout("iq4_nl"),
    SparseLayout("2:4", "float32"),
    SparseLayout("unstructured", "float16", 0.5),
    FactoredLayout("shared"),
    FactoredLayout("shared", 4),
    FactoredLayout("basis", 6),
    CodebookLayout(16, 1, "float16"),
    CodebookLayout(4, None, "bfloat16"),
)
by_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: str(layout.name if hasattr(layout, "name") else layout)
)
NAME = "model.layers.1.mlp.down_proj"


def made(W_RC: Tensor, layout: AnyLayout) -> StoredWeight:
    """A weight in a layout, as simply as it goes."""
    if isinstance(layout, FourBitLayout):
        return bitsandbytes_layout.quantize_nearest(
            W_RC, layout.format, layout.group_size, layout.double_quant
        )
    if isinstance(layout, GgmlLayout):
        return GgmlScheme(layout).nearest(W_RC)
    if isinstance(layout, SparseLayout):
        return SparseWeight.of(W_RC, keep_mask(W_RC.abs(), layout.choice(W_RC.shape[1])), layout)
    if isinstance(layout, FactoredLayout):
        rank = layout.rank
        left, right = (W_RC[:, :rank].clone(), W_RC[:rank].clone()) if rank else (None, None)
        return FactoredWeight(layout, W_RC if layout.format == "shared" else None, left, right)
    if isinstance(layout, CodebookLayout):
        R = len(W_RC)
        levels = layout.snap(
            torch.linspace(-0.3, 0.3, layout.entries).repeat(
                layout.shapes(*W_RC.shape)["weight_levels"][0][0], 1
            )
        )
        index = (W_RC[..., None] - levels[torch.arange(R) // layout.sharing(R)][:, None]).abs().argmin(-1)
        return CodebookWeight.of(Palette(index, levels, layout.sharing(R)), layout)
    return IntegerScheme(layout).nearest(W_RC, 0.04 if layout.activations == "static" else None)


def damages(part: str, tensor: Tensor, layout: AnyLayout) -> Iterator[Tensor]:
    """The tensor with one value of it damaged, in every way there is."""
    values: tuple[float, ...] = (float("nan"), float("inf"), -float("inf"))
    if part == "weight_scale":
        values += (0.0, -0.01)
    elif part == "input_scale":
        values += (0.0, -1.0)
    elif part == "weight_nested_absmax":
        values += (-1.0,)
    elif not tensor.is_floating_point():
        values = {"weight_multiplier": (0, 19, 255), "weight_mask": ()}.get(part, ())
        if part == "weight" and isinstance(layout, IntegerLayout):
            values = (-128,) if layout.group_size is None else (0x08, 0x80)
    for value in values:
        damaged = tensor.clone()
        damaged.view(-1)[damaged.numel() // 2] = value
        yield damaged
    if part == "weight_mask":
        yield tensor ^ 1


def assert_one_line(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


@by_layout
def test_values_that_can_not_be_are_refused_by_all_who_read_them(layout: AnyLayout, tmp_path: Path) -> None:
    write_in(tmp_path, pico("llama", vocab_size=VOCABULARY), layout, lambda W_RC: made(W_RC, layout))
    whole, model = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    module: Any = model.get_submodule(NAME)
    shape = (module.out_features, module.in_features)
    sound, count = module.stored(), 0
    for part, tensor in sound.items():
        for damaged in damages(part, tensor, layout):
            count += 1
            save_file({**whole, f"{NAME}.{part}": damaged}, tmp_path / "model.safetensors", {"format": "pt"})
            said = "mask" if part == "weight_mask" else "is damaged"
            assert_one_line(
                lambda: AutoModelForCausalLM.from_pretrained(tmp_path), said, "" if "mask" in said else NAME
            )
            parts = {**sound, part: damaged}
            assert_one_line(lambda parts=parts: registry.read(parts, layout, shape), said)  # type: ignore[misc]
            module.get_parameter(part).data = damaged
            assert_one_line(lambda: module.dequantized(torch.float32), said)
            module.get_parameter(part).data = tensor
    assert count >= 3
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(live(load(tmp_path)), live(model))


def test_a_damaged_bias_and_a_damaged_embedding_are_refused(tmp_path: Path) -> None:
    write_in(
        tmp_path / "bias",
        pico("qwen2"),
        IntegerLayout("w8a8"),
        lambda W_RC: made(W_RC, IntegerLayout("w8a8")),
    )
    file = tmp_path / "bias/model.safetensors"
    whole, name = load_file(file), "model.layers.0.self_attn.q_proj.bias"
    save_file({**whole, name: whole[name].index_fill(0, torch.tensor(3), torch.inf)}, file, {"format": "pt"})
    assert_one_line(
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "bias"),
        "q_proj is damaged: the bias must be finite",
    )
    plain = pico("llama").get_input_embeddings()
    module: Any = integer_embedding.embedding("embed", plain, made(plain.weight.data, IntegerLayout("w8a8")))  # type: ignore[arg-type]
    assert isinstance(module, IntegerEmbedding)
    module.require_sound("embed")
    module.weight.data[0, 0, 0] = -128
    assert_one_line(
        lambda: module.require_sound("embed"), "embed is damaged: codes of w8a8 must lie in -127..127"
    )


def test_a_scale_of_zero_is_that_of_a_row_of_zeros() -> None:
    codes = torch.tensor([[3, -4], [0, 0]], dtype=torch.int8)
    assert torch.equal(
        IntegerWeight(codes, torch.tensor([0.5, 0.0]), IntegerLayout("w8a8")).dequantize()[1], torch.zeros(2)
    )
    with pytest.raises(ValueError, match="positive, or zero for a row of zeros"):
        IntegerWeight(codes, torch.tensor([0.0, 0.5]), IntegerLayout("w8a8"))
    empty = Int8Weight(
        codes, torch.tensor([1.0, 0.0])
    ).as_integer()  # stock bitsandbytes gives a row of zeros a scale of zero
    again = registry.read(empty.tensors(), IntegerLayout("w8a8"), (2, 2))
    assert torch.equal(registry.dequantize(again), empty.dequantize())


def test_a_fitted_scale_below_zero_is_written_as_the_same_weights_under_one_above() -> None:
    coding, W = IntegerScheme(IntegerLayout("w8a8")), noise(4, 8)
    index = coding.grid.nearest(W / W.abs().amax(1, keepdim=True))
    scale = W.abs().amax(1, keepdim=True) * torch.tensor([[1.0], [-1.0], [1e-45], [0.0]])
    packed: Any = coding.store(RoundedWeight(index, scale))
    expected = coding.grid.levels[index] * scale
    torch.testing.assert_close(packed.dequantize(), expected)
    assert bool((packed.scale_R >= 0).all()) and float(packed.scale_R[1]) > 0


STAGES: dict[str, dict[str, Any]] = {
    **{
        f"int8 {rounding}": {"quantize": {"format": "int8", "rounding": rounding}}
        for rounding in ("nearest", "gptq")
    },
    **{f"nf4 {double}": {"quantize": {"format": "nf4", "double_quant": double}} for double in (True, False)},
    "fp4": {"quantize": {"format": "fp4", "rounding": "nearest"}},
    "w8a8": {"quantize": {"format": "w8a8", "embedding": "int8"}},
    "w8a8 static": {"quantize": {"format": "w8a8", "activations": "static", "rounding": "nearest"}},
    "w4a8": {"quantize": {"format": "w4a8"}},
    "w4a4 static": {"quantize": {"format": "w4a4", "activations": "static"}},
    "w8a16": {"quantize": {"format": "w8a16"}},
    "w4a16": {"quantize": {"format": "w4a16", "rounding": "nearest"}},
    "q4_0": {"quantize": {"format": "q4_0"}},
    "iq4_nl": {"quantize": {"format": "iq4_nl"}},
    "mixed": {
        "quantize": {"format": "nf4", "double_quant": True, "overrides": {"*down_proj": {"format": "w4a8"}}}
    },
    "sparse": {"sparsify": {"pattern": "unstructured", "keep": 0.5}},
    "2:4": {"sparsify": {"pattern": "2:4"}},
    "codebook": {"codebook": {"entries": 16, "per": "row"}},
    "basis": {"low_rank": {"layers_per_basis": 2, "keep": 0.5}},
    "shared": {"share": {"layers": "auto", "parts": ["ffn"], "groups": 1, "residual_rank": 4, "steps": 4}},
}


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a matrix, layers, rows and a column of zeros, and rows near the end of float32, and a
    text."""
    folder = tmp_path_factory.mktemp("zeros")
    base = save_base(folder / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"].zero_()
    weights["model.layers.0.mlp.down_proj.weight"][:, :128] = 0
    up = weights["model.layers.1.mlp.up_proj.weight"]
    up[3:9], up[9] = 0, 1e-44
    weights["model.layers.1.self_attn.o_proj.weight"][:, 5] = 0
    weights["model.embed_tokens.weight"][7] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base, write_text(folder / "facts.txt")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", STAGES)
def test_what_is_made_of_zeros_is_not_taken_for_damaged(
    name: str, zeros: tuple[Path, Path], tmp_path: Path
) -> None:
    base, text = zeros
    run_recipe(staged_recipe(text, base, STAGES[name], samples=8, length=24), tmp_path / "out")
    found = live(load(tmp_path / "out"))
    assert bool(found.isfinite().all()) and distance(found, measured(tmp_path / "out")) < 0.05


def entry(**fields: Any) -> dict[str, Any]:
    return {"schemes": [{"format": "w8a8", "linears": [NAME], **fields}]}


CONFIGS: tuple[tuple[Any, str], ...] = (
    ({"schemes": 3}, "schemes that are not a list: 3"),
    ({"schemes": None}, "schemes that are not a list"),
    ({"schemes": {"format": "w8a8"}}, "schemes that are not a list"),
    ({"schemes": "w8a8"}, "schemes that are not a list"),
    ({"schemes": [["w8a8"]]}, "a scheme that is not an object"),
    ({"schemes": [3]}, "a scheme that is not an object: 3"),
    (entry(linears=5), "linears that are not a list of names: 5"),
    (entry(linears=NAME), "linears that are not a list of names"),
    (entry(linears=[NAME, 5]), "linears that are not a list of names"),
    (entry(linears=[[NAME]]), "linears that are not a list of names"),
    (entry(linears=["model.layers.7.mlp.down_proj"]), "no such linear"),
    (entry(format="w2a2"), "w2a2"),
    (entry(format=["w8a8"]), "doesn't know"),
    (entry(format=None), "doesn't know"),
    (entry(format="w4a8"), "needs a group"),
    *(
        (entry(format="w4a8", group_size=size), "needs a group")
        for size in ("x", -1, 0, 32.0, 10**10, True, [32])
    ),
    *((entry(format="nf4", group_size=size), "in groups of") for size in ("x", 64.0, -64, None, [64])),
    (entry(format="nf4", group_size=64, double_quant="yes"), "double_quant is true or false"),
    (entry(format="nf4"), "missing 1 required"),
    (entry(format="codebook", entries="x", rows=1, dtype="float16"), "no codebook of 'x' levels"),
    (entry(format="codebook", entries=16.0, rows=1, dtype="float16"), "no codebook of 16.0 levels"),
    (entry(format="codebook", entries=[16], rows=1, dtype="float16"), "no codebook"),
    (entry(format="codebook", entries=16, rows=-1, dtype="float16"), "whole number from 1"),
    (entry(format="codebook", entries=16, rows=1, dtype=["float16"]), "doesn't know"),
    (entry(format="sparse", pattern=["2:4"], dtype="float16"), "no pattern"),
    (entry(format="sparse", pattern="unstructured", dtype="float16", keep="x"), "keep is a share"),
    (entry(format="basis", rank="x"), "whole number from 1"),
    (entry(format="shared", rank=1.5), "whole number from 0"),
    ({"schemes": [], "ties": {NAME: 3}}, "ties that are not names"),
    ({"schemes": [], "ties": [NAME]}, "ties that are not names"),
    ({"schemes": [], "ties": {f"{NAME}.weight": f"{NAME}.weight"}}, "to itself"),
    ({"schemes": [], "ties": {"a": "b", "b": "c", "c": "a"}}, "to itself"),
    ({"schemes": [], "order": 2}, "update it"),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain") / "model")


def rewrite(folder: Path, original: dict[str, Any], **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**original, **fields}))


def test_a_config_that_can_not_be_is_refused_in_one_line(plain: Path) -> None:
    original = json.loads((plain / "config.json").read_text())
    for said, why in CONFIGS:
        rewrite(plain, original, quantization_config={"quant_method": transformers_quantizer.METHOD, **said})
        assert_one_line(lambda: AutoModelForCausalLM.from_pretrained(plain), why)
        assert_one_line(lambda: DiskModel(plain, CPU, quantized=True), why)
    rewrite(
        plain,
        original,
        quantization_config={
            "quant_method": transformers_quantizer.METHOD,
            **entry(format="basis", rank=10**6),
        },
    )
    assert_one_line(lambda: AutoModelForCausalLM.from_pretrained(plain), "a rank of 1000000 for")
    for nothing in (3, [1], "w8a8"):
        rewrite(plain, original, quantization_config=nothing)
        assert_one_line(lambda: DiskModel(plain, CPU, quantized=True), "no object")
    rewrite(
        plain,
        original,
        quantization_config={"quant_method": transformers_quantizer.METHOD, "schemes": [], "ties": None},
    )
    assert Checkpoint.open(plain, base=False).aliases == {}
    assert distance(measured(plain), live(load(plain))) < 1e-5
    rewrite(plain, original)


def test_layers_that_can_not_be_are_refused_in_one_line(plain: Path) -> None:
    original = json.loads((plain / "config.json").read_text())
    for own in (
        {"num_attention_heads": "x"},
        {"num_attention_heads": -1},
        {"num_key_value_heads": 3},
        {"intermediate_size": -5},
        {"intermediate_size": "5"},
        {"intermediate_size": 1e10},
        {"intermediate_size": 10**19},
        {"hidden_act": "nothing"},
        {"hidden_act": 3},
    ):
        ours = {"quant_method": transformers_quantizer.METHOD, "schemes": []}
        rewrite(plain, original, per_layer_config={"0": own}, quantization_config=ours, **{ALLOW: True})
        for act in (
            lambda: AutoModelForCausalLM.from_pretrained(plain),
            lambda: DiskModel(plain, CPU, quantized=True),
        ):
            with pytest.raises(CompressError) as caught:
                act()
            assert len(str(caught.value).splitlines()) == 1
    rewrite(plain, original)


def test_a_block_wider_than_a_row_is_one_block() -> None:
    W_RC = noise(4, 24)
    packed: Any = made(W_RC, IntegerLayout("w4a8", group_size=24))
    wide = replace(packed, scheme=IntegerLayout("w4a8", group_size=100_000))
    assert torch.equal(wide.dequantize(), packed.dequantize())


def test_scales_of_scales_are_checked_in_the_stock_layout_too() -> None:
    packed = bitsandbytes_layout.quantize_nearest(noise(64, 128), "nf4", 64, True)
    parts = bitsandbytes_layout.tensors(packed)
    parts["weight.nested_absmax"] = torch.full_like(parts["weight.nested_absmax"], torch.nan)
    assert_one_line(
        lambda: registry.read(parts), "a 4-bit linear of 64 x 128 is damaged: scales must be finite"
    )


def test_codes_without_a_scheme_are_refused_in_one_line() -> None:
    parts = {"weight": torch.ones(1, 4, 4, dtype=torch.int8), "weight_scale": torch.ones(4)}
    with pytest.raises(ModelError, match=r"config\.json names no other format") as refused:
        registry.read(parts)
    assert len(str(refused.value).splitlines()) == 1
