"""What `plan` foretells against what a run gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import CompressError, ModelError, RecipeError
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.modeling.layerwise import MetaModel
from llmcompress.pipeline.plan import per_token, plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.stages.machine import Machine, Run
from tests.bases import known, save_base, small_recipe, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_and_bytes_of_the_base_are_those_of_its_files(
    family: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    checkpoint = Checkpoint.open(base)
    rows = plan_recipe(small_recipe(text, base)).rows
    assert rows[0].parameters == checkpoint.parameters
    assert 0 <= checkpoint.size_bytes - rows[0].size_bytes < 8000  # the header


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("llama", {}, {}),
        ("llama", {"intermediate_size": 172}, {"double_quant": True, "group_size": 32}),
        ("qwen3_moe", {}, {"format": "fp4", "skip": ["*.q_proj"]}),
        ("gpt2", {}, {"group_size": 64}),
        ("llama", {"tie_word_embeddings": True}, {"group_size": 32}),
        ("llama", {}, {"head": "quantize"}),
        ("llama", {"dtype": "bfloat16"}, {}),
    ],
)
def test_the_bytes_of_the_result_are_those_that_a_run_writes(
    family: str, config: dict[str, Any], settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, **config)
    recipe = small_recipe(text, base, rounding="nearest", **settings)
    plan = plan_recipe(recipe)
    rows, notes = plan.rows, plan.notes
    report = run_recipe(recipe, tmp_path / "out")
    assert rows[1].parameters == report.compressed.parameters
    assert report.compressed.size_bytes is not None
    headers = 2500 * len(report.linears) + 4000  # names, and what each linear says of its own format
    assert 0 <= report.compressed.size_bytes - rows[1].size_bytes < headers
    assert (
        f"{len(report.linears)} linears are quantised, {len(report.kept)} kept" in " ".join(notes)
        or not report.kept
    )


def test_a_plan_reads_no_weights_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    plan = plan_recipe(small_recipe(text, base))
    rows, notes = plan.rows, plan.notes
    assert [row.stage for row in rows] == ["base", "quantize (nf4, gptq)"]
    assert known(rows[1].seconds) > 0 and known(rows[1].peak_memory_bytes) > 0
    assert any("8 sequences of 24 tokens" in note for note in notes)
    assert sorted(tmp_path.rglob("*")) == before


class SteadyMachine(Machine):
    """One on which each operation that is timed takes a millisecond, whatever else runs."""

    def _timed(self, key: Hashable, made: Callable[[], Run]) -> float:
        return 1e-3


def test_more_work_costs_more(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.pipeline.plan.machine_of", SteadyMachine)
    small, deep = save_base(tmp_path / "small"), save_base(tmp_path / "deep", num_hidden_layers=24)
    seconds = {}
    for base in (small, deep):
        for rounding in ("nearest", "gptq", "learned"):
            rows = plan_recipe(small_recipe(text, base, rounding=rounding)).rows
            seconds[base.name, rounding] = known(rows[1].seconds)
    for name in ("small", "deep"):
        assert seconds[name, "nearest"] < seconds[name, "gptq"] < seconds[name, "learned"]
    for rounding in ("gptq", "learned"):
        assert seconds["deep", rounding] == pytest.approx(12 * seconds["small", rounding], rel=1e-3)


def test_memory_does_not_grow_with_the_layers(text: Path, tmp_path: Path) -> None:
    small, deep = save_base(tmp_path / "small"), save_base(tmp_path / "deep", num_hidden_layers=24)
    peaks = {plan_recipe(small_recipe(text, base)).rows[1].peak_memory_bytes for base in (small, deep)}
    assert len(peaks) == 1


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_plan_refuses_what_a_run_refuses(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names no base"):
        plan_recipe(small_recipe(text))
    with pytest.raises(ModelError, match="is no folder"):
        plan_recipe(small_recipe(text, tmp_path / "none"))
    base = save_base(tmp_path / "base")
    recipe = small_recipe(text, base)
    for wrong, message in (
        ({"skip": ["nothing"]}, 'skip "nothing" matches no linear'),
        ({"group_size": 4096}, "no linear of this model can be quantised"),
    ):
        with pytest.raises(ModelError, match=message):
            plan_recipe(small_recipe(text, base, **wrong))
    for role in ("teacher", "student"):
        taught = staged_recipe(text, base, {"distill": {role: str(tmp_path / "none"), "steps": 1}})
        for refuse in (plan_recipe, lambda given: run_recipe(given, tmp_path / "out")):
            with pytest.raises(ModelError, match=f"{role} .*none is no folder"):
                refuse(taught)
    (tmp_path / "empty").mkdir()
    for fields, message in (
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised already"),
        (
            {"quantization_config": None, "architectures": ["LlamaForSequenceClassification"]},
            "no causal language model",
        ),
        ({"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}, "nonesuch"),
        ({"model_type": "hrm_text", "architectures": ["HrmTextForCausalLM"]}, "hrm_text"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "no causal language model"),
    ):
        configure(base, **fields)
        with pytest.raises(CompressError, match=message) as caught:
            plan_recipe(recipe)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(CompressError, match=message):
            run_recipe(recipe, tmp_path / "out")
    for content in ("", "{", "[]"):
        (base / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config.json (is not JSON|holds a list)"):
            plan_recipe(recipe)
    with pytest.raises(ModelError, match=r"has no config.json"):
        plan_recipe(small_recipe(text, tmp_path / "empty"))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_costs_what_the_matrices_multiply_and_the_cache_holds(family: str) -> None:
    model: Any = pico(family)
    flops, cached = per_token(MetaModel(model.config, torch.device("cpu"), torch.float32))
    cache: Any = DynamicCache(config=model.config)
    multiplied = 0

    def count(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal multiplied
        multiplied += args[0].numel() // args[0].shape[-1] * module.weight.numel()

    hooks = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5, 6, 7]]), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached == held // 5
    # layers, experts a token, matrices, weights, tokens
    routed = 2 * 2 * 3 * 64 * 192 * 5 if family == "qwen3_moe" else 0
    router = 2 * 5 * 64 if family == "qwen3_moe" else 0  # is no linear module
    assert flops in (2 * (multiplied + routed) // 5, 2 * ((multiplied + routed) // 5 + router))
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "stage",
    [
        {"axis": "kv", "keep": 1},
        {"axis": "ffn", "parameters": 0.8},
        {"axis": "hidden", "keep": 48, "multiple": 16},
        {"axis": "layer", "parameters": 0.8},
        {"axis": ["ffn", "kv"], "size": "330kB"},
    ],
)
def test_a_cut_is_priced_before_it_is_made(stage: dict[str, Any], text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    whole, cut = plan_recipe(
        small_recipe(text, base).model_validate({"base": str(base), "stages": [{"prune": stage}]})
    ).rows
    assert all(
        getattr(cut, key) <= getattr(whole, key)
        for key in ("parameters", "size_bytes", "flops_per_token", "kv_cache_bytes_per_token")
    )
    assert cut.flops_per_token < whole.flops_per_token
    if stage["axis"] == "kv":
        assert 2 * known(cut.kv_cache_bytes_per_token) == known(whole.kv_cache_bytes_per_token)
    if "parameters" in stage:
        assert cut.parameters <= 0.8 * whole.parameters
