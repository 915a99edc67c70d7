"""Distillation as a stage: what learns, from whom, on what, and that it can be interrupted."""

from __future__ import annotations

import json
import os
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
from transformers import AutoModelForCausalLM, Trainer

from llmcompress.data.calibration import load_data
from llmcompress.data.sources import DataSpec
from llmcompress.errors import DataError, ModelError, RecipeError
from llmcompress.io.manifest import MANIFEST, manifest_of
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.distill import training
from llmcompress.stages.distill.student import freeze
from llmcompress.stages.distill.teacher import forward_arguments, output_of
from llmcompress.stages.distill.trainer import (
    DistillTrainer,
    SequenceDataset,
    Watch,
    answering,
    continued,
    last_checkpoint,
)
from tests.artefacts import load
from tests.bases import byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.caches import own_cache
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

TRAINED = {"steps": 6, "batch": 4, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def facts(report: Report, stage: int = -1) -> dict[str, Any]:
    return report.stages[stage].model_dump()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_model(family: str) -> None:
    model, ids = (
        pico(family).eval(),
        torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        found = output_of(model, model(**forward_arguments(ids))).scores
        assert torch.equal(found.logits(found.product(torch.arange(18))), model(ids).logits.flatten(0, 1))


def test_sequences_come_once_each_in_an_order_of_the_seed_and_then_again() -> None:
    tokens = torch.arange(50)
    sequences = SequenceDataset(tokens, 8, 9, seed=1)
    assert len(sequences) == 9 and sequences.ids_NL.shape == (6, 8)
    first = torch.stack([sequences[i]["input_ids"] for i in range(6)])
    assert torch.equal(first.flatten().sort().values, tokens[:48])
    again, other = SequenceDataset(tokens, 8, 9, seed=1), SequenceDataset(tokens, 8, 9, seed=2)
    assert torch.equal(again.order, sequences.order) and not torch.equal(other.order, sequences.order)


def test_what_is_trained_on_neither_calibrates_nor_measures(text: Path) -> None:
    spec = DataSpec(source=str(text), samples=8, length=16, evaluation_samples=4)
    plain = load_data(spec, byte_tokenizer(), 256, None)
    layers = load_data(spec, byte_tokenizer(), 256, None, lambda length: 200 * length)
    assert torch.equal(layers.calibration, plain.calibration) and torch.equal(
        layers.evaluation, plain.evaluation
    )
    assert len(plain.training) == 0 and len(layers.training) == 200 * 16
    trained = {tuple(sequence.tolist()) for sequence in layers.training.view(-1, 16)}
    assert not trained & {
        tuple(sequence.tolist()) for side in (layers.calibration, layers.evaluation) for sequence in side
    }


def test_dropout_is_off() -> None:
    model = pico("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    freeze(model)
    ids = torch.randint(3, 100, (1, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_stays_as_it_is(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    report = run_recipe(staged_recipe(text, tmp_path / "base", {"distill": TRAINED}), tmp_path / "out")
    found = facts(report)
    assert found["kl_before"] == found["kl_after"] == 0 and "kept as it came" in found["notes"][0]
    base, out = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert base.keys() == out.keys() and all(torch.equal(out[name], base[name]) for name in base)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "cross_entropy"])
def test_what_was_cut_is_healed(loss: str, text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    stages = [
        {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
        {"distill": {**TRAINED, "loss": loss, "steps": 20}},
    ]
    report = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")
    found = facts(report)
    if loss != "cross_entropy":  # a text is not what a random model predicts
        assert found["kl_after"] < 0.9 * found["kl_before"] and not found["notes"]
        assert found["kl_after"] == min(kl for _, kl in found["curve"]) and found["curve"][-1][0] == 20
        assert [step for step, _ in found["losses"]] == list(range(1, 21)) and found["losses"][-1][1] < found[
            "losses"
        ][0][1]
        assert [step for step, _ in found["perplexities"]] == [0] + [step for step, _ in found["curve"]]
    cut = run_recipe(staged_recipe(text, tmp_path / "base", stages[0]), tmp_path / "cut")
    assert loss == "cross_entropy" or known(report.fidelity.kl_nats_mean) < 0.9 * known(
        cut.fidelity.kl_nats_mean
    )
    assert report.compressed.parameters == cut.compressed.parameters
    assert load(tmp_path / "out").config.intermediate_size == 64


@pytest.mark.slow
def test_norms_alone_can_learn(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    cut = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}
    run_recipe(staged_recipe(text, tmp_path / "base", cut), tmp_path / "cut")
    settings = {**TRAINED, "train": "norms", "learning_rate": 1e-2}
    run_recipe(staged_recipe(text, tmp_path / "base", cut, {"distill": settings}), tmp_path / "out")
    before, after = weights(tmp_path / "cut"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("norm" in name for name in changed)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_it_goes_on_to_the_next_stage(family: str, text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", family)
    cut = (
        {"axis": "expert", "keep": 2}
        if family == "qwen3_moe"
        else {"axis": "ffn", "keep": 64, "repair": False}
    )
    stages = (
        {"prune": cut},
        {"distill": {**TRAINED, "steps": 3}},
        {"quantize": {"format": "nf4", "rounding": "nearest"}},
    )
    report = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")
    assert [stage.name for stage in report.stages] == ["prune", "distill", "quantize"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__


@pytest.mark.slow
def test_small_batches_that_are_added_up_are_a_large_one(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    cut = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}
    for micro in (4, 1):
        run_recipe(
            staged_recipe(text, tmp_path / "base", cut, {"distill": {**TRAINED, "micro_batch": micro}}),
            tmp_path / str(micro),
        )
    whole, parts = weights(tmp_path / "4"), weights(tmp_path / "1")
    assert all(torch.allclose(parts[name], whole[name], atol=1e-5) for name in whole)


@pytest.mark.slow
def test_a_model_in_memory_learns_as_one_on_disk(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    stages: list[dict[str, Any]] = [
        {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
        {"distill": TRAINED},
    ]
    written = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    result, report = apply_recipe(staged_recipe(text, tmp_path / "base", *stages), model, byte_tokenizer())
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-4)
    out = weights(tmp_path / "out")
    assert all(torch.allclose(result.state_dict()[name], out[name], atol=1e-6) for name in out)


KILLED = """
import sys
from functools import partial
from llmcompress import Recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.report import metrics
sys.modules["llmcompress.pipeline.evaluate"].speed = partial(metrics.speed, decode_tokens=2, repeats=1)
run_recipe(Recipe.from_file(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_one_that_was_killed_goes_on_and_ends_the_same(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    settings = {**TRAINED, "steps": 15, "evaluate_every": 3}
    recipe = staged_recipe(
        text,
        tmp_path / "base",
        {"prune": {"axis": "ffn", "keep": 64, "repair": False}},
        {"distill": settings},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())

    def start(out: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(tmp_path / out)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    killed = start("killed")
    for _ in range(2400):
        if any(tmp_path.glob("**/checkpoint-6/trainer_state.json")):
            break
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    assert start("killed").wait() == 0 and start("whole").wait() == 0
    again, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("qwen3_moe", {}),
        ("llama", {"train": "lora", "rank": 4}),
        ("llama", {"train": "scales"}),
        ("gpt2", {"train": "scales"}),
        ("llama", {"hidden": 1.0, "on_policy": 0.5}),
        ("llama", {"cache": True, "optimizer": "adamw_8bit"}),
    ],
    ids=str,
)
def test_one_that_was_interrupted_goes_on_and_ends_the_same(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base", family)
    before: dict[str, Any] = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}
    if family == "qwen3_moe":
        before = {"prune": {"axis": "expert", "keep": 2}}
    if settings.get("train") == "scales":
        before = {"quantize": {"format": "nf4", "group_size": 32, "rounding": "nearest"}}
    lesson = {**TRAINED, "learning_rate": 1e-3, "evaluate_every": 2, **settings}
    recipe = staged_recipe(text, tmp_path / "base", before, {"distill": lesson})
    run_recipe(recipe, tmp_path / "whole")
    step_end = Watch.on_step_end

    def interrupted(self: Watch, args: Any, state: Any, control: Any, **named: Any) -> None:
        step_end(self, args, state, control, **named)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "again")
    monkeypatch.setattr(Watch, "on_step_end", step_end)
    report = run_recipe(recipe, tmp_path / "again")
    assert facts(report)["kl_after"] < facts(report)["kl_before"]
    again, whole = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    states = {2: "{}", 10: '{"best_model_checkpoint": "/at/that/time/checkpoint-2"}', 30: "{}", 40: "{}"}
    for step, text in states.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
        (folder / "model.safetensors").write_bytes(b"weights")
        if step < 40:  # the last was under way
            (folder / MANIFEST).write_text(manifest_of(folder))
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"weighty")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}, (
        "no best one is taken from others"
    )
    assert last_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    assert last_checkpoint(tmp_path) is None, "the best one is what stays in the end"


def test_training_that_leaves_the_numbers_keeps_what_was_good(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "base")

    class Breaking(DistillTrainer):
        def training_step(self, model: Any, *given: Any, **named: Any) -> Tensor:
            if self.state.global_step == 4:
                next(model.parameters()).data.fill_(torch.nan)
            return Trainer.training_step(self, model, *given, **named)

    monkeypatch.setattr(training, "DistillTrainer", Breaking)
    cut = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}
    settings = {**TRAINED, "steps": 10, "evaluate_every": 2}
    report = run_recipe(staged_recipe(text, tmp_path / "base", cut, {"distill": settings}), tmp_path / "out")
    found = facts(report)
    assert "loss became NaN or Inf at step 5" in found["notes"][0] and found["kl_after"] < found["kl_before"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


CUT = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A base, what is left of it once cut and once quantised, and the KL of the first."""
    folder = tmp_path_factory.mktemp("bases")
    save_base(folder / "base")
    run_recipe(staged_recipe(text, folder / "base", CUT), folder / "cut")
    for double_quant in (False, True):
        quantize = {"format": "nf4", "group_size": 32, "rounding": "nearest", "double_quant": double_quant}
        run_recipe(
            staged_recipe(text, folder / "base", {"quantize": quantize}), folder / f"nf4-{double_quant}"
        )
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(own_cache(tmp_path / "cache")))


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    "settings",
    [
        {"train": "lora", "rank": 4, "learning_rate": 1e-2},
        {"cache": True, "top_k": 200},
        {"on_policy": 0.5},
        {"hidden": 1.0},
        {"hidden": 1.0, "hidden_loss": "cosine"},
        {"attention": 1.0},
        {"teacher_format": "nf4"},
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_8bit"},
    ],
    ids=str,
)
def test_what_was_cut_is_healed_in_every_way(
    settings: dict[str, Any], bases: Path, text: Path, tmp_path: Path
) -> None:
    cut = Report.of(bases / "cut").fidelity.kl_nats_mean
    distilled = {"distill": {**TRAINED, "learning_rate": 5e-4, "steps": 12, **settings}}
    report = run_recipe(staged_recipe(text, bases / "base", CUT, distilled), tmp_path / "out")
    assert cut is not None and report.fidelity.kl_nats_mean is not None and report.fidelity.kl_nats_mean < cut
    assert weights(tmp_path / "out").keys() == weights(bases / "cut").keys()
    assert Report.of(tmp_path / "out").trainings[0].steps == 12


def test_what_is_written_by_the_student_is_drawn_the_same_again() -> None:
    model, ids = (
        pico("llama").eval(),
        torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0)),
    )
    answering(model)
    first, again, other = (continued(model, ids, seed) for seed in (5, 5, 6))
    assert first.shape == ids.shape and torch.equal(first[:, :6], ids[:, :6])
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, ids)


@pytest.mark.slow
def test_a_kept_teacher_is_not_asked_twice(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    notes = []
    for loss in ("forward_kl", "reverse_kl"):
        distilled = {"distill": {**TRAINED, "cache": True, "top_k": 8, "loss": loss}}
        notes.append(
            facts(run_recipe(staged_recipe(text, tmp_path / "base", CUT, distilled), tmp_path / loss))[
                "notes"
            ][0]
        )
    assert notes[0].startswith("the teacher was asked for 40 of 40 sequences, 34 bytes per token")
    assert notes[1].startswith("the teacher was asked for 0 of 40 sequences")


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("train", ["scales", "norms", "all"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantised_model_learns_at_the_same_bytes(
    train: str, double_quant: bool, bases: Path, text: Path, tmp_path: Path
) -> None:
    quantize = {
        "quantize": {"format": "nf4", "group_size": 32, "rounding": "nearest", "double_quant": double_quant}
    }
    plain = Report.of(bases / f"nf4-{double_quant}")
    distilled = {"distill": {**TRAINED, "train": train, "learning_rate": 1e-3, "steps": 12}}
    report = run_recipe(staged_recipe(text, bases / "base", quantize, distilled), tmp_path / "out")
    assert known(report.fidelity.kl_nats_mean) < known(plain.fidelity.kl_nats_mean)
    before, after = weights(bases / f"nf4-{double_quant}"), weights(tmp_path / "out")
    # bitsandbytes keeps the offset of double quantisation as text, of any length
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before if "quant_state" not in name)
    changed = {
        name
        for name in before
        if after[name].shape != before[name].shape or not torch.equal(before[name], after[name])
    }
    changed = {name for name in changed if "quant_state" not in name}
    scales = {name for name in before if name.endswith((".absmax", ".nested_absmax"))}
    assert changed and not {name for name in changed if before[name].dtype == torch.uint8} - scales
    assert bool(changed & scales) == (train != "norms") and ("lm_head.weight" in changed) == (train == "all")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.bnb_4bit_use_double_quant == double_quant


@pytest.mark.slow
def test_scales_of_a_model_of_mixed_formats_learn_too(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    mixed = {
        "format": "nf4",
        "group_size": 32,
        "rounding": "nearest",
        "overrides": {"*.down_proj": {"format": "w8a8"}},
    }
    plain = run_recipe(staged_recipe(text, tmp_path / "base", {"quantize": mixed}), tmp_path / "plain")
    distilled = {"distill": {**TRAINED, "train": "scales", "learning_rate": 1e-3, "steps": 12}}
    report = run_recipe(
        staged_recipe(text, tmp_path / "base", {"quantize": mixed}, distilled), tmp_path / "out"
    )
    assert known(report.fidelity.kl_nats_mean) < known(plain.fidelity.kl_nats_mean)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights(tmp_path / "out")[name], weights(tmp_path / "plain")[name])


@pytest.mark.slow
def test_a_quantised_model_in_memory_learns_as_one_on_disk(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    stages = (
        {"quantize": {"format": "nf4", "group_size": 32, "rounding": "nearest"}},
        {"distill": {**TRAINED, "train": "scales", "learning_rate": 1e-3}},
    )
    written = run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    result, report = apply_recipe(staged_recipe(text, tmp_path / "base", *stages), model, byte_tokenizer())
    assert report.fidelity.kl_nats_mean == pytest.approx(written.fidelity.kl_nats_mean, rel=1e-4)
    assert report.compressed.size_bytes == pytest.approx(written.compressed.size_bytes, rel=0.05)
    state, out = result.state_dict(), weights(tmp_path / "out")
    assert all(torch.allclose(state[name].float(), out[name].float(), atol=1e-5) for name in out)


@pytest.mark.slow
def test_another_model_teaches(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_base(tmp_path / "other", hidden_size=128)
    save_base(tmp_path / "wide", vocab_size=300)
    for other in ("other", "wide"):
        settings = {**TRAINED, "steps": 12, "learning_rate": 1e-3, "teacher": str(tmp_path / other)}
        found = facts(
            run_recipe(
                staged_recipe(text, tmp_path / "base", CUT, {"distill": settings}), tmp_path / "out" / other
            )
        )
        assert found["kl_after"] < found["kl_before"]


@pytest.mark.slow
@pytest.mark.parametrize("weights_too", [True, False])
def test_another_model_learns(weights_too: bool, text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    if weights_too:
        save_base(tmp_path / "other", "gpt2")
    else:
        save_base(tmp_path / "other", hidden_size=32)
    if not weights_too:
        (tmp_path / "other" / "model.safetensors").unlink()
    settings = {
        **TRAINED,
        "steps": 12,
        "learning_rate": 1e-3,
        "student": str(tmp_path / "other"),
        "hidden": 0.1,
    }
    report = run_recipe(staged_recipe(text, tmp_path / "base", {"distill": settings}), tmp_path / "out")
    found = facts(report)
    assert found["kl_after"] < found["kl_before"]
    student = load(tmp_path / "out")
    assert student.config.model_type == ("gpt2" if weights_too else "llama")
    assert sum(p.numel() for p in student.parameters()) == report.compressed.parameters
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    result, live = apply_recipe(
        staged_recipe(text, tmp_path / "base", {"distill": settings}), base, byte_tokenizer()
    )
    assert type(result) is type(student)
    assert live.fidelity.kl_nats_mean == pytest.approx(report.fidelity.kl_nats_mean, rel=1e-3)


def test_kin_that_speaks_otherwise_is_refused(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_base(tmp_path / "narrow", vocab_size=200)
    save_base(tmp_path / "wide", vocab_size=300)
    save_base(tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    words = json.loads(tokenizer.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(words))
    for settings, why in (
        ({"teacher": "narrow"}, "predicts 200 tokens and the base 256"),
        ({"student": "narrow"}, "predicts 200 tokens and the base 256"),
        ({"student": "wide"}, "predicts 300 tokens and the base 256"),
        ({"teacher": "other"}, "another tokenizer than the base"),
        ({"student": "other"}, "another tokenizer than the base"),
    ):
        named = {role: str(tmp_path / name) for role, name in settings.items()}
        with pytest.raises(ModelError, match=why):
            run_recipe(
                staged_recipe(text, tmp_path / "base", {"distill": {**TRAINED, **named}}), tmp_path / "out"
            )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_scales_without_any_are_refused_before_anything_is_done(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    stages = (
        {"quantize": {"format": "int8", "rounding": "nearest"}},
        {"distill": {**TRAINED, "train": "scales"}},
    )
    with pytest.raises(ModelError, match="nf4 and fp4 and for codebooks"):
        run_recipe(staged_recipe(text, tmp_path / "base", *stages), tmp_path / "out")


def test_too_little_text_is_said(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    long = staged_recipe(text, tmp_path / "base", {"distill": {**TRAINED, "steps": 2, "batch": 4000}})
    with pytest.raises(DataError, match="not one batch of 4000"):
        run_recipe(long, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("learning_rate: 0", "learning_rate: Input should be greater than 0"),
        ("learning_rate: -0.1", "learning_rate: Input should be greater than 0"),
        ("steps: 0", "steps: Input should be greater than or equal to 1"),
        ("batch: 16, micro_batch: 5", "micro_batch 5 is no divisor of batch 16"),
        ("loss: forward_kl, skew: 0.5", "skew is for jensen_shannon"),
        ("loss: kl", "loss: Input should be"),
        ("label_share: 2", "label_share: Input should be less than or equal to 1"),
        ("stepz: 10", "unknown key; did you mean steps"),
        ("rank: 8", "rank is for train: lora, not all"),
        ("top_k: 8", "top_k is for cache: true"),
        ("cache: true, on_policy: 0.5", "on_policy needs the teacher in memory"),
        ("cache: true, hidden: 1.0", "hidden needs the teacher in memory"),
        ("train: scales", "put one of them before it"),
        ("train: scales, student: a/b", "leave student"),
        ("trackers: [tensorbored]", "trackers are .*, not tensorbored"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(settings: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as told:
        Recipe.parse(f"stages: [{{distill: {{{settings}}}}}]")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (["quantize", "prune: {axis: ffn, keep: 0.5}"], "but for what is not in codes"),
        (["quantize", "distill: {train: lora}"], "but for what is not in codes"),
        (["prune: {axis: ffn, keep: 0.5}", "distill: {student: a/b}"], "let its distill be the first"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_told(stages: list[str], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        Recipe.parse("stages:\n" + "".join(f"  - {entry}\n" for entry in stages))


def test_a_plan_prices_it(text: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    rows = plan_recipe(staged_recipe(text, tmp_path / "base", {"distill": TRAINED})).rows
    assert rows[1].stage == "distill (forward_kl, 6 steps of 4 x 48 tokens)" and known(rows[1].seconds) > 0
