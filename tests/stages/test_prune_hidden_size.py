"""A narrower hidden state, and fewer experts: what stays of the function, and who loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.errors import AcceptError, ModelError
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.layerwise import InMemoryModel, LayerwiseModel
from llmcompress.modeling.sequential import walk
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept
from llmcompress.stages.prune import experts, hidden_size
from llmcompress.stages.prune.stage import Prune
from tests.artefacts import CPU, TOKENS, distance, live, load, measured
from tests.bases import byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

WITH_HEAD_DIM = ("llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def resident(family: str, **config: Any) -> LayerwiseModel:
    model = pico(family, **config)
    return InMemoryModel(model.config, model.state_dict(), CPU)


def save_flat(folder: Path, family: str, keep: int, **config: Any) -> Path:
    """A base whose hidden state fills `keep` directions only, none of them a channel."""
    model = pico(family, vocab_size=256, tie_word_embeddings=False, **config)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(5))).Q[:, :keep]
    into = basis @ basis.T
    source = resident(family, vocab_size=256, tie_word_embeddings=False, **config)
    rows = {
        f"{source.layer_name(i)}.{name}": row
        for i in range(len(source.layers))
        for name, row in source.anatomy.layer.items()
    }
    rows |= {f"{source.anatomy.embedding}.weight": "vocab hidden"}
    for name, row in rows.items():
        parameter = model.get_parameter(name)
        if row.startswith("hidden ") or row == "expert hidden ffn":
            parameter.data = into @ parameter.data
        elif name.endswith("embed_tokens.weight"):
            parameter.data = parameter.data @ into
        elif row == "hidden" and name.endswith("bias"):
            parameter.data = into @ parameter.data
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_HEAD_DIM)
def test_directions_that_are_never_used_are_cut_for_free(family: str, text: Path, tmp_path: Path) -> None:
    base = save_flat(tmp_path / "base", family, 32)
    for mend in (True, False):
        out = tmp_path / f"out-{mend}"
        report = run_recipe(
            staged_recipe(
                text, base, {"prune": {"axis": "hidden", "keep": 32, "multiple": 1, "repair": mend}}
            ),
            out,
        )
        config = json.loads((out / "config.json").read_text())
        assert config["hidden_size"] == 32 and config["head_dim"] == 16
        assert known(report.fidelity.kl_nats_mean) < 1e-5, mend
        assert distance(live(load(out)), measured(out)) < 1e-5
        assert distance(live(load(out)), live(load(base))) < 0.01


@pytest.mark.slow
def test_principal_directions_with_repair_lose_least(text: Path, tmp_path: Path) -> None:
    base, kl = save_base(tmp_path / "base", "llama", tie_word_embeddings=False), {}
    for score in ("pca", "activation"):
        for mend in (True, False):
            stage = {"prune": {"axis": "hidden", "keep": 48, "multiple": 16, "score": score, "repair": mend}}
            kl[score, mend] = known(
                run_recipe(
                    staged_recipe(text, base, stage), tmp_path / f"{score}-{mend}"
                ).fidelity.kl_nats_mean
            )
    assert min(kl.values()) == kl["pca", True]
    assert kl["pca", True] < kl["pca", False] and kl["activation", True] < kl["activation", False]


@pytest.mark.slow
def test_a_tied_model_loses_channels_and_generates_the_same_with_a_cache(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "hidden", "keep": 32, "multiple": 16, "score": "activation"}}
    ]
    run_recipe(staged_recipe(text, base, *stages), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        cached = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        slow = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)  # type: ignore[operator]
    assert torch.equal(cached, slow)
    result, report = apply_recipe(
        staged_recipe(text, base, *stages, {"quantize": {"format": "nf4", "group_size": 32}}),
        AutoModelForCausalLM.from_pretrained(base),
        byte_tokenizer(),
    )
    written = run_recipe(
        staged_recipe(text, base, *stages, {"quantize": {"format": "nf4", "group_size": 32}}),
        tmp_path / "nf4",
    )
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert result.config.hidden_size == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage"),
    [("llama", {"axis": "hidden", "keep": 48, "multiple": 16}), ("qwen3_moe", {"axis": "expert", "keep": 3})],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    family: str, stage: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    told = staged_recipe(text, base, {"prune": stage})
    run_recipe(told, tmp_path / "once")
    for lost in (["prune.00001"], ["prune.00000"], ["outer.00000"], ["directions.00000", "prune.00001"]):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for name in lost:
            (partial_folder(tmp_path / "again") / "journal" / f"{name}.safetensors").unlink(
                missing_ok=family != "llama"
            )
        run_recipe(told, tmp_path / "again", overwrite=True)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (
                lost,
                file,
            )


def test_whose_hidden_state_can_not_be_cut_is_told_why() -> None:
    for family, score, why in [
        ("gemma2", "activation", "its embedding is scaled by the hidden width"),
        ("qwen2", "pca", "use score: activation"),
        ("gpt2", "activation", "heads of a gpt2 model share out its hidden width"),
    ]:
        stage = Prune.model_validate({"axis": "hidden", "keep": 48, "multiple": 16, "score": score})
        with pytest.raises(ModelError, match=why):
            stage.changes(resident(family, **({"tie_word_embeddings": True} if family == "qwen2" else {})))


def test_directions_come_in_the_order_of_their_variance(tmp_path: Path) -> None:
    assert hidden_size.why_not(resident("llama"), "pca") is None
    assert "embedding" in (hidden_size.why_not(resident("gemma2"), "pca") or "")


@pytest.mark.slow
def test_experts_that_are_never_asked_are_cut_for_free(text: Path, tmp_path: Path) -> None:
    model = pico("qwen3_moe", vocab_size=256, num_experts=6)
    for module in model.get_submodule("model.layers").children():
        for silent in (1, 4):
            module.mlp.experts.down_proj.data[silent] = 0  # type: ignore[union-attr, operator]
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    sequences = torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    for layer in walk(source, sequences):
        saliency_E = experts.saliency(layer)
        assert saliency_E[[1, 4]].tolist() == [0, 0] and bool((saliency_E[[0, 2, 3, 5]] > 0).all())
        tensors, lost = experts.cut(layer, 4)
        # a router of fewer rows may round its last bit otherwise
        assert lost <= torch.finfo(torch.float32).eps and torch.equal(
            tensors["mlp.gate.weight"], layer.module.get_parameter("mlp.gate.weight")[[0, 2, 3, 5]]
        )
    report = run_recipe(
        staged_recipe(text, tmp_path / "base", {"prune": {"axis": "expert", "keep": 4}}), tmp_path / "out"
    )
    assert load(tmp_path / "out").config.num_experts == 4
    assert distance(live(load(tmp_path / "out")), measured(tmp_path / "out")) < 1e-5
    assert report.stages[0].model_dump()["kept_units"] == 4


def test_the_worth_of_an_expert_is_what_it_adds_to_the_tokens_sent_to_it() -> None:
    source = resident("qwen3_moe")
    sequences = torch.randint(1, 150, (2, 24), generator=torch.Generator().manual_seed(0))
    layer = next(iter_ := walk(source, sequences))
    seen: list[tuple[torch.Tensor, ...]] = []
    module = layer.module.get_submodule("mlp.experts")
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    layer.outputs(layer.inputs)
    hook.remove()
    expected = torch.zeros(5)
    for x_TD, expert_TK, weight_TK in seen:
        for x_D, chosen, weights in zip(x_TD, expert_TK, weight_TK, strict=True):
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                up = module.get_parameter("gate_up_proj")[expert] @ x_D
                gate, value = up.chunk(2)
                expected[expert] += (
                    weight
                    * (
                        module.get_parameter("down_proj")[expert] @ (torch.nn.functional.silu(gate) * value)
                    ).norm()
                )
    torch.testing.assert_close(experts.saliency(layer), expected.detach() / 48, rtol=1e-4, atol=1e-6)
    del iter_


def test_fewer_experts_than_a_token_asks_are_refused() -> None:
    with pytest.raises(ModelError, match="each token goes to 2; keep 2 or more"):
        Prune.model_validate({"axis": "expert", "keep": 1}).changes(resident("qwen3_moe"))
