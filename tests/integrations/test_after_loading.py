"""What users do to a model of ours once it is loaded: adapters merged, tokens added, casts, copies, caches,
checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import ModelError
from llmcompress.formats.base import StoredModule
from llmcompress.formats.integer import IntegerLayout
from llmcompress.formats.low_rank import FactoredLayout
from llmcompress.formats.registry import AnyLayout
from llmcompress.integrations.plain_modules import ours
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import TOKENS, distance, live, load, write_in
from tests.bases import VOCABULARY, byte_tokenizer, save_base, staged_recipe, write_text
from tests.formats.test_damaged_artefacts import LAYOUTS, made
from tests.models import pico

# PEFT asks transformers by an old name
pytestmark = [
    pytest.mark.usefixtures("short_runs"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
by_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: str(layout.name if hasattr(layout, "name") else layout)
)
TARGETS = ["q_proj", "down_proj"]


def artefact(folder: Path, layout: AnyLayout, family: str = "llama") -> Path:
    write_in(folder, pico(family, vocab_size=VOCABULARY), layout, lambda W_RC: made(W_RC, layout))
    return folder


def adapted(model: Any, targets: list[str] | None = None, **options: Any) -> Any:
    """With a LoRA adapter that is not zero."""
    config = peft.LoraConfig(
        r=4, target_modules=targets or TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


def named(folder: Path) -> list[str]:
    """The linears that a config gives a scheme."""
    said = json.loads((folder / "config.json").read_text()).get("quantization_config", {"schemes": []})
    return [name for scheme in said["schemes"] for name in scheme["linears"]]


def unrounded(layout: AnyLayout) -> bool:
    return not isinstance(layout, IntegerLayout) or layout.activations == "none"


@by_layout
def test_a_merged_adapter_leaves_plain_linears_that_compute_the_same(
    layout: AnyLayout, tmp_path: Path
) -> None:
    model = adapted(load(artefact(tmp_path / "model", layout)))
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            base: Any = module.base_layer
            expected[name] = base.dequantized(torch.float32) + module.get_delta_weight("default")
    before = live(model)
    merged = model.merge_and_unload()
    assert len(expected) == 4
    for name, weight in expected.items():
        plain = merged.get_submodule(name)
        assert type(plain) is nn.Linear
        torch.testing.assert_close(plain.weight.data, weight)
    # where inputs were rounded they no longer are; the 4-bit kernel of some CPUs computes in bfloat16
    assert distance(live(merged), before) < (0.02 if unrounded(layout) else 0.3)
    merged.save_pretrained(tmp_path / "merged")
    assert sorted(named(tmp_path / "merged")) == sorted(name for name, _ in ours(merged))
    assert len(named(tmp_path / "merged")) == 10
    assert torch.equal(live(load(tmp_path / "merged")), live(merged))


def test_an_adapter_is_merged_and_taken_out_again(tmp_path: Path) -> None:
    model = adapted(load(artefact(tmp_path, IntegerLayout("w8a8", "none"))))
    before = live(model)
    model.merge_adapter()
    torch.testing.assert_close(live(model), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(live(model), before, rtol=1e-3, atol=1e-3)


def test_a_model_all_of_whose_linears_are_merged_into_is_a_plain_one(tmp_path: Path) -> None:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    merged = adapted(
        load(artefact(tmp_path / "model", IntegerLayout("w4a8", group_size=32))), every
    ).merge_and_unload()
    assert not list(ours(merged))
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert torch.equal(live(load(tmp_path / "merged")), live(merged))


def test_a_merged_conv1d_is_one_again(tmp_path: Path) -> None:
    model = adapted(load(artefact(tmp_path / "model", IntegerLayout("w8a8", "none"), "gpt2")), ["c_attn"])
    before = live(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(live(merged), before, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(live(load(tmp_path / "merged")), live(merged))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def test_an_adapter_on_one_of_two_layers_that_share_is_refused_before_anything_changes(
    text: Path, tmp_path: Path
) -> None:
    shared = {"share": {"layers": "auto", "parts": ["ffn"], "groups": 1, "steps": 2}}
    run_recipe(
        staged_recipe(text, save_base(tmp_path / "base"), shared, samples=8, length=24), tmp_path / "out"
    )
    model = adapted(load(tmp_path / "out"), ["layers.1.mlp.down_proj"])
    before = live(model)
    with pytest.raises(ModelError, match=r"share a tensor.*model\.dequantize\(\) first") as caught:
        model.merge_and_unload()
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(live(model), before)
    plain = adapted(load(tmp_path / "out").dequantize(), ["layers.1.mlp.down_proj"])
    torch.testing.assert_close(live(plain.merge_and_unload()), before, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "llmcompress"])
def test_merging_works_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    artefact(tmp_path, IntegerLayout("w8a8", "none"))
    code = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import peft, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
merged = peft.get_peft_model(model, config).merge_and_unload()
assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
"""
    order = "peft,llmcompress" if first == "peft" else "llmcompress,peft"
    subprocess.run([sys.executable, "-c", code, order, str(tmp_path)], check=True, timeout=300)


