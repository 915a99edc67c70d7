"""The main job on pico models: what plain transformers loads is what we computed, the same each time, whole
or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.errors import AcceptError, DataError, ModelError, OutputError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.disk_store import source_digest
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.page import page
from llmcompress.report.schema import Report
from tests.bases import VOCABULARY, byte_tokenizer, save_base, small_recipe, write_text
from tests.models import FAMILIES, pico

CPU = torch.device("cpu")
LAYERS = 3  # of the base whose run is interrupted
TOKENS = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
LOADER = """
import sys, torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[1])["tokens"]
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    seen = {
        name: dequantize_4bit(m.weight.data, m.weight.quant_state)
        for name, m in model.named_modules() if isinstance(m, Linear4bit)
    }
    model.get_input_embeddings().requires_grad_(True)  # so weights are dequantised
    seen["exact logits"] = model(tokens).logits.detach()
    with torch.no_grad():
        seen["logits"] = model(tokens).logits
    save_file(seen, folder + ".seen")
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def load_elsewhere(folders: list[Path], scratch: Path) -> dict[Path, dict[str, Tensor]]:
    """Weights of the 4-bit linears and logits, as one process that has only transformers and bitsandbytes
    sees them."""
    from safetensors.torch import save_file

    save_file({"tokens": TOKENS}, scratch / "tokens")
    arguments = [sys.executable, "-c", LOADER, str(scratch / "tokens"), *map(str, folders)]
    subprocess.run(arguments, check=True, cwd=scratch, timeout=600)
    return {folder: load_file(f"{folder}.seen") for folder in folders}


def own_weights(folder: Path) -> dict[str, Tensor]:
    """The 4-bit linears of an artefact as our own decoder reads them, by their name in the file."""
    tensors = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    merged = {name: tensor for part in tensors.values() for name, tensor in part.items()}
    names = [name.removesuffix(".weight.absmax") for name in merged if name.endswith(".weight.absmax")]
    return {
        name: bitsandbytes_layout.dequantize(
            bitsandbytes_layout.unpack(bitsandbytes_layout.parts_of(name, merged))
        )
        for name in names
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """Every family, compressed by gptq; two of them by learned rounding too, one in many shards, one in
    bfloat16."""
    folder = tmp_path_factory.mktemp("families")
    outs = {}
    for family in FAMILIES:
        base = save_base(folder / family, family, max_shard_size="100KB" if family == "qwen2" else "1GB")
        outs[family] = folder / f"{family}-gptq"
        kept = {"experts": "keep"} if family == "qwen3_moe" else {}  # so that plain transformers loads it
        run_recipe(small_recipe(text, base, **kept), outs[family])
    for family in ("llama", "gemma3_text"):
        outs[f"{family} learned"] = folder / f"{family}-learned"
        run_recipe(
            small_recipe(text, folder / family, rounding="learned", steps=6), outs[f"{family} learned"]
        )
    return outs


@pytest.fixture(scope="module")
def elsewhere(
    everyone: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, dict[str, Tensor]]:
    return load_elsewhere(list(everyone.values()), tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "llama learned", "gemma3_text learned"])
def test_plain_transformers_loads_what_we_computed(
    name: str, everyone: dict[str, Path], elsewhere: dict[Path, dict[str, Tensor]]
) -> None:
    out = everyone[name]
    seen, own = dict(elsewhere[out]), own_weights(out)
    exact, fast = seen.pop("exact logits"), seen.pop("logits")
    assert seen.keys() == own.keys() == {linear.name for linear in Report.of(out).linears}
    assert all(torch.equal(seen[linear], own[linear]) for linear in own)
    ours = torch.cat(list(logits(DiskModel(out, CPU, quantized=True), TOKENS)))
    assert distance(exact, ours) < 1e-4
    assert distance(fast, ours) < 0.1  # the kernel computes in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_report_tells_of_every_linear_and_every_byte(name: str, everyone: dict[str, Path]) -> None:
    out = everyone[name]
    report, checkpoint = Report.of(out), Checkpoint.open(out, base=False)
    model = pico(name, vocab_size=VOCABULARY)
    linears = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    kept = {kept.name for kept in report.kept}
    assert {linear.name for linear in report.linears} | {n for n in kept if "experts" not in n} == linears
    assert (
        report.compressed.size_bytes
        == checkpoint.size_bytes
        == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    )
    assert (
        report.compressed.parameters == report.base.parameters == sum(p.numel() for p in model.parameters())
    )
    assert report.fidelity.kl_nats_mean is not None and 0 < report.fidelity.kl_nats_mean < 0.2
    assert (report.data.calibration_tokens, report.data.evaluation_tokens) == (8 * 24, 4 * 24)


