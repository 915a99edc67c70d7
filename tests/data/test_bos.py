"""Models whose tokenizer begins with BOS: it is the first token of each sequence, and what is predicted there
is not scored."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmcompress.algorithms.distillation_losses import IGNORED
from llmcompress.data.calibration import CalibrationData, bos_of, load_data, with_bos
from llmcompress.data.sources import DataSpec
from llmcompress.errors import DataError
from llmcompress.modeling.backward import (
    drawn_from,
    following,
    gradients,
    label_generator,
    next_tokens,
    output_fisher,
)
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.sequential import divergences, walk
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.console import print_evaluation, print_report
from llmcompress.report.model_card import BOS, card
from llmcompress.report.schema import Report
from llmcompress.stages.distill.feature_matching import Matching
from llmcompress.stages.distill.teacher import TeacherOutput, forward_arguments, output_of
from llmcompress.stages.distill.trainer import Objective, SequenceDataset, measured
from tests.artefacts import CPU
from tests.bases import VOCABULARY, bos_tokenizer, byte_tokenizer, known, save_base, save_bos_base, write_text
from tests.models import noise, pico

pytestmark = pytest.mark.usefixtures("short_runs")

SMALL: dict[str, Any] = {"samples": 8, "length": 24, "evaluation_samples": 6}
SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bos_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary, near the base."""
    folder = save_bos_base(tmp_path_factory.mktemp("other"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.abs().mean() * noise(*parameter.shape, seed=parameter.numel())
    model.save_pretrained(folder)
    return folder


def load(tokenizer: PreTrainedTokenizerFast, text: Path, training: int = 0, **spec: Any) -> CalibrationData:
    entries = {"source": str(text)} | SMALL | spec
    return load_data(
        DataSpec.model_validate(entries), tokenizer, VOCABULARY + 1, 96, lambda length: training * length
    )


def recipe(text: Path, base: Path, *stages: dict[str, Any], **data: Any) -> Recipe:
    return Recipe.model_validate(
        {"base": str(base), "data": {"source": str(text)} | SMALL | data, "stages": list(stages)}
    )


# sequences


def test_every_sequence_begins_with_bos_and_is_text_after_it(text: Path) -> None:
    plain, layers = load(byte_tokenizer(), text, length=23), load(bos_tokenizer(), text)
    assert (layers.bos, layers.unscored, plain.bos, plain.unscored) == (VOCABULARY, 1, None, 0)
    for ours, theirs in ((layers.calibration, plain.calibration), (layers.evaluation, plain.evaluation)):
        assert ours.shape == (len(theirs), 24) and (ours[:, 0] == VOCABULARY).all()
        assert torch.equal(ours[:, 1:], theirs)
    assert torch.equal(layers.scored, plain.evaluation) and torch.equal(plain.scored, plain.evaluation)
    assert layers.sha256 != plain.sha256
    assert (layers.calibration_tokens, layers.evaluation_tokens) == (8 * 24, 6 * 24)


def test_every_training_sequence_begins_with_bos_too(text: Path) -> None:
    layers = load(bos_tokenizer(), text, training=20)
    assert len(layers.training) == 20 * 24 and VOCABULARY not in layers.training
    sequences = SequenceDataset(layers.training, 16, 9, seed=1, bos=layers.bos)
    rows = torch.stack([sequences[number]["input_ids"] for number in range(9)])
    assert rows.shape == (9, 16) and (rows[:, 0] == VOCABULARY).all()
    assert torch.equal(sequences.ids_NL[:, 1:].flatten(), layers.training[: 20 * 24 // 15 * 15])
    again = SequenceDataset(layers.training, 15, 9, seed=1)
    assert torch.equal(sequences.ids_NL, with_bos(again.ids_NL, VOCABULARY))
    trained = {tuple(sequence.tolist()) for sequence in layers.training.view(-1, 24)[:, :23]}
    assert not trained & {
        tuple(sequence[1:].tolist()) for side in (layers.calibration, layers.evaluation) for sequence in side
    }


def test_without_bos_the_sequences_are_those_of_a_tokenizer_that_adds_none(text: Path) -> None:
    old, off, never = (
        load(tokenizer, text, training=5, **more)
        for tokenizer, more in (
            (byte_tokenizer(), {}),
            (bos_tokenizer(), {"bos": False}),
            (bos_tokenizer(begins=False), {}),
        )
    )
    for new in (off, never):
        assert (new.bos, new.sha256, new.training_sha256) == (None, old.sha256, old.training_sha256)
        assert torch.equal(new.scored, old.evaluation)


def test_bos_can_be_asked_of_a_tokenizer_that_adds_none(text: Path) -> None:
    assert load(bos_tokenizer(begins=False), text, bos=True).sha256 == load(bos_tokenizer(), text).sha256
    with pytest.raises(
        DataError, match="bos: true asks for a BOS token and the tokenizer has none; use bos: auto"
    ):
        load(byte_tokenizer(), text, bos=True)


def test_a_tokenizer_is_known_by_what_it_encodes() -> None:
    assert bos_of(bos_tokenizer(), "auto") == bos_of(bos_tokenizer(), True) == VOCABULARY
    assert (
        bos_of(bos_tokenizer(), False)
        is bos_of(bos_tokenizer(begins=False), "auto")
        is bos_of(byte_tokenizer(), "auto")
        is None
    )
    named = byte_tokenizer()
    named.bos_token = "a"  # the text begins with it, and the tokenizer adds nothing
    assert bos_of(named, "auto") is None and bos_of(named, True) == named.bos_token_id
    if SHARED.is_dir():
        names = ("stories260K", "wikilm-8m")
        tokenizers = (AutoTokenizer.from_pretrained(SHARED / "models" / name) for name in names)
        assert [bos_of(tokenizer, "auto") for tokenizer in tokenizers] == [1, None]


def test_lengths_count_bos(text: Path) -> None:
    assert load(bos_tokenizer(), text, length=None, samples=1, evaluation_samples=1).calibration.shape == (
        1,
        96,
    )
    with pytest.raises(
        DataError, match="length 2 leaves no token to predict from text; use length: 3 or more"
    ):
        load(bos_tokenizer(), text, length=2)
    with pytest.raises(
        DataError, match=r"fills \d+ sequences of 96 tokens .* use evaluation_samples: (\d+) or length: (\d+)"
    ) as told:
        load(bos_tokenizer(), text, length=96, evaluation_samples=40)
    length = int(str(told.value).partition("or length: ")[2].split()[0])
    assert load(bos_tokenizer(), text, length=length, evaluation_samples=40).evaluation.shape == (40, length)
    with pytest.raises(DataError, match="or give more text"):
        load(bos_tokenizer(), text, length=length + 1, evaluation_samples=40)


def test_a_text_on_both_sides_is_refused_behind_bos_as_well(tmp_path: Path, text: Path) -> None:
    (tmp_path / "train.txt").write_text(text.read_text())
    (tmp_path / "valid.txt").write_text(text.read_text() + "one more line")
    with pytest.raises(DataError, match=r"evaluation sequence 0 of .* also stands in its calibration text"):
        load(bos_tokenizer(), tmp_path)


def test_a_bos_token_beyond_the_vocabulary_is_refused(text: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer gives token 256 and the model has 256 tokens"):
        load_data(
            DataSpec(source=str(text), samples=2, length=24, evaluation_samples=2),
            bos_tokenizer(),
            VOCABULARY,
            96,
        )


# numbers


def by_transformers(folder: Path, sequences: Tensor) -> Tensor:
    """The logits of the whole model, float64."""
    with torch.no_grad():
        scores: Tensor = AutoModelForCausalLM.from_pretrained(folder)(sequences, use_cache=False).logits
    return scores.double()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_perplexity_is_that_of_the_predictions_made_after_text(
    family: str, text: Path, tmp_path: Path
) -> None:
    folder = save_bos_base(tmp_path, family)
    spec = DataSpec.model_validate({"source": str(text)} | SMALL)
    sequences = load(bos_tokenizer(), text).evaluation
    log_q = by_transformers(folder, sequences).log_softmax(-1)
    nll = F.nll_loss(log_q[:, 1:-1].flatten(0, 1), sequences[:, 2:].flatten())
    found = evaluate(str(folder), data=spec)
    assert found.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert (found.tokens, found.bos) == (6 * 22, True)
    plain = evaluate(str(folder), data=spec.model_copy(update={"bos": False}))
    sequences = load(byte_tokenizer(), text).evaluation
    nll = F.nll_loss(
        by_transformers(folder, sequences).log_softmax(-1)[:, :-1].flatten(0, 1), sequences[:, 1:].flatten()
    )
    assert plain.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5) and not plain.bos


def test_the_distance_from_a_base_is_that_of_the_predictions_made_after_text(
    text: Path, base: Path, other: Path
) -> None:
    sequences = load(bos_tokenizer(), text).evaluation
    log_p, log_q = (by_transformers(folder, sequences).log_softmax(-1)[:, 1:] for folder in (base, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = evaluate(
        str(other), against=str(base), data=DataSpec.model_validate({"source": str(text)} | SMALL)
    )
    assert found.kl_nats_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_nats_p99 == pytest.approx(
        float(kl.flatten().sort().values[math.ceil(0.99 * kl.numel()) - 1]), rel=1e-4
    )
    assert found.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()), abs=0.008
    )


def test_losses_between_streams_do_not_count_bos(base: Path, other: Path, text: Path) -> None:
    sequences, model = load(bos_tokenizer(), text).calibration, DiskModel(base, CPU)
    *_, last = walk(model, sequences, through=True)
    *_, found = walk(DiskModel(other, CPU), sequences, through=True)
    aside = [hidden.clone() for hidden in found.inputs]
    for hidden in aside:
        hidden[:, 0] = 0
    first, second = (divergences(model, last.inputs, {0: states}, 1)[0] for states in (found.inputs, aside))
    assert first == second > 0 and divergences(model, last.inputs, {0: aside})[0] != pytest.approx(
        first, rel=1e-3
    )


# gradients and training


def test_the_label_after_bos_is_not_learnt() -> None:
    tokens = torch.tensor([[9, 1, 2, 3], [9, 4, 5, 6]])
    assert next_tokens(tokens).tolist() == [[1, 2, 3, IGNORED], [4, 5, 6, IGNORED]]
    assert next_tokens(tokens, 1).tolist() == [[IGNORED, 2, 3, IGNORED], [IGNORED, 5, 6, IGNORED]]


def test_gradients_are_those_of_the_predictions_made_after_text(base: Path, tmp_path: Path) -> None:
    tokens, model = (
        with_bos(torch.randint(3, 250, (3, 11)), VOCABULARY),
        AutoModelForCausalLM.from_pretrained(base),
    )
    weight = model.model.layers[0].mlp.down_proj.weight
    scores = model(tokens, use_cache=False).logits
    F.cross_entropy(scores[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum").backward()
    watched = ("mlp.down_proj.weight",)
    steps = {
        i: found
        for i, _, found in gradients(DiskModel(base, CPU), tokens, tmp_path, following, watched, unscored=1)
    }
    torch.testing.assert_close(
        steps[0][watched[0]], weight.grad, rtol=0, atol=1e-4 * float(weight.grad.abs().max())
    )


def test_the_fisher_matrix_does_not_see_what_is_predicted_at_bos(base: Path, tmp_path: Path) -> None:
    tokens = with_bos(torch.randint(3, 250, (3, 11)), VOCABULARY)
    model = DiskModel(base, CPU)
    last = len(model.layers) - 1
    begun, without = (dict(output_fisher(model, tokens, tmp_path, 0, unscored=n))[last] for n in (0, 1))
    grads: list[Tensor] = []

    def drawn(number: int, p: Tensor, given: Tensor) -> Tensor:
        found = drawn_from(p.flatten(0, 1), label_generator(0, number, CPU)).view(given.shape)
        found[:, 0] = IGNORED
        return found

    for index, found, _ in gradients(model, tokens, tmp_path, drawn):
        grads += found if index == last else []
    expected = torch.cat(grads).flatten(0, 1)
    # nothing after the last layer reads the states of another position
    assert float(torch.cat(grads)[:, 0].abs().max()) == 0
    torch.testing.assert_close(without, expected.T @ expected / len(expected))
    assert not torch.allclose(begun, without, rtol=1e-3)


def test_a_student_is_measured_and_taught_by_the_predictions_made_after_text() -> None:
    ids = with_bos(torch.randint(3, 150, (2, 9)), 1)
    student, teacher = pico("llama"), pico("llama", rms_norm_eps=0.5)
    with torch.no_grad():
        own, theirs = (model(**forward_arguments(ids)) for model in (student, teacher))
        taught, found = output_of(teacher, theirs), output_of(student, own)
        logits = (
            one.scores.logits(one.scores.product(torch.arange(20))).view(2, 10, -1) for one in (taught, found)
        )
        log_p, log_q = (each.log_softmax(-1) for each in logits)
        kl, nll = measured(student, ids, taught, 1, own)
        objective = Objective("forward_kl", 0.0, 1.0, None, None, lambda batch, **_: taught, unscored=1)
        loss = objective.loss(student, ids, taught, own)
    every = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (
        float(kl)
        == pytest.approx(float(every[:, 1:].mean()), rel=1e-4)
        != pytest.approx(float(every.mean()), rel=1e-4)
    )
    assert float(nll) == pytest.approx(
        float(F.nll_loss(log_q[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())), rel=1e-4
    )
    assert float(loss) == pytest.approx(float(every[:, 1:-1].mean()), rel=1e-4)


def test_states_and_attention_at_bos_are_not_matched() -> None:
    def states(seed: int, first: float) -> TeacherOutput:
        hidden = noise(2, 5, 8, seed=seed)
        hidden[:, 0] = first * hidden[:, 0]
        maps = noise(2, 3, 5, 5, seed=seed + 1)
        maps[:, :, 0] *= first
        scores: Any = None
        return TeacherOutput(scores, (hidden, hidden), (maps.softmax(-1),))

    for hidden, attention in ((1.0, 0.0), (0.0, 1.0)):
        matching = Matching.of(1, 1, (), "mse", hidden, attention, 1)
        loss = matching.loss(states(0, 1.0), states(7, 1.0), None)
        assert torch.equal(loss, matching.loss(states(0, 99.0), states(7, -50.0), None)) and float(loss) > 0
        counting = replace(matching, unscored=0)
        assert float(counting.loss(states(0, 99.0), states(7, -50.0), None)) != pytest.approx(
            float(loss), rel=1e-3
        )


def test_a_distillation_runs_on_sequences_that_begin_with_bos(text: Path, base: Path, tmp_path: Path) -> None:
    lesson = {"steps": 4, "batch": 2, "length": 12, "learning_rate": 1e-3, "cache": True, "top_k": 8}
    cut = {"prune": {"axis": "ffn", "keep": 64, "repair": False}}
    report = run_recipe(recipe(text, base, cut, {"distill": lesson}), tmp_path / "out")
    (found,) = report.trainings
    assert found.kl_after < found.kl_before and found.length == 12
    with pytest.raises(
        DataError, match="distill: length 2 leaves no token to predict from text; use 3 or more"
    ):
        run_recipe(recipe(text, base, {"distill": {"steps": 1, "batch": 2, "length": 2}}), tmp_path / "short")


@pytest.mark.parametrize(
    "stage",
    [
        {"prune": {"axis": "ffn", "keep": 64, "score": "taylor"}},
        {"prune": {"axis": "layer", "keep": 1, "score": "kl"}},
        {"tie": {}},
        {"prune": {"axis": "ffn", "keep": 64, "score": "obs"}},
    ],
)
def test_the_stages_that_measure_losses_take_sequences_that_begin_with_bos(
    stage: dict[str, Any], text: Path, base: Path, tmp_path: Path
) -> None:
    report = run_recipe(recipe(text, base, stage), tmp_path / "out")
    assert report.data.bos is True and known(report.fidelity.kl_nats_mean) > 0


# recipe and report


def test_bos_is_a_key_of_data_and_leaves_older_digests_as_they_were() -> None:
    told = "base: demo\ndata: {{source: python-docs, samples: 8{}}}\nstages:\n  - quantize: {{format: nf4}}\n"
    plain, auto, off, on = (
        Recipe.parse(told.format(more)) for more in ("", ", bos: auto", ", bos: false", ", bos: true")
    )
    assert plain.digest == auto.digest == "a66499063a92afba0f73318a6f1f5436b01caad66d020ec654940d8bbae018c9"
    assert len({plain.digest, off.digest, on.digest}) == 3
    assert [Recipe.parse(one.to_yaml()).data.bos for one in (plain, auto, off, on)] == [
        "auto",
        "auto",
        False,
        True,
    ]
    # it says how sequences are cut, not which text they are of
    assert off.data.with_text("other.txt").bos is False
    assert off.data.with_text("{source: other.txt, bos: auto}").bos == "auto"
    assert plain.data.with_text("{source: other.txt, bos: false}").bos is False
    with pytest.raises(DataError, match="bos"):
        plain.data.with_text("{source: other.txt, bos: never}")


def test_a_report_says_that_sequences_begin_with_bos_and_that_it_is_run_again(
    text: Path, base: Path, tmp_path: Path
) -> None:
    report = run_recipe(recipe(text, base, {"quantize": {"format": "nf4"}}), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "report.json").read_text())
    assert raw["data"]["bos"] is True and report.data.bos is True
    assert BOS in (tmp_path / "out" / "README.md").read_text()
    assert "each sequence begins with BOS" in printed(print_report, report)
    assert reproduce(str(tmp_path / "out")).verdict == "bit-equal"
    del raw["data"]["bos"]
    old = Report.from_json(json.dumps(raw))
    assert old.data.bos is None and json.loads(old.to_json()) == raw
    assert BOS not in card(old, "stages: []\n", {}) and "BOS" not in printed(print_report, old)


def test_an_artefact_from_before_there_was_bos_is_run_again_without_it(
    text: Path, base: Path, tmp_path: Path
) -> None:
    told = recipe(text, base, {"quantize": {"format": "nf4"}})
    spec = told.data.model_copy(update={"bos": False})
    # as it was made when sequences had no BOS: neither file says anything
    made = run_recipe(told, tmp_path / "out", data=spec)
    assert made.data.bos is None and "bos" not in (tmp_path / "out" / "recipe.yaml").read_text()
    assert reproduce(str(tmp_path / "out"), data=str(text)).verdict == "bit-equal"


def test_a_report_of_sequences_without_bos_is_what_it_was(text: Path, tmp_path: Path) -> None:
    report = run_recipe(
        recipe(text, save_base(tmp_path / "base"), {"quantize": {"format": "nf4"}}), tmp_path / "out"
    )
    assert report.data.bos is None and "bos" not in json.loads(report.to_json())["data"]
    assert BOS not in (tmp_path / "out" / "README.md").read_text()


def test_an_evaluation_says_that_sequences_begin_with_bos() -> None:
    assert "each sequence begins with" in printed(print_evaluation, {"model": "m", "tokens": 9, "bos": True})
    assert "each sequence begins with" not in printed(print_evaluation, {"model": "m", "tokens": 9})


def printed(show: Any, what: Any) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    show(what, console)
    return console.export_text()
