"""The report as JSON, on the terminal, as a model card and as pictures: the same numbers everywhere, bad
input in one line."""

import copy
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from pydantic import ValidationError
from rich.console import Console

from llmcompress.errors import AcceptError, CompressError
from llmcompress.io.units import amount, duration, number
from llmcompress.pipeline.outcome import companions
from llmcompress.pipeline.plan import PlanRow
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.console import print_evaluation, print_plan, print_report
from llmcompress.report.model_card import card, evaluations, front_matter, recipe_card
from llmcompress.report.plots import before_after, error_per_layer, training_curves
from llmcompress.report.redaction import for_others
from llmcompress.report.rows import change
from llmcompress.report.schema import Report
from llmcompress.stages.distill.stage import Distill

RECIPE = (
    "data: {source: python-docs}\nstages:\n  - quantize: {format: nf4, rounding: gptq}  # ``` can't end the "
    "layer\n"
)
REVISION = "0123456789abcdef0123456789abcdef01234567"


def facts() -> dict[str, Any]:
    kinds = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.gate_up_proj[3]")
    linears = [
        {
            "name": f"model.layers.{layer}.{kind}",
            "format": "nf4",
            "bits": 4.5,
            "relative_error": 0.05 + 0.01 * layer + 0.02 * place,
        }
        for layer in range(4)
        for place, kind in enumerate(kinds)
    ]
    kept = [
        {"name": "model.layers.0.self_attn.o_proj", "why": "172 columns | no multiple"},
        {"name": "lm_head", "why": "head: keep"},
    ]
    model = {
        "parameters": 8392960,
        "perplexity_ci95": [30.1, 32.9],
        "tokens_per_s": 5700.125,
        "decode_tokens_per_s": 144.25,
    }
    stage = {
        "name": "quantize",
        "seconds": 41.25,
        "format": "nf4",
        "linears": linears,
        "kept": kept,
        "notes": ["one [bold] note"],
    }
    return {
        "schema": 1,
        "recipe_digest": "ab" * 32,
        "base": {
            "model": "someone/wikilm-8m",
            "revision": REVISION,
            "size_bytes": 16794064,
            "perplexity": 31.4159265358979,
            **model,
        },
        "compressed": {
            "model": "made/small-nf4",
            "size_bytes": 7794064,
            "perplexity": 31.512345678901234,
            **model,
        },
        "fidelity": {
            "kl_nats_mean": 0.0020123456789,
            "kl_nats_p99": 1.5e-05,
            "top1_agreement": 0.978,
            "perplexity_ratio": 1.003,
            "perplexity_ratio_ci95": [1.001, 1.005],
        },
        "data": {
            "source": "Salesforce/wikitext",
            "revision": "cd" * 20,
            "sha256": "cd" * 32,
            "calibration_tokens": 65536,
            "evaluation_tokens": 262144,
        },
        "stages": [stage],
        "cost": {"seconds": 61.25, "peak_memory_bytes": 702603264},
        "environment": {
            "versions": {"torch": "2.13.0", "llmcompress": "0.1.0"},
            "device": "a CPU, 2 threads",
        },
    }


def report(**changes: Any) -> Report:
    return Report.model_validate(facts() | changes)


def bare() -> Report:
    """A report of a recipe without stages, on a machine where almost nothing was measured."""
    unmeasured = {
        "model": "/home/someone/models/wikilm-8m",
        "parameters": None,
        "size_bytes": None,
        "perplexity": None,
    }
    cost = {"seconds": 0.0, "peak_memory_bytes": None}
    return report(base=unmeasured, compressed=unmeasured, fidelity={}, stages=[], cost=cost)


def distilled(
    before: float, *curve: list[float | None], length: int = 512, **settings: Any
) -> dict[str, Any]:
    """What a `distill` stage of these settings tells after this training."""
    after = min([before, *(kl for _, kl in curve if kl is not None)])
    found = {"name": "distill", "seconds": 9.5, "kl_before": before, "kl_after": after, "curve": list(curve)}
    return Distill(length=length, **settings).model_dump(mode="json", exclude_none=True) | found