@pytest.fixture(scope="module", params=["tied", "untied", "in memory"])
def embedded(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What makes a model with an int8 embedding: its head is tied to it, quantised apart, or it was never on
    the disk."""
    folder = tmp_path_factory.mktemp("embedded")
    base = save_base(folder / "base", tie_word_embeddings=request.param != "untied")
    stage = {"format": "w8a8", "embedding": "int8", "rounding": "nearest"}
    stage |= {"head": "quantize"} if request.param == "untied" else {}
    recipe = staged_recipe(text, base, {"quantize": stage}, samples=8, length=24)
    if request.param == "in memory":
        return lambda: apply_recipe(recipe, AutoModelForCausalLM.from_pretrained(base), byte_tokenizer())[
            0
        ].eval()
    run_recipe(recipe, folder / "out")
    return lambda: load(folder / "out")


@pytest.mark.parametrize("rows", [8, -8])
def test_tokens_are_added_and_taken_away(rows: int, embedded: Any, tmp_path: Path) -> None:
    model, whole = embedded(), embedded()
    W_VD = whole.get_input_embeddings().dequantized(torch.float32)
    model.resize_token_embeddings(VOCABULARY + rows)
    kept = min(VOCABULARY, VOCABULARY + rows)
    found: Tensor = model.get_input_embeddings().weight
    assert found.shape == (VOCABULARY + rows, 64) and torch.equal(found[:kept], W_VD[:kept])
    assert (model.get_output_embeddings().weight is found) == model.config.tie_word_embeddings
    tokens = TOKENS.clamp(max=kept - 1)
    with torch.no_grad():
        scores, expected = model(tokens).logits, whole(tokens).logits
    assert scores.shape[-1] == VOCABULARY + rows
    # the head no longer rounds what it reads
    assert distance(scores[..., :kept], expected[..., :kept]) < 0.05
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, scores)
    assert any(isinstance(module, StoredModule) for module in again.modules())


def test_asking_for_no_other_number_of_tokens_changes_nothing(embedded: Any) -> None:
    model = embedded()
    before = type(model.get_input_embeddings())
    model.resize_token_embeddings()
    assert type(model.get_input_embeddings()) is before


def test_an_adapter_on_one_of_two_that_are_one_matrix_is_refused(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    stage = {"quantize": {"format": "w8a8", "embedding": "int8", "rounding": "nearest"}}
    run_recipe(staged_recipe(text, base, stage, samples=8, length=24), tmp_path / "out")
    with pytest.raises(ModelError, match="share a tensor"):
        adapted(load(tmp_path / "out"), ["embed_tokens"]).merge_and_unload()


@by_layout
def test_a_model_is_cast_copied_pickled_and_given_other_weights(layout: AnyLayout, tmp_path: Path) -> None:
    model: Any = load(artefact(tmp_path, layout))
    before = live(model)
    assert torch.equal(live(copy.deepcopy(model)), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(live(torch.load(buffer, weights_only=False)), before)
    other = load(tmp_path)
    other.load_state_dict(model.state_dict())
    model.tie_weights()
    assert torch.equal(live(other), before) and torch.equal(live(model), before)
    for dtype in (torch.bfloat16, torch.float64):
        cast = load(tmp_path).to(dtype)  # type: ignore[arg-type]
        assert cast(TOKENS).logits.dtype == dtype and distance(live(cast), before) < 0.2
    plain = load(tmp_path).dequantize()
    assert not list(ours(plain)) and not hasattr(plain.config, "quantization_config")


@by_layout
def test_an_adapter_learns_with_checkpoints_and_a_static_cache_generates_the_same(
    layout: AnyLayout, tmp_path: Path
) -> None:
    model: Any = load(artefact(tmp_path / "model", layout))
    options: Any = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(TOKENS),
        "pad_token_id": 0,
    }
    cached = model.generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(cached, model.generate(TOKENS, **options))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert grads and all(
        grad is not None and bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads
    )


def test_layers_of_a_shared_layout_that_share_nothing_are_merged_into_apart(tmp_path: Path) -> None:
    model = adapted(load(artefact(tmp_path, FactoredLayout("shared"))), ["layers.0.mlp.down_proj"])
    other = model.base_model.model.model.layers[1].mlp.down_proj.dequantized(torch.float32)
    before = live(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(live(merged), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged.model.layers[1].mlp.down_proj.dequantized(torch.float32), other)


def test_a_model_goes_when_its_last_name_does(tmp_path: Path) -> None:
    model = load(artefact(tmp_path, IntegerLayout("w8a8")))
    gone = weakref.ref(model.model.layers[0].mlp.up_proj)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
