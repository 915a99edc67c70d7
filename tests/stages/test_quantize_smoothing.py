"""A scale that crosses changes nothing, the search never ends worse than it began, and planted outliers are
smoothed away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.algorithms.activation_quantization import round_tokens
from llmcompress.architectures.families import anatomy_of
from llmcompress.architectures.shape_grammar import scale
from llmcompress.errors import RecipeError
from llmcompress.formats import registry
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.schemes import FourBitScheme, Int8Scheme, IntegerScheme, QuantScheme
from llmcompress.integrations.distributed import ALONE
from llmcompress.modeling import token_limit
from llmcompress.modeling.decoder_layer import DecoderLayer
from llmcompress.modeling.finished_parts import FinishedParts
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.quantize.smoothing import SAMPLE, Sample, Smooth, best
from tests.bases import VOCABULARY, byte_tokenizer, known, small_recipe, write_text
from tests.models import FAMILIES, VARIANTS, pico

pytestmark = pytest.mark.usefixtures("short_runs")

CPU = torch.device("cpu")
SAME = 1e-5  # of the largest output
CONFIGS = [*((family, {}) for family in FAMILIES), *VARIANTS]
every_config = pytest.mark.parametrize(
    ("family", "config"),
    CONFIGS,
    ids=[f"{family}-{'-'.join(config)}" if config else family for family, config in CONFIGS],
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"]
)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_limit, "TOKENS_AT_ONCE", 72)  # 8 sequences of 24 tokens: batches of 3, 3 and 2


def layers(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Iterator[DecoderLayer]:
    """The layers of a model whose weights are stored in `dtype`."""
    cast(nn.Module, model).to(dtype)
    sequences = torch.randint(1, 150, (8, 24), generator=torch.Generator().manual_seed(1))
    return walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences)


def weights(layer: DecoderLayer) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in layer.module.named_parameters()}


def restore(layer: DecoderLayer, before: Mapping[str, Tensor]) -> None:
    for name, data in before.items():
        layer.module.get_parameter(name).data = data


def drawn(layer: DecoderLayer, key: str, spread: float = 1.0) -> Tensor:
    """A factor for each unit of a producer, by e^spread up or down."""
    _, _, axes = layer.anatomy.producer(key)
    shape = [layer.sizes[axis] for axis in axes]
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(2))).exp()


def moved(layer: DecoderLayer, before: Sequence[Tensor]) -> float:
    """How far the outputs are from those before, over the largest of them."""
    pairs = list(zip(layer.outputs(layer.inputs), before, strict=True))
    return max(float((now - then).abs().max() / then.abs().max()) for now, then in pairs)


def norm_of(layer: DecoderLayer, key: str) -> str | None:
    """The weight of a producer that is a norm."""
    return f"{key}.weight" if layer.anatomy.layer.get(f"{key}.weight") == "hidden" else None


@every_dtype
@every_config
def test_a_scale_that_crosses_leaves_the_output_of_the_block(
    family: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    for layer in layers(pico(family, **config), dtype):
        before, outputs = weights(layer), layer.outputs(layer.inputs)
        for key in set(layer.anatomy.scale_pairs) - {"mlp.experts.gate_up_proj[1]"}:
            changed = layer.cross(key, drawn(layer, key), dtype)
            assert moved(layer, outputs) <= SAME, key
            now = weights(layer)
            assert {name for name in now if not torch.equal(now[name], before[name])} == set(changed), key
            left = [name for name in changed if name != norm_of(layer, key)]
            for name in left:  # each has its part in it
                layer.module.get_parameter(name).data = before[name]
                assert moved(layer, outputs) > 100 * SAME, (key, name)
                layer.module.get_parameter(name).data = now[name]
            restore(layer, before)


@every_dtype
def test_a_scale_crosses_from_experts_to_experts(dtype: torch.dtype) -> None:
    for layer in layers(pico("qwen3_moe"), dtype):
        outputs = layer.outputs(layer.inputs)
        key = "mlp.experts.gate_up_proj[1]"
        assert set(layer.cross(key, drawn(layer, key), dtype)) == {
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        }
        assert moved(layer, outputs) <= SAME


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt2", "opt", "phi3"])
def test_the_readers_get_what_the_norm_is_really_divided_by(family: str) -> None:
    checked = 0
    for layer in layers(pico(family), torch.bfloat16):
        offset = layer.anatomy.norm_offset
        for key, consumers in layer.anatomy.scale_pairs.items():
            norm, before, factor = norm_of(layer, key), weights(layer), drawn(layer, key)
            if norm is None:
                continue
            layer.cross(key, factor, torch.bfloat16)
            now = weights(layer)
            assert torch.equal(now[norm], now[norm].bfloat16().float()), "it can't be stored as it is"
            real = (before[norm].double() + offset) / (now[norm].double() + offset)
            assert float((real / factor - 1).abs().max()) > 1e-3, (
                "bfloat16 rounded nothing: this shows nothing"
            )
            for reader in consumers:
                row = reader if reader in layer.anatomy.layer else f"{reader}.weight"
                columns = real[:, None] if reader in layer.anatomy.conv1d else real
                torch.testing.assert_close(
                    now[row].double(), before[row].double() * columns, rtol=1e-6, atol=0
                )
            if f"{key}.bias" in now:
                torch.testing.assert_close(
                    now[f"{key}.bias"].double(), before[f"{key}.bias"].double() / real, rtol=1e-6, atol=0
                )
            restore(layer, before)
            checked += 1
    assert checked == 4


@every_dtype
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "opt"])
def test_the_widest_factors_cross_too(family: str, dtype: torch.dtype) -> None:
    """Factors are kept within 4096, either way; what is divided by so much must not round to nothing."""
    for layer in layers(pico(family), dtype):
        before, outputs = weights(layer), layer.outputs(layer.inputs)
        for key in layer.anatomy.scale_pairs:
            factor = drawn(layer, key)
            factor.flatten()[::3], factor.flatten()[1::3] = 4096.0, 1 / 4096
            layer.cross(key, factor, dtype)
            assert moved(layer, outputs) <= SAME, key
            restore(layer, before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_channel_that_a_norm_shuts_off_stays_shut_off(family: str) -> None:
    model = pico(family)
    anatomy = anatomy_of(model.config)
    key = next(iter(anatomy.scale_pairs))
    for module in model.get_submodule(anatomy.layers).children():
        module.get_parameter(f"{key}.weight").data[5:9] = -anatomy.norm_offset
    for layer in layers(model):
        outputs = layer.outputs(layer.inputs)
        layer.cross(key, drawn(layer, key), torch.bfloat16)
        assert not (layer.module.get_parameter(f"{key}.weight").data[5:9] + anatomy.norm_offset).any()
        assert moved(layer, outputs) <= SAME


def test_the_reference_does_not_notice_a_scale_that_crosses() -> None:
    model = pico("qwen2")
    sequences = torch.randint(1, 150, (8, 24), generator=torch.Generator().manual_seed(1))
    plain = [
        layer.targets
        for layer in walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences, reference=True)
    ]
    for layer in walk(InMemoryModel(model.config, model.state_dict(), CPU), sequences, reference=True):
        for key in layer.anatomy.scale_pairs:
            layer.cross(key, drawn(layer, key), torch.float32)
        layer.set_weight("mlp.down_proj", 0.5 * layer.weight("mlp.down_proj"))
        for now, then in zip(layer.targets, plain[layer.index], strict=True):
            assert float((now - then).abs().max() / then.abs().max()) <= 2 * SAME


def rounded_error(
    layer: DecoderLayer, consumers: Sequence[str], coding: QuantScheme, aims: Sequence[Tensor]
) -> float:
    """What the nearest codes of the readers and the rounding of their inputs cost in the layer's output, in
    plain hooks."""

    def read(module: nn.Module, args: tuple[Tensor, ...], *, bits: int | None) -> tuple[Tensor, ...]:
        return args if bits is None else (round_tokens(args[0], bits), *args[1:])

    bits = None if coding.input_largest is None else 4 if coding.input_largest == 7 else 8
    before, hooks = weights(layer), []
    for reader in consumers:
        layer.set_weight(reader, registry.dequantize(coding.nearest(layer.weight(reader))))
        hooks.append(layer.module.get_submodule(reader).register_forward_pre_hook(partial(read, bits=bits)))
    outs = layer.outputs(layer.inputs[: len(aims)])
    for hook in hooks:
        hook.remove()
    restore(layer, before)
    return sum(
        float(((out - aim).square().sum(-1) / aim.square().sum(-1)).sum())
        for out, aim in zip(outs, aims, strict=True)
    )


SEARCHED: list[tuple[QuantScheme, str, torch.dtype]] = [
    (IntegerScheme(IntegerLayout("w8a8")), "smoothquant", torch.float32),
    (Int8Scheme(0.0), "smoothquant", torch.bfloat16),
    (IntegerScheme(IntegerLayout("w4a8", group_size=32)), "smoothquant", torch.float16),
    (IntegerScheme(IntegerLayout("w4a4", group_size=64)), "awq", torch.float32),
    (FourBitScheme("nf4", 64, False, torch.bfloat16), "awq", torch.bfloat16),
    (IntegerScheme(IntegerLayout("w8a8", "none")), "awq", torch.bfloat16),
]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize(
    ("coding", "method", "dtype"), SEARCHED, ids=[f"{coding.format}-{how}" for coding, how, _ in SEARCHED]
)
def test_the_search_never_ends_worse_than_no_smoothing(
    family: str, coding: QuantScheme, method: Any, dtype: torch.dtype
) -> None:
    for layer in layers(pico(family, num_hidden_layers=1, **one_layer(family)), dtype):
        before, outputs = weights(layer), layer.outputs(layer.inputs)
        found = Smooth(method=method).search(
            layer, dict.fromkeys(layer.anatomy.linears, coding), lambda name: dtype
        )
        after = weights(layer)
        assert moved(layer, outputs) <= SAME, "the search changed what the layer computes"
        assert not layer.rounds, "a rounding of the search was left behind"
        assert set(found) == {
            key
            for key, consumers in layer.anatomy.scale_pairs.items()
            if set(consumers) & set(layer.anatomy.linears)
        }
        restore(layer, before)
        for key, factor in found.items():
            consumers = [
                reader for reader in layer.anatomy.scale_pairs[key] if reader in layer.anatomy.linears
            ]
            plain = rounded_error(layer, consumers, coding, outputs[:SAMPLE])
            layer.cross(key, factor, dtype)
            assert rounded_error(layer, consumers, coding, outputs[:SAMPLE]) <= plain * (1 + 1e-3), key
        assert all(torch.equal(data, after[name]) for name, data in weights(layer).items()), (
            "it says other factors than its own"
        )


def test_the_best_few_on_a_quarter_and_no_scale_are_tried_on_the_whole_sample() -> None:
    """Candidates are numbers and their own losses; on a quarter the last one looks best, wrongly."""
    factors = [torch.tensor(float(n)) for n in (9, 5, 4, 3, 2, 8)]
    sample = Sample([torch.zeros(8, 3, 2)], [torch.zeros(8, 3, 2)], FinishedParts({}))
    asked: list[tuple[int, float]] = []

    def loss(on: Sample, factor: Tensor) -> float:
        sequences = sum(map(len, on.inputs))
        asked.append((sequences, float(factor)))
        return 0.0 if sequences < 8 and factor == 8 else float(factor)

    assert best(factors, sample, loss, ALONE) == 2
    assert asked == [*((2, n) for n in (5, 4, 3, 2, 8)), *((8, n) for n in (9, 3, 2, 8))]
    asked.clear()
    assert best(factors[:3], sample, loss, ALONE) == 4
    assert asked == [(8, n) for n in (9, 5, 4)], "few candidates need no quarter"
    asked.clear()
    single = Sample([torch.zeros(1, 3, 2)], [torch.zeros(1, 3, 2)], FinishedParts({}))
    assert best(factors, single, loss, ALONE) == 8 and len(asked) == 6, "a sequence has no quarter"


def one_layer(family: str) -> dict[str, Any]:
    return {"layer_types": ["full_attention"]} if "gemma" in family else {}


def test_a_given_exponent_is_that_of_the_papers() -> None:
    """Largest input and weight of a unit over all columns that read it, four query heads for each value
    channel."""
    coding: QuantScheme = IntegerScheme(IntegerLayout("w8a8"))
    linears = ["self_attn.o_proj", "mlp.down_proj"]
    for layer in layers(pico("llama")):
        read: dict[str, list[Tensor]] = {linear: [] for linear in linears}
        for inputs, _ in layer.reads(*layer.anatomy.consumers):
            for linear in linears:
                read[linear].append(inputs[linear].flatten(0, -2).double())
        before = weights(layer)
        for method, alpha in (("smoothquant", 0.5), ("smoothquant", 0.8), ("awq", 0.4)):
            smooth = Smooth.model_validate({"method": method, "alpha": alpha})
            found = smooth.search(layer, dict.fromkeys(linears, coding), lambda name: torch.float32)
            restore(layer, before)
            assert list(found) == ["self_attn.v_proj", "mlp.up_proj"]
            for key, linear in zip(found, linears, strict=True):
                X_TC, W_RC = torch.cat(read[linear]), layer.weight(linear).double()
                units = (2, 4, 16) if key == "self_attn.v_proj" else (320, 1)
                top, weight_top, size = (
                    x.reshape(units).amax(1)
                    for x in (X_TC.abs().amax(0), W_RC.abs().amax(0), X_TC.square().mean(0).sqrt())
                )
                raw = top**alpha / weight_top ** (1 - alpha) if method == "smoothquant" else size**alpha
                expected = raw / raw.log().mean().exp()
                torch.testing.assert_close(
                    found[key].double().reshape(expected.shape), expected, rtol=1e-4, atol=0
                )


def test_only_what_is_rounded_is_smoothed() -> None:
    for layer in layers(pico("llama")):
        found = Smooth().search(
            layer, {"mlp.gate_proj": IntegerScheme(IntegerLayout("w8a8"))}, lambda name: torch.float32
        )
        assert list(found) == ["post_attention_layernorm"]


# Outliers that were planted: some channels of the norms are 50 to 100 times as large, and the columns that
# read them as small.


def plant(model: PreTrainedModel) -> PreTrainedModel:
    anatomy = anatomy_of(model.config)
    sizes, generator = anatomy.axis_sizes(model.config), torch.Generator().manual_seed(4)
    for layer in model.get_submodule(anatomy.layers).children():
        for key, consumers in anatomy.scale_pairs.items():
            if anatomy.layer.get(f"{key}.weight") != "hidden":
                continue
            factor = torch.ones(sizes["hidden"])
            factor[torch.randperm(len(factor), generator=generator)[:3]] = (
                torch.rand(3, generator=generator) * 50 + 50
            )
            gain = layer.get_parameter(f"{key}.weight").data
            gain.copy_((gain + anatomy.norm_offset) * factor - anatomy.norm_offset)
            if f"{key}.bias" in anatomy.layer:
                layer.get_parameter(f"{key}.bias").data.mul_(factor)
            for reader in consumers:
                columns, row = layer.get_parameter(f"{reader}.weight").data, anatomy.layer[f"{reader}.weight"]
                columns.copy_(scale(columns, row, sizes, ("hidden",), 1 / factor))
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_planting_outliers_changes_nothing_but_what_is_rounded(family: str) -> None:
    tokens = torch.randint(1, 150, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain, planted = (model(tokens).logits for model in (pico(family), plant(pico(family))))
    assert float((plain - planted).abs().max() / plain.abs().max()) <= SAME


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "format"),
    [("llama", "w8a8"), ("gpt2", "w8a8"), ("gemma2", "w8a8"), ("llama", "int8"), ("llama", "w4a4")],
)
def test_planted_outliers_are_smoothed_away(family: str, format: str, text: Path, tmp_path: Path) -> None:
    kl: dict[str, float] = {}
    smooth: dict[str, Any]
    for name, smooth in (("plain", {}), ("planted", {}), ("smoothed", {"smooth": {}})):
        model = pico(family, vocab_size=VOCABULARY, num_hidden_layers=1, **one_layer(family))
        base = tmp_path / name
        (model if name == "plain" else plant(model)).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        recipe = small_recipe(text, base, format=format, rounding="nearest", **smooth)
        kl[name] = known(run_recipe(recipe, tmp_path / f"{name}-out").fidelity.kl_nats_mean)
    assert kl["plain"] > 0 and kl["planted"] > (100 if format != "w4a4" else 5) * kl["plain"]
    assert kl["smoothed"] < 1.3 * kl["plain"]


@pytest.mark.parametrize(
    ("smooth", "why"),
    [
        ("{method: smoothquantt}", "smooth.method: .*'smoothquant' or 'awq', not 'smoothquantt'"),
        ("{alpa: 0.5}", "smooth.alpa: unknown key; did you mean alpha?"),
        ("{alpha: 2}", "smooth.alpha: .*not 2"),
        ("true", "smooth: .*not True"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(smooth: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.parse(f"stages: [quantize: {{format: w8a8, smooth: {smooth}}}]")
    assert "\n" not in str(caught.value)