def trained() -> Report:
    """A report of two trainings: one until the end, one whose loss became NaN."""
    healed = distilled(0.4, [50, 0.2], [100, 0.1], steps=100, batch=16, learning_rate=5e-4)
    return report(
        stages=[
            healed,
            distilled(0.125, [10, 0.25], [20, None], steps=90, loss="reverse_kl"),
            facts()["stages"][0],
        ]
    )


def printed(*lines: Any, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    lines[0](*lines[1:], console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


# JSON


def test_json_gives_the_same_report_and_the_same_text_again() -> None:
    text = report().to_json()
    assert Report.from_json(text) == report()
    assert Report.from_json(text).to_json() == text == Report.from_json(text.encode()).to_json()
    assert Report.from_json(bare().to_json()) == bare()


def test_json_holds_the_keys_of_the_contract_and_a_stage_its_own_facts() -> None:
    raw = json.loads(report().to_json())
    assert raw.keys() == facts().keys()
    assert raw["base"].keys() >= {
        "model",
        "revision",
        "parameters",
        "size_bytes",
        "perplexity",
        "tokens_per_s",
    }
    assert raw["compressed"].keys() == raw["base"].keys()
    assert raw["fidelity"] == facts()["fidelity"]
    assert raw["stages"] == facts()["stages"]
    assert list(raw["environment"]["versions"]) == ["llmcompress", "torch"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 7, "schema 7, this llmcompress reads 1: install llmcompress==0.1.0, which wrote it"),
        (("schema",), True, "schema True"),
        (("schema",), "1", "schema '1'"),
        (("base", "perplexity"), "31.4", "base.perplexity: Input should be a valid number"),
        (("base", "perplexity"), -1.0, "base.perplexity: Input should be greater than or equal to 0"),
        (("base", "parameters"), 1.5, "base.parameters: Input should be a valid integer"),
        (("base", "model"), None, "base.model: Input should be a valid string"),
        (
            ("fidelity", "top1_agreement"),
            1.5,
            "fidelity.top1_agreement: Input should be less than or equal to 1",
        ),
        (("fidelity", "kl_nats"), 0.1, "fidelity.kl_nats: Extra inputs are not permitted"),
        (("stages",), {}, "stages: Input should be a valid tuple"),
        (("stages", 0, "linears", 0, "name"), 3, "stages.0.linears.0.name: Input should be a valid string"),
        (("stages", 0), distilled(0.4, [50.5, 0.2]), "stages.0.curve.0.0: Input should be a valid integer"),
        (("stages", 0), {"name": "distill", "seconds": 1.0}, "stages.0.loss: Field required"),
        (("cost",), [], "cost: Input should be a valid dictionary"),
    ],
)
def test_a_malformed_report_is_one_line_that_names_the_key(
    path: tuple[Any, ...], value: object, message: str
) -> None:
    raw = facts()
    inner: Any = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(CompressError) as error:
        Report.from_json(json.dumps(raw), "out/report.json")
    assert message in str(error.value)
    assert str(error.value).startswith("out/report.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "1", "NaN", '{"schema": 1}', '{"schema": 2}', "[" * 100_000, b"\xff\xfe"]
)
def test_what_is_no_report_is_refused(text: str | bytes) -> None:
    with pytest.raises(CompressError):
        Report.from_json(text)


def test_numbers_that_json_does_not_have_are_refused_both_ways() -> None:
    for number_text in ("NaN", "Infinity", "1e999"):
        with pytest.raises(CompressError, match="is no number"):
            Report.from_json(report().to_json().replace("41.25", number_text))
    with pytest.raises(ValidationError):
        report(cost={"seconds": float("nan"), "peak_memory_bytes": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        report(stages=[{"name": "prune", "seconds": 1.0, "own": float("nan")}]).to_json()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_a_report_or_a_compress_error(data: st.DataObject) -> None:
    text = report().to_json()
    start = data.draw(st.integers(0, len(text)))
    damaged = text[:start] + data.draw(st.text(max_size=4)) + text[start + data.draw(st.integers(0, 4)) :]
    try:
        lines = len(Report.from_json(damaged).to_json()[:1])
    except CompressError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


def test_a_report_is_read_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CompressError, match=r"report\.json can't be read \(No such file or directory\): give a folder"
    ):
        Report.of(tmp_path)
    (tmp_path / "report.json").write_text(report().to_json())
    assert Report.of(tmp_path) == report()


def test_a_report_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report().recipe_digest = "x"


# accept


def test_bounds_that_hold_are_silent() -> None:
    report().require()
    report().require(kl_nats=0.0020123456789, perplexity_ratio=1.003, top1_agreement=0.978)


def test_missed_bounds_are_one_line_with_what_was_measured_asked_and_to_try() -> None:
    with pytest.raises(AcceptError) as error:
        report().require(kl_nats=0.001, perplexity_ratio=1.5, top1_agreement=0.99)
    assert str(error.value) == (
        "the result misses accept: kl_nats is 0.00201234568 and at most 0.001 was asked; "
        "top1_agreement is 0.978 and at least 0.99 was asked; "
        "try rounding: learned, a smaller group_size or more calibration samples, or a looser bound"
    )
    assert error.value.exit_code == 3


def test_a_bound_on_what_was_not_measured_is_missed() -> None:
    with pytest.raises(
        AcceptError, match="kl_nats was not measured and at most 1 was asked; try a looser bound"
    ):
        bare().require(kl_nats=1.0)


# terminal


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_printed_report_tells_all_it_should(width: int) -> None:
    text = printed(print_report, report(), width=width)
    for words in (
        "before and after",
        "distance from the base",
        "where the time went",
        "kept as they were",
        "largest errors",
    ):
        assert words in text
    if width < 200:
        return
    for words in (
        "16.8 MB",
        "7.79 MB",
        "-53.6 %",
        "31.42 [30.10, 32.90]",
        "0.002012 nats/token",
        "97.80 %",
        "41 s",
        "head: keep",
    ):
        assert words in text
    assert "mlp.experts.gate_up_proj[3]" in text  # a name is no markup
    assert "one [bold] note" in text
    worst = [line for line in text.splitlines() if "4.500" in line]
    assert len(worst) == 5
    assert "model.layers.3.mlp.experts.gate_up_proj[3]" in worst[0]


def test_a_report_without_stages_or_measurements_is_printed() -> None:
    text = printed(print_report, bare())
    assert "largest errors" not in text
    assert "None" not in text
    assert "nan" not in text


def test_many_kept_linears_are_counted() -> None:
    kept = [{"name": f"model.layers.{layer}.mlp.gate", "why": "a router"} for layer in range(40)]
    assert "... and 28 more" in printed(
        print_report, report(stages=[{"name": "quantize", "seconds": 1.0, "kept": kept}])
    )


def test_the_last_stage_that_touched_a_linear_tells_its_error() -> None:
    first, last = copy.deepcopy(facts()["stages"][0]), copy.deepcopy(facts()["stages"][0])
    last["linears"] = [last["linears"][0] | {"relative_error": 0.5}]
    found = report(stages=[first, last]).linears
    assert len(found) == len(first["linears"])
    assert found[0].relative_error == 0.5


def test_a_training_is_printed_with_its_steps_and_what_it_won() -> None:
    lines = [line.split() for line in printed(print_report, trained()).splitlines()]
    assert ["forward_kl", "100", "0.4000", "nats/token", "0.1000", "nats/token", "75.00", "%"] in lines
    assert [
        "reverse_kl",
        "20",
        "of",
        "90",
        "0.1250",
        "nats/token",
        "0.1250",
        "nats/token",
        "0.00",
        "%",
    ] in lines
    assert "held-out" not in printed(print_report, report())


def test_a_training_that_had_nothing_to_win_shows_no_share() -> None:
    found = report(stages=[distilled(0.0, [10, 0.5], steps=10)])
    assert found.trainings[0].recovered is None
    assert "0.000 nats/token   0.000 nats/token           -" in printed(print_report, found)


def test_an_evaluation_is_printed_without_what_it_lacks() -> None:
    evaluation = {
        "model": "a[3]",
        "perplexity": 31.4,
        "perplexity_ci95": (30, 33),
        "tokens": 262144,
        "size_bytes": 16794064,
    }
    alone = printed(print_evaluation, evaluation | {"tokens_per_s": 5700.0})
    assert "KL" not in alone
    assert "31.40 [30.00, 33.00]" in alone
    assert "a[3]" in alone
    assert "262,144" in alone
    against = printed(
        print_evaluation, evaluation | {"kl_nats_mean": 0.0, "kl_nats_p99": 0.1, "top1_agreement": 1.0}
    )
    assert "0.000 nats/token" in against
    assert "100.00 %" in against


def test_a_plan_is_printed_with_its_notes() -> None:
    rows = [
        PlanRow("base", 8392960, 16794064, 2_000_000, 4096),
        PlanRow("quantize", 8392960, 7794064, 2_000_000, 4096, peak_memory_bytes=700_000_000, seconds=412.0),
    ]
    text = printed(print_plan, rows, ["time as on this machine"])
    for words in ("8.39 M", "16.8 MB", "700 MB", "6 min 52 s", "time as on this machine"):
        assert words in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (amount(None), "-"),
        (amount(0, "B"), "0 B"),
        (amount(999.4, "B"), "999 B"),
        (amount(999.6, "B"), "1 kB"),
        (amount(123456789, "B"), "123 MB"),
        (amount(0.25), "0.25"),
        (number(31416.0), "31,416"),
        (number(999.96), "1,000"),
        (number(0.0), "0.000"),
        (change(2, 1), "-50 %"),
        (change(2, 2), "="),
        (change(0, 2), "-"),
        (duration(0.04), "0.0 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(7300), "2 h 01 min"),
    ],
)
def test_numbers_are_written_for_people(text: str, words: str) -> None:
    assert text == words


# model card


def test_the_card_parses_and_carries_the_numbers_of_the_report() -> None:
    found: Any = ModelCard(
        card(
            report(),
            RECIPE,
            {"license": "apache-2.0", "language": ["en"], "tags": ["not", "ours"], "extra": {}},
        )
    )
    data, raw = found.data, json.loads(report().to_json())
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    keys = ("kl_nats_mean", "kl_nats_p99", "top1_agreement", "perplexity_ratio")
    assert measured == {
        "perplexity": raw["compressed"]["perplexity"],
        **{key: raw["fidelity"][key] for key in keys},
    }
    assert {result.dataset_type for result in data.eval_results} == {"Salesforce/wikitext"}
    assert data.model_name == "small-nf4"
    assert (data.base_model, data["base_model_relation"]) == ("someone/wikilm-8m", "quantized")
    assert (data.license, data.language, data["library_name"]) == ("apache-2.0", ["en"], "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["llmcompress", "4-bit", "bitsandbytes", "nf4", "quantize"]
    assert "extra" not in data


def test_the_card_says_how_to_load_and_to_make_the_model_and_what_it_does_not_show() -> None:
    text = card(report(), RECIPE, {})
    assert f"````yaml\n{RECIPE.strip()}\n````" in text
    assert "pip install transformers accelerate bitsandbytes\n" in text
    assert "```\nllmcompress reproduce path/to/small-nf4\n```" in text
    assert '"small-nf4"  # this folder, or its id on the Hub' in text
    assert "172 columns \\| no multiple" in text
    assert "262,144 tokens of one text" in text
    assert "(error_per_layer.png)" in text
    assert "(before_after.png)" in text


@pytest.mark.parametrize(
    ("formats", "packages", "imported"),
    [
        ({"nf4", "fp4"}, "transformers accelerate bitsandbytes", False),
        ({"int8"}, "transformers accelerate bitsandbytes", False),
        ({"nf4", "w8a8"}, "transformers accelerate bitsandbytes llmcompress", True),
        (set(), "transformers accelerate", False),
    ],
)
def test_the_card_says_what_loading_takes(formats: set[str], packages: str, imported: bool) -> None:
    found = report()
    stage, linear = found.stages[0], found.linears[0]
    linears = tuple(
        linear.model_copy(update={"format": format, "name": format}) for format in sorted(formats)
    )
    text = card(
        found.model_copy(update={"stages": (stage.model_copy(update={"linears": linears}),)}),
        "stages: []\n",
        {},
    )
    assert f"pip install {packages}\n" in text
    assert ("```python\nimport llmcompress" in text) == imported


def test_a_base_in_a_folder_is_named_by_its_last_name_alone() -> None:
    raw = facts()
    raw["base"] |= {"model": "/home/someone/models/wikilm-8m", "revision": None}
    raw["compressed"]["model"] = "/home/someone/out/"
    raw["data"] |= {"source": "../text/wikitext-2", "revision": None}
    text = card(Report.model_validate(raw), RECIPE, {})
    found: Any = ModelCard(text)
    assert found.data.base_model is None
    assert found.data.model_name == "out"
    assert {result.dataset_name for result in found.data.eval_results} == {"wikitext-2"}
    assert "llmcompress reproduce path/to/out --base path/to/wikilm-8m --data path/to/wikitext-2\n" in text
    assert "/home" not in text
    assert "../text" not in text


def test_the_command_of_the_card_quotes_names_with_spaces() -> None:
    raw = facts()
    raw["data"] |= {"source": "my texts/the diary.txt", "revision": None}
    assert "llmcompress reproduce path/to/small-nf4 --data 'path/to/the diary.txt'\n" in card(
        Report.model_validate(raw), RECIPE, {}
    )


def test_on_the_hub_the_card_names_the_repository() -> None:
    text = card(report(), RECIPE, {}, "me/tiny")
    found: Any = ModelCard(text)
    assert found.data.model_name == "tiny" and "\n# tiny\n" in text
    assert 'name = "me/tiny"\n' in text
    assert "```\nllmcompress reproduce me/tiny\n```" in text
    assert "small-nf4" not in text


def test_the_card_and_the_report_say_where_a_recipe_and_a_text_come_from() -> None:
    raw = facts() | {"recipe": {"source": "them/recipe", "revision": REVISION}}
    found: Any = ModelCard(text := card(made := Report.model_validate(raw), RECIPE, {}))
    assert f"the recipe below, `them/recipe` at `{REVISION}`:" in text
    assert {result.dataset_revision for result in found.data.eval_results} == {"cd" * 20}
    assert Report.from_json(made.to_json()) == made
    entries = evaluations(made)
    assert [(entry["task_id"], entry["value"]) for entry in entries] == [
        ("perplexity", raw["compressed"]["perplexity"]),
        ("kl_nats_mean", raw["fidelity"]["kl_nats_mean"]),
    ]
    assert {(entry["dataset_id"], entry["dataset_revision"]) for entry in entries} == {
        ("Salesforce/wikitext", "cd" * 20)
    }
    raw["data"]["revision"] = None
    assert evaluations(Report.model_validate(raw)) == []  # of no known commit


def test_what_is_shared_names_no_path_of_this_machine() -> None:
    raw = facts()
    raw["base"] |= {"model": "/home/someone/models/wikilm-8m", "revision": None}
    raw["compressed"]["model"] = "/home/someone/out/"
    raw["data"] |= {"source": "../text/wikitext-2", "revision": None}
    there = f"them/student@{REVISION}"
    taught = distilled(0.4, [50, 0.2], steps=100) | {
        "teacher": "/home/someone/models/my@teacher",
        "student": there,
    }
    found = Report.model_validate(raw | {"stages": [taught]})
    shared, text = for_others(found, "me/tiny"), card(found, RECIPE, {}, "me/tiny")
    assert (shared.base.model, shared.compressed.model, shared.data.source) == (
        "wikilm-8m",
        "me/tiny",
        "wikitext-2",
    )
    assert shared.trainings[0].model_dump().items() >= {"teacher": "my@teacher", "student": there}.items()
    assert f", teacher `my@teacher`, student `them/student` at revision `{REVISION}`" in text
    assert "someone" not in shared.to_json() + text
    assert for_others(report(), "made/small-nf4") == report()


def test_a_student_is_no_version_of_the_model_that_taught_it() -> None:
    taught = distilled(0.4, [50, 0.2], steps=100) | {"student": "someone/tiny"}
    found: Any = ModelCard(card(report(stages=[taught]), RECIPE, {}))
    assert found.data.base_model is None and "base_model_relation" not in found.data


def test_a_recipe_that_is_shared_alone_has_a_card() -> None:
    text = recipe_card(RECIPE, "me/recipe")
    found: Any = ModelCard(text)
    assert found.data.tags == ["llmcompress", "recipe"]
    assert RECIPE.strip() in text and "llmcompress run me/recipe --base" in text


def test_the_front_matter_of_a_stranger_is_read_in_bounds() -> None:
    assert front_matter("---\nlicense: mit\n---\ntext") == {"license": "mit"}
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]\n" for n in range(9)
    )
    for wrong in (
        bomb,
        "[" * 9999,
        "a: 1\na: 2",
        "!!python/object/apply:os.system [ls]",
        "- a",
        "x" * 70_000,
        "\x00",
    ):
        assert front_matter(f"---\n{wrong}\n---\ntext") == {}


