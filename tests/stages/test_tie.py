"""Embedding and head tied: a plain tied model, the best of both, and nothing lost where they were one
already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.data.calibration import load_data
from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.integer_embedding import IntegerEmbedding
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import leave
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.tie.stage import Tie, _placed, _with_gain
from tests.artefacts import CPU, TOKENS, distance, live, load, measured, weights_of
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import FAMILIES, noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

FITS = ("least_squares", "mean", "embedding", "head")
UNTIED: tuple[tuple[str, dict[str, Any]], ...] = (
    *((family, {}) for family in FAMILIES),
    # a linear widens the embedding, another narrows what the head reads
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"_remove_final_layer_norm": True}),  # no norm whose gain could change
)
by_base = pytest.mark.parametrize(
    ("family", "config"), UNTIED, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def tie(**settings: Any) -> dict[str, Any]:
    return {"tie": {**settings}}


def recipe(text: Path, base: Path, *stages: dict[str, Any]) -> Recipe:
    return staged_recipe(text, base, *(stages or (tie(),)), samples=4, length=24)


def untied(folder: Path, family: str = "llama", **config: Any) -> Path:
    return save_base(folder, family, tie_word_embeddings=False, **config)


def resident(family: str, **config: Any) -> InMemoryModel:
    model = pico(family, tie_word_embeddings=False, **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


def calibration(told: Recipe) -> Tensor:
    return load_data(told.data, byte_tokenizer(), VOCABULARY, None).calibration


@torch.no_grad()
def kl_nats(base: PreTrainedModel, other: PreTrainedModel, sequences: Tensor) -> float:
    """KL a token of one model's predictions from another's."""
    wanted, had = (model(sequences).logits.float().log_softmax(-1) for model in (base, other))
    return float((wanted.exp() * (wanted - had)).sum(-1).mean())


def found(report: Report) -> dict[str, Any]:
    return report.stages[0].model_dump()


# What is written.


@pytest.mark.slow(keep=1)
@by_base
def test_what_is_left_is_a_plain_tied_model_that_computes_what_was_measured(
    family: str, config: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base, out = untied(tmp_path / "base", family, **config), tmp_path / "out"
    report, source = run_recipe(recipe(text, base), out), resident(family, **config)
    said = json.loads((out / "config.json").read_text())
    assert said["tie_word_embeddings"] is True and "quantization_config" not in said
    before, after = weights_of(base), weights_of(out)
    lost = before.keys() - after.keys()
    assert after.keys() < before.keys() and len(lost) == 1, "the head's tensor, whatever the files call it"
    assert not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in after)
    model = load(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert distance(live(model), measured(out)) < 1e-5
    inside = f"{source.anatomy.layers}."
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(inside)), (
        "a layer was touched"
    )
    V, D = cast(Tensor, model.get_input_embeddings().weight).shape
    saved = sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in after.values())
    assert saved == 4 * V * D
    unique = sum(p.numel() for p in model.parameters())
    assert report.compressed.parameters == Checkpoint.open(out).parameters == unique
    assert known(report.base.parameters) - unique == V * D
    assert found(report)["kl_nats"] > 0 and known(report.fidelity.kl_nats_mean) > 0


PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens, seen = load_file(sys.argv[1])["tokens"], {}
for number, folder in enumerate(sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, folder
    with torch.no_grad():
        seen[str(number)] = model(tokens).logits.float()
save_file(seen, sys.argv[2])
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.mark.slow
def test_it_loads_without_the_plug_in_also_once_it_is_nf4(text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base")
    run_recipe(recipe(text, base), tmp_path / "tied")
    report = run_recipe(
        recipe(text, base, tie(), {"quantize": {"format": "nf4", "rounding": "nearest"}}), tmp_path / "nf4"
    )
    assert [stage.name for stage in report.stages] == ["tie", "quantize"]
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert (
        config["tie_word_embeddings"] is True
        and config["quantization_config"]["quant_method"] == "bitsandbytes"
    )
    assert not any("lm_head" in name for name in weights_of(tmp_path / "nf4"))
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    folders = [tmp_path / "tied", tmp_path / "nf4"]
    arguments = [sys.executable, "-c", PLAIN, tmp_path / "tokens", tmp_path / "seen", *folders]
    subprocess.run([str(argument) for argument in arguments], check=True, timeout=600)
    for number, near in enumerate((1e-5, 0.02)):  # the stock 4-bit kernel computes in bfloat16
        assert distance(load_file(tmp_path / "seen")[str(number)], measured(folders[number])) < near


def test_the_embedding_that_both_are_becomes_int8_with_the_linears(text: Path, tmp_path: Path) -> None:
    base, out = untied(tmp_path / "base", "gemma2"), tmp_path / "out"
    run_recipe(recipe(text, base, tie(), {"quantize": {"format": "w8a8", "embedding": "int8"}}), out)
    model = load(out)
    assert isinstance(model.get_input_embeddings(), IntegerEmbedding)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert distance(live(model), measured(out)) < 3e-3


def test_a_tied_model_can_be_cut_and_tied_again_it_is_refused(text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base")
    run_recipe(recipe(text, base, tie(fit="mean"), {"prune": {"axis": "ffn", "keep": 192}}), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.intermediate_size == 192 and distance(live(model), measured(tmp_path / "out")) < 1e-5
    for given in (recipe(text, tmp_path / "out"), recipe(text, base, tie(), tie())):
        for act in cast(
            "list[Callable[[Recipe], Any]]", [plan_recipe, lambda told: run_recipe(told, tmp_path / "again")]
        ):
            with pytest.raises(ModelError, match=r"are one matrix already; leave tie") as told:
                act(given)
            assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_keeps_its_type(dtype: str, text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base", num_hidden_layers=1)
    cast(
        PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    ).save_pretrained(base)
    report = run_recipe(recipe(text, base), tmp_path / "out")
    assert {str(tensor.dtype) for tensor in weights_of(tmp_path / "out").values()} == {f"torch.{dtype}"}
    sequences = calibration(recipe(text, base))
    whole, one = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (base, tmp_path / "out")
    )
    assert found(report)["kl_nats"] == pytest.approx(kl_nats(whole, one, sequences), rel=1e-3), (
        "not that of what is stored"
    )


# What it costs.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("fit", FITS)
def test_the_loss_said_is_that_of_the_predictions_on_the_calibration_text(
    fit: str, text: Path, tmp_path: Path
) -> None:
    base = untied(tmp_path / "base", "gpt2")
    told = recipe(text, base, tie(fit=fit))
    report = run_recipe(told, tmp_path / "out")
    sequences = calibration(told)
    assert found(report)["kl_nats"] == pytest.approx(
        kl_nats(load(base), load(tmp_path / "out"), sequences), rel=1e-3
    )
    assert found(report)["fit"] == fit
    assert ("balance" in found(report)) == (fit == "least_squares")


def test_the_plain_fits_are_what_their_names_say(text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base", num_hidden_layers=1)
    before = weights_of(base)
    E, O = before["model.embed_tokens.weight"], before["lm_head.weight"]  # noqa: E741
    for fit, expected in (("mean", (E + O) / 2), ("embedding", E), ("head", O)):
        run_recipe(recipe(text, base, tie(fit=fit)), tmp_path / fit)
        after = weights_of(tmp_path / fit)
        assert torch.equal(after["model.embed_tokens.weight"], expected), fit
        assert all(torch.equal(after[name], before[name]) for name in after if "embed_tokens" not in name), (
            fit
        )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gemma2", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
        ("gpt2", {"num_hidden_layers": 1}),
        ("opt", {"num_hidden_layers": 1, "word_embed_proj_dim": 32}),
        ("opt", {"num_hidden_layers": 1, "_remove_final_layer_norm": True}),
    ],
    ids=str,
)
def test_least_squares_is_no_worse_than_any_other_fit(
    family: str, config: dict[str, Any], text: Path
) -> None:
    """On the text that it is measured by; in memory, where it is cheap."""
    lost = {}
    for fit in FITS:
        model = pico(family, vocab_size=VOCABULARY, tie_word_embeddings=False, **config)
        told = Recipe.model_validate(
            {"data": {"source": str(text), "samples": 4, "length": 16}, "stages": [tie(fit=fit)]}
        )
        told = told.model_copy(update={"data": told.data.model_copy(update={"evaluation_samples": 1})})
        _, report = apply_recipe(told, model, byte_tokenizer())
        lost[fit] = found(report)["kl_nats"]
    assert lost["least_squares"] == min(lost.values()), lost


@pytest.mark.parametrize(
    ("fit", "family", "config"),
    [
        ("least_squares", "gemma2", {}),
        ("mean", "llama", {"num_hidden_layers": 1}),
        ("least_squares", "gpt_neox", {"num_hidden_layers": 1}),
        ("least_squares", "opt", {"num_hidden_layers": 1, "word_embed_proj_dim": 32}),
    ],
    ids=str,
)
def test_matrices_that_are_equal_are_tied_for_free(
    fit: str, family: str, config: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    model: Any = pico(family, vocab_size=VOCABULARY, tie_word_embeddings=False, **config)
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight.data)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    report = run_recipe(recipe(text, tmp_path / "base", tie(fit=fit)), tmp_path / "out")
    assert found(report)["kl_nats"] == 0 and report.fidelity.kl_nats_mean == pytest.approx(0, abs=1e-9)
    assert torch.equal(live(load(tmp_path / "out")), live(model))


@pytest.mark.parametrize(
    ("family", "config"), [case for case in UNTIED if "_remove_final_layer_norm" not in case[1]], ids=str
)
def test_a_gain_on_what_the_head_reads_is_one_on_the_columns_of_the_head(
    family: str, config: dict[str, Any]
) -> None:
    """Also where the norm adds one to its gains, has a bias, or a linear stands between it and the head."""
    source = resident(family, **config)
    head, embedding = (
        source.model.get_parameter(f"{x}.weight") for x in (source.anatomy.head, source.anatomy.embedding)
    )
    gain_D = noise(head.shape[1]).exp()
    hidden, plain, same = (
        noise(1, 7, source.sizes["hidden"], seed=1),
        head.data.clone(),
        embedding.data.clone(),
    )
    with torch.no_grad():
        head.data = plain * gain_D
        expected = leave(source, hidden)
        head.data = same
        with _placed(source, {f"{source.anatomy.embedding}.weight": plain, **_with_gain(source, gain_D)}):
            torch.testing.assert_close(leave(source, hidden), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(head.data, same) and torch.equal(embedding.data, same), (
            "what was there before is not back"
        )


# In memory, interrupted, planned, refused.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("gpt2", {}), ("opt", {"word_embed_proj_dim": 32})]
)
def test_a_model_in_memory_becomes_a_new_one_like_the_folder(
    family: str, config: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = untied(tmp_path / "base", family, **config)
    written = run_recipe(recipe(text, base), tmp_path / "out")
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    before = live(model)
    result, report = apply_recipe(recipe(text, base), model, byte_tokenizer())
    assert torch.equal(live(model), before), "the model given was changed"
    assert result.config.tie_word_embeddings is True
    assert cast(Any, result).get_output_embeddings().weight is cast(Any, result).get_input_embeddings().weight
    assert report.compressed.parameters == written.compressed.parameters
    # the header
    assert 0 <= known(written.compressed.size_bytes) - known(report.compressed.size_bytes) < 10_000
    assert found(report)["kl_nats"] == found(written)["kl_nats"]
    result.save_pretrained(tmp_path / "saved")
    once, again = weights_of(tmp_path / "out"), weights_of(tmp_path / "saved")
    assert once.keys() == again.keys() and all(
        torch.equal(tensor, again[name]) for name, tensor in once.items()
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base")
    told = recipe(text, base, tie(), {"quantize": {"format": "w8a8", "rounding": "nearest"}})
    run_recipe(told, tmp_path / "once")
    for lost in ([], ["journal/outer.00000", "journal-1/quantize.00001"]):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for name in lost:
            (partial_folder(tmp_path / "again") / f"{name}.safetensors").unlink()
        run_recipe(told, tmp_path / "again", overwrite=True)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_plan_foretells_the_parameters_and_bytes(family: str, text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base", family)
    rows = plan_recipe(recipe(text, base)).rows
    report = run_recipe(recipe(text, base, tie(fit="mean")), tmp_path / "out")
    assert rows[1].stage == "tie (embedding and head)" and known(rows[1].seconds) > 0
    assert rows[1].parameters == report.compressed.parameters
    assert 0 <= known(report.compressed.size_bytes) - rows[1].size_bytes < 8000  # the header
    assert rows[1].flops_per_token == rows[0].flops_per_token, "the head is multiplied by as before"


def test_matrices_of_other_axes_are_refused_in_one_line() -> None:
    source = resident("llama")
    source.anatomy = replace(source.anatomy, outer={**source.anatomy.outer, "lm_head.weight": "vocab embed"})
    stage = Tie()
    with pytest.raises(
        ModelError, match='this model is "vocab hidden" and its head "vocab embed"; they can\'t be one'
    ) as told:
        stage.result(source)
    assert len(str(told.value).splitlines()) == 1


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    base = untied(tmp_path / "base", num_hidden_layers=1)
    run_recipe(recipe(text, base, {"tie": {"fit": "mean"}}), tmp_path / "out")
    facts = found(Report.of(tmp_path / "out"))
    assert (facts["name"], facts["fit"]) == ("tie", "mean")
    assert "operations per token are unchanged" in facts["notes"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import llmcompress" not in card and "bitsandbytes" not in card.split("```")[1], (
        "a tied model is a plain one"
    )
