"""The bitsandbytes border against bitsandbytes itself, bit for bit, and against a process that has only
transformers."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.derivation.example_configs import example_config
from llmcompress.derivation.shrink import shrunk, tiny_model
from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from tests.models import pico

stock: Any = functional  # typed in part only
Linear4bit, Params4bit = cast(Any, modules).Linear4bit, cast(Any, modules).Params4bit
FORMATS: tuple[bitsandbytes_layout.FourBitFormat, ...] = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
repacks = pytest.mark.skipif(
    not stock.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes repacks nothing"
)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """From layer 2048 up bitsandbytes' CPU dequantisation is compiled at first use, which takes most of a
    minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def own(
    format: bitsandbytes_layout.FourBitFormat,
    group_size: int,
    double_quant: bool,
    dtype: torch.dtype = torch.float32,
) -> bitsandbytes_layout.Packed:
    """Codes and scales that no nearest rounding gives: all codes, scales of both signs and zero."""
    generator = torch.Generator().manual_seed(group_size)
    columns = max(256, group_size)
    codes = torch.randint(16, (64, columns), generator=generator, dtype=torch.uint8)
    absmax = torch.randn(64, columns // group_size, generator=generator) * 0.1
    absmax[0, 0] = 0
    nested = bitsandbytes_layout.double_quantize(absmax) if double_quant else None
    return bitsandbytes_layout.Packed(
        codes, nested.decode() if nested else absmax, format, group_size, dtype, nested
    )


def theirs(packed: bitsandbytes_layout.Packed, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes reads from our tensors."""
    stored = bitsandbytes_layout.tensors(packed)
    data = stored.pop("weight")
    state = stock.QuantState.from_dict(
        {name.removeprefix("weight."): tensor for name, tensor in stored.items()}, device="cpu"
    )
    state.dtype = dtype
    weight: Tensor = stock.dequantize_4bit(data, state)
    return weight


def equal(a: bitsandbytes_layout.Packed, b: bitsandbytes_layout.Packed) -> bool:
    nested = (a.nested is None) == (b.nested is None)
    if a.nested is not None and b.nested is not None:
        fields = ("codes", "nested_absmax", "levels", "offset")
        nested = all(torch.equal(getattr(a.nested, field), getattr(b.nested, field)) for field in fields)
    same = (a.format, a.group_size, a.dtype) == (b.format, b.group_size, b.dtype)
    return same and nested and torch.equal(a.codes_RC, b.codes_RC) and torch.equal(a.absmax_RG, b.absmax_RG)


@pytest.mark.parametrize("format", FORMATS)
def test_a_code_under_scale_one_is_its_level(format: bitsandbytes_layout.FourBitFormat) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(32, 4)
    packed = bitsandbytes_layout.Packed(codes, torch.ones(32, 1), format, 64, torch.float32)
    assert torch.equal(theirs(packed, torch.float32), bitsandbytes_layout.grid(format).repeat(32, 4))


@pytest.mark.parametrize(
    ("format", "group_size", "double_quant"),
    [*itertools.product(FORMATS, bitsandbytes_layout.GROUP_SIZES, (False, True))],
)
def test_dequantising_is_bit_equal_to_bitsandbytes(
    format: bitsandbytes_layout.FourBitFormat, group_size: int, double_quant: bool
) -> None:
    packed = own(format, group_size, double_quant)
    for dtype in DTYPES:
        assert torch.equal(bitsandbytes_layout.dequantize(packed, dtype), theirs(packed, dtype))


@pytest.mark.parametrize(
    ("format", "group_size", "double_quant"),
    [*itertools.product(FORMATS, bitsandbytes_layout.GROUP_SIZES, (False, True))],
)
def test_nearest_rounding_writes_the_bytes_of_stock_bitsandbytes(
    format: bitsandbytes_layout.FourBitFormat, group_size: int, double_quant: bool
) -> None:
    for dtype in DTYPES:
        weight = noise(48, max(256, group_size), dtype=dtype)
        weight[3] = 0  # whole blocks of zeros
        data, state = stock.quantize_4bit(
            weight, blocksize=group_size, compress_statistics=double_quant, quant_type=format
        )
        expected = {
            "weight": data,
            **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()},
        }
        found = bitsandbytes_layout.tensors(
            bitsandbytes_layout.quantize_nearest(weight, format, group_size, double_quant)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("format", "double_quant", "dtype"), [*itertools.product(FORMATS, (False, True), DTYPES)]
)
def test_packing_and_unpacking_returns_the_same_linear(
    format: bitsandbytes_layout.FourBitFormat, double_quant: bool, dtype: torch.dtype
) -> None:
    packed = own(format, 64, double_quant, dtype)
    assert equal(bitsandbytes_layout.unpack(bitsandbytes_layout.tensors(packed)), packed)


def test_rounded_scales_in_a_checkpoint_are_refused() -> None:
    stored = bitsandbytes_layout.tensors(own("nf4", 64, False))
    stored["weight.absmax"] = stored["weight.absmax"].bfloat16()
    with pytest.raises(ModelError, match="float32"):
        bitsandbytes_layout.unpack(stored)


@pytest.mark.parametrize("shape", [(5, 3), (64, 4), (300, 7)])
def test_double_quantisation_is_bit_equal_to_bitsandbytes(shape: tuple[int, int]) -> None:
    absmax = noise(*shape).abs()
    flat = absmax.reshape(-1)
    codes, state = stock.quantize_blockwise(flat - flat.mean(), blocksize=256)
    found = bitsandbytes_layout.double_quantize(absmax)
    assert torch.equal(found.codes, codes.reshape(shape))
    assert torch.equal(found.decode().reshape(-1), stock.dequantize_blockwise(codes, state) + flat.mean())


def test_scales_that_do_not_decode_are_no_linear() -> None:
    packed = own("nf4", 64, True)
    with pytest.raises(ValueError, match="decodes to"):
        replace(packed, absmax_RG=packed.absmax_RG * 1.01)
    with pytest.raises(ValueError, match="groups of 96"):
        replace(packed, group_size=96)


def runs_on_the_kernel(R: int, C: int, group_size: int, format: bitsandbytes_layout.FourBitFormat) -> bool:
    """Whether a stock module computes the right thing without gradients."""
    n = R * C
    codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    absmax = noise(-(-n // group_size)).abs()
    state = stock.QuantState(
        absmax, torch.Size((R, C)), bitsandbytes_layout.grid(format), group_size, format, torch.float32
    )
    module = Linear4bit(
        C, R, bias=False, compute_dtype=torch.float32, quant_type=format, device="meta"
    ).eval()
    data = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
    module.weight = Params4bit.from_prequantized(
        data, state.as_dict(packed=True), device="cpu", module=module
    )
    weight = (
        bitsandbytes_layout.grid(format)[codes.int()] * absmax.repeat_interleave(group_size)[:n]
    ).reshape(R, C)
    x = noise(3, C, seed=5)
    try:
        with torch.no_grad():
            found = module(x)
    except (AssertionError, RuntimeError):
        return False
    exact = x @ weight.T
    return float((found - exact).norm() / exact.norm()) < 0.01


@repacks
@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_is_refused_exactly_where_the_kernels_fail(
    format: bitsandbytes_layout.FourBitFormat,
) -> None:
    whole = [(64, max(128, group_size), group_size) for group_size in bitsandbytes_layout.GROUP_SIZES] + [
        (32, group_size, group_size) for group_size in bitsandbytes_layout.GROUP_SIZES
    ]
    columns = [
        (64, C, group_size)
        for C in (32, 96, 100, 160, 172, 192, 320, 384)
        for group_size in (32, 64, 128, 256)
    ]
    rows = [(R, 128, 64) for R in (1, 7, 8, 16, 24, 31, 32, 33, 48, 63, 96, 160)]
    for R, C, layer in whole + columns + rows:
        refused = bitsandbytes_layout.refusal((R, C), format, layer)
        assert (refused is None) == runs_on_the_kernel(R, C, layer, format), (R, C, layer, refused)


def test_a_refusal_says_which_group_size_would_fit() -> None:
    assert "use group_size 32" in (bitsandbytes_layout.refusal((64, 96), "nf4", 64) or "")
    assert "no group_size fits" in (bitsandbytes_layout.refusal((64, 172), "nf4", 64) or "")
    assert "48 output rows" in (bitsandbytes_layout.refusal((48, 128), "nf4", 64) or "")


@pytest.mark.parametrize(("format", "double_quant"), [*itertools.product(FORMATS, (False, True))])
def test_a_live_linear_computes_with_our_weight(
    format: bitsandbytes_layout.FourBitFormat, double_quant: bool
) -> None:
    packed, bias, x = own(format, 64, double_quant), noise(64, seed=3), noise(5, 256, seed=4)
    module = bitsandbytes_linear.linear(packed, bias)
    exact = torch.nn.functional.linear(x, bitsandbytes_layout.dequantize(packed), bias)
    assert torch.equal(module(x.clone().requires_grad_()), exact)
    with torch.no_grad():
        assert float((module(x) - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize(("format", "double_quant"), [*itertools.product(FORMATS, (False, True))])
def test_a_live_linear_gives_its_exact_codes_back_after_a_forward(
    format: bitsandbytes_layout.FourBitFormat, double_quant: bool
) -> None:
    packed, bias, x = own(format, 64, double_quant), noise(64, seed=3), noise(5, 256, seed=4)
    module = bitsandbytes_linear.linear(packed, bias)
    assert equal(bitsandbytes_linear.packed_of(module), packed)
    with torch.no_grad():
        before = module(x)
    assert equal(bitsandbytes_linear.packed_of(module), packed)
    state = module.state_dict()
    expected = {**bitsandbytes_layout.tensors(packed), "bias": bias}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(module(x), before)  # reading the state left the module as it was


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_pass_through_a_live_linear_after_a_forward_repacked_it(
    format: bitsandbytes_layout.FourBitFormat,
) -> None:
    packed = own(format, 64, double_quant=False)
    module, bias = bitsandbytes_linear.linear(packed, noise(64)), noise(64)
    x = noise(3, 256, seed=1).requires_grad_()
    with torch.no_grad():
        module(x)  # on a CPU with AVX512-BF16 this is what repacks
    out = module(x)
    out.backward(bias.expand(3, 64))
    torch.testing.assert_close(
        x.grad, (bias @ bitsandbytes_layout.dequantize(packed)).expand(3, 256), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(bitsandbytes_linear.packed_of(module).codes_RC, packed.codes_RC)


@repacks
def test_a_stock_linear_is_read_before_a_forward_and_refused_after() -> None:
    packed = own("nf4", 64, False)
    stored = bitsandbytes_layout.tensors(packed)
    module = Linear4bit(
        256, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta"
    ).eval()
    module.weight = Params4bit.from_prequantized(stored.pop("weight"), stored, device="cpu", module=module)
    assert equal(bitsandbytes_linear.packed_of(module), packed)
    with torch.no_grad():
        module(noise(2, 256))
    with pytest.raises(ModelError, match="load it again"):
        bitsandbytes_linear.packed_of(module)


LOADER = """
import json, sys, torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    weights = {
        name + (".codes" if isinstance(m, Linear4bit) else ".dense"):
            dequantize_4bit(m.weight.data, m.weight.quant_state)
            if isinstance(m, Linear4bit)
            else m.weight.data.clone()
        for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    with torch.no_grad():
        weights["logits"] = model(torch.arange(24)[None]).logits
    save_file(weights, folder + "/seen.safetensors")
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""
KEPT = "model.layers.1.mlp.down_proj"


@pytest.mark.slow
def test_a_plain_from_pretrained_dequantises_what_we_computed(tmp_path: Path) -> None:
    variants: list[tuple[bitsandbytes_layout.FourBitFormat, int, bool]] = [
        *(
            ("nf4", group_size, double_quant)
            for group_size in (32, 64, 128, 256)
            for double_quant in (False, True)
        ),
        ("fp4", 64, False),
        ("fp4", 128, True),
    ]
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "head_dim": 64,
    }
    model = pico("llama", **sizes, num_key_value_heads=2, dtype="bfloat16").bfloat16()
    expected: dict[str, dict[str, Tensor]] = {}
    for format, layer, double_quant in variants:
        folder = tmp_path / f"{format}-{layer}-{double_quant}"
        state, seen = dict(model.state_dict()), {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in ("lm_head", KEPT):
                packed = bitsandbytes_layout.quantize_nearest(
                    module.weight.data.float(), format, layer, double_quant
                )
                sign = -1.0 if not double_quant else 1.0  # a sign that no nearest rounding gives
                packed = replace(packed, absmax_RG=packed.absmax_RG * sign, dtype=torch.bfloat16)
                del state[f"{name}.weight"]
                state.update(
                    {f"{name}.{part}": tensor for part, tensor in bitsandbytes_layout.tensors(packed).items()}
                )
                seen[f"{name}.codes"] = bitsandbytes_layout.dequantize(packed)
            elif isinstance(module, torch.nn.Linear):
                seen[f"{name}.dense"] = module.weight.data
        config = model.config.to_dict()
        skip = ["lm_head", KEPT]
        config["quantization_config"] = bitsandbytes_layout.quantization_config(
            format, double_quant, torch.bfloat16, skip
        )
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        expected[str(folder)] = seen
    subprocess.run([sys.executable, "-c", LOADER, *expected], check=True, cwd=tmp_path, timeout=300)
    for folder_name, weights in expected.items():
        seen = load_file(f"{folder_name}/seen.safetensors")
        assert bool(seen.pop("logits").isfinite().all())
        # so exactly the skipped linears stayed dense: layer 1, not 10 or 11
        assert seen.keys() == weights.keys()
        assert all(torch.equal(seen[name], weights[name]) for name in weights)


def test_a_live_model_saves_and_loads_with_plain_transformers(tmp_path: Path) -> None:
    model, tokens = pico("llama"), torch.arange(24)[None]
    for name, module in list(model.named_modules()):
        shape = getattr(getattr(module, "weight", None), "shape", ())
        if (
            isinstance(module, torch.nn.Linear)
            and name != "lm_head"
            and bitsandbytes_layout.refusal(shape, "nf4", 64) is None
        ):
            model.set_submodule(
                name,
                bitsandbytes_linear.linear(
                    bitsandbytes_layout.quantize_nearest(module.weight.data, "nf4", 64, False), None
                ),
            )
    kept = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    model.config.quantization_config = bitsandbytes_layout.quantization_config(
        "nf4", False, torch.float32, kept
    )
    with torch.no_grad():
        before = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(again(tokens).logits, before)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_transformers_has_no_native_codes_for_experts(family: str, tmp_path: Path) -> None:
    """Once it has, a mixture whose experts are nf4 can be written so that plain transformers loads it."""
    tiny_model(shrunk(example_config(family), 2), dtype=torch.float32).save_pretrained(tmp_path)
    asked: Any = cast(Any, BitsAndBytesConfig)(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked)
    coded = [name for name, each in model.named_parameters() if isinstance(each, Params4bit)]
    stacks = [name for name, each in model.named_parameters() if each.dim() == 3]
    assert len(coded) == 2 * 4 and len(stacks) == 2 * 2, (
        "write experts natively where transformers loads them"
    )
