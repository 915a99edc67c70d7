"""The stage on pico models: which linears it takes, which it keeps and why, and that nearest is stock
bitsandbytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.formats.four_bit import FourBitLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.stages.quantize.stage import Quantize
from tests.bases import VOCABULARY, known, save_base, small_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def resident(family: str = "llama", **config: Any) -> LayerwiseModel:
    model = pico(family, vocab_size=VOCABULARY, **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


def own(folder: Path) -> dict[str, bitsandbytes_layout.Packed]:
    tensors = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".weight.absmax") for name in tensors if name.endswith(".weight.absmax")]
    return {name: bitsandbytes_layout.unpack(bitsandbytes_layout.parts_of(name, tensors)) for name in names}


@pytest.mark.parametrize(
    ("family", "format", "group_size", "double_quant"),
    [
        ("llama", "nf4", 64, False),
        ("llama", "nf4", 64, True),
        ("llama", "fp4", 32, False),
        ("qwen2", "fp4", 64, True),
        ("opt", "nf4", 64, False),
    ],
)
def test_nearest_is_stock_bitsandbytes(
    family: str,
    format: bitsandbytes_layout.FourBitFormat,
    group_size: int,
    double_quant: bool,
    text: Path,
    tmp_path: Path,
) -> None:
    base = save_base(tmp_path / "base", family, num_hidden_layers=1)
    settings = {"format": format, "group_size": group_size, "double_quant": double_quant}
    run_recipe(small_recipe(text, base, rounding="nearest", **settings), tmp_path / "out")
    ours = own(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, packed in ours.items():
        weight = model.get_submodule(name).weight.data
        stock = bitsandbytes_layout.stock().quantize_4bit(
            weight, blocksize=group_size, compress_statistics=double_quant, quant_type=format
        )
        assert torch.equal(
            bitsandbytes_layout.dequantize(packed), bitsandbytes_layout.stock().dequantize_4bit(*stock)
        )
    if group_size == 64:  # the only group_size that transformers quantises with
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=format,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
        loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        loaded.save_pretrained(tmp_path / "stock")
        theirs, found = (
            load_file(tmp_path / "stock" / "model.safetensors"),
            load_file(tmp_path / "out" / "model.safetensors"),
        )
        assert theirs.keys() == found.keys()
        assert all(torch.equal(theirs[name], found[name]) for name in theirs)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("format", "group_size", "double_quant"), [("fp4", 64, False), ("nf4", 32, True), ("nf4", 128, False)]
)
def test_calibration_beats_nearest_at_the_same_bytes(
    format: str, group_size: int, double_quant: bool, text: Path, tmp_path: Path
) -> None:
    wide: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    base = save_base(tmp_path / "base", **wide)
    settings: dict[str, Any] = {"format": format, "group_size": group_size, "double_quant": double_quant}
    more = small_recipe(text).data.model_copy(update={"samples": 32, "evaluation_samples": 8})
    kl, sizes = {}, {}
    for rounding in ("nearest", "gptq", "learned"):
        steps = {"steps": 20} if rounding == "learned" else {}
        recipe = small_recipe(text, base, rounding=rounding, **steps, **settings).model_copy(
            update={"data": more}
        )
        report = run_recipe(recipe, tmp_path / rounding)
        kl[rounding], sizes[rounding] = (
            known(report.fidelity.kl_nats_mean),
            known(report.compressed.size_bytes),
        )
        assert {linear.bits for linear in report.linears} == {
            Quantize.model_validate(settings).coding(torch.float32).bits
        }
        assert all(
            p.group_size == group_size and p.double_quant == double_quant
            for p in own(tmp_path / rounding).values()
        )
    assert 0 < kl["gptq"] < 0.9 * kl["nearest"] and 0 < kl["learned"] < 0.9 * kl["nearest"]
    # the offset of double quantisation is spelled in digits
    assert max(sizes.values()) - min(sizes.values()) <= 7 * 20


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gpt_neox"])
def test_biases_take_up_the_mean_error_of_calibrated_rounding(
    family: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, num_hidden_layers=1)
    run_recipe(small_recipe(text, base, format="w4a4"), tmp_path / "gptq")
    run_recipe(small_recipe(text, base, format="w4a4", rounding="nearest"), tmp_path / "nearest")
    before = load_file(base / "model.safetensors")
    for rounding in ("gptq", "nearest"):
        after = load_file(tmp_path / rounding / "model.safetensors")
        moved = {name for name in after if name in before and not torch.equal(after[name], before[name])}
        linears = {name.removesuffix(".weight_scale") for name in after if name.endswith(".weight_scale")}
        expected = (
            {f"{name}.bias" for name in linears if f"{name}.bias" in before} if rounding == "gptq" else set()
        )
        assert moved - {f"{name}.weight" for name in linears} == expected, (
            "nearest rounding is the baseline, as stock has it"
        )


@pytest.mark.slow
def test_corrected_biases_survive_an_interrupted_run(text: Path, tmp_path: Path) -> None:
    base, settings = save_base(tmp_path / "base", "gpt2"), {"format": "w4a4", "smooth": {}}
    run_recipe(small_recipe(text, base, **settings), tmp_path / "once")
    strict = small_recipe(text, base, **settings).model_copy(update={"accept": Accept(kl_nats=1e-12)})
    with pytest.raises(AcceptError):
        run_recipe(strict, tmp_path / "again")
    (partial_folder(tmp_path / "again") / "journal" / "quantize.00001.safetensors").unlink()
    run_recipe(small_recipe(text, base, **settings), tmp_path / "again")
    once, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again"))
    assert once == again


def test_the_bits_are_those_on_disk(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    for double_quant in (False, True):
        out = tmp_path / str(double_quant)
        run_recipe(small_recipe(text, base, rounding="nearest", double_quant=double_quant), out)
        tensors = Checkpoint.open(out, base=False).tensors
        name = "model.layers.0.mlp.up_proj"
        stored = sum(tensors[f"{name}.{part}"].size_bytes for part in ("weight", "weight.absmax"))
        stored += tensors[f"{name}.weight.nested_absmax"].size_bytes if double_quant else 0
        assert 8 * stored / (320 * 64) == pytest.approx(
            Quantize(double_quant=double_quant).coding(torch.float32).bits, rel=0.01
        )


@pytest.mark.slow
def test_the_head_is_kept_unless_the_recipe_says_otherwise(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    kept = run_recipe(small_recipe(text, base), tmp_path / "kept")
    assert ("lm_head", "head: keep") in {(linear.name, linear.why) for linear in kept.kept}
    report = run_recipe(small_recipe(text, base, head="quantize"), tmp_path / "out")
    assert "lm_head" in own(tmp_path / "out") and report.linears[-1].name == "lm_head" and not report.kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.lm_head).__name__ == "Linear4bit"
    model = AutoModelForCausalLM.from_pretrained(base)
    result, live = apply_recipe(small_recipe(text, base, head="quantize"), model, loaded_tokenizer(base))
    assert (
        isinstance(result.get_submodule("lm_head"), bitsandbytes_linear.Linear4bit)
        and live.linears == report.linears
    )


def loaded_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {"tie_word_embeddings": True}), ("gemma2", {}), ("gpt2", {}), ("opt", {})],
)
def test_a_tied_head_can_not_be_quantised(family: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="this one is tied to the embedding; use head: keep"):
        Quantize(head="quantize").choose(resident(family, **config))


def test_a_tied_head_is_kept_without_a_word_of_error() -> None:
    chosen, kept = Quantize().choose(resident("llama", tie_word_embeddings=True))
    assert len(chosen) == 14 and kept == {"lm_head": "head: keep"}


def test_what_skip_names_is_kept() -> None:
    model = resident()
    chosen, kept = Quantize(skip=("*.down_proj", "model.layers.0.self_attn.*")).choose(model)
    assert {name for name, why in kept.items() if why == "skip"} == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
    }
    assert len(chosen) == 14 - 6


def test_what_skip_names_stays_dense_in_the_artefact(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    run_recipe(small_recipe(text, base, rounding="nearest", skip=["model.layers.1.mlp.up_proj"]), out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(
        loaded.model.layers[1].mlp.up_proj.weight,
        pico("llama", vocab_size=256).model.layers[1].mlp.up_proj.weight,
    )


def test_a_skip_that_matches_nothing_is_told_the_names_there_are() -> None:
    with pytest.raises(
        ModelError,
        match=r'skip "\*.qproj" matches no linear of this model; they have names like model.layers.0',
    ):
        Quantize(skip=("*.q_proj", "*.qproj")).choose(resident())


def test_a_model_of_which_nothing_can_be_quantised_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear of this model can be quantised"):
        Quantize(skip=("*",)).choose(resident())
    with pytest.raises(
        ModelError, match=r"no linear of this model can be quantised .*; try another group_size or skip"
    ):
        Quantize(group_size=4096).choose(resident())


def test_shapes_that_the_kernels_can_not_take_are_kept_with_the_reason(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", intermediate_size=172, num_hidden_layers=1)  # as stories260K is
    report = run_recipe(small_recipe(text, base), tmp_path / "out")
    why = {linear.name: linear.why for linear in report.kept}
    assert "rows of 172 weights don't divide into groups of 64" in why["model.layers.0.mlp.down_proj"]
    assert all("172 output rows" in why[f"model.layers.0.mlp.{x}_proj"] for x in ("gate", "up"))
    assert len(report.linears) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_experts_are_quantised_one_by_one_unless_they_are_kept_and_routers_stay() -> None:
    kept_stage, stage = Quantize(experts="keep"), Quantize(skip=("*.down_proj_linears.3",))
    model = resident("qwen3_moe")
    kept_stage.prepare(model)
    chosen, kept = kept_stage.choose(model)
    assert len(chosen) == 8 and all(".self_attn." in name for name in chosen)
    for part in ("gate_up_proj", "down_proj"):
        assert kept[f"model.layers.1.mlp.experts.{part}"] == "experts: keep"
    stage.prepare(model)
    chosen, kept = stage.choose(model)
    experts = [name for name in chosen if ".experts." in name]
    assert len(experts) == 2 * (2 * model.config.num_experts - 1) and len(chosen) == 8 + len(experts)
    assert kept["model.layers.1.mlp.experts.down_proj_linears.3"] == "skip"
    assert not any("gate." in name for name in chosen)
    assert stage.result(model).removed == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in (0, 1)
        for part in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "learned"])
def test_quantised_experts_load_with_the_plug_in_and_kept_ones_stay(
    rounding: str, text: Path, tmp_path: Path
) -> None:
    base, out, skipped = save_base(tmp_path / "base", "qwen3_moe"), tmp_path / "out", "down_proj_linears.3"
    steps = {"steps": 3} if rounding == "learned" else {}
    # nf4, which transformers loads by itself where there are no experts
    settings = {"format": "nf4", "rounding": rounding, "skip": [f"*.{skipped}"], **steps}
    report = run_recipe(small_recipe(text, base, **settings), out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    experts = [linear.name for linear in report.linears if ".experts." in linear.name]
    assert len(experts) == 2 * (2 * loaded.config.num_experts - 1)
    assert all(isinstance(loaded.get_submodule(name), FourBitLinear) for name in experts)
    assert report.plug_in and "import llmcompress" in (out / "README.md").read_text()
    whole = AutoModelForCausalLM.from_pretrained(base)
    for index in (0, 1):
        kept = loaded.get_parameter(f"model.layers.{index}.mlp.experts.{skipped}.weight")
        was = whole.get_parameter(f"model.layers.{index}.mlp.experts.down_proj")[3]
        assert torch.equal(kept, was)
    ids = torch.arange(3, 27)[None]
    walked = torch.cat([*logits(DiskModel(out, CPU, quantized=True), ids)])
    with torch.no_grad():
        found = loaded(ids, use_cache=False).logits
    assert (found - walked).norm() < 0.1 * walked.norm()  # the kernel computes in bfloat16
    (stage,) = report.stages
    counts = [layer["expert_tokens"] for layer in stage.model_dump()["per_layer"]]
    tokens = report.data.calibration_tokens * loaded.config.num_experts_per_tok
    assert [sum(of) for of in counts] == [tokens, tokens]
    active, every = report.compressed.active_parameters, report.compressed.parameters
    assert active is not None and every is not None and active < every == report.base.parameters
    loaded.dequantize()
    assert not hasattr(loaded.config, "quantization_config")
    assert (
        loaded.get_parameter("model.layers.0.mlp.experts.down_proj").shape
        == whole.get_parameter("model.layers.0.mlp.experts.down_proj").shape
    )


def test_the_plan_of_a_mixture_says_what_a_token_goes_through_and_the_bytes_of_its_codes(
    text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", "qwen3_moe"), tmp_path / "out"
    recipe = small_recipe(text, base, format="w4a8", group_size=64, rounding="nearest")
    plan = plan_recipe(recipe)
    assert re.match(r"a token goes through .* of the parameters", plan.notes[0])
    before, after = plan.rows
    assert before.flops_per_token == after.flops_per_token and before.parameters == after.parameters
    run_recipe(recipe, out)
    assert after.size_bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_family_is_quantised_or_kept_with_a_reason(family: str) -> None:
    model = resident(family)
    chosen, kept = Quantize().choose(model)
    names = {name for name, _ in model.linear_maps()}
    assert set(chosen).isdisjoint(kept) and names <= {*chosen, *kept}
    assert all(kept.values())
    for name in chosen:
        assert name in names


def test_a_journal_of_the_same_run_is_used_and_of_another_is_not(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=2)
    one, two = (
        small_recipe(text, base, rounding="nearest"),
        small_recipe(text, base, rounding="nearest", format="fp4"),
    )
    run_recipe(one, tmp_path / "one")
    with pytest.raises(ModelError):
        run_recipe(damaged(two, base), tmp_path / "two")
    run_recipe(two, tmp_path / "two")
    assert {packed.format for packed in own(tmp_path / "two").values()} == {"fp4"}


def damaged(recipe: Recipe, base: Path) -> Recipe:
    """The recipe on a copy of the base whose second layer holds a NaN."""
    from safetensors.torch import save_file

    folder = base.with_name("damaged")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return recipe.model_copy(update={"base": str(folder)})


def test_a_base_with_nan_in_its_weights_is_refused(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"model.layers.1.mlp.up_proj.weight: 1 of 20480 values are NaN or infinite"
    ):
        run_recipe(damaged(small_recipe(text, base), base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_artefact_of_a_tied_base_that_stores_its_head_twice_stores_it_once(
    text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True, num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run_recipe(small_recipe(text, base), tmp_path / "out")
    written = DiskModel(tmp_path / "out", CPU, quantized=True)
    assert "lm_head.weight" not in written.checkpoint.tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rounding": "nearest"}, "two_sided is for rounding: gptq and learned"),
        ({"smooth": {}}, "leave two_sided or smooth"),
    ],
)
def test_rows_can_be_rounded_together_only_where_that_means_something(
    settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Quantize.model_validate({"two_sided": True, **settings})


def test_recipes_without_two_sided_keep_their_digests() -> None:
    assert "two_sided" not in Quantize().model_dump()


def test_rows_rounded_together_have_other_codes_of_the_same_bytes_and_resume(
    text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    sizes, codes = list[int](), list[bytes]()
    for two_sided in (False, True):
        recipe = small_recipe(text, base, rounding="gptq", two_sided=two_sided)
        report = run_recipe(recipe, tmp_path / str(two_sided))
        sizes.append(known(report.compressed.size_bytes))
        codes.append((tmp_path / str(two_sided) / "model.safetensors").read_bytes())
    assert sizes[0] == sizes[1] and codes[0] != codes[1]
    with pytest.raises(AcceptError):
        run_recipe(recipe.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again")
    journal = partial_folder(tmp_path / "again") / "journal"
    (journal / "quantize.00001.safetensors").unlink()
    (journal / "fisher-outputs.00000.safetensors").unlink()
    run_recipe(recipe, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == codes[1]
