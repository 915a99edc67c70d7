"""`embedding: int8`, from recipe to artefact: what loads and computes what was measured, and that a tied head
is one matrix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.integer_embedding import IntegerEmbedding
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import enter, logits
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept
from llmcompress.report.schema import Report
from llmcompress.stages.quantize.solver import LayerQuantizer
from llmcompress.stages.quantize.stage import Quantize
from tests.artefacts import CPU, TOKENS, distance, live, load, measured
from tests.bases import byte_tokenizer, known, save_base, small_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

Case = tuple[str, bool]  # family, whether its head is tied
CASES: list[Case] = [(family, tied) for family in FAMILIES for tied in (True, False)]
SETTINGS: dict[str, Any] = {"format": "w8a8", "rounding": "nearest", "embedding": "int8"}
by_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[Case, Path]:
    folder = tmp_path_factory.mktemp("embeddings")
    for family, tied in CASES:
        base = save_base(folder / f"{family}-{tied}", family, tie_word_embeddings=tied)
        run_recipe(small_recipe(text, base, **SETTINGS), folder / f"{family}-{tied}-out")
    return {(family, tied): folder / f"{family}-{tied}-out" for family, tied in CASES}


def base_of(artefact: Path) -> Path:
    return artefact.with_name(artefact.name.removesuffix("-out"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of an artefact, in as many files as it has, as type, shape and bytes."""
    tensors = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def is_shared(model: PreTrainedModel) -> bool:
    """Whether the head's parameters are the embedding's own."""
    head, embedding = cast(Any, model).get_output_embeddings(), cast(Any, model).get_input_embeddings()
    return head.weight is embedding.weight and head.weight_scale is embedding.weight_scale


# What loads.