def test_a_card_without_stages_or_measurements_is_valid() -> None:
    found: Any = ModelCard(card(bare(), "stages: []", {"license": None, "language": 3}))
    assert found.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "bitsandbytes" not in found.text
    assert "error_per_layer" not in found.text


def test_the_card_tells_each_training_in_a_sentence_with_a_picture() -> None:
    text = card(trained(), RECIPE, {})
    assert (
        "## Training\n\n"
        "`forward_kl`, 100 steps of 16 x 512 tokens (819 k in all), learning rate 0.0005: KL(teacher || "
        "student) on held-out "
        "text went from 0.4000 to 0.1000 nats/token at step 100, 75.00 % recovered.\n\n"
        "`reverse_kl`, 20 of 90 steps of 16 x 512 tokens (164 k in all), learning rate 0.0001: nothing was "
        "better than "
        "the start, KL 0.1250 nats/token on held-out text, which is kept.\n\n"
        "![KL on held-out text over the steps of training](training.png)\n\n## Limits" in text
    )


def test_the_front_matter_is_plain_yaml_that_any_name_leaves_whole() -> None:
    raw = facts()
    raw["compressed"]["model"] = "a: b #c 'ü'"
    text = card(Report.model_validate(raw), RECIPE, {"license_name": "its: own"})
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model-index"][0]["name"] == "a: b #c 'ü'"
    assert front["license_name"] == "its: own"


