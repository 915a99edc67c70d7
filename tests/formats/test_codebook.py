"""Linears in codebooks: what lies on the disk, what they compute, and what transformers makes of a checkpoint
of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.algorithms.codebook import Palette, kmeans, nearest
from llmcompress.errors import ModelError
from llmcompress.formats import codebook
from llmcompress.formats.base import DTYPES
from llmcompress.formats.codebook import CodebookLayout, CodebookLinear, CodebookWeight, pack, read, unpack
from llmcompress.formats.registry import dequantize, layouts_of, parts_of, quantized_linears
from llmcompress.integrations import transformers_quantizer
from tests.artefacts import linears, write_in
from tests.integrations.test_transformers_quantizer import LOADER, load, logits
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

LAYOUTS = (
    CodebookLayout(16, 1, "float16"),
    CodebookLayout(16, None, "float32"),
    CodebookLayout(8, 1, "bfloat16"),
    CodebookLayout(4, 5, "float16"),
    CodebookLayout(256, None, "float16"),
)
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}, {layout.dtype}")


def clustered(W_RC: Tensor, layout: CodebookLayout) -> CodebookWeight:
    """The nearest of the levels of k-means."""
    rows = layout.sharing(len(W_RC))
    levels = layout.snap(kmeans(W_RC, torch.ones(W_RC.shape[1]), layout.entries, rows))
    return CodebookWeight.of(Palette(nearest(W_RC, levels, rows), levels, rows), layout)


def weight(R: int, C: int, layout: CodebookLayout, seed: int = 0) -> CodebookWeight:
    return clustered(torch.randn(R, C, generator=torch.Generator().manual_seed(seed)), layout)


def artefact(folder: Path, model: PreTrainedModel, layout: CodebookLayout) -> PreTrainedModel:
    """Write a model whose linears are in codebooks, and give the model itself the values of these."""
    return write_in(folder, model, layout, lambda W_RC: clustered(W_RC, layout))


def plain_pack(codes: list[int], bits: int) -> list[int]:
    """The bits of all indices in a line, the highest first, in eights, filled up to whole units."""
    line = "".join(f"{code:0{bits}b}" for code in codes)
    whole = 24 if bits == 3 else 8
    line += "0" * (-len(line) % whole)
    return [int(line[i : i + 8], 2) for i in range(0, len(line), 8)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    entries=st.sampled_from([4, 8, 16, 256]),
    shared=st.sampled_from([1, 2, 5, None]),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_a_linear_comes_back_from_its_tensors_bit_for_bit(
    rows: int, columns: int, seed: int, entries: int, shared: int | None, dtype: str
) -> None:
    layout = CodebookLayout(entries, shared, dtype)
    made = weight(rows, columns, layout, seed)
    tensors = made.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout.shapes(rows, columns)
    again = layout.read(tensors, columns)
    assert torch.equal(again.codes_RC, made.codes_RC) and torch.equal(again.levels_GL, made.levels_GL)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tensors.items())
    by_hand = torch.stack(
        [made.levels_GL[r // (shared or rows)][made.codes_RC[r].long()] for r in range(rows)]
    )
    assert torch.equal(again.dequantize(DTYPES[dtype]), by_hand)
    stored = sum(t.nbytes for t in tensors.values())
    assert 8 * stored == pytest.approx(layout.bits((rows, columns)) * rows * columns)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bits=st.sampled_from([2, 3, 4, 8]), data=st.data())
def test_indices_lie_in_their_bytes_from_the_highest_bit_on(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=30))
    packed = pack(torch.tensor([codes, codes[::-1]]), bits)
    assert packed.tolist() == [plain_pack(codes, bits), plain_pack(codes[::-1], bits)]
    assert unpack(packed, len(codes), bits).tolist() == [codes, codes[::-1]]


def test_the_bits_of_a_weight_are_those_that_one_counts_by_hand() -> None:
    assert CodebookLayout(16, 1, "float16").bits((10, 256)) == 4 + 16 * 16 / 256
    assert CodebookLayout(8, None, "float32").bits((64, 64)) == 3 + 8 * 32 / 64**2
    assert CodebookLayout(4, 4, "bfloat16").bits((6, 32)) == 2 + 2 * 4 * 16 / (6 * 32), (
        "the last codebook is of two rows"
    )
    assert CodebookLayout(16, 1, "float16").refusal((8, 64)) is None
    assert "take 8192 bits each" not in (CodebookLayout(256, 1, "float16").refusal((8, 768)) or "")
    assert CodebookLayout(256, 1, "float16").refusal((8, 256)) == (
        "8 x 256 weights take 24 bits each in a codebook of 256 a row, and 16 as they are"
    )


@by_layout
def test_what_a_layout_says_is_read_back_from_json(layout: CodebookLayout) -> None:
    config = json.loads(json.dumps(transformers_quantizer.quantization_config([(layout, ["a.b"])])))
    assert layouts_of(config["schemes"]) == {"a.b": layout}


@pytest.mark.parametrize(
    "fields",
    [
        {"entries": 5},
        {"entries": "16"},
        {"rows": 0},
        {"rows": "all"},
        {"rows": True},
        {"dtype": "int8"},
        {"group_size": 64},
    ],
)
def test_a_layout_that_can_not_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="that this llmcompress doesn't know"):
        layouts_of(
            [{"format": "codebook", "entries": 16, "rows": 1, "dtype": "float16", "linears": ["a"], **fields}]
        )


def test_tensors_of_another_layout_or_damaged_ones_are_refused() -> None:
    layout = LAYOUTS[0]
    good = weight(4, 8, layout).tensors()
    for wrong in (
        {**good, "weight": good["weight"].int()},
        {**good, "weight": good["weight"][0]},
        {**good, "weight": good["weight"][:, :3]},
        {**good, "weight_levels": good["weight_levels"].float()},
        {**good, "weight_levels": good["weight_levels"][:, :8]},
        {"weight": good["weight"]},
    ):
        with pytest.raises(ModelError, match="a linear of 4 x 8 in Codebook"):
            read(wrong, layout, 4, 8)
    with pytest.raises(ModelError, match="a linear of 0 x 8 in Codebook"):
        layout.read({**good, "weight": good["weight"][0]}, 8)
    levels = good["weight_levels"].clone()
    levels[2, 3] = torch.inf
    with pytest.raises(ModelError, match="a linear of 4 x 8 is damaged: levels must be finite"):
        read({**good, "weight_levels": levels}, layout, 4, 8)


def test_a_palette_of_another_layout_is_refused() -> None:
    W_RC = torch.randn(6, 20)
    levels = kmeans(W_RC, torch.ones(20), 16, 2)
    palette = Palette(nearest(W_RC, levels, 2), levels, 2)
    with pytest.raises(ValueError, match="snap them"):
        CodebookWeight.of(palette, CodebookLayout(16, 2, "float16"))
    for layout in (
        CodebookLayout(16, 1, "float32"),
        CodebookLayout(8, 2, "float32"),
        CodebookLayout(16, None, "float32"),
    ):
        with pytest.raises(ValueError, match="are not Codebook"):
            CodebookWeight.of(palette, layout)
    assert torch.equal(
        CodebookWeight.of(palette, CodebookLayout(16, 2, "float32")).dequantize(), palette.weight()
    )


def test_levels_beyond_float16_become_its_largest() -> None:
    layout = CodebookLayout(4, 1, "float16")
    assert layout.snap(torch.tensor([[-1e6, 0.1, 1.0, 70000.0]])).tolist()[0][::3] == [-65504.0, 65504.0]


def test_a_linear_in_codebooks_is_found_among_the_tensors_of_a_checkpoint() -> None:
    made = weight(8, 16, LAYOUTS[0])
    tensors = {f"a.b.{name}": tensor for name, tensor in made.tensors().items()} | {"c.weight": torch.ones(1)}
    assert quantized_linears(tensors) == ["a.b"]
    parts = parts_of("a.b", tensors)
    assert parts.keys() == {"weight", "weight_levels"}
    assert torch.equal(dequantize(LAYOUTS[0].read(parts, 16)), made.dequantize())


# The module.


@by_layout
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_module_computes_what_the_weight_does(layout: CodebookLayout, bias: bool, tokens: int) -> None:
    made, bias_R = weight(24, 37, layout), torch.randn(24) if bias else None
    module = codebook.linear(made, bias_R)
    x = torch.randn(2, tokens, 37, requires_grad=True)
    plain = nn.functional.linear(x, made.dequantize(), bias_R)
    torch.testing.assert_close(module(x), plain)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain)
    (grad,), (expected,) = (torch.autograd.grad(out.square().sum(), x) for out in (module(x), plain))
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for name, p in module.named_parameters() if name != "bias")
    assert module.state_dict().keys() == {"weight", "weight_levels", *(("bias",) if bias else ())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_output_has_the_type_of_the_input(dtype: torch.dtype, tokens: int) -> None:
    made = weight(24, 37, LAYOUTS[0])
    x = torch.randn(tokens, 37, dtype=dtype)
    out = codebook.linear(made, torch.randn(24))(x)
    plain = x.double() @ made.dequantize(torch.float64).T
    bias = codebook.linear(made, None)(x)
    assert out.dtype == bias.dtype == dtype
    torch.testing.assert_close(
        bias.double(), plain, rtol=0, atol=20 * torch.finfo(dtype).eps * float(plain.abs().max())
    )


def test_a_bias_gets_its_gradient_with_inputs_that_want_none() -> None:
    module = codebook.linear(weight(24, 37, LAYOUTS[0]), torch.zeros(24))
    module.bias.requires_grad_(True)
    module(torch.randn(3, 37)).sum().backward()
    assert module.bias.grad is not None and torch.equal(module.bias.grad, torch.full((24,), 3.0))


def test_no_tokens_are_no_error() -> None:
    assert codebook.linear(weight(24, 37, LAYOUTS[0]), None)(torch.zeros(2, 0, 37)).shape == (2, 0, 24)


@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_of_a_dense_weight_is_kept(tokens: int) -> None:
    module = codebook.linear(weight(64, 128, LAYOUTS[0]), None)
    x = torch.randn(tokens, 128, requires_grad=True)
    held: list[int] = []

    def noted(tensor: Tensor) -> Tensor:
        held.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        module(x).sum().backward()
    assert sum(held) == module.weight.nbytes + module.weight_levels.nbytes
    every = [
        *module.parameters(),
        *module.buffers(),
        *(v for v in vars(module).values() if isinstance(v, Tensor)),
    ]
    assert sum(t.nbytes for t in every) == sum(held)


def test_levels_keep_their_type_where_a_model_is_cast() -> None:
    made = weight(16, 24, LAYOUTS[0])
    module = codebook.linear(made, torch.randn(16)).to(torch.bfloat16)
    assert module.weight.dtype == torch.uint8 and module.weight_levels.dtype == torch.float16
    assert module.bias.dtype == torch.bfloat16
    module.to(torch.float32)
    assert torch.equal(module.dequantized(torch.float32), made.dequantize())
    assert module.to("meta").weight.device.type == "meta"


def test_a_module_that_gets_other_values_computes_with_them() -> None:
    module, other = CodebookLinear(24, 16, LAYOUTS[2], bias=False), weight(16, 24, LAYOUTS[2], seed=1)
    module.load_state_dict(other.tensors())
    torch.testing.assert_close(module(torch.eye(24)).T, other.dequantize())
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in other.tensors().items())
    twin = copy.deepcopy(module)
    module.load_state_dict(weight(16, 24, LAYOUTS[2], seed=2).tensors())
    torch.testing.assert_close(twin(torch.eye(24)).T, other.dequantize())
    assert not torch.allclose(module(torch.eye(24)).T, other.dequantize())


# In a model.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_saves_the_same_bytes(family: str, tmp_path: Path) -> None:
    plain = artefact(tmp_path, pico(family), LAYOUTS[0])
    model = load(tmp_path)
    assert sum(isinstance(m, CodebookLinear) for m in model.modules()) == len(linears(plain))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


@by_layout
def test_every_layout_loads_and_is_the_model_of_its_values_when_dequantised(
    layout: CodebookLayout, tmp_path: Path
) -> None:
    for family in ("llama", "gpt2"):
        plain = artefact(tmp_path / family, pico(family), layout)
        model = load(tmp_path / family)
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(model.dequantize()), logits(plain))


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_every_layout(tmp_path: Path) -> None:
    folders = []
    for family in ("llama", "gpt2", "qwen3_moe"):
        for i, layout in enumerate(LAYOUTS):
            folders.append(tmp_path / f"{family}-{i}")
            artefact(folders[-1], pico(family), layout)
    subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, cwd=tmp_path, timeout=300)


def test_what_is_lost_or_damaged_is_an_error(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj"
    levels = whole[f"{name}.weight_levels"]
    for part, tensor, why in (
        ("weight_levels", None, f"the checkpoint lacks {name}.weight_levels"),
        ("weight", None, f"the checkpoint lacks {name}.weight"),
        ("weight", whole[f"{name}.weight"].int(), "int32 in the checkpoint, not torch.uint8"),
        ("weight_levels", torch.full_like(levels, torch.nan), "down_proj is damaged: levels must be finite"),
    ):
        changed = {key: value for key, value in whole.items() if key != f"{name}.{part}"}
        changed |= {} if tensor is None else {f"{name}.{part}": tensor}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=why):
            load(tmp_path)


@pytest.mark.slow
def test_a_whole_model_compiles_and_maps(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), LAYOUTS[0])
    model = load(tmp_path, device_map="auto")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
