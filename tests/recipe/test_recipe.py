"""What a recipe may say, what it is told when it is wrong, and that it is a value."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import CompressError, RecipeError
from llmcompress.recipe.recipe import LARGEST, Recipe
from llmcompress.stages.quantize.stage import Quantize

RECIPES = Path(__file__).parents[2] / "recipes"
FULL = """
base: user/model
revision: abc
data: {source: wikitext-2, samples: 4, length: 16, seed: 1}
stages:
  - quantize: {format: fp4, group_size: 128, double_quant: true, rounding: learned, steps: 7,
                skip: ["*.q_proj"], head: quantize}
accept: {kl_nats: 0.05, top1_agreement: 0.9}
"""


def refusal(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml") and len(message.splitlines()) == 1
    return message


def test_a_recipe_says_everything_in_a_few_lines() -> None:
    recipe = Recipe.parse(FULL)
    stage = recipe.stages[0]
    assert isinstance(stage, Quantize)
    assert (recipe.base, recipe.data.samples, recipe.accept.kl_nats) == ("user/model", 4, 0.05)
    assert (stage.format, stage.group_size, stage.rounding, stage.skip) == (
        "fp4",
        128,
        "learned",
        ("*.q_proj",),
    )


@pytest.mark.parametrize("stage", ["- quantize", "- quantize:", "- quantize: {}", "- {quantize: {}}"])
def test_a_stage_without_settings_has_the_defaults(stage: str) -> None:
    recipe = Recipe.parse(f"stages:\n{stage}")
    assert recipe == Recipe.parse("stages: [{quantize: {format: nf4, group_size: 64, rounding: gptq}}]")
    found = recipe.stages[0]
    assert isinstance(found, Quantize)
    assert (found.format, found.rounding) == ("nf4", "gptq")


@pytest.mark.parametrize(
    ("text", "place", "nearest"),
    [
        ('"ba\\nse": a\nstages: [quantize]', "ba se", "base"),
        ("bse: a\nstages: [quantize]", "bse", "base"),
        ("stages: [quantize]\naccpet: {}", "accpet", "accept"),
        ("data: {sampels: 3}\nstages: [quantize]", "data.sampels", "samples"),
        ("stages: [{quantize: {groupsize: 64}}]", "stages.0.quantize.groupsize", "group_size"),
        ("stages: [{quantize: {roundings: gptq}}]", "stages.0.quantize.roundings", "rounding"),
        ("accept: {kl_nat: 1}\nstages: [quantize]", "accept.kl_nat", "kl_nats"),
    ],
)
def test_an_unknown_key_is_told_where_it_stands_and_its_nearest_name(
    text: str, place: str, nearest: str
) -> None:
    assert refusal(text) == f"my.yaml: {place}: unknown key; did you mean {nearest}?"


def test_a_key_near_to_none_is_told_all_there_are() -> None:
    assert "accept.zzz: unknown key; use one of kl_nats, perplexity_ratio, top1_agreement" in refusal(
        "accept: {zzz: 1}\nstages: [quantize]"
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[quantise]", '"quantise" is no stage; did you mean quantize?'),
        ("[{quantise: {group_size: 64}}]", '"quantise" is no stage; did you mean quantize?'),
        (
            "[{zzz: {}}]",
            '"zzz" is no stage; use one of prune, sparsify, tie, share, low_rank, codebook, distill, '
            "quantize",
        ),
        (
            "[{}]",
            "an entry is one stage, this one has nothing; use one of prune, sparsify, tie, share, low_rank, "
            "codebook, distill, quantize",
        ),
        ("[]", "stages"),
        ("quantize", "stages"),
        ("[3]", "stages.0"),
        ("[null]", "stages.0"),
        ("[[quantize]]", "stages.0"),
        ("[{1: 2}]", "stages.0"),
        ("[{null: 2}]", "stages.0"),
        (
            "[{quantize: {}, prune: {axis: ffn, keep: 1}}]",
            "stages.0: an entry is one stage, this one has prune and quantize",
        ),
        ("[{quantize: 3}]", "stages.0.quantize"),
        ("[{quantize: [nf4]}]", "stages.0.quantize"),
        ('[{"a\\nb": 1}]', '"a b" is no stage'),
        ("[quantize, quantize]", "can't be changed again"),
    ],
)
def test_a_wrong_stage_is_told_so(stages: str, message: str) -> None:
    assert message in refusal(f"stages: {stages}")


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ("group_size: 48", "group_size"),
        ("group_size: true", "group_size"),
        ("group_size: '64'", "group_size"),
        ("format: int4", "format"),
        ("double_quant: 7", "double_quant"),
        ("rounding: best", "rounding"),
        ("rounding: learned, steps: 0", "steps"),
        ("rounding: gptq, steps: 10", "steps is for rounding: learned, not gptq"),
        ("skip: lm_head", "skip"),
        ("skip: [3]", "skip.0"),
        ("head: drop", "head"),
    ],
)
def test_an_impossible_setting_is_told_what_it_may_be(settings: str, place: str) -> None:
    assert f"stages.0.quantize.{place}" in refusal(f"stages: [{{quantize: {{{settings}}}}}]").replace(
        "quantize: ", "quantize."
    )


def test_an_impossible_block_is_told_the_blocks_there_are() -> None:
    message = refusal("stages: [{quantize: {group_size: 48}}]")
    assert "stages.0.quantize.group_size" in message and "32, 64, 128" in message and "48" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("base: 3\nstages: [quantize]", "base"),
        ("base: ''\nstages: [quantize]", "base"),
        ("base: [a]\nstages: [quantize]", "base"),
        ("data: wikitext\nstages: [quantize]", "data"),
        ("data: {samples: many}\nstages: [quantize]", "data.samples"),
        ("data: {length: 1}\nstages: [quantize]", "data.length"),
        ("accept: {kl_nats: true}\nstages: [quantize]", "accept.kl_nats"),
        ("accept: {kl_nats: '0.1'}\nstages: [quantize]", "accept.kl_nats"),
        ("accept: {kl_nats: -1}\nstages: [quantize]", "accept.kl_nats"),
        ("accept: {kl_nats: .nan}\nstages: [quantize]", "accept.kl_nats"),
        ("accept: {kl_nats: .inf}\nstages: [quantize]", "accept.kl_nats"),
        ("accept: {top1_agreement: 2}\nstages: [quantize]", "accept.top1_agreement"),
        ("base: a", "stages: is missing; add it"),
        ("base: a\nstages:", "stages"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_where_it_stands(text: str, place: str) -> None:
    assert f"my.yaml: {place}" in refusal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing, not a mapping"),
        ("# only a comment", "holds nothing, not a mapping"),
        ("[quantize]", "holds a list, not a mapping"),
        ("quantize", "holds a str, not a mapping"),
        ("3", "holds a int, not a mapping"),
        ("stages: [", "is no YAML (line 1)"),
        ("base: a\nstages: [quantize]\nbase: b", 'is no YAML (line 3): "base" is given twice'),
        ("stages: [{quantize: {group_size: 64, group_size: 32}}]", '"group_size" is given twice'),
        ("a: b: c", "is no YAML (line 1)"),
        ("base: a\n\tstages: b", "is no YAML (line 2)"),
        ("base: !!python/object/apply:os.system ['true']\nstages: [quantize]", "is no YAML"),
        ("base: &a [*a]\nstages: [quantize]", "is no YAML (line 1): it holds itself"),
        ("a: 1\n---\nb: 2", "is no YAML"),
        ("base: 2001-99-99\nstages: [quantize]", "is no YAML"),
        ("{[a]: b}", "is no YAML"),
        ("3: b\nstages: [quantize]", "3"),
        ("\x00", "is no YAML"),
        (b"\xff\xfe\x00\xd8", "is no YAML"),
        (b"\x80\x81PK\x03\x04", "is no YAML"),
        ("[" * 30_000, "is no YAML (line 1): it is more than 32 levels deep"),
        ("[" * 200_000, "has 200000 bytes and may have 131072"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_told_so(text: str | bytes, message: str) -> None:
    assert message in refusal(text)[:300]


@pytest.mark.parametrize(
    "place", ["base: *i", "stages: *i", "stages: [{quantize: {skip: *i}}]", "data: {source: *i}", "x: *i"]
)
def test_a_bomb_of_aliases_is_refused_at_once(place: str) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for letter, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{letter}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n"
    start = time.monotonic()
    assert len(refusal(bomb + place)) < 400
    assert len(refusal(f"{bomb}stages: [quantize]\n{place}")) < 400
    assert time.monotonic() - start < 2


def test_a_bomb_in_a_known_key_is_refused_at_once() -> None:
    lines = ["&a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"&{letter} [{', '.join([f'*{before}'] * 9)}]"
        for letter, before in zip("bcdefghi", "abcdefgh", strict=True)
    ]
    bomb = f"[{', '.join(lines)}]"
    start = time.monotonic()
    for text in (
        f"base: {bomb}",
        f"stages: {bomb}",
        f"data: {{seed: {bomb}}}",
        f"stages: [{{quantize: {{skip: {bomb}}}}}]",
    ):
        message = refusal(text if "stages" in text else f"{text}\nstages: [quantize]")
        assert len(message) < 400
    assert time.monotonic() - start < 5


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe file"):
        Recipe.from_file(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no recipe file"):
        Recipe.from_file(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(RecipeError, match="has 131073 bytes and may have 131072"):
        Recipe.from_file(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    "text", [FULL, "stages: [quantize]", "base: 'ü: #1'\nstages: [quantize: {group_size: 32}]"]
)
def test_a_recipe_that_is_written_reads_back_the_same(text: str) -> None:
    recipe = Recipe.parse(text)
    written = recipe.to_yaml()
    assert Recipe.parse(written) == recipe and Recipe.parse(written).to_yaml() == written
    assert Recipe.parse(written).digest == recipe.digest
    # what was left out stays out
    assert yaml.safe_load(written).keys() == {"schema"} | yaml.safe_load(text).keys()


def test_a_newer_schema_names_the_version_to_install() -> None:
    assert Recipe.parse("schema: 1\nstages: [quantize]") == Recipe.parse("stages: [quantize]")
    assert Recipe.parse("schema: 1\nstages: [quantize]").digest == Recipe.parse("stages: [quantize]").digest
    assert (
        "has schema 7, this llmcompress reads up to 1; install llmcompress 0.7 or newer: pip install -U "
        '"llmcompress>=0.7"' in (refusal("schema: 7\nnew_key: 1\nstages: [{grow: {}}]"))
    )
    for wrong in ("0", "'1'", "1.0", "true", "[1]"):
        assert "schema" in refusal(f"schema: {wrong}\nstages: [quantize]")


def test_the_published_schema_is_that_of_the_code_and_takes_the_recipes_we_ship() -> None:
    text = (RECIPES / "recipe.schema.json").read_text()
    assert text == Recipe.json_schema(), "run: llmcompress schema > recipes/recipe.schema.json"
    schema = jsonschema.Draft202012Validator(json.loads(text))
    schema.check_schema(json.loads(text))
    for file in RECIPES.glob("*.yaml"):
        assert not list(schema.iter_errors(yaml.safe_load(file.read_text()))), file
    for good in (
        "stages: [tie, quantize]",
        "stages: [{tie: null}]",
        "schema: 1\nstages: [{quantize: null}]",
        FULL,
    ):
        assert not list(schema.iter_errors(yaml.safe_load(good))), good
    for wrong in (
        "{}",
        "stages: []",
        "stages: [quantise]",
        "stages: [{quantize: {block: 64}}]",
        "stages: [{tie: {wheights: []}}]",
        "stages: [{share: {layers: auto}}]",
        "stages: [prune]",
        "schema: 2\nstages: [quantize]",
        "stages: [{prune: {axis: ffn, keep: 0.5}, quantize: {}}]",
    ):
        assert list(schema.iter_errors(yaml.safe_load(wrong))), wrong
        assert refusal(wrong)


def test_a_recipe_is_saved_and_read_back_from_file_and_folder(tmp_path: Path) -> None:
    recipe = Recipe.parse(FULL)
    file = recipe.save_pretrained(tmp_path / "new" / "folder")
    assert [path.name for path in file.parent.iterdir()] == ["recipe.yaml"]
    assert (
        Recipe.from_pretrained(file)
        == Recipe.from_pretrained(file.parent)
        == Recipe.from_file(file)
        == recipe
    )
    assert recipe.origin is None
    for name in ("none.yaml", str(tmp_path), "nonesuch", "a/b/c", "../recipe"):
        with pytest.raises(
            RecipeError, match=r"no recipe file .*a folder that holds recipe.yaml, or a Hub id"
        ):
            Recipe.from_pretrained(name)


def test_an_effort_writes_out_what_the_stages_do_not_say() -> None:
    asked = Recipe.parse("{effort: best, stages: [{distill: {}}, quantize]}")
    settled = asked.with_effort(None)
    assert yaml.safe_load(settled.to_yaml())["stages"] == [
        {"distill": {"steps": 2000}},
        {"quantize": {"rounding": "learned", "steps": 200}},
    ]
    assert settled.with_effort("fast").stages == settled.stages, "what is said stays"
    fast = asked.with_effort("fast")
    assert fast.effort == "fast"
    assert yaml.safe_load(fast.to_yaml())["stages"] == [
        {"distill": {"steps": 250}},
        {"quantize": {"rounding": "gptq"}},
    ]
    said = Recipe.parse("stages: [{quantize: {rounding: nearest}}, {distill: {steps: 7}}]")
    assert said.with_effort("best").stages == said.stages
    learned = Recipe.parse("stages: [{quantize: {rounding: learned}}]").with_effort("fast")
    assert yaml.safe_load(learned.to_yaml())["stages"] == [{"quantize": {"rounding": "learned", "steps": 50}}]
    assert "effort: Input should be 'fast', 'balanced' or 'best'" in refusal(
        "{effort: x, stages: [quantize]}"
    )


def test_weights_that_layers_share_are_not_learned() -> None:
    shared = "stages: [{share: {pairs: [[1, 2]]}}, {distill: {}}, quantize]"
    stages = yaml.safe_load(Recipe.parse(shared).with_effort("best").to_yaml())["stages"]
    assert stages[0]["share"]["steps"] == 600 and stages[2] == {"quantize": {"rounding": "gptq"}}


def test_a_recipe_without_an_effort_is_left_as_it_is_and_keeps_its_digest() -> None:
    plain = Recipe.parse("stages: [quantize]")
    assert plain.with_effort(None) is plain
    digests = {
        plain.digest,
        *(
            Recipe.parse(f"{{effort: {word}, stages: [quantize]}}").digest
            for word in ("fast", "balanced", "best")
        ),
    }
    assert len(digests) == 4
    # as it was before efforts existed
    said = Recipe.parse("{data: {samples: 4, length: 7}, stages: [quantize]}")
    assert said.digest == "30cdb1824fac1bd567e57505aad14c98be0a7c32fc4f65c61780e6a40b12cf6f"


def test_equal_recipes_have_one_digest_and_others_another() -> None:
    one = Recipe.parse("stages: [quantize]")
    spelled = Recipe.parse(
        "{accept: {}, stages: [{quantize: {group_size: 64, format: nf4}}], data: {seed: 0}}"
    )
    assert one == spelled and one.digest == spelled.digest and len(one.digest) == 64
    others = [
        "stages: [{quantize: {group_size: 32}}]",
        "stages: [{quantize: {format: fp4}}]",
        "stages: [{quantize: {skip: [a]}}]",
        "{stages: [quantize], data: {seed: 1}}",
        "{stages: [quantize], base: demo}",
        "{stages: [quantize], accept: {kl_nats: 1}}",
    ]
    assert len({one.digest, *(Recipe.parse(text).digest for text in others)}) == 1 + len(others)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_the_recipes_we_ship_are_short_and_right(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 25 and text.startswith("#")
    recipe = Recipe.from_file(file)
    assert Recipe.parse(recipe.to_yaml()) == recipe


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(
    ["base", "data", "stages", "accept", "quantize", "group_size", "format", "samples", "kl_nats", "skip"]
)
values: Any = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4)
    ),
)


def holds_or_says_why(text: str | bytes) -> None:
    error = None
    try:
        recipe = Recipe.parse(text)
    except CompressError as caught:
        error = str(caught)
    if error is None:
        assert Recipe.parse(recipe.to_yaml()) == recipe
    else:
        assert len(error.splitlines()) == 1 and len(error) < 1000


@given(st.text() | st.binary())
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_one_line_of_error(text: str | bytes) -> None:
    holds_or_says_why(text)


@given(values)
@settings(max_examples=300, deadline=None)
def test_any_yaml_is_a_recipe_or_one_line_of_error(value: object) -> None:
    holds_or_says_why(yaml.safe_dump(value, allow_unicode=True))


@given(st.lists(st.sampled_from([*FULL, *FULL.split(), *FULL.splitlines(keepends=True)])).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_scramble_of_a_recipe_is_one_or_one_line_of_error(text: str) -> None:
    holds_or_says_why(text)
