"""compressed-tensors: what is written by name, shape and value, what is refused, and that plain transformers
computes from it what the artefact computes.

The last part needs the package compressed-tensors, which is in the extras vllm and dev. It loads the
exports in a process that does not import llmcompress.

Where inputs are rounded, a whole model does not show whether two computations are the same: the last bit of
an input decides a tie, a flip is a step of int8, and what follows is another. So there each linear is given
the same input here and there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.algorithms.activation_quantization import LARGEST
from llmcompress.errors import ModelError
from llmcompress.exports.artefact import Artefact
from llmcompress.exports.compressed_tensors import TARGET, packed
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.pipeline.export import Exported, export
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from tests.artefacts import TOKENS, live, load
from tests.bases import save_base, small_recipe, staged_recipe, write_text
from tests.exports.artefacts import written

UP = "model.layers.0.mlp.up_proj"
# name -> layout, and what pico makes of it
LAYOUTS: dict[str, tuple[IntegerLayout, dict[str, Any]]] = {
    "w8a8": (IntegerLayout("w8a8"), {}),
    "w8a8-static": (IntegerLayout("w8a8", "static"), {}),
    "w8a8-none": (IntegerLayout("w8a8", "none"), {}),
    "w8a16": (IntegerLayout("w8a16"), {}),
    "w4a16": (IntegerLayout("w4a16", "dynamic", 32), {}),
    "w4a16-wide": (IntegerLayout("w4a16", "dynamic", 128), {"intermediate_size": 384}),
    "w4a8": (IntegerLayout("w4a8", "dynamic", 64), {}),
    "w4a4": (IntegerLayout("w4a4", "dynamic", 64), {}),
    "bias": (IntegerLayout("w8a8"), {"attention_bias": True, "mlp_bias": True}),
    "tied": (IntegerLayout("w4a16", "dynamic", 32), {"tie_word_embeddings": True}),
    "half": (IntegerLayout("w4a16", "dynamic", 32), {"dtype": torch.bfloat16}),
}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, logging
logging.disable_progress_bar()
place, names = sys.argv[1], sys.argv[2:]
given, found = torch.load(f"{place}/given.pt"), {}
torch.set_grad_enabled(False)
largest = {8: 127, 4: 7}

def as_the_artefact(module, args):
    (x,), bits = args, module.quantization_scheme.input_activations.num_bits
    steps = x.float().abs().amax(-1, keepdim=True) / largest[bits]
    return ((x.float() / steps).round().mul(steps).to(x.dtype),)

def outputs_of(model, linears):
    x = {columns: x.to(model.dtype) for columns, x in given["inputs"].items()}
    return {name: model.get_submodule(name)(x[columns]) for name, columns in linears.items()}

for name in names:
    folder, dtype = f"{place}/{name}-ct", torch.bfloat16 if name == "half" else torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    model.eval()
    linears = {n: m.in_features for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    logits = model(given["tokens"]).logits
    weights = {n: model.get_submodule(n).weight.clone() for n in linears}
    outputs = outputs_of(model, linears)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None and scheme.input_activations.dynamic:
            module.quantization_enabled = False
            module.register_forward_pre_hook(as_the_artefact)
    found[name] = {"logits": logits, "weights": weights, "outputs": outputs}
    found[name]["outputs alike"] = outputs_of(model, linears)
    found[name]["logits alike"] = model(given["tokens"]).logits
assert not any(module.startswith("llmcompress") for module in sys.modules)
torch.save(found, f"{place}/found.pt")
"""


