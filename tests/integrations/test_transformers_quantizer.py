"""Models that we quantised, through plain `from_pretrained`, against the float model with the same
rounding."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout, four_bit, integer
from llmcompress.formats.four_bit import FourBitLayout, FourBitLinear
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.integrations import transformers_quantizer
from llmcompress.integrations.registration import register
from tests.artefacts import linears
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

Any_ = IntegerLayout | FourBitLayout
STEP = torch.tensor(0.04)  # of static activations
TOKENS = torch.arange(3, 27)[None]
SCHEMES: tuple[Any_, ...] = (
    IntegerLayout("w8a8"),
    IntegerLayout("w8a8", "static"),
    IntegerLayout("w8a8", "none"),
    IntegerLayout("w4a8", group_size=32),
    IntegerLayout("w4a8", "static", 24),  # divides nothing
    IntegerLayout("w4a4", group_size=16),
    IntegerLayout("w4a4", "static", 64),
    FourBitLayout("nf4", 64),
    FourBitLayout("nf4", 32, double_quant=True),
    FourBitLayout("fp4", 64),
)
by_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.format}-{getattr(s, 'activations', '')}{s.group_size}"
)


def nearest(W: Tensor, scheme: Any_) -> IntegerWeight | bitsandbytes_layout.Packed:
    """Round to nearest: integers with a row's scale, and the nearest multiplier for each layer's own."""
    if isinstance(scheme, FourBitLayout):
        return bitsandbytes_layout.quantize_nearest(
            W.contiguous(), scheme.format, scheme.group_size, scheme.double_quant
        )
    step = STEP.clone() if scheme.activations == "static" else None
    if scheme.group_size is None:
        scale = W.abs().amax(1) / 127
        return IntegerWeight((W / scale[:, None]).round().to(torch.int8), scale, scheme, None, step)
    R, C = W.shape
    G = -(-C // scheme.group_size)
    layers = nn.functional.pad(W, (0, G * scheme.group_size - C)).reshape(R, G, -1)
    wanted = layers.abs().amax(2) / 7
    scale = wanted.amax(1) / integer.MULTIPLIER
    multiplier = (wanted / scale[:, None]).round().clamp(1, integer.MULTIPLIER)
    codes = (layers / (scale[:, None] * multiplier)[..., None]).round().clamp(-7, 7).reshape(R, -1)[:, :C]
    return IntegerWeight(codes.to(torch.int8), scale, scheme, multiplier.to(torch.uint8), step)


def stored(weight: IntegerWeight | bitsandbytes_layout.Packed) -> dict[str, Tensor]:
    return weight.tensors() if isinstance(weight, IntegerWeight) else four_bit.tensors(weight)


class Rounded(nn.Module):
    """The oracle: a float linear that rounds its tokens as the scheme says, in plain float arithmetic."""

    def __init__(
        self, weight: IntegerWeight | bitsandbytes_layout.Packed, bias: Tensor | None, scheme: Any_
    ) -> None:
        super().__init__()
        W = (
            weight.dequantize()
            if isinstance(weight, IntegerWeight)
            else bitsandbytes_layout.dequantize(weight)
        )
        self.weight, self.bias, self.scheme = W, bias, scheme

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.scheme, IntegerLayout) and self.scheme.activations != "none":
            largest = 2 ** (self.scheme.activation_bits - 1) - 1
            step = STEP if self.scheme.activations == "static" else x.abs().amax(-1, keepdim=True) / largest
            x = (x / step).round().clamp(-largest, largest) * step
        return nn.functional.linear(x, self.weight, self.bias)


def artefact(folder: Path, model: PreTrainedModel, schemes: Sequence[Any_]) -> None:
    """Write a model whose linears take the schemes in turn, and turn the model into the oracle of that."""
    names: dict[Any_, list[str]] = {scheme: [] for scheme in schemes}
    state = dict(model.state_dict())
    for i, (name, module) in enumerate(linears(model).items()):
        scheme = schemes[i % len(schemes)]
        weight = cast(Tensor, module.weight).detach()
        found = nearest(weight.T if isinstance(module, Conv1D) else weight, scheme)
        del state[f"{name}.weight"]
        state.update({f"{name}.{part}": tensor for part, tensor in stored(found).items()})
        names[scheme].append(name)
        model.set_submodule(name, Rounded(found, cast(Tensor | None, module.bias), scheme))
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = transformers_quantizer.quantization_config([*names.items()])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, **options: Any) -> Any:
    model, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options))
    assert not any(
        set(info[kind]) - {"lm_head.weight"}
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), info
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return cast(Tensor, model(TOKENS).logits).float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@by_scheme
def test_a_loaded_model_computes_what_rounding_in_floats_does(scheme: Any_, tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3"):
        oracle = pico(family)
        artefact(tmp_path / family, oracle, [scheme])
        model = load(tmp_path / family)
        ours = [m for m in model.modules() if isinstance(m, IntegerLinear | FourBitLinear)]
        assert len(ours) == (8 if family == "gpt2" else 14)
        assert not any(
            tensor.requires_grad for m in ours for part, tensor in m.named_parameters() if part != "bias"
        )
        # the 4-bit kernel of some CPUs computes in bfloat16; an activation that falls on the other side of a
        # half moves 1e-3
        assert distance(logits(model), logits(oracle)) < (0.02 if isinstance(scheme, FourBitLayout) else 3e-3)
        if isinstance(scheme, IntegerLayout) and scheme.activations == "none":
            torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_saves_the_same_bytes(family: str, tmp_path: Path) -> None:
    oracle = pico(family)
    artefact(
        tmp_path,
        oracle,
        [IntegerLayout("w8a8"), IntegerLayout("w4a8", group_size=32), IntegerLayout("w4a4", "static", 24)],
    )
    model = load(tmp_path)
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert torch.equal(logits(load(tmp_path / "again")), before) and bool(before.isfinite().all())


@by_scheme
def test_a_forward_leaves_the_saved_bytes_as_they_were(scheme: Any_, tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [scheme])
    model = load(tmp_path)
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert torch.equal(logits(load(tmp_path / "again")), before)


def test_one_model_mixes_all_formats(tmp_path: Path) -> None:
    oracle = pico("llama")
    artefact(tmp_path, oracle, SCHEMES)
    model = load(tmp_path)
    found = {
        name: m.scheme for name, m in model.named_modules() if isinstance(m, IntegerLinear | FourBitLinear)
    }
    assert found == {name: SCHEMES[i % len(SCHEMES)] for i, name in enumerate(linears(pico("llama")))}
    assert distance(logits(model), logits(oracle)) < 0.05


def test_int8_codes_of_the_stock_format_join_a_mixed_model() -> None:
    weight = integer.quantize_nearest(pico("llama").get_parameter("model.layers.0.mlp.up_proj.weight"))
    ours = weight.as_integer()
    assert torch.equal(ours.codes_RC, weight.codes_RC)
    torch.testing.assert_close(ours.dequantize(), weight.dequantize(), rtol=1e-6, atol=0)


LOADER = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError:
        continue
    raise SystemExit(f"{folder} was loaded as a plain model")
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_every_format(tmp_path: Path) -> None:
    folders = []
    for family in ("llama", "gpt2"):
        for i, scheme in enumerate((*SCHEMES, None)):
            folders.append(tmp_path / f"{family}-{i}")
            artefact(folders[-1], pico(family), SCHEMES if scheme is None else [scheme])
    subprocess.run([sys.executable, "-c", LOADER, *folders], check=True, cwd=tmp_path, timeout=300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = pico("llama")
    artefact(
        tmp_path,
        oracle,
        [
            IntegerLayout("w8a8"),
            IntegerLayout("w4a8", group_size=32),
            FourBitLayout("nf4", 64, double_quant=True),
        ],
    )
    exact = load(tmp_path)
    for model in (load(tmp_path, dtype=dtype), load(tmp_path).to(dtype)):
        assert model.lm_head.weight.dtype == dtype
        for name, tensor in exact.state_dict().items():
            if "_proj" in name:
                assert (
                    torch.equal(model.state_dict()[name], tensor)
                    and model.state_dict()[name].dtype == tensor.dtype
                )
        assert distance(logits(model), logits(oracle)) < 0.1


@by_scheme
def test_a_model_on_the_disk_computes_the_same(scheme: Any_, tmp_path: Path) -> None:
    for family, inner in (("llama", "model"), ("gpt2", "transformer")):
        folder = tmp_path / family
        artefact(folder, pico(family), [scheme])
        expected = logits(load(folder))
        places = dict.fromkeys(
            (f"{inner}.embed_tokens", f"{inner}.wte", f"{inner}.wpe", f"{inner}.norm"), "cpu"
        )
        places |= {
            f"{inner}.layers": "disk",
            f"{inner}.h": "disk",
            f"{inner}.rotary_emb": "cpu",
            f"{inner}.ln_f": "cpu",
            "lm_head": "cpu",
        }
        present = {name for name, _ in load(folder).named_modules()}
        model = load(
            folder,
            device_map={k: v for k, v in places.items() if k in present},
            offload_folder=str(folder / "off"),
        )
        assert any(p.device.type == "meta" for p in model.parameters())
        # without its kernel a 4-bit weight is exact, where the kernel of some CPUs computes in bfloat16
        tolerance = 0.02 if isinstance(scheme, FourBitLayout) else 0
        torch.testing.assert_close(
            logits(model), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
        with pytest.raises(ModelError, match="offloaded"):
            model.dequantize()


def test_an_automatic_device_map_changes_nothing(tmp_path: Path) -> None:
    artefact(tmp_path, pico("qwen3"), SCHEMES)
    assert torch.equal(logits(load(tmp_path, device_map="auto")), logits(load(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_dequantising_gives_a_plain_model(family: str, tmp_path: Path) -> None:
    oracle, plain = pico(family), pico(family)
    artefact(
        tmp_path,
        oracle,
        [IntegerLayout("w8a8"), IntegerLayout("w4a8", group_size=32), FourBitLayout("nf4", 64)],
    )
    model = load(tmp_path).dequantize()
    for name, module in linears(plain).items():
        found, expected = model.get_submodule(name), cast(Any, oracle.get_submodule(name))
        assert type(found) is type(module)
        weight = cast(Tensor, found.weight)
        assert torch.equal(weight.T if isinstance(found, Conv1D) else weight, expected.weight)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model))


@by_scheme
def test_tokens_are_the_same_with_and_without_a_cache(scheme: Any_, tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [scheme])
    model = load(tmp_path)
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


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama", tie_word_embeddings=True), [IntegerLayout("w8a8")])
    model = load(tmp_path)
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight
        and model.lm_head.weight.dtype == torch.float32
    )
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_a_model_without_its_head_loads_the_same_file(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [IntegerLayout("w4a8", group_size=32)])
    body = cast(Any, AutoModel.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, load(tmp_path).model(TOKENS).last_hidden_state)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@by_scheme
def test_a_lost_tensor_is_an_error(scheme: Any_, place: str, tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [scheme])
    whole = load_file(tmp_path / "model.safetensors")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": place,
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    for lost in [name for name in whole if name.startswith("model.layers.1.mlp.down_proj.")]:
        save_file(
            {name: t for name, t in whole.items() if name != lost},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(ModelError, match=lost):
            AutoModelForCausalLM.from_pretrained(
                tmp_path, device_map=places, offload_folder=str(tmp_path / "off")
            )


def test_a_tensor_of_another_type_or_shape_is_an_error(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [IntegerLayout("w8a8")])
    whole, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    save_file({**whole, name: whole[name].float()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"float32 in the checkpoint, not torch\.int8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file({**whole, name: whole[name][0].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_cannot_be_is_refused(tmp_path: Path) -> None:
    def entry(**fields: Any) -> dict[str, Any]:
        return {"schemes": [{"format": "w8a8", "linears": ["a"], **fields}]}

    for config, why in (
        ({"schemes": [], "order": 2}, "order"),
        (entry(format="w3a8"), "w3a8"),
        (entry(shuffle=True), "shuffle"),
        (entry(linears=["a", "a"]), "two schemes"),
        (entry(format="nf4", group_size=48), "48"),
    ):
        with pytest.raises(ModelError, match=why):
            transformers_quantizer.CompressedConfig(**cast(Any, config))
    for names, tied, why in (
        (["model.layers.0.mlp.gone"], False, "no such linear"),
        (["model.layers.0"], False, "no such linear"),
        (["lm_head"], True, "tied"),
    ):
        artefact(tmp_path, pico("llama", tie_word_embeddings=tied), [IntegerLayout("w8a8")])
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["schemes"][0]["linears"] += names
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=why):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_plain_model_is_not_quantised_on_the_way(tmp_path: Path) -> None:
    pico("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=transformers_quantizer.CompressedConfig()
        )


def test_a_copy_and_other_codes_compute_as_they_should(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), SCHEMES)
    model = load(tmp_path)
    before, other = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    state = {
        name: t.flip(0) if "_proj.weight" in name and t.dtype == torch.uint8 else t
        for name, t in model.state_dict().items()
    }
    other.load_state_dict(
        {name: t if int(t.min()) else model.state_dict()[name] for name, t in state.items()}
    )
    assert torch.equal(logits(model), before) and distance(logits(other), before) > 0.1


def test_a_4_bit_linear_makes_its_kernel_where_its_codes_are() -> None:
    packed = bitsandbytes_layout.quantize_nearest(
        pico("llama").get_parameter("model.layers.0.mlp.up_proj.weight").detach(), "nf4", 64, True
    )
    module = FourBitLinear(64, 320, FourBitLayout("nf4", 64, True), bias=False)
    module.load_state_dict(four_bit.tensors(packed))
    assert (
        torch.equal(module.dequantized(torch.float32), bitsandbytes_layout.dequantize(packed))
        and len(module.kernel) == 1
    )
    assert module.to("meta").kernel == ()


def test_importing_the_plugin_again_is_harmless(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [IntegerLayout("w8a8")])
    before = logits(load(tmp_path))
    register()
    assert torch.equal(logits(load(tmp_path)), before)


def test_a_whole_model_compiles_and_trains_an_adapter(tmp_path: Path) -> None:
    artefact(tmp_path, pico("llama"), [IntegerLayout("w8a8"), IntegerLayout("w4a8", group_size=32)])
    model = load(tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-3, atol=1e-3)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    model(TOKENS, labels=TOKENS).loss.backward()
    grad = model.model.embed_tokens.weight.grad
    assert bool(grad.isfinite().all()) and bool((grad[TOKENS[0, :-1]].abs().sum(1) > 0).all())


# which peft 0.21 still asks for
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_lora_adapter_trains_on_top_and_is_loaded_again(tmp_path: Path) -> None:
    artefact(
        tmp_path / "model",
        pico("llama"),
        [IntegerLayout("w8a8"), IntegerLayout("w4a8", group_size=32), FourBitLayout("nf4", 64)],
    )
    model, before = load(tmp_path / "model"), logits(load(tmp_path / "model"))
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), before), "a new adapter changes nothing"
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted.eval()))
