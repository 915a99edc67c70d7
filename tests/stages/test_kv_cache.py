"""The stage that stores the KV cache in fewer bits: what it leaves, what is measured, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.errors import ModelError, RecipeError
from llmcompress.integrations.kv_cache import FIELD, CacheSettings, QuantizedKeysAndValues, kv_cache
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.kv_cache import read_with
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.model_card import install_command, loading_code
from llmcompress.report.schema import Report
from tests.artefacts import load, weights_of
from tests.bases import byte_tokenizer, save_base, staged_recipe, write_text
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

SETTINGS = {"bits": 4, "block": 8, "window": 4, "sinks": 2}
SAID = {"bits": 4, "per": "channel", "block": 8, "window": 4, "sinks": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def recipe(text: Path, base: Path, *before: dict[str, Any], **settings: Any) -> Recipe:
    stages = (*before, {"kv_cache": {**SETTINGS, **settings}})
    return staged_recipe(text, base, *stages, samples=4, length=64)


def layers_of(model: Any) -> set[type]:
    """The kinds of layers in the cache that `generate` makes."""
    prompt = torch.ones(1, 30, dtype=torch.int64)
    found = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=True)
    return {type(layer) for layer in found.past_key_values.layers}


@pytest.mark.parametrize("before", [(), ({"quantize": {"format": "nf4", "rounding": "nearest"}},)])
def test_an_artefact_writes_with_codes_and_its_report_says_what_they_cost(
    tmp_path: Path, text: Path, before: tuple[dict[str, Any], ...]
) -> None:
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    report = run_recipe(recipe(text, base, *before), out)
    assert json.loads((out / "config.json").read_text())[FIELD] == SAID
    if not before:  # no weight changes
        for name, tensor in weights_of(base).items():
            assert torch.equal(tensor, weights_of(out)[name])
    facts = Report.of(out).kv_cache
    assert facts is not None and facts == report.kv_cache
    (at,) = facts.lengths
    assert (facts.bits, at.length) == (4, 64) and 0 < at.kl_nats_mean < 0.1
    # 56 of 64 tokens are codes: 2 heads x 16 channels x (4 bits and scales), in 2 layers
    itemsize = torch.float32.itemsize
    coded, plain = 2 * (16 / 2 + 4 * 16 / 8) + 2 * (16 / 2 + 4), 2 * 2 * 16 * itemsize
    assert at.plain_bytes_per_token == 2 * plain
    assert at.bytes_per_token == 2 * (56 * coded + 8 * plain) / 64
    again = evaluate(out, data=recipe(text, base).data).kv_cache
    assert again == facts
    model = load(out)
    found = cast(Any, model).generate(
        torch.ones(1, 30, dtype=torch.int64), max_new_tokens=4, return_dict_in_generate=True
    )
    assert {type(layer) for layer in found.past_key_values.layers} == {QuantizedKeysAndValues}
    assert "import llmcompress  # without it, generate makes a plain KV cache" in loading_code(report, None)
    assert "llmcompress" in install_command(report)
    assert "KV cache in 4 bits" in (out / "README.md").read_text()
    assert "KV cache in 4 bits" in (out / "report.html").read_text()


def test_the_loss_is_that_of_the_model_read_in_pieces(tmp_path: Path, text: Path) -> None:
    model = pico("llama").eval()
    sequences = torch.randint(3, 160, (2, 70), generator=torch.Generator().manual_seed(0))
    settings = CacheSettings(**cast(Any, SAID))
    (_, plain, kl, _), _ = read_with(lambda: kv_cache(model, settings), model, sequences, unscored=1)
    assert kl.shape == (2, 69)
    with torch.no_grad():
        whole = model(sequences).logits.log_softmax(-1)
    expected = -whole[:, 1:-1].gather(-1, sequences[:, 2:, None])[..., 0]
    assert torch.allclose(
        plain[:, :-1], expected, atol=1e-4
    )  # pieces with a plain cache are the model itself
    # nothing is a code before the second piece, and everything later has read some
    assert float(kl[:, :31].max()) < 1e-6 < float(kl[:, 31:].min())


@pytest.mark.slow
def test_plain_transformers_loads_it_with_a_plain_cache(tmp_path: Path, text: Path) -> None:
    base, out = save_base(tmp_path / "base", "llama"), tmp_path / "out"
    run_recipe(recipe(text, base), out)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "found = model.generate(torch.ones(1, 30, dtype=torch.int64), max_new_tokens=4, "
        "return_dict_in_generate=True)\n"
        "print(type(found.past_key_values.layers[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "DynamicLayer"


def test_in_memory_the_returned_model_writes_with_codes(tmp_path: Path, text: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    model = load(base)
    small, report = apply_recipe(recipe(text, base), model, byte_tokenizer())
    assert getattr(small.config, FIELD) == SAID and report.kv_cache is not None
    assert not hasattr(model.config, FIELD)
    found = cast(Any, small).generate(
        torch.ones(1, 30, dtype=torch.int64), max_new_tokens=4, return_dict_in_generate=True
    )
    assert {type(layer) for layer in found.past_key_values.layers} == {QuantizedKeysAndValues}


def test_plan_prices_the_cache(tmp_path: Path, text: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    plan = plan_recipe(staged_recipe(text, base, {"kv_cache": {"bits": 4}}, samples=4, length=64))
    before, after = (row.kv_cache_bytes_per_token for row in plan.rows)
    heads, channels, layers = 2, 16, 2
    plain = layers * heads * 2 * channels * 4
    coded = layers * heads * (16 + 4 * 16 / 32 + 4)
    assert before == plain
    # at 2048 tokens all but 64 are codes, and at 8192 as well
    assert after == round((1984 * coded + 64 * plain) / 2048)
    late = round((8128 * coded + 64 * plain) / 8192)
    assert f"KV cache per token: {after:,} B at 2,048 tokens, {late:,} B at 8,192 tokens" in plan.notes


def test_a_place_before_another_stage_is_refused() -> None:
    with pytest.raises(RecipeError, match="kv_cache comes last"):
        Recipe.parse("stages: [{kv_cache: {bits: 8}}, {quantize: {format: nf4}}]")
    with pytest.raises(RecipeError, match="kv_cache comes last"):
        Recipe.parse("stages: [kv_cache, kv_cache]")
    assert len(Recipe.parse("stages: [{sparsify: {pattern: '2:4'}}, kv_cache]").stages) == 2


def test_a_model_of_sliding_windows_alone_is_refused_before_any_work(tmp_path: Path, text: Path) -> None:
    base = save_base(tmp_path / "base", "mistral")
    with pytest.raises(ModelError, match="nothing to store in fewer bits"):
        run_recipe(recipe(text, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_takes_the_stage(tmp_path: Path, text: Path) -> None:
    base, small, out = (tmp_path / name for name in ("base", "small", "out"))
    save_base(base, "llama")
    run_recipe(staged_recipe(text, base, {"quantize": {"format": "w8a8"}}, samples=4, length=64), small)
    report = run_recipe(recipe(text, base, {"quantize": {"format": "w8a8"}}), out)
    assert report.kv_cache is not None
    fields = [json.loads((folder / "config.json").read_text()) for folder in (small, out)]
    assert fields[0]["quantization_config"] == fields[1]["quantization_config"]
    assert AutoModelForCausalLM.from_pretrained(out).config.llmcompress_kv_cache == SAID
    for name, tensor in weights_of(small).items():
        assert torch.equal(tensor, weights_of(out)[name])
