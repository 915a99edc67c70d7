"""`evaluate` on what others quantised: measured where transformers can load it here, else one line says what
is missing."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.errors import ModelError
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, small_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

BLOCK = 64  # of FP8 scales


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    text = write_text(tmp_path_factory.mktemp("text") / "facts.txt")
    return DataSpec(source=str(text), samples=1, length=32, evaluation_samples=6)


@pytest.fixture(scope="module")
def sequences(spec: DataSpec) -> Tensor:
    return load_data(spec, byte_tokenizer(), VOCABULARY, 96).evaluation


def perplexity(folder: Path, sequences: Tensor) -> float:
    """That of a model as plain transformers loads it, with the weights that its 4-bit codes stand for."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()
    with torch.no_grad():
        scores = model(sequences, use_cache=False).logits.double()
    return math.exp(float(F.cross_entropy(scores[:, :-1].flatten(0, 1), sequences[:, 1:].flatten())))


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def rewritten(
    base: Path, folder: Path, quantization: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """A checkpoint of other tensors and a `quantization_config`, with the base's config and tokenizer."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_told(folder: Path, spec: DataSpec, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        evaluate(str(folder), data=spec)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_4_bit_codes_that_are_stored_as_another_type_are_read(
    storage: str, double_quant: bool, spec: DataSpec, sequences: Tensor, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.float32,
    )
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path / "stock")
    byte_tokenizer().save_pretrained(tmp_path / "stock")
    stored = load_file(tmp_path / "stock/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == getattr(torch, storage)
    found = evaluate(str(tmp_path / "stock"), against=str(base), data=spec)
    assert found.perplexity == pytest.approx(perplexity(tmp_path / "stock", sequences), rel=1e-3)
    assert 0 < known(found.kl_nats_mean) < 0.5
    plain = Checkpoint.open(base).parameters
    assert Checkpoint.open(tmp_path / "stock", base=False).parameters == plain


def fp8(base: Path, folder: Path) -> Path:
    """Fine-grained FP8 as DeepSeek's checkpoints have it: a scale for each layer of BLOCK x BLOCK weights."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = tensor
            continue
        R, C = tensor.shape
        rows, columns = -(-R // BLOCK), -(-C // BLOCK)
        padded = (
            F.pad(tensor, (0, columns * BLOCK - C, 0, rows * BLOCK - R))
            .unflatten(0, (rows, BLOCK))
            .unflatten(2, (columns, BLOCK))
        )
        scale = padded.abs().amax((1, 3)) / 448
        codes = (padded / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:R, :C]
        tensors[name] = codes.to(torch.float8_e4m3fn).contiguous()
        tensors[f"{name}_scale_inv"] = scale
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewritten(base, folder, said, tensors)


@pytest.mark.filterwarnings("ignore")  # transformers tells that it dequantises without a GPU
def test_fp8_is_measured_as_transformers_loads_it(spec: DataSpec, sequences: Tensor, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = fp8(base, tmp_path / "fp8")
    found = evaluate(str(folder), against=str(base), data=spec)
    assert found.perplexity == pytest.approx(perplexity(folder, sequences), rel=1e-3)
    assert 0 < known(known(found.kl_nats_mean)) < 0.1 and known(found.tokens_per_s) > 0
    assert found.size_bytes == (folder / "model.safetensors").stat().st_size
    turned = evaluate(str(base), against=str(folder), data=spec)  # as the base of another, too
    assert turned.top1_agreement == found.top1_agreement
    for act in (plan_recipe, lambda told: run_recipe(told, tmp_path / "out")):
        with pytest.raises(ModelError, match="is quantised already"):
            act(small_recipe(Path(spec.source), folder))


def gptq(base: Path, folder: Path, method: str = "gptq", **said: Any) -> Path:
    """A checkpoint in GPTQ's layout, of zeros: 8 codes of 4 bits an int32, groups of 32 inputs."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not is_linear(name):
            tensors[name] = tensor
            continue
        R, C = tensor.shape
        linear = name.removesuffix(".weight")
        tensors[f"{linear}.qweight"] = torch.zeros(C // 8, R, dtype=torch.int32)
        tensors[f"{linear}.qzeros"] = torch.zeros(C // 32, R // 8, dtype=torch.int32)
        tensors[f"{linear}.scales"] = torch.zeros(C // 32, R, dtype=torch.float16)
        tensors[f"{linear}.g_idx"] = torch.arange(C, dtype=torch.int32) // 32
    return rewritten(base, folder, {"quant_method": method, "bits": 4, "group_size": 32, **said}, tensors)


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel, which reads these, is installed"
)
def test_what_needs_a_package_names_it(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    assert_told(
        gptq(base, tmp_path / "gptq", desc_act=False, sym=True), spec, "is quantised by gptq", "pip install"
    )
    assert_told(
        gptq(base, tmp_path / "awq", "awq", zero_point=True, version="gemm"),
        spec,
        "is quantised by awq",
        "gptqmodel",
    )


@pytest.mark.parametrize(
    ("said", "package", "words"),
    [
        ({"quant_method": "quanto", "weights": "int8"}, "optimum", "optimum-quanto"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq", "hqq"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao", "torchao"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"},
            "compressed_tensors",
            "compressed-tensors",
        ),
        ({"quant_method": "aqlm"}, "aqlm", "aqlm"),
    ],
)
def test_each_method_names_its_own(
    said: dict[str, Any], package: str, words: str, spec: DataSpec, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    folder = rewritten(base, tmp_path / "model", said, load_file(base / "model.safetensors"))
    assert_told(
        folder, spec, f"is quantised by {said['quant_method']}, and transformers can't load it here", words
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_needs_a_gpu_says_so(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    said = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    assert_told(
        rewritten(base, tmp_path / "model", said, load_file(base / "model.safetensors")),
        spec,
        "requires a GPU",
    )


def test_a_method_that_nobody_knows_is_not_read_as_plain_numbers(spec: DataSpec, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    weights = load_file(base / "model.safetensors")
    unknown: tuple[dict[str, Any], ...] = ({"quant_method": "rune"}, {"quant_method": ["gptq"]}, {"bits": 4})
    for number, said in enumerate(unknown):
        folder = rewritten(base, tmp_path / str(number), said, weights)
        assert_told(folder, spec, "is quantised by", "does not know")
    newer = {"quant_method": "llmcompress", "schemes": [], "order": "other"}
    assert_told(rewritten(base, tmp_path / "newer", newer, weights), spec, "update it")


def test_an_incomplete_model_and_pickles_are_refused(spec: DataSpec, tmp_path: Path) -> None:
    folder = fp8(save_base(tmp_path / "base"), tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_told(folder, spec, "has no tensor for model.layers.1.input_layernorm.weight (1 missing)")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_told(folder, spec, "safetensors")


@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_are_measured_where_their_package_is(
    spec: DataSpec, sequences: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    base = save_base(tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors[name] = tensor
        if is_linear(name):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "weights": {**eight, "strategy": "channel"},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    said = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["lm_head"],
    }
    folder = rewritten(base, tmp_path / "model", said, tensors)
    found = evaluate(str(folder), against=str(base), data=spec)
    assert found.perplexity == pytest.approx(perplexity(folder, sequences), rel=1e-3)
    assert 0 < known(found.kl_nats_mean) < 0.02


@pytest.mark.filterwarnings("ignore")
def test_torchao_is_measured_where_it_is(spec: DataSpec, sequences: Tensor, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    base = save_base(tmp_path / "base")
    config: Any = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    found = evaluate(str(tmp_path / "model"), against=str(base), data=spec)
    assert found.perplexity == pytest.approx(perplexity(tmp_path / "model", sequences), rel=1e-3)
    assert 0 < known(found.kl_nats_mean) < 0.01
