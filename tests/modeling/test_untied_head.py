"""A head that is its own though config.json says it is the embedding: the files decide, as in
transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.data.sources import DataSpec
from llmcompress.errors import ModelError
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import CPU, assert_same_in_memory, distance, live, load, measured, weights_of
from tests.bases import save_base, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gemma2": "model.embed_tokens.weight",
}
NF4_HEAD = {"quantize": {"format": "nf4", "head": "quantize", "rounding": "nearest"}}
INT8 = {"quantize": {"format": "w8a8", "embedding": "int8", "rounding": "nearest"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def base_with_head(folder: Path, family: str = "llama", *, same: bool = False, said: Any = True) -> Path:
    """A base that stores a head beside its embedding, and whose config.json says that they are one."""
    base = save_base(folder, family, tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors[EMBEDDING[family]]
    drawn = 0.1 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    tensors["lm_head.weight"] = embedding + (0 if same else drawn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": said}
    config = {name: value for name, value in config.items() if value is not None}
    (base / "config.json").write_text(json.dumps(config))
    return base


def config_of(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(("family", "said"), [("llama", True), ("gpt2", None), ("gemma2", None)])
def test_what_is_measured_is_what_transformers_loads(
    family: str, said: Any, tmp_path: Path, text: Path
) -> None:
    """Of some families the default is that they are tied, so the config need not say it."""
    base = base_with_head(tmp_path / "base", family, said=said)
    plain = live(AutoModelForCausalLM.from_pretrained(base))
    assert torch.equal(measured(base), plain)
    spec = DataSpec(source=str(text), length=24, evaluation_samples=2)
    before = evaluate(str(base), data=spec).perplexity
    tied = pico(family, vocab_size=256, tie_word_embeddings=True)
    assert distance(live(tied), plain) > 0.01
    run_recipe(staged_recipe(text, base, NF4_HEAD), tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    told = AutoModelForCausalLM.from_pretrained(base)
    told.config.tie_word_embeddings = False
    told.save_pretrained(tmp_path / "told")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "told" / file).write_bytes((base / file).read_bytes())
    assert evaluate(str(tmp_path / "told"), data=spec).perplexity == before


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "stage",
    [
        {"prune": {"axis": "ffn", "keep": 0.6}},
        {"prune": {"axis": "hidden", "keep": 0.75, "score": "activation"}},
        {"sparsify": {"pattern": "2:4", "score": "magnitude"}},
        {"share": {"layers": "adjacent", "groups": 1, "steps": 0}},
        {"codebook": {"entries": 16}},
        {"low_rank": {"layers_per_basis": 2, "keep": 0.5}},
        INT8,
        {"quantize": {"format": "w8a8", "rotate": True, "rounding": "nearest"}},
        {"distill": {"steps": 1, "batch": 2}},
    ],
    ids=lambda stage: "-".join(map(str, next(iter(stage.values())).values())),
)
def test_each_stage_leaves_the_head_its_own(stage: dict[str, Any], tmp_path: Path, text: Path) -> None:
    base, told = base_with_head(tmp_path / "base"), tmp_path / "out"
    recipe = staged_recipe(text, base, stage, samples=4, length=24)
    report = run_recipe(recipe, told)
    assert config_of(told)["tie_word_embeddings"] is False
    assert distance(measured(told), live(load(told))) < 1e-5
    rows = plan_recipe(recipe).rows
    assert rows[0].parameters == report.base.parameters
    assert rows[-1].parameters == report.compressed.parameters
    written = weights_of(told)
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "stage", [NF4_HEAD, INT8, {"prune": {"axis": "ffn", "keep": 0.6}}], ids=["nf4", "int8", "prune"]
)
def test_a_model_in_memory_is_taken_by_its_weights(stage: dict[str, Any], tmp_path: Path, text: Path) -> None:
    base = base_with_head(tmp_path / "base")
    model, report, _ = assert_same_in_memory(
        staged_recipe(text, base, stage, samples=4, length=24), base, tmp_path
    )
    assert model.config.tie_word_embeddings is False
    assert report.base.parameters == sum(tensor.numel() for tensor in weights_of(base).values())


def test_a_head_in_memory_that_equals_the_embedding_is_the_embedding(tmp_path: Path) -> None:
    model = pico("llama", tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert InMemoryModel(model.config, state, CPU).config.tie_word_embeddings is True
    state["lm_head.weight"][0, 0] += 1
    other = InMemoryModel(model.config, state, CPU)
    assert other.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    assert torch.equal(other.model.get_parameter("lm_head.weight"), state["lm_head.weight"])


def test_an_equal_head_is_written_once(tmp_path: Path, text: Path) -> None:
    base = base_with_head(tmp_path / "base", same=True)
    report = run_recipe(staged_recipe(text, base, {"prune": {"axis": "ffn", "keep": 0.6}}), tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert distance(measured(tmp_path / "out"), live(load(tmp_path / "out"))) == 0
    assert report.base.parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters()
    )


def test_a_head_that_is_equal_as_it_is_loaded_is_the_embedding(tmp_path: Path) -> None:
    """Transformers compares in the dtype that it loads: what differs in float32 alone is one matrix in
    bfloat16."""
    base = base_with_head(tmp_path / "base", same=True)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 + 1e-4)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert DiskModel(base, CPU).config.tie_word_embeddings is False
    (base / "config.json").write_text(json.dumps(config_of(base) | {"dtype": "bfloat16"}))
    loaded = AutoModelForCausalLM.from_pretrained(base)
    assert (
        DiskModel(base, CPU).config.tie_word_embeddings
        is (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
        is True
    )


@pytest.mark.parametrize(
    "stage", [NF4_HEAD, INT8, {"prune": {"axis": "layer", "keep": 1}}], ids=["nf4", "int8", "layer"]
)
def test_a_tied_base_may_store_its_matrix_under_the_name_of_the_head(
    stage: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    plain = live(AutoModelForCausalLM.from_pretrained(base))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(live(AutoModelForCausalLM.from_pretrained(base)), plain) and torch.equal(
        measured(base), plain
    )
    recipe = staged_recipe(text, base, stage, samples=4, length=24)
    if stage is NF4_HEAD:
        with pytest.raises(ModelError, match="tied to the embedding"):
            run_recipe(recipe, tmp_path / "out")
        return
    report = run_recipe(recipe, tmp_path / "out")
    assert report.base.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert distance(measured(tmp_path / "out"), live(load(tmp_path / "out"))) < 1e-5


def test_a_base_without_a_head_that_is_said_to_have_its_own_is_refused(tmp_path: Path, text: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    (base / "config.json").write_text(json.dumps(config_of(base) | {"tie_word_embeddings": False}))
    recipe = staged_recipe(text, base, {"quantize": {"format": "nf4"}})
    for act in (
        lambda: run_recipe(recipe, tmp_path / "out"),
        lambda: plan_recipe(recipe),
        lambda: evaluate(str(base)),
    ):
        with pytest.raises(
            ModelError, match=r"no lm_head\.weight, and its config.json says tie_word_embeddings: false"
        ) as caught:
            act()
        assert len(str(caught.value).splitlines()) == 1


def test_a_teacher_predicts_by_its_own_head(tmp_path: Path, text: Path) -> None:
    """A distillation with weight on its predictions alone moves the student as those of the untied teacher
    do."""
    teacher = base_with_head(tmp_path / "teacher")
    told = tmp_path / "told"
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(teacher))
    model.config.tie_word_embeddings = False
    model.save_pretrained(told)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (told / file).write_bytes((teacher / file).read_bytes())
    base, found = save_base(tmp_path / "base"), []
    for number, name in enumerate((teacher, told)):
        stage = {"distill": {"steps": 1, "batch": 2, "teacher": str(name)}}
        run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / f"out-{number}")
        found.append(weights_of(tmp_path / f"out-{number}"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_ties_anything_but_head_and_embedding(family: str) -> None:
    model = pico(family)
    anatomy = InMemoryModel(model.config, model.state_dict(), CPU).anatomy
    assert model._tied_weights_keys == {f"{anatomy.head}.weight": f"{anatomy.embedding}.weight"}