@pytest.mark.slow
@by_case
def test_an_artefact_loads_and_computes_what_was_measured(case: Case, artefacts: dict[Case, Path]) -> None:
    folder, tied = artefacts[case], case[1]
    model, resident = cast(Any, load(folder)), DiskModel(artefacts[case], CPU, quantized=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is IntegerEmbedding and isinstance(head, IntegerLinear) == tied
    assert not any(p.requires_grad for p in embedding.parameters())
    read = cast(Any, resident.model).get_input_embeddings()
    assert torch.equal(embedding(TOKENS), read(TOKENS)), (
        "the rows are those that were measured, scaled as the family does"
    )
    plain = cast(Any, AutoModelForCausalLM.from_pretrained(base_of(folder))).get_input_embeddings()
    assert 1e-4 < distance(embedding(TOKENS), plain(TOKENS).detach()) < 0.01
    # an activation that lies at a half falls on one side or the other by the order of sums
    assert distance(live(model), measured(folder)) < 0.01
    if tied:
        assert is_shared(model)
        assert torch.equal(head.dequantized(torch.float32), resident.model.get_parameter("lm_head.weight"))


@pytest.mark.slow
@by_case
def test_the_disk_holds_one_matrix_and_the_config_names_what_it_is(
    case: Case, artefacts: dict[Case, Path]
) -> None:
    (family, tied), folder = case, artefacts[case]
    tensors, name = (
        load_file(folder / "model.safetensors"),
        DiskModel(folder, CPU, quantized=True).anatomy.embedding,
    )
    V, D = DiskModel(base_of(folder), CPU).matrices()[name]
    assert tensors[f"{name}.weight"].shape == (1, V, D) and tensors[f"{name}.weight"].dtype == torch.int8
    assert (
        tensors[f"{name}.weight_scale"].shape == (V,)
        and tensors[f"{name}.weight_scale"].dtype == torch.float32
    )
    # the head, as the base calls it
    dense = [part for part, tensor in tensors.items() if tensor.shape == (V, D)]
    assert len(dense) == (not tied) and not any(
        "lm_head" in part or "embed_out" in part for part in tensors.keys() - set(dense)
    )
    schemes = json.loads((folder / "config.json").read_text())["quantization_config"]["schemes"]
    (entry,) = [scheme for scheme in schemes if name in scheme["linears"]]
    assert entry["activations"] == ("dynamic" if tied else "none") and ("lm_head" in entry["linears"]) == tied
    positions = [part for part in tensors if "embed_positions" in part or "wpe" in part]
    assert len(positions) == (family in ("opt", "gpt2")) and all(
        tensors[part].dtype == torch.float32 for part in positions
    )


@pytest.mark.slow
@by_case
def test_saving_again_in_one_file_or_several_writes_the_same_tensors(
    case: Case, artefacts: dict[Case, Path], tmp_path: Path
) -> None:
    once, model = bytes_of(artefacts[case]), load(artefacts[case])
    before = live(model)
    for size in ("1GB", "30KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert bytes_of(tmp_path / size) == once
        again = load(tmp_path / size)
        assert torch.equal(live(again), before) and (not case[1] or is_shared(again))
    assert len(list((tmp_path / "30KB").glob("*.safetensors"))) > 1


@pytest.mark.slow
@by_case
def test_tokens_are_the_same_with_and_without_a_cache(case: Case, artefacts: dict[Case, Path]) -> None:
    model = cast(Any, load(artefacts[case]))
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(TOKENS[:1]),
    }
    with_cache, without = (
        model.generate(TOKENS[:1], use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without) and with_cache.shape[1] > TOKENS.shape[1]


@pytest.mark.slow
@by_case
def test_a_report_counts_the_embedding_once(case: Case, artefacts: dict[Case, Path], text: Path) -> None:
    report, checkpoint = Report.of(artefacts[case]), Checkpoint.open(artefacts[case], base=False)
    name = DiskModel(base_of(artefacts[case]), CPU).anatomy.embedding
    (entry,) = [linear for linear in report.linears if linear.name == name]
    assert entry == report.linears[0] and entry.format == "w8a8" and entry.bits == 8.0
    facts = entry.model_dump()
    assert 1e-3 < facts["relative_error"] < 0.01 and 1e-3 < facts["weight_error"] < 0.01
    assert report.compressed.parameters == checkpoint.parameters == report.base.parameters
    assert report.compressed.size_bytes == checkpoint.size_bytes
    assert ("lm_head" in {kept.name for kept in report.kept}) != case[1]
    plan = plan_recipe(small_recipe(text, base_of(artefacts[case]), **SETTINGS))
    rows, notes = plan.rows, plan.notes
    headers = 400 * len(report.linears) + 4000
    assert (
        rows[1].parameters == checkpoint.parameters
        and 0 <= checkpoint.size_bytes - rows[1].size_bytes < headers
    )
    assert (
        f"{len(report.linears)} linears are quantised, {len(report.kept)} kept" in " ".join(notes)
        or not report.kept
    )


LOADER = """
import json, sys
from transformers import AutoModelForCausalLM
told = {}
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
        told[folder] = sorted(key[0] for key in info["mismatched_keys"])
assert not any(name.startswith("llmcompress") for name in sys.modules)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_process_without_llmcompress_refuses_the_embedding(artefacts: dict[Case, Path]) -> None:
    arguments = [sys.executable, "-c", LOADER, *map(str, artefacts.values())]
    out = subprocess.run(arguments, check=True, timeout=600, capture_output=True, text=True).stdout
    told = json.loads(out.splitlines()[-1])
    for folder in artefacts.values():
        assert f"{DiskModel(folder, CPU, quantized=True).anatomy.embedding}.weight" in told[str(folder)], (
            "it was loaded as floats"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [("llama", True), ("gemma3_text", True), ("gpt2", True), ("opt", False)], ids=str
)
def test_a_model_in_memory_becomes_what_the_folder_is(
    case: Case, artefacts: dict[Case, Path], text: Path, tmp_path: Path
) -> None:
    base, written = base_of(artefacts[case]), Report.of(artefacts[case])
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base).eval())
    result, report = apply_recipe(small_recipe(text, base, **SETTINGS), model, byte_tokenizer())
    assert report.linears == written.linears and report.kept == written.kept
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-3)
    assert report.compressed.parameters == written.compressed.parameters
    # the file's header
    assert abs(known(report.compressed.size_bytes) - known(written.compressed.size_bytes)) < 10_000
    assert torch.equal(live(result), live(load(artefacts[case]))) and (not case[1] or is_shared(result))
    result.tie_weights()
    result.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(artefacts[case])


# Formats beside it.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "head", "linear"),
    [
        ({"format": "nf4"}, ("w8a8", "none"), "FourBitLinear"),
        ({"format": "int8"}, ("w8a8", "dynamic"), "IntegerLinear"),
        ({"format": "w4a4", "group_size": 32, "activations": "static"}, ("w8a8", "dynamic"), "IntegerLinear"),
        ({"format": "w4a16", "group_size": 32}, ("w8a16", "dynamic"), "IntegerLinear"),
        ({"format": "w8a8", "activations": "none"}, ("w8a8", "none"), "IntegerLinear"),
        (
            {"format": "w4a8", "smooth": {}, "overrides": {"lm_head": {"format": "w8a16"}}},
            ("w8a16", "dynamic"),
            "IntegerLinear",
        ),
        ({"format": "w4a8", "protect": 0.2, "rounding": "gptq"}, ("w8a8", "dynamic"), "IntegerLinear"),
        ({"format": "nf4", "rounding": "learned", "steps": 3}, ("w8a8", "none"), "FourBitLinear"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_tied_head_reads_as_the_format_of_the_linears_does(
    settings: dict[str, Any], head: tuple[str, str], linear: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    report = run_recipe(
        small_recipe(text, base, **{"rounding": "nearest", **settings, "embedding": "int8"}), tmp_path / "out"
    )
    model = cast(Any, load(tmp_path / "out"))
    assert is_shared(model) and (model.lm_head.scheme.format, model.lm_head.scheme.activations) == head
    assert type(model.model.layers[0].mlp.up_proj).__name__ == linear
    assert distance(live(model), measured(tmp_path / "out")) < (0.02 if linear == "FourBitLinear" else 0.01)
    whole = [(x.bits, Checkpoint.open(base).tensors[f"{x.name}.weight"].size_bytes) for x in report.linears]
    mean = sum(bits * size for bits, size in whole) / sum(size for _, size in whole)
    assert report.stages[0].model_dump()["bits"] == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_in_bfloat16_keeps_its_dtype(tied: bool, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma3_text", tie_word_embeddings=tied)
    cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)).save_pretrained(
        base
    )
    config = json.loads((base / "config.json").read_text())
    if not tied:
        del config["dtype"]
        (base / "config.json").write_text(json.dumps(config))
    run_recipe(small_recipe(text, base, **SETTINGS), tmp_path / "out")
    model = cast(Any, load(tmp_path / "out"))
    assert model.dtype == model.model.dtype == model.model.norm.weight.dtype == torch.bfloat16 and (
        is_shared(model) or not tied
    )
    rows, read = model.get_input_embeddings()(TOKENS), DiskModel(tmp_path / "out", CPU, quantized=True).model
    assert (
        rows.dtype == torch.bfloat16
        and distance(rows.float(), cast(Any, read).get_input_embeddings()(TOKENS)) < 0.01
    )
    assert distance(live(model), measured(tmp_path / "out")) < 0.1
    model.save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    assert load(tmp_path / "again").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_head_of_its_own_is_quantised_beside_it(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    report = run_recipe(small_recipe(text, base, **SETTINGS, head="quantize"), tmp_path / "out")
    assert [x.name for x in report.linears][:: len(report.linears) - 1] == [
        "model.embed_tokens",
        "lm_head",
    ] and not report.kept
    model = cast(Any, load(tmp_path / "out"))
    assert (
        isinstance(model.lm_head, IntegerLinear)
        and model.lm_head.weight is not model.model.embed_tokens.weight
    )
    assert distance(live(model), measured(tmp_path / "out")) < 0.01


# The order of things.


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "rotate"), [(True, "heads"), (False, True), (True, False)])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tied: bool, rotate: Any, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    recipe = small_recipe(text, base, format="w8a8", embedding="int8", rotate=rotate)
    run_recipe(recipe, tmp_path / "once")
    out, partial = tmp_path / "out", partial_folder(tmp_path / "out")
    with pytest.raises(AcceptError):
        run_recipe(recipe.model_copy(update={"accept": Accept(kl_nats=1e-9)}), out)
    shutil.move(partial, tmp_path / "kept")
    for lost in (
        ("quantize.00001",),
        ("outer.00000", "quantize.00001"),
        ("quantize.00000", "quantize.00001"),
    ):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", partial)
        for name in lost:
            (partial / "journal" / f"{name}.safetensors").unlink()
        run_recipe(recipe, out)
        assert (
            bytes_of(out) == bytes_of(tmp_path / "once")
            and Report.of(out).linears == Report.of(tmp_path / "once").linears
        )
    assert distance(live(load(out)), measured(out)) < 0.01
    base_logits = torch.cat(list(logits(DiskModel(base, CPU), TOKENS)))
    assert distance(measured(out), base_logits) < 0.1


def test_blocks_are_calibrated_on_the_rounded_embedding_against_the_full_models(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = save_base(tmp_path / "base", num_hidden_layers=1), dict[str, list[Tensor]]()
    solve = LayerQuantizer._layer

    def watch(self: LayerQuantizer, layer: Any, *rest: Any) -> Any:
        seen.update(inputs=list(layer.inputs), reference=list(layer.reference))
        return solve(self, layer, *rest)

    monkeypatch.setattr(LayerQuantizer, "_layer", watch)
    run_recipe(small_recipe(text, base, format="w8a8", embedding="int8"), tmp_path / "out")
    model = DiskModel(base, CPU).model
    rounded = DiskModel(tmp_path / "out", CPU, quantized=True).model.get_parameter(
        "model.embed_tokens.weight"
    )
    full = model.get_parameter("model.embed_tokens.weight")
    inputs, reference = torch.cat(seen["inputs"]).flatten(0, -2), torch.cat(seen["reference"]).flatten(0, -2)
    ids = torch.cdist(reference, full).argmin(1)
    assert (
        torch.equal(reference, full[ids])
        and torch.equal(inputs, rounded[ids])
        and not torch.equal(inputs, reference)
    )


# What is refused.


def test_what_can_not_be_is_refused_in_one_line(text: Path, tmp_path: Path) -> None:
    tied, untied = (save_base(tmp_path / str(tied), tie_word_embeddings=tied) for tied in (True, False))
    for base, settings, why in (
        (tied, {"head": "quantize"}, "tied to the embedding; use head: keep and embedding: int8"),
        (
            tied,
            {"head": "quantize", "embedding": "int8"},
            "tied to the embedding; use head: keep and embedding: int8",
        ),
        (
            untied,
            {"format": "int8", "threshold": 6.0, "embedding": "int8"},
            "threshold: 6 of .* or beside embedding: int8",
        ),
    ):
        for act in (lambda recipe: run_recipe(recipe, tmp_path / "out"), plan_recipe):
            with pytest.raises(ModelError, match=why) as caught:
                act(small_recipe(text, base, **settings))
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_without_its_head_or_with_another_loads_the_same_file(artefacts: dict[Case, Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    for case in (("llama", True), ("llama", False)):
        whole = cast(Any, load(artefacts[case]))
        with torch.no_grad():
            expected = whole.model(TOKENS).last_hidden_state
            body = cast(Any, AutoModel.from_pretrained(artefacts[case]))
            other = cast(Any, AutoModelForSequenceClassification.from_pretrained(artefacts[case]))
            assert torch.equal(body(TOKENS).last_hidden_state, expected)
            assert torch.equal(other.model(TOKENS).last_hidden_state, expected)


def test_an_embedding_that_is_kept_changes_nothing() -> None:
    source = InMemoryModel(pico("llama").config, pico("llama").state_dict(), CPU)
    before, _ = enter(source, [TOKENS % 160])
    chosen, kept = Quantize.model_validate({"format": "w8a8"}).choose(source)
    assert "model.embed_tokens" not in chosen and kept["lm_head"] == "head: keep"
    assert torch.equal(before[0], source.model.get_parameter("model.embed_tokens.weight")[TOKENS % 160])