# 1. What is written.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 64])
def test_codes_are_packed_first_code_lowest(bits: int, columns: int) -> None:
    largest = LARGEST[bits]
    codes_RC = torch.randint(-largest, largest + 1, (3, columns), dtype=torch.int8)
    words = packed(codes_RC, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-columns * bits // 32))
    for row, column in ((row, column) for row in range(3) for column in range(columns)):
        word, place = divmod(column * bits, 32)
        code = ((int(words[row, word]) & 0xFFFFFFFF) >> place) % (1 << bits)
        assert code - (1 << (bits - 1)) == codes_RC[row, column]


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `packed`, with shifts."""
    shifts = torch.arange(0, 32, bits)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes.flatten(1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact in each layout, and beside it its export with -ct after its name."""
    place = tmp_path_factory.mktemp("exports")
    for name, (layout, config) in LAYOUTS.items():
        written(place / name, layout, **config)
        export(place / name, "compressed-tensors", place / f"{name}-ct")
    return place


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_scales_are_those_of_the_artefact(name: str, place: Path) -> None:
    artefact, layout = Artefact(place / name), LAYOUTS[name][0]
    tensors = load_file(place / f"{name}-ct" / "model.safetensors")
    for matrix in artefact.matrices.values():
        weight = artefact.stored(matrix)
        assert isinstance(weight, IntegerWeight)
        R, C = matrix.shape
        scale_RG = tensors.pop(f"{matrix.key}.weight_scale")
        if layout.weight_bits == 8 and layout.activation_bits == 8 and layout.activations != "none":
            codes_RC = tensors.pop(f"{matrix.key}.weight")
        else:
            codes_RC = unpacked(tensors.pop(f"{matrix.key}.weight_packed"), layout.weight_bits, C)
            assert tensors.pop(f"{matrix.key}.weight_shape").tolist() == [R, C]
        assert torch.equal(codes_RC, weight.codes_RC)
        assert scale_RG.dtype == torch.float32 and scale_RG.shape[0] == R
        meant_RC = codes_RC * scale_RG.repeat_interleave(C // scale_RG.shape[1], dim=1)
        torch.testing.assert_close(meant_RC, weight.dequantize(), rtol=2e-7, atol=0)
        if layout.activations == "static":
            assert tensors.pop(f"{matrix.key}.input_scale").tolist() == [pytest.approx(0.02)]
    plain = load_file(place / name / "model.safetensors")
    assert tensors.keys() == {key for keys in artefact.plain.values() for key in keys}
    assert all(torch.equal(tensor, plain[key]) for key, tensor in tensors.items())


def group(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [*config["config_groups"]] == ["group_0"]
    return {"format": config["format"], "ignore": config["ignore"], **config["config_groups"]["group_0"]}


@pytest.mark.parametrize(
    ("name", "form", "weights", "inputs"),
    [
        ("w8a8", "int-quantized", (8, "channel", None), (8, "token", True)),
        ("w8a8-static", "int-quantized", (8, "channel", None), (8, "tensor", False)),
        ("w8a8-none", "pack-quantized", (8, "channel", None), None),
        ("w8a16", "pack-quantized", (8, "channel", None), None),
        ("w4a16", "pack-quantized", (4, "group", 32), None),
        ("w4a8", "pack-quantized", (4, "group", 64), (8, "token", True)),
        ("w4a4", "pack-quantized", (4, "group", 64), (4, "token", True)),
    ],
)
def test_the_config_says_each_format(
    name: str, form: str, weights: tuple[Any, ...], inputs: tuple[Any, ...] | None, place: Path
) -> None:
    found = group(place / f"{name}-ct")
    assert found["format"] == form and found["targets"] == ["Linear"] and found["ignore"] == ["lm_head"]
    said = found["weights"]
    assert (said["num_bits"], said["strategy"], said["group_size"]) == weights
    assert said["symmetric"] and said["type"] == "int" and not said["dynamic"]
    said = found["input_activations"]
    assert inputs == (said and (said["num_bits"], said["strategy"], said["dynamic"]))


def test_the_report_says_what_each_matrix_became(place: Path) -> None:
    facts = json.loads((place / "w4a8-ct" / "export.json").read_text())
    assert (
        facts["converted"][UP] == "w4a8 -> pack-quantized int4, groups of 64, inputs int8, a scale per token"
    )
    assert any("127.5" in note for note in facts["notes"])
    card = (place / "w4a8-ct" / "README.md").read_text()
    assert "vllm serve w4a8-ct" in card and "| w4a8 -> pack-quantized int4" in card


def test_a_matrix_with_fewer_columns_than_a_group_has_one_scale_per_row(tmp_path: Path) -> None:
    folder = written(tmp_path / "small", IntegerLayout("w4a16", "dynamic", 4096))
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert {*made.facts.kinds} == {"w4a16 -> pack-quantized int4, one scale per row, inputs as they are"}


def test_the_space_that_is_asked_for_is_a_little_more_than_what_is_written(place: Path) -> None:
    for name in LAYOUTS:
        size = (place / f"{name}-ct" / "model.safetensors").stat().st_size
        assert size <= TARGET.size_bytes(Artefact(place / name)) <= 1.6 * size


# 2. Runs: native artefacts, embeddings, mixtures.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(tmp_path: Path, text: Path, config: dict[str, Any] | None = None, **quantize: Any) -> Path:
    base = save_base(tmp_path / "base", **(config or {}))
    run_recipe(small_recipe(text, base, **quantize), tmp_path / "small")
    return tmp_path / "small"


def exported(folder: Path) -> tuple[Exported, dict[str, Tensor]]:
    made = export(folder, "compressed-tensors", folder.with_name("out"))
    return made, load_file(made.folder / "model.safetensors")


@pytest.mark.usefixtures("short_runs")
def test_llm_int8_without_a_threshold_is_w8a8(tmp_path: Path, text: Path) -> None:
    folder = run(tmp_path, text, format="int8", threshold=0.0)
    made, tensors = exported(folder)
    assert {*made.facts.kinds} == {
        "int8 -> int-quantized int8, one scale per row, inputs int8, a scale per token"
    }
    before = load_file(folder / "model.safetensors")
    assert torch.equal(tensors[f"{UP}.weight"], before[f"{UP}.weight"])
    torch.testing.assert_close(tensors[f"{UP}.weight_scale"][:, 0], before[f"{UP}.SCB"] / 127)


@pytest.mark.usefixtures("short_runs")
def test_llm_int8_with_a_threshold_reads_inputs_as_they_are(tmp_path: Path, text: Path) -> None:
    made, tensors = exported(run(tmp_path, text, format="int8", threshold=6.0))
    assert {*made.facts.kinds} == {"int8 -> pack-quantized int8, one scale per row, inputs as they are"}
    assert any("threshold on (6)" in note for note in made.facts.notes)
    assert f"{UP}.SCB" not in tensors


@pytest.mark.usefixtures("short_runs")
def test_an_int8_embedding_becomes_plain_and_the_head_stays_tied(tmp_path: Path, text: Path) -> None:
    folder = run(tmp_path, text, {"tie_word_embeddings": True}, format="w8a8", embedding="int8")
    made, tensors = exported(folder)
    artefact = Artefact(folder)
    matrix = artefact.matrices["model.embed_tokens"]
    assert torch.equal(tensors["model.embed_tokens.weight"], artefact.weight(matrix))
    assert "lm_head.weight" not in tensors
    assert made.facts.converted["model.embed_tokens"] == "w8a8 -> float32"
    assert any("The head, tied to it" in note for note in made.facts.notes)
    assert group(made.folder)["ignore"] == ["lm_head"]


@pytest.mark.usefixtures("short_runs")
def test_a_quantised_head_is_targeted_by_its_name(tmp_path: Path, text: Path) -> None:
    made, tensors = exported(run(tmp_path, text, format="w8a16", head="quantize"))
    assert "lm_head.weight_packed" in tensors
    found = group(made.folder)
    assert found["targets"] == ["Linear", "lm_head"] and found["ignore"] == []


@pytest.mark.usefixtures("short_runs")
def test_several_schemes_each_name_their_linears(tmp_path: Path, text: Path) -> None:
    overrides = {"*.down_proj": {"format": "w4a16", "group_size": 64}}
    made, _ = exported(run(tmp_path, text, format="w8a8", overrides=overrides))
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    by_format = {entry["format"]: entry["targets"] for entry in config["config_groups"].values()}
    assert by_format["pack-quantized"] == [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    assert UP in by_format["int-quantized"] and "Linear" not in by_format["int-quantized"]


STAGES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "sparse": ([{"sparsify": {"pattern": "2:4"}}], {}),
    "shared": ([{"share": {"pairs": [[0, 1]]}}, {"quantize": {"format": "w8a16"}}], {}),
    "uneven": ([{"prune": {"axis": "ffn", "keep": [256, 192]}}, {"quantize": {"format": "w8a8"}}], {}),
    "low rank": (
        [
            {"low_rank": {"rank": 8, "skip": ["*.self_attn.*", "*.gate_proj", "*.up_proj"]}},
            {"quantize": {"format": "w8a8", "skip": ["*.down_proj"]}},
        ],
        {},
    ),
    "codebook": ([{"quantize": {"format": "codebook", "entries": 4}}], {}),
    "experts": ([{"quantize": {"format": "w8a8"}}], {"family": "qwen3_moe"}),
}


def staged(tmp_path: Path, text: Path, name: str) -> Path:
    stages, config = STAGES[name]
    base = save_base(tmp_path / "base", **config)
    run_recipe(staged_recipe(text, base, *stages, samples=8, length=24), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
@pytest.mark.usefixtures("short_runs")
def test_what_layers_share_is_written_for_each(tmp_path: Path, text: Path) -> None:
    made, tensors = exported(staged(tmp_path, text, "shared"))
    ups = [tensors[f"model.layers.{index}.mlp.up_proj.weight_packed"] for index in (0, 1)]
    assert torch.equal(*ups)
    assert any("once for each layer" in note for note in made.facts.notes)


# 3. What is refused.


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        export(folder, "compressed-tensors", folder.with_name("out"))
    assert not folder.with_name("out").exists()
    return str(caught.value)


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    said = refusal(written(tmp_path / "small", IntegerLayout("w4a16", "dynamic", 48)))
    assert "model.layers.0.self_attn.q_proj is w4a16: its 64 columns don't divide into groups of 48" in said


def test_static_inputs_of_4_bit_weights_are_refused(tmp_path: Path) -> None:
    said = refusal(written(tmp_path / "small", IntegerLayout("w4a8", "static", 32)))
    assert "vLLM has no kernel for 4-bit weights with one stored scale" in said


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    assert "no linear is stored in integers" in refusal(save_base(tmp_path / "base"))


def test_a_conv1d_is_refused(tmp_path: Path) -> None:
    said = refusal(written(tmp_path / "small", IntegerLayout("w8a8"), "gpt2"))
    assert "transformer.h.0.attn.c_attn is w8a8: it is a Conv1D" in said


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("uneven", "its layers have widths of their own (per_layer_config)"),
        (
            "low rank",
            "model.layers.0.mlp.down_proj is basis of rank 8: compressed-tensors has no layout for a",
        ),
        ("sparse", "model.layers.0.self_attn.q_proj is sparse 2:4: compressed-tensors has no sparse layout"),
        ("codebook", "model.layers.0.self_attn.q_proj is codebook"),
        ("experts", "the experts of model.layers.0.mlp.experts.down_proj are linears with names"),
    ],
)
def test_what_has_no_layout_there_is_refused(name: str, why: str, tmp_path: Path, text: Path) -> None:
    assert why in refusal(staged(tmp_path, text, name))


@pytest.mark.usefixtures("short_runs")
def test_nf4_is_refused_and_loads_as_it_is(tmp_path: Path, text: Path) -> None:
    said = refusal(run(tmp_path, text, format="nf4", group_size=64))
    assert "model.layers.0.self_attn.q_proj is nf4: compressed-tensors has no such table of levels" in said
    assert "plain transformers loads the folder as it is, and so does vLLM up to 0.27.1" in said


@pytest.mark.usefixtures("short_runs")
def test_linears_that_vllm_makes_one_need_one_format(tmp_path: Path, text: Path) -> None:
    overrides = {"*.v_proj": {"format": "w8a16"}}
    said = refusal(run(tmp_path, text, format="w8a8", overrides=overrides))
    assert "vLLM makes these linears one" in said
    assert "model.layers.0.self_attn.v_proj is pack-quantized int8" in said


@pytest.mark.usefixtures("short_runs")
def test_a_linear_that_was_kept_beside_quantised_ones_is_refused(tmp_path: Path, text: Path) -> None:
    said = refusal(run(tmp_path, text, format="w8a8", skip=["*.layers.1.mlp.gate_proj"]))
    assert "model.layers.1.mlp.gate_proj is plain" in said


# 4. What plain transformers computes from it.


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install 'llmcompress[vllm]'",
)


@pytest.fixture(scope="module")
def inputs() -> dict[int, Tensor]:
    """What linears are given, by their number of columns C: [4, 10, C], tokens of different magnitudes."""
    draw = torch.Generator().manual_seed(7)
    magnitudes = torch.logspace(-2, 1, 40).reshape(4, 10, 1)
    return {C: torch.randn(4, 10, C, generator=draw) * magnitudes for C in (64, 128, 320, 384)}


@pytest.fixture(scope="module")
def found(place: Path, inputs: dict[int, Tensor]) -> dict[str, dict[str, Any]]:
    """What a process without llmcompress computes from each export: logits, the weights after a forward,
    and the outputs of every linear; `alike`, with inputs rounded dynamically as the artefact rounds
    them."""
    return elsewhere(place, LAYOUTS, TOKENS, inputs)


def elsewhere(
    place: Path, names: Iterable[str], tokens: Tensor, inputs: dict[int, Tensor]
) -> dict[str, dict[str, Any]]:
    """Run LOAD on the exports `names` in a folder."""
    torch.save({"tokens": tokens, "inputs": inputs}, place / "given.pt")
    command = [sys.executable, "-c", LOAD, str(place), *names]
    packages = [path for path in sys.path if (Path(path) / "compressed_tensors").is_dir()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, dict[str, Any]] = torch.load(place / "found.pt")
    return result


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest magnitude of ours."""
    return float((ours - theirs).detach().abs().max() / ours.detach().abs().max())


@needs_package
@pytest.mark.parametrize("name", LAYOUTS)
def test_plain_transformers_has_the_same_weights(
    name: str, place: Path, found: dict[str, dict[str, Any]]
) -> None:
    artefact = Artefact(place / name)
    # a loader casts scales to the dtype of the model
    tolerance = 2e-7 if artefact.dtype == torch.float32 else 2**-7
    for linear, weight in found[name]["weights"].items():
        meant = artefact.weight(artefact.matrices[linear])
        torch.testing.assert_close(weight.float(), meant, rtol=tolerance, atol=0)


@needs_package
@pytest.mark.parametrize("name", ["w8a8", "w8a8-none", "w8a16", "w4a16", "w4a16-wide", "bias", "tied"])
def test_plain_transformers_computes_the_same_logits(
    name: str, place: Path, found: dict[str, dict[str, Any]]
) -> None:
    assert apart(live(load(place / name).eval()), found[name]["logits alike"]) < 1e-3


@needs_package
@pytest.mark.parametrize("name", ["w8a8-none", "w8a16", "w4a16", "w4a16-wide", "tied"])
def test_weights_alone_match_to_float_rounding(
    name: str, place: Path, found: dict[str, dict[str, Any]]
) -> None:
    dense: Any = cast(Any, load(place / name)).dequantize()
    assert apart(live(dense.eval()), found[name]["logits"]) < 1e-5


@needs_package
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "bias"])
def test_a_linear_computes_what_ours_does_once_inputs_are_rounded_alike(
    name: str, place: Path, inputs: dict[int, Tensor], found: dict[str, dict[str, Any]]
) -> None:
    model = load(place / name).eval()
    for linear, theirs in found[name]["outputs alike"].items():
        ours = model.get_submodule(linear)(inputs[cast(Any, model.get_submodule(linear)).in_features])
        assert apart(ours, theirs) < 1e-5


@needs_package
@pytest.mark.parametrize(("name", "bits"), [("w8a8", 8), ("w4a8", 8), ("w4a4", 4), ("w8a8-static", 8)])
def test_how_inputs_are_rounded_is_what_the_notes_say(
    name: str, bits: int, place: Path, inputs: dict[int, Tensor], found: dict[str, dict[str, Any]]
) -> None:
    """compressed-tensors takes steps of the largest magnitude of a token / 127.5 and codes from -128 on."""
    artefact, lowest = Artefact(place / name), -(1 << (bits - 1))
    for linear, theirs in found[name]["outputs"].items():
        matrix = artefact.matrices[linear]
        x = inputs[matrix.shape[1]]
        steps = x.abs().amax(-1, keepdim=True) / (-lowest - 0.5)
        if name == "w8a8-static":
            steps = torch.tensor(0.02)
        rounded_x = (x / steps).round().clamp(lowest, -lowest - 1) * steps
        assert apart(rounded_x @ artefact.weight(matrix).T, theirs) < 1e-5


# 5. Real models.

SHARED = Path(__file__).parents[3] / "shared" / "models"
REAL = {"demo": None, "stories260K": SHARED / "stories260K", "wikilm-8m": SHARED / "wikilm-8m"}


@needs_package
@pytest.mark.slow
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("form", ["w4a16", "w8a8"])
@pytest.mark.parametrize("name", REAL)
def test_an_export_of_a_real_model_computes_what_the_artefact_does(
    name: str, form: str, tmp_path: Path
) -> None:
    """In float32: logits where weights alone are rounded, and each linear where inputs are too."""
    base = REAL[name]
    if base is not None and not base.is_dir():
        pytest.skip(f"no {base}")
    data = {"source": "python-docs", "samples": 4, "length": 32, "evaluation_samples": 2}
    stages = [{"quantize": {"format": form, "rounding": "nearest"}}]
    recipe = Recipe.model_validate({"base": str(base or "demo"), "data": data, "stages": stages})
    run_recipe(recipe, tmp_path / name)
    export(tmp_path / name, "compressed-tensors", tmp_path / f"{name}-ct")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    columns = {model.get_submodule(linear).in_features for linear in Artefact(tmp_path / name).matrices}
    draw = torch.Generator().manual_seed(3)
    inputs = {C: torch.randn(2, 8, C, generator=draw) for C in columns}
    tokens = torch.randint(model.config.vocab_size, (2, 48), generator=draw)
    theirs = elsewhere(tmp_path, [name], tokens, inputs)[name]
    with torch.no_grad():
        if form == "w4a16":
            assert apart(model(tokens).logits, theirs["logits"]) < 1e-3
        for linear, output in theirs["outputs alike"].items():
            module = model.get_submodule(linear)
            assert apart(module(inputs[module.in_features]), output) < (1e-3 if form == "w4a16" else 1e-5)
