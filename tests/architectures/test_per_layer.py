"""Models whose layers have widths of their own: what is written, who loads it, and what it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from llmcompress.architectures.per_layer import config_of_layer, mixed
from llmcompress.architectures.resize import changed, resized
from llmcompress.architectures.shape_grammar import Spelling
from llmcompress.errors import AcceptError, ModelError
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel, MetaModel
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.resolve import config_of
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept
from llmcompress.stages.prune.stage import Prune
from tests.artefacts import CPU, TOKENS, distance, live, load, measured
from tests.bases import byte_tokenizer, save_base, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

DENSE = tuple(family for family in FAMILIES if family != "qwen3_moe")
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def outline(family: str, **config: Any) -> MetaModel:
    return MetaModel(pico(family, **config).config, CPU, torch.float32)


def narrowed(family: str, widths: dict[str, list[int]]) -> Any:
    """The config of a pico model with these widths."""
    plain = outline(family)
    return changed(plain.config, resized(plain.config, plain.anatomy, widths))


@pytest.mark.parametrize("family", DENSE)
def test_each_block_has_the_width_that_its_config_says(family: str) -> None:
    config = narrowed(family, {"ffn": [192, 320]})
    assert mixed(config)
    model = MetaModel(config, CPU, torch.float32)
    assert [model.sizes_of(index)["ffn"] for index in range(2)] == [192, 320]
    assert [config_of_layer(config, index).num_hidden_layers for index in range(2)] == [2, 2]
    for index, layer in enumerate(model.layers):
        ours = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert ours == {
            n: Spelling.parse(row).shape(model.sizes_of(index)) for n, row in model.anatomy.layer.items()
        }
    assert model.parameters() == sum(p.numel() for p in model.model.parameters()) + (
        0 if not config.tie_word_embeddings else -model.model.get_output_embeddings().weight.numel()
    )


def test_widths_that_are_the_same_in_all_layers_are_said_once() -> None:
    config = narrowed("llama", {"ffn": [192, 256]})
    model = MetaModel(config, CPU, torch.float32)
    again = changed(config, resized(config, model.anatomy, {"ffn": [128, 128]}))
    assert not mixed(again) and again.intermediate_size == 128
    both = changed(config, resized(config, model.anatomy, {"kv": [1, 2]}))
    told = [config_of_layer(both, index) for index in range(2)]
    assert [(own.intermediate_size, own.num_key_value_heads, own.num_attention_heads) for own in told] == [
        (192, 1, 4),
        (256, 2, 8),
    ]


def test_the_vocabulary_has_one_size() -> None:
    model = outline("llama")
    with pytest.raises(ModelError, match='axis "vocab" has one size in the whole model'):
        resized(model.config, model.anatomy, {"vocab": [100, 120]})


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_a_model_of_uneven_widths_loads_and_computes_what_was_measured(
    family: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    axes = ["ffn", "kv"] if family in HEADS else "ffn"
    stage = {"prune": {"axis": axes, "parameters": 0.7, "allocation": "sensitivity", "multiple": 1}}
    report = run_recipe(staged_recipe(text, base, stage), tmp_path / "out")
    before, after = report.base.parameters, report.compressed.parameters
    assert before and after and 0.69 * before <= after <= 0.7 * before
    widths = report.stages[0].model_dump()["widths"]
    assert any(len(set(counts)) > 1 for counts in widths.values()), widths
    model: Any = load(tmp_path / "out")
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5
    with torch.no_grad():
        cached = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    assert distance(live(load(tmp_path / "again")), live(model)) == 0


@pytest.mark.slow
def test_what_comes_after_uneven_widths(text: Path, tmp_path: Path) -> None:
    """Quantised, cut again, thinned out, or taken as a base of its own: all go on from the widths there
    are."""
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    uneven = {"prune": {"axis": "ffn", "keep": 0.6, "allocation": "sensitivity", "multiple": 1}}
    followers: dict[str, dict[str, Any]] = {
        "nf4": {"quantize": {"format": "nf4", "group_size": 32, "rotate": "heads"}},
        "int8": {"quantize": {"format": "int8", "smooth": {}}},
        "layer": {"prune": {"axis": "layer", "keep": 2}},
        "2:4": {"sparsify": {"pattern": "2:4"}},
    }
    for name, after in followers.items():
        out = tmp_path / name.replace(":", "-")
        report = run_recipe(staged_recipe(text, base, uneven, after), out)
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "llmcompress", name
        model = load(out)
        assert distance(live(model), measured(out)) < 0.02, name
        assert report.stages[0].name == "prune"
        assert "import llmcompress" in (out / "README.md").read_text(), name
    run_recipe(staged_recipe(text, base, uneven), tmp_path / "alone")
    second = run_recipe(
        staged_recipe(text, tmp_path / "alone", {"quantize": {"format": "w8a8"}}), tmp_path / "second"
    )
    assert second.base.parameters == second.compressed.parameters
    assert distance(live(load(tmp_path / "second")), measured(tmp_path / "second")) < 0.02
    base_model = AutoModel.from_pretrained(tmp_path / "alone")
    assert {tuple(layer.mlp.up_proj.weight.shape) for layer in base_model.layers} == {
        tuple(layer.mlp.up_proj.weight.shape) for layer in load(tmp_path / "alone").model.layers
    }


@pytest.mark.slow
def test_a_model_in_memory_gets_the_same_uneven_widths(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    told = staged_recipe(
        text, base, {"prune": {"axis": "ffn", "keep": 0.6, "allocation": "sensitivity", "multiple": 1}}
    )
    run_recipe(told, tmp_path / "out")
    model, report = apply_recipe(told, AutoModelForCausalLM.from_pretrained(base), byte_tokenizer())
    assert distance(live(model), live(load(tmp_path / "out"))) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert distance(live(load(tmp_path / "saved")), live(model)) == 0
    assert report.stages[0].model_dump()["widths"]


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_uneven_widths(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    run_recipe(
        staged_recipe(
            text, base, {"prune": {"axis": "ffn", "keep": 0.6, "allocation": "sensitivity", "multiple": 1}}
        ),
        tmp_path / "out",
    )
    script = (
        "from transformers import AutoModelForCausalLM; "
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode != 0 and "mismatch" in done.stderr


@pytest.mark.slow
def test_an_interrupted_allocation_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    told = staged_recipe(text, base, {"prune": {"axis": ["ffn", "kv"], "parameters": 0.7}})
    run_recipe(told, tmp_path / "once")
    for lost in (["prune.00001"], ["prune.00000", "widths.00000"], ["fisher.00000", "widths.00000"]):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for name in lost:
            (partial_folder(tmp_path / "again") / "journal" / f"{name}.safetensors").unlink()
        run_recipe(told, tmp_path / "again", overwrite=True)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )


def test_a_mixed_config_is_read_from_disk_as_it_was_written(tmp_path: Path) -> None:
    config = narrowed("qwen2", {"ffn": [192, 320]})
    model = pico("qwen2")
    state = {
        n: t[:192].clone() if ".0.mlp" in n and "down" not in n else t for n, t in model.state_dict().items()
    }
    down = "model.layers.0.mlp.down_proj.weight"
    state[down] = state[down][:, :192].clone()
    source = InMemoryModel(config, state, CPU)
    assert source.sizes_of(0)["ffn"] == 192
    config.save_pretrained(tmp_path)
    assert mixed(config_of(tmp_path)) and config_of_layer(config_of(tmp_path), 0).intermediate_size == 192
    with pytest.raises(ModelError):
        DiskModel(tmp_path, CPU)  # no weights there


def test_a_plan_says_that_the_run_finds_the_widths() -> None:
    stage = Prune.model_validate({"axis": "ffn", "parameters": 0.8})
    assert stage.sensitive and not stage.model_copy(update={"allocation": "uniform"}).sensitive
    assert not Prune.model_validate({"axis": "ffn", "keep": 0.5}).sensitive