# pictures


@pytest.mark.parametrize("draw", [error_per_layer, before_after])
@pytest.mark.parametrize("make", [report, bare])
def test_pictures_are_drawn_and_equal_reports_give_equal_bytes(draw: Any, make: Any, tmp_path: Path) -> None:
    draw(make(), tmp_path / "a.png")
    draw(make(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.01  # something is drawn on the white


@pytest.mark.parametrize(
    "stages",
    [
        trained().stages,
        [distilled(4.0, [10, 0.5], [20, 0.1])],  # far apart
        [distilled(0.0, [10, 0.0])],
        [distilled(0.5)],  # not one evaluation
        [distilled(0.5, [10, None])],
    ],
)
def test_training_curves_are_drawn_and_equal_reports_give_equal_bytes(stages: Any, tmp_path: Path) -> None:
    training_curves(report(stages=stages), tmp_path / "a.png")
    training_curves(report(stages=copy.deepcopy(stages)), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.01


def test_an_evaluation_that_gave_no_number_is_left_out_of_the_line(tmp_path: Path) -> None:
    gap, whole = [distilled(0.5, [10, 0.3], [20, None], [30, 0.2])], [distilled(0.5, [10, 0.3], [30, 0.2])]
    found = report(stages=gap)
    assert found.trainings[0].points == ((0, 0.5), (10, 0.3), (30, 0.2))
    assert found.trainings[0].best == (30, 0.2)
    training_curves(found, tmp_path / "a.png")
    training_curves(report(stages=whole), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_only_what_was_trained_has_a_section_and_a_picture(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(RECIPE))
    plain, taught = (companions(told, recipe, tmp_path, tmp_path) for told in (report(), trained()))
    assert taught.keys() - plain.keys() == {"training.png"}
    assert "Training" not in str(plain["README.md"])
    assert "training.png" in str(taught["README.md"])


def test_rendering_changes_nothing(tmp_path: Path) -> None:
    one, base_card = trained(), {"license": "mit"}
    before = one.to_json()
    printed(print_report, one)
    card(one, RECIPE, base_card)
    error_per_layer(one, tmp_path / "a.png")
    before_after(one, tmp_path / "b.png")
    training_curves(one, tmp_path / "c.png")
    assert one.to_json() == before
    assert base_card == {"license": "mit"}