def test_a_report_tells_of_a_paragraph_and_of_what_both_models_write(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    report = run_recipe(small_recipe(text, base), tmp_path / "out")
    spread, samples = report.fidelity.kl_nats_distribution, report.samples
    assert spread is not None and sum(spread.counts) == 4 * 24 and spread.p99 == report.fidelity.kl_nats_p99
    assert samples is not None and samples.paragraph is not None and samples.left_out is None
    paragraph = "".join(samples.paragraph.tokens)
    assert len(samples.paragraph.tokens) == 24 and paragraph in text.read_text()
    assert [each.tokens for each in samples.continuations] == [12] * 4
    assert all(each.prompt in text.read_text() for each in samples.continuations)
    assert (tmp_path / "out" / "report.html").read_text() == page(report, _shared(tmp_path / "out", report))


def _shared(folder: Path, report: Report) -> str:
    return Recipe.from_file(folder / "recipe.yaml").for_others(report).to_yaml()


def test_a_model_that_is_too_large_or_too_slow_writes_nothing_and_the_report_says_so(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    for setting, why in (("SHARE", "too large to be loaded whole"), ("WRITES_S", "more than 0 s")):
        with monkeypatch.context() as patch:
            patch.setattr(f"llmcompress.pipeline.evaluate.{setting}", 0)
            report = run_recipe(small_recipe(text, base), tmp_path / setting)
        assert report.samples is not None and report.samples.paragraph is not None
        assert not report.samples.continuations and why in (report.samples.left_out or "")
        assert why in (tmp_path / setting / "report.html").read_text()
        assert (report.compressed.tokens_per_s is None) == (setting == "SHARE")


def test_samples_that_can_not_be_spelled_cost_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("a tokenizer of others")

    monkeypatch.setattr("llmcompress.report.samples.token_texts", fails)
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    assert run_recipe(small_recipe(text, base), tmp_path / "out").samples is None
    assert "the report has no samples of text" in caplog.text


@pytest.mark.slow
def test_an_artefact_carries_its_recipe_its_report_and_the_small_files(
    everyone: dict[str, Path], text: Path
) -> None:
    out = everyone["llama"]
    files = set(contents(out))
    assert {"report.json", "recipe.yaml", "README.md", "tokenizer.json", "generation_config.json"} <= files
    assert {"error_per_layer.png", "before_after.png", "report.html"} <= files
    recipe = Recipe.from_file(out / "recipe.yaml")
    assert (
        recipe == small_recipe(text, out.parent / "llama") and recipe.digest == Report.of(out).recipe_digest
    )
    assert not list(out.parent.glob(".*"))


@pytest.mark.slow
def test_a_tied_base_is_stored_once_and_kept_experts_stay_as_they_are(everyone: dict[str, Path]) -> None:
    tied = Checkpoint.open(everyone["gemma3_text"], base=False)
    assert "lm_head.weight" not in tied.tensors and "model.embed_tokens.weight" in tied.tensors
    moe = Checkpoint.open(everyone["qwen3_moe"], base=False)
    base = Checkpoint.open(everyone["qwen3_moe"].parent / "qwen3_moe")
    experts = [name for name in base.tensors if ".experts." in name]
    assert experts and all(torch.equal(moe.read(name), base.read(name)) for name in experts)
    kept = {kept.name: kept.why for kept in Report.of(everyone["qwen3_moe"]).kept}
    assert all(
        kept[f"model.layers.{i}.mlp.experts.{part}"] == "experts: keep"
        for i in (0, 1)
        for part in ("gate_up_proj",)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path]:
    """A base of LAYERS layers, and its artefact by learned rounding."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_base(folder / "base", "llama", num_hidden_layers=LAYERS)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "LICENSE").write_text("free")
    run_recipe(slow_recipe(text, base), folder / "out")
    return base, folder / "out"


def slow_recipe(text: Path, base: Path) -> Recipe:
    return small_recipe(text, base, rounding="learned", steps=12)


TIMED = {"report.json", "report.html", "README.md", "before_after.png"}  # show seconds and speeds


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes(llama: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    base, out = llama
    run_recipe(slow_recipe(text, base), tmp_path / "out")
    once, again = contents(out), contents(tmp_path / "out")
    assert once.keys() == again.keys() and {"LICENSE", "chat_template.jinja"} <= once.keys()
    assert not [name for name in once if once[name] != again[name] and name not in TIMED]


RUNNER = """
import sys
import torch
torch.set_num_threads(1)  # as the runs here: sums in another order have other last bits
from llmcompress.recipe.recipe import Recipe
from llmcompress.pipeline.disk_store import source_digest
from llmcompress.pipeline.run import run_recipe
run_recipe(Recipe.from_file(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    llama: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, whole = llama
    out, recipe = tmp_path / "out", slow_recipe(text, base)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path / "recipe.yaml"), str(out)])
    journal = partial_folder(out) / "journal"
    deadline = time.monotonic() + 120
    while not list(journal.glob("quantize.*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in journal.glob("quantize.*.safetensors")}
    assert 0 < len(done) < LAYERS and not out.exists()
    report = run_recipe(recipe, out)
    assert any(f"{len(done)} layers were done by an earlier run" in note for note in report.stages[0].notes)
    assert contents(out)["model.safetensors"] == contents(whole)["model.safetensors"]
    assert contents(out)["config.json"] == contents(whole)["config.json"]
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_a_finished_block_is_not_done_again_and_a_damaged_one_is(
    llama: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, whole = llama
    out, recipe = tmp_path / "out", slow_recipe(text, base)
    with pytest.raises(AcceptError):
        run_recipe(recipe.model_copy(update={"accept": Accept(kl_nats=1e-9)}), out)
    journal = partial_folder(out) / "journal"
    files = sorted(journal.glob("quantize.*.safetensors"))
    assert len(files) == LAYERS and not out.exists()
    files[2].write_bytes(files[2].read_bytes()[:-1])
    report = run_recipe(recipe, out)  # what is accepted does not decide what a layer becomes
    assert any(f"{LAYERS - 1} layers were done by an earlier run" in note for note in report.stages[0].notes)
    assert contents(out)["model.safetensors"] == contents(whole)["model.safetensors"]


@pytest.mark.slow
def test_a_result_that_misses_its_bounds_is_not_published(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base", num_hidden_layers=1), tmp_path / "out"
    recipe = small_recipe(text, base, rounding="nearest")
    strict = recipe.model_copy(update={"accept": Accept(kl_nats=1e-9, top1_agreement=1.0)})
    with pytest.raises(
        AcceptError, match=r"kl_nats is .* and at most 1e-09 was asked; top1_agreement is .*; try rounding: "
    ):
        run_recipe(strict, out)
    assert not out.exists() and list((partial_folder(out) / "journal").glob("quantize.*"))
    assert not (partial_folder(out) / "artifact").exists()  # what can't be published takes no space
    run_recipe(recipe, out)
    before = contents(out)
    with pytest.raises(AcceptError):
        run_recipe(strict, out, overwrite=True)
    assert contents(out) == before


def test_what_exists_is_overwritten_only_when_asked(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base", num_hidden_layers=1), tmp_path / "out"
    recipe = small_recipe(text, base, rounding="nearest")
    out.mkdir()
    run_recipe(recipe, out)  # an empty folder is nothing to lose
    before = contents(out)
    with pytest.raises(OutputError, match="exists; choose another out or pass overwrite=True"):
        run_recipe(recipe, out)
    assert contents(out) == before and not partial_folder(out).exists()
    run_recipe(small_recipe(text, base, rounding="nearest", format="fp4"), out, overwrite=True)
    assert {linear.format for linear in Report.of(out).linears} == {"fp4"}
    with pytest.raises(OutputError, match="is or holds the base"):
        run_recipe(recipe, base, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("")
    with pytest.raises(OutputError, match="holds other things than a model"):
        run_recipe(recipe, tmp_path / "photos", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "photos"}


def test_the_arguments_take_the_place_of_what_the_recipe_says(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    other = tmp_path / "other.txt"
    shutil.copy(text, other)
    recipe = small_recipe(text, Path("/none"), rounding="nearest").model_copy(update={"revision": "abc"})
    report = run_recipe(recipe, tmp_path / "out", base=str(base), data=str(other))
    assert (report.base.model, report.base.revision, report.data.source) == (str(base), None, str(other))


def live(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base).eval()
    return model


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "qwen3_moe"])
def test_a_model_in_memory_becomes_what_a_folder_becomes(family: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    recipe = small_recipe(text, base)
    written = run_recipe(recipe, tmp_path / "out")
    model = live(base)
    result, report = apply_recipe(recipe, model, byte_tokenizer())
    assert result is model
    assert report.linears == written.linears and report.kept == written.kept
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-4)
    assert report.compressed.parameters == written.compressed.parameters
    assert report.base.size_bytes is not None and written.base.size_bytes is not None
    assert abs(report.base.size_bytes - written.base.size_bytes) < 10_000  # all but the headers of the file
    codes = {
        n: bitsandbytes_layout.dequantize(bitsandbytes_linear.packed_of(m))
        for n, m in model.named_modules()
        if isinstance(m, bitsandbytes_linear.Linear4bit)
    }
    own = own_weights(tmp_path / "out")
    assert codes.keys() == own.keys() and all(torch.equal(codes[name], own[name]) for name in own)
    with torch.no_grad():
        fast = model(TOKENS).logits
    assert (
        distance(fast, torch.cat(list(logits(DiskModel(tmp_path / "out", CPU, quantized=True), TOKENS))))
        < 0.1
    )
    model.save_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, own[name]) for name, weight in own_weights(tmp_path / "saved").items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, fast)


def test_a_model_in_memory_is_as_it_was_when_the_result_is_refused(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    recipe = small_recipe(text, base, rounding="nearest").model_copy(update={"accept": Accept(kl_nats=1e-9)})
    model = live(base)
    before, modules = (
        {n: t.clone() for n, t in model.state_dict().items()},
        [type(m) for m in model.modules()],
    )
    with pytest.raises(AcceptError):
        apply_recipe(recipe, model, byte_tokenizer())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [type(m) for m in model.modules()]
    assert getattr(model.config, "quantization_config", None) is None
    loose = small_recipe(text, base, rounding="nearest")
    apply_recipe(loose, model, byte_tokenizer())
    with pytest.raises(ModelError, match="quantised already"):
        apply_recipe(loose, model, byte_tokenizer())


def test_a_model_in_memory_keeps_its_mode_and_its_dtype(text: Path, tmp_path: Path) -> None:
    model = pico("llama", vocab_size=VOCABULARY, num_hidden_layers=1).bfloat16().train()
    recipe = small_recipe(text, rounding="nearest")
    apply_recipe(recipe, model, byte_tokenizer())
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.training
    linears = [m for m in model.modules() if isinstance(m, bitsandbytes_linear.Linear4bit)]
    assert {bitsandbytes_linear.packed_of(m).dtype for m in linears} == {torch.bfloat16}
    model.eval()
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_the_keys_of_the_report_are_the_contract(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(small_recipe(text, base, rounding="nearest"), tmp_path / "out")
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    sections = ["base", "compressed", "fidelity", "data", "stages", "cost", "environment", "samples"]
    assert list(report) == ["schema", "recipe_digest", *sections]
    model = {"model", "revision", "parameters", "size_bytes", "perplexity", "tokens_per_s"}
    assert model <= report["base"].keys() == report["compressed"].keys()
    assert {"kl_nats_mean", "kl_nats_p99", "top1_agreement", "perplexity_ratio"} <= report["fidelity"].keys()
    assert report["data"].keys() == {"source", "sha256", "calibration_tokens", "evaluation_tokens"}
    assert all({"name", "seconds"} <= stage.keys() for stage in report["stages"])
    assert report["cost"].keys() == {"seconds", "peak_memory_bytes"} and report["environment"].keys() == {
        "versions",
        "device",
    }
    assert all(report[which][key] for which in ("base", "compressed") for key in model - {"revision"})


def test_no_space_on_the_disk_is_told_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OutputError, match=r"needs .* [kM]B, 1 kB are free"):
        run_recipe(small_recipe(text, base), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_is_told_so(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="can't write"):
        run_recipe(small_recipe(text, base), tmp_path / "locked" / "out")


def test_a_name_that_the_report_can_not_be_written_with_is_refused_at_once(
    text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1).rename(tmp_path / os.fsdecode(b"base-\xff"))
    with pytest.raises(ModelError, match=r"base .* is not Unicode text"):
        run_recipe(small_recipe(text), tmp_path / "out", base=str(base))
    other = Path(shutil.copy(text, tmp_path / os.fsdecode(b"facts-\xff.txt")))
    with pytest.raises(DataError, match=r"data .* is not Unicode text"):
        run_recipe(small_recipe(text), tmp_path / "out", base="demo", data=str(other))
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


def test_the_source_of_a_package_is_told_by_every_byte_of_it(tmp_path: Path) -> None:
    for name in ("a.py", "inner/b.py", "c.c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    seen = {source_digest.__wrapped__(tmp_path)}
    for name in ("a.py", "inner/b.py", "c.c"):
        (tmp_path / name).write_text("x = 2")
        seen.add(source_digest.__wrapped__(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    seen.add(source_digest.__wrapped__(tmp_path))
    (tmp_path / "picture.png").write_text("no source")
    assert source_digest.__wrapped__(tmp_path) in seen and len(seen) == 5
