"""What a recipe may say of `tie`, in its four kinds, in which order, and what it is told when it is wrong."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import yaml

from llmcompress.errors import RecipeError
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.codebook.stage import Codebook
from llmcompress.stages.low_rank.stage import LowRank
from llmcompress.stages.share.stage import Share
from llmcompress.stages.tie.stage import Tie

KINDS: dict[str, type[Any]] = {
    "{weights: [embedding, head]}": Tie,
    "{weights: [head, embedding], fit: mean}": Tie,
    "{layers: auto, groups: 4}": Share,
    "{layers: cka, groups: 1, parts: [ffn, attention], residual_rank: 8, steps: 0}": Share,
    "{pairs: [[0, 1]]}": Share,
    "{pairs: [[2, 3, 4], [5, 6]], parts: [attention]}": Share,
    "{codebook: 16}": Codebook,
    "{codebook: 256, per: group, rows: 4, skip: ['*.down_proj']}": Codebook,
    "{codebook: 4, per: linear}": Codebook,
    "{basis: 2, rank: 64}": LowRank,
    "{basis: 1, keep: 0.5, skip: ['*.k_proj']}": LowRank,
}
TIES = {
    "weights": "{weights: [embedding, head]}",
    "pairs": "{pairs: [[0, 1]]}",
    "codebook": "{codebook: 16}",
    "basis": "{basis: 2, rank: 8}",
}
CUT, HEAL = "prune: {axis: ffn, keep: 0.5}", "distill: {steps: 10}"


def stages(*entries: str) -> str:
    return "stages:\n" + "".join(f"  - {entry}\n" for entry in entries)


def tie(kind: str) -> str:
    return f"tie: {TIES[kind]}"


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and len(message.splitlines()) == 1 and "<" not in message
    return message.removeprefix("my.yaml: ")


@pytest.mark.parametrize("settings", KINDS)
def test_each_kind_is_known_by_its_key_and_reads_back_the_same(settings: str) -> None:
    recipe = Recipe.parse(stages(f"tie: {settings}"))
    assert type(recipe.stages[0].stage) is KINDS[settings] and recipe.stages[0].tie is recipe.stages[0].stage
    written = recipe.to_yaml()
    again = Recipe.parse(written)
    assert again == recipe and again.digest == recipe.digest and again.to_yaml() == written
    assert yaml.safe_load(written)["stages"] == [{"tie": yaml.safe_load(settings)}], "what was left out stays out"
    assert Recipe.model_validate(recipe.model_dump()) == recipe, "as a value too"


def test_defaults_that_are_spelled_out_have_the_same_digest_and_other_settings_another() -> None:
    for bare, spelled in (
        ("{weights: [embedding, head]}", "{fit: least_squares, weights: [embedding, head]}"),
        ("{pairs: [[0, 1]]}", "{pairs: [[0, 1]], parts: [ffn], residual_rank: 0, steps: 300}"),
        ("{codebook: 16}", "{codebook: 16, per: row, skip: []}"),
        ("{basis: 2, rank: 8}", "{basis: 2, rank: 8, skip: []}"),
    ):
        one, other = (Recipe.parse(stages(f"tie: {settings}")) for settings in (bare, spelled))
        assert one == other and one.digest == other.digest
    digests = {Recipe.parse(stages(f"tie: {settings}")).digest for settings in KINDS}
    assert len(digests) == len(KINDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{codbook: 16}", "stages.0.tie.codbook: unknown key; did you mean codebook?"),
        ("{weigths: [embedding, head]}", "stages.0.tie.weigths: unknown key; did you mean weights?"),
        ("{basiss: 2, rank: 8}", "stages.0.tie.basiss: unknown key; did you mean basis?"),
        ("{layer: auto, groups: 4}", "stages.0.tie.layer: unknown key; did you mean layers?"),
        ("{pair: [[0, 1]]}", "stages.0.tie.pair: unknown key; did you mean pairs?"),
        ("{pairs: [[0, 1]], residual_ranks: 8}", "stages.0.tie.residual_ranks: unknown key; did you mean residual_rank?"),
        ("{layers: auto, group: 4}", "stages.0.tie.group: unknown key; did you mean groups?"),
        ("{layers: auto, groups: 4, part: [ffn]}", "stages.0.tie.part: unknown key; did you mean parts?"),
        ("{weights: [embedding, head], fits: mean}", "stages.0.tie.fits: unknown key; did you mean fit?"),
        ("{codebook: 16, row: 4}", "stages.0.tie.row: unknown key; did you mean rows?"),
        ("{basis: 2, ranks: 8}", "stages.0.tie.ranks: unknown key; did you mean rank?"),
        ("{basis: 2, rank: 8, zzz: 1}", "stages.0.tie.zzz: unknown key; use one of basis, rank, keep, skip"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_of_its_kind(settings: str, message: str) -> None:
    assert refusal(stages(f"tie: {settings}")) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{pairs: [[0, 1]], layers: auto, groups: 4}", "stages.0.tie: give layers (auto, with groups) or pairs, one of them"),
        ("{layers: auto}", "stages.0.tie: groups goes with layers: how many different ones are left"),
        ("{pairs: [[0, 1]], groups: 4}", "stages.0.tie: groups goes with layers: how many different ones are left"),
        ("{pairs: [[0, 1], [1, 2]]}", "stages.0.tie: pairs name a layer twice; a layer is in one group"),
        ("{pairs: [[1, 1]]}", "stages.0.tie: pairs name a layer twice; a layer is in one group"),
        ("{pairs: [[0]]}", "stages.0.tie.pairs.0: "),
        ("{pairs: [0, 1]}", "stages.0.tie.pairs.0: "),
        ("{pairs: []}", "stages.0.tie"),
        ("{pairs: [[0, -1]]}", "stages.0.tie"),
        ("{layers: alike, groups: 2}", "stages.0.tie.layers: "),
        ("{layers: auto, groups: 0}", "stages.0.tie.groups: "),
        ("{pairs: [[0, 1]], parts: []}", "stages.0.tie.parts: "),
        ("{pairs: [[0, 1]], parts: [mlp]}", "stages.0.tie.parts.0: "),
        ("{pairs: [[0, 1]], residual_rank: -1}", "stages.0.tie.residual_rank: "),
        ("{weights: [embedding]}", "stages.0.tie: weights are [embedding, head], not ['embedding']; layers are shared by tie:"),
        ("{weights: [head, head]}", "stages.0.tie: weights are [embedding, head], not ['head', 'head']"),
        ("{weights: [embedding, ffn]}", "stages.0.tie.weights.1: "),
        ("{weights: [embedding, head], fit: best}", "stages.0.tie.fit: "),
        ("{codebook: 5}", "stages.0.tie.codebook: "),
        ("{codebook: '16'}", "stages.0.tie.codebook: "),
        ("{codebook: 16, per: column}", "stages.0.tie.per: "),
        ("{codebook: 16, rows: 4}", "stages.0.tie: rows is for per: group, not row"),
        ("{codebook: 16, per: linear, rows: 4}", "stages.0.tie: rows is for per: group, not linear"),
        ("{codebook: 16, per: group}", "stages.0.tie: per: group needs rows, how many adjacent rows share a codebook"),
        ("{codebook: 16, per: group, rows: 1}", "stages.0.tie.rows: "),
        ("{basis: 2}", "stages.0.tie: give rank or keep, one of them"),
        ("{basis: 2, rank: 8, keep: 0.5}", "stages.0.tie: give rank or keep, one of them"),
        ("{basis: 0, rank: 8}", "stages.0.tie.basis: "),
        ("{basis: 2, rank: 0}", "stages.0.tie.rank: "),
        ("{basis: 2, keep: 1.0}", "stages.0.tie.keep: "),
        ("{basis: 2, keep: 0}", "stages.0.tie.keep: "),
        ("{codebook: 16, basis: 2}", "stages.0.tie.basis: unknown key"),
        ("{}", "stages.0.tie"),
        ("[embedding, head]", "stages.0.tie"),
        ("3", "stages.0.tie"),
        ("{1: 2}", "stages.0.tie"),
        ("{groups: 4}", "stages.0.tie"),
    ],
)
def test_an_impossible_setting_is_told_why(settings: str, message: str) -> None:
    assert refusal(stages(f"tie: {settings}")).startswith(message)


# What may follow what.


@pytest.mark.parametrize("kind", ["pairs", "codebook", "basis"])
@pytest.mark.parametrize("prune", [CUT, "prune: {pattern: '2:4'}", "prune: {axis: layer, keep: 1}"])
def test_nothing_is_cut_once_it_is_shared(prune: str, kind: str) -> None:
    why = "prune comes before tie: weights that are shared, products or codes can't be cut any more"
    assert refusal(stages(tie(kind), prune)) == why
    assert refusal(stages(tie(kind), HEAL, prune)) == why
    if "pattern" not in prune:
        assert len(Recipe.parse(stages(prune, tie(kind))).stages) == 2


def test_a_tied_head_does_not_stand_in_the_way_of_a_cut() -> None:
    assert len(Recipe.parse(stages(tie("weights"), CUT, "quantize")).stages) == 3


@pytest.mark.parametrize("kind", ["weights", "pairs", "basis"])
def test_what_is_tied_after_the_last_healing_is_not_healed(kind: str) -> None:
    why = "distill heals what comes before it, and tie comes after the last one; put distill after tie"
    assert refusal(stages(CUT, HEAL, tie(kind))) == why
    assert refusal(stages(HEAL, tie(kind), "quantize")) == why
    assert refusal(stages(tie("pairs"), HEAL, tie(kind))) == why
    for fine in ((tie(kind), HEAL), (HEAL, tie(kind), HEAL), (tie(kind), "quantize"), (CUT, tie(kind), HEAL, "quantize")):
        assert len(Recipe.parse(stages(*fine)).stages) == len(fine)


def test_a_codebook_comes_after_healing_as_quantize_does() -> None:
    assert len(Recipe.parse(stages(CUT, HEAL, tie("codebook"))).stages) == 3


def test_two_codes_for_the_same_linears_are_refused() -> None:
    why = "codebook and quantize are two codes for the same linears, and codebook takes all; give it skip, or leave one"
    assert refusal(stages(tie("codebook"), "quantize")) == why
    assert refusal(stages(tie("codebook"), "distill: {train: scales}", "quantize")) == why
    for fine in ("{codebook: 16, skip: ['*.mlp.*']}", "{codebook: 16, skip: [a]}"):
        assert len(Recipe.parse(stages(f"tie: {fine}", "quantize")).stages) == 2
    for rest in ("{head: quantize}", "{embedding: int8}"):
        assert len(Recipe.parse(stages(tie("codebook"), f"quantize: {rest}")).stages) == 2


@pytest.mark.parametrize("kind", TIES)
def test_what_is_quantised_is_not_tied(kind: str) -> None:
    why = "a quantised model can't be changed again, but for what is not in codes: after the one quantize comes nothing, or "
    assert refusal(stages("quantize", tie(kind))).startswith(why)


def test_scales_are_for_what_has_some() -> None:
    why = "train: scales is for what quantize or a codebook left; put one of them before it"
    for before in ([], [tie("pairs")], [tie("basis")], [tie("weights")], [CUT]):
        assert refusal(stages(*before, "distill: {train: scales}")) == why
    for before in ([tie("codebook")], ["quantize"], [tie("pairs"), "quantize"], [tie("codebook"), HEAL]):
        assert len(Recipe.parse(stages(*before, "distill: {train: scales}")).stages) == len(before) + 1


def test_every_two_ties_can_follow_each_other() -> None:
    for one, other in combinations(TIES, 2):
        for entries in ((one, other), (other, one)):
            found = Recipe.parse(stages(*map(tie, entries)))
            assert Recipe.parse(found.to_yaml()) == found and len(found.stages) == 2
