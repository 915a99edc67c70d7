"""What a recipe may say of tie, share, low_rank and codebook, in which order, and what it is told when it is
wrong."""

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
    "tie: {}": Tie,
    "tie: {fit: mean}": Tie,
    "share: {layers: auto, groups: 4}": Share,
    "share: {layers: cka, groups: 1, parts: [ffn, attention], residual_rank: 8, steps: 0}": Share,
    "share: {pairs: [[0, 1]]}": Share,
    "share: {pairs: [[2, 3, 4], [5, 6]], parts: [attention]}": Share,
    "codebook: {entries: 16}": Codebook,
    "codebook: {entries: 256, per: group, rows: 4, skip: ['*.down_proj']}": Codebook,
    "codebook: {entries: 4, per: linear}": Codebook,
    "low_rank: {layers_per_basis: 2, rank: 64}": LowRank,
    "low_rank: {keep: 0.5, skip: ['*.k_proj']}": LowRank,
}
ENTRIES = {
    "tie": "tie: {}",
    "share": "share: {pairs: [[0, 1]]}",
    "codebook": "codebook: {entries: 16}",
    "low_rank": "low_rank: {layers_per_basis: 2, rank: 8}",
}
CUT, HEAL = "prune: {axis: ffn, keep: 0.5}", "distill: {steps: 10}"


def stages(*entries: str) -> str:
    return "stages:\n" + "".join(f"  - {entry}\n" for entry in entries)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and len(message.splitlines()) == 1 and "<" not in message
    return message.removeprefix("my.yaml: ")


@pytest.mark.parametrize("entry", KINDS)
def test_each_stage_reads_back_the_same(entry: str) -> None:
    recipe = Recipe.parse(stages(entry))
    assert type(recipe.stages[0]) is KINDS[entry]
    written = recipe.to_yaml()
    again = Recipe.parse(written)
    assert again == recipe and again.digest == recipe.digest and again.to_yaml() == written
    assert yaml.safe_load(written)["stages"] == [yaml.safe_load(entry)], "what was left out stays out"
    assert Recipe.model_validate(recipe.model_dump()) == recipe, "as a value too"


def test_defaults_that_are_spelled_out_have_the_same_digest_and_other_settings_another() -> None:
    for bare, spelled in (
        ("tie", "tie: {fit: least_squares}"),
        ("share: {pairs: [[0, 1]]}", "share: {pairs: [[0, 1]], parts: [ffn], residual_rank: 0, steps: 300}"),
        ("codebook: {entries: 16}", "codebook: {entries: 16, per: row, skip: []}"),
        ("low_rank: {rank: 8}", "low_rank: {layers_per_basis: 1, rank: 8, skip: []}"),
    ):
        one, other = (Recipe.parse(stages(entry)) for entry in (bare, spelled))
        assert one == other and one.digest == other.digest
    digests = {Recipe.parse(stages(entry)).digest for entry in KINDS}
    assert len(digests) == len(KINDS)


@pytest.mark.parametrize(
    ("old", "why"),
    [
        (
            "prune: {pattern: '2:4'}",
            "stages.0.prune: pattern is no key any more; single weights are set to zero by a stage of",
        ),
        (
            "tie: {weights: [embedding, head]}",
            "stages.0.tie: weights is no key any more; tie is always for embedding and head",
        ),
        (
            "tie: {layers: auto, groups: 2}",
            "stages.0.tie: layers is no key any more; layers share weights by share: {layers:",
        ),
        (
            "tie: {pairs: [[0, 1]]}",
            "stages.0.tie: pairs is no key any more; layers share weights by share: {layers: auto",
        ),
        (
            "tie: {basis: 2, rank: 8}",
            "stages.0.tie: basis is no key any more; linears become products of low rank by low_rank:",
        ),
        (
            "tie: {codebook: 16}",
            "stages.0.tie: codebook is no key any more; weights become indices by codebook: {entries: 16}",
        ),
        (
            "low_rank: {basis: 2, rank: 8}",
            "stages.0.low_rank: basis is no key any more; it is called layers_per_basis",
        ),
        ("codebook: {codebook: 16}", "stages.0.codebook: codebook is no key any more; it is called entries"),
        ("quantize: {block: 64}", "stages.0.quantize: block is no key any more; it is called group_size"),
        (
            "quantize: {overrides: {'*': {block: 64}}}",
            "stages.0.quantize.overrides.*: block is no key any more; it is called",
        ),
    ],
)
def test_a_retired_key_is_told_what_to_write_instead(old: str, why: str) -> None:
    assert refusal(stages(old)).startswith(why)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("codebook: {entris: 16}", "stages.0.codebook.entris: unknown key; did you mean entries?"),
        (
            "low_rank: {layer_per_basis: 2, rank: 8}",
            "stages.0.low_rank.layer_per_basis: unknown key; did you mean layers_per_basis?",
        ),
        ("share: {layer: auto, groups: 4}", "stages.0.share.layer: unknown key; did you mean layers?"),
        ("share: {pair: [[0, 1]]}", "stages.0.share.pair: unknown key; did you mean pairs?"),
        (
            "share: {pairs: [[0, 1]], residual_ranks: 8}",
            "stages.0.share.residual_ranks: unknown key; did you mean residual_rank?",
        ),
        ("share: {layers: auto, group: 4}", "stages.0.share.group: unknown key; did you mean groups?"),
        (
            "share: {layers: auto, groups: 4, part: [ffn]}",
            "stages.0.share.part: unknown key; did you mean parts?",
        ),
        ("tie: {fits: mean}", "stages.0.tie.fits: unknown key; did you mean fit?"),
        ("codebook: {entries: 16, row: 4}", "stages.0.codebook.row: unknown key; did you mean rows?"),
        (
            "low_rank: {layers_per_basis: 2, ranks: 8}",
            "stages.0.low_rank.ranks: unknown key; did you mean rank?",
        ),
        (
            "low_rank: {layers_per_basis: 2, rank: 8, zzz: 1}",
            "stages.0.low_rank.zzz: unknown key; use one of layers_per_basis, rank, keep, skip, experts",
        ),
    ],
)
def test_an_unknown_key_is_told_the_nearest_of_its_kind(settings: str, message: str) -> None:
    assert refusal(stages(settings)) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "share: {pairs: [[0, 1]], layers: auto, groups: 4}",
            "stages.0.share: give layers (auto, with groups) or pairs, one of them",
        ),
        (
            "share: {layers: auto}",
            "stages.0.share: groups goes with layers: how many different ones are left",
        ),
        (
            "share: {pairs: [[0, 1]], groups: 4}",
            "stages.0.share: groups goes with layers: how many different ones are left",
        ),
        (
            "share: {pairs: [[0, 1], [1, 2]]}",
            "stages.0.share: pairs name a layer twice; a layer is in one group",
        ),
        ("share: {pairs: [[1, 1]]}", "stages.0.share: pairs name a layer twice; a layer is in one group"),
        ("share: {pairs: [[0]]}", "stages.0.share.pairs.0: "),
        ("share: {pairs: [0, 1]}", "stages.0.share.pairs.0: "),
        ("share: {pairs: []}", "stages.0.share"),
        ("share: {pairs: [[0, -1]]}", "stages.0.share"),
        ("share: {layers: alike, groups: 2}", "stages.0.share.layers: "),
        ("share: {layers: auto, groups: 0}", "stages.0.share.groups: "),
        ("share: {pairs: [[0, 1]], parts: []}", "stages.0.share.parts: "),
        ("share: {pairs: [[0, 1]], parts: [mlp]}", "stages.0.share.parts.0: "),
        ("share: {pairs: [[0, 1]], residual_rank: -1}", "stages.0.share.residual_rank: "),
        ("tie: {fit: best}", "stages.0.tie.fit: "),
        ("codebook: {entries: 5}", "stages.0.codebook.entries: "),
        ("codebook: {entries: '16'}", "stages.0.codebook.entries: "),
        ("codebook: {entries: 16, per: column}", "stages.0.codebook.per: "),
        ("codebook: {entries: 16, rows: 4}", "stages.0.codebook: rows is for per: group, not row"),
        (
            "codebook: {entries: 16, per: linear, rows: 4}",
            "stages.0.codebook: rows is for per: group, not linear",
        ),
        (
            "codebook: {entries: 16, per: group}",
            "stages.0.codebook: per: group needs rows, how many adjacent rows share a codebook",
        ),
        ("codebook: {entries: 16, per: group, rows: 1}", "stages.0.codebook.rows: "),
        ("low_rank: {layers_per_basis: 2}", "stages.0.low_rank: give rank or keep, one of them"),
        (
            "low_rank: {layers_per_basis: 2, rank: 8, keep: 0.5}",
            "stages.0.low_rank: give rank or keep, one of them",
        ),
        ("low_rank: {layers_per_basis: 0, rank: 8}", "stages.0.low_rank.layers_per_basis: "),
        ("low_rank: {layers_per_basis: 2, rank: 0}", "stages.0.low_rank.rank: "),
        ("low_rank: {layers_per_basis: 2, keep: 1.0}", "stages.0.low_rank.keep: "),
        ("low_rank: {layers_per_basis: 2, keep: 0}", "stages.0.low_rank.keep: "),
        ("codebook: {entries: 16, basis: 2}", "stages.0.codebook.basis: unknown key"),
        ("tie: [embedding, head]", "stages.0.tie"),
        ("tie: 3", "stages.0.tie"),
        ("tie: {1: 2}", "stages.0.tie"),
        ("share: {groups: 4}", "stages.0.share"),
    ],
)
def test_an_impossible_setting_is_told_why(settings: str, message: str) -> None:
    assert refusal(stages(settings)).startswith(message)


# What may follow what.


@pytest.mark.parametrize("kind", ["share", "codebook", "low_rank"])
@pytest.mark.parametrize("prune", [CUT, "sparsify: {pattern: '2:4'}", "prune: {axis: layer, keep: 1}"])
def test_nothing_is_cut_once_it_is_shared(prune: str, kind: str) -> None:
    why = (
        f"{prune.partition(':')[0]} comes before {kind}: weights that are shared, products or codes can't "
        "be cut any more"
    )
    assert refusal(stages(ENTRIES[kind], prune)) == why
    assert refusal(stages(ENTRIES[kind], HEAL, prune)) == why
    if "pattern" not in prune:
        assert len(Recipe.parse(stages(prune, ENTRIES[kind])).stages) == 2


def test_a_tied_head_does_not_stand_in_the_way_of_a_cut() -> None:
    assert len(Recipe.parse(stages(ENTRIES["tie"], CUT, "quantize")).stages) == 3


@pytest.mark.parametrize("kind", ["tie", "share", "low_rank"])
def test_what_is_tied_after_the_last_healing_is_not_healed(kind: str) -> None:
    why = f"distill heals what comes before it, and {kind} comes after the last one; put distill after {kind}"
    assert refusal(stages(CUT, HEAL, ENTRIES[kind])) == why
    assert refusal(stages(HEAL, ENTRIES[kind], "quantize")) == why
    assert refusal(stages(ENTRIES["share"], HEAL, ENTRIES[kind])) == why
    for fine in (
        (ENTRIES[kind], HEAL),
        (HEAL, ENTRIES[kind], HEAL),
        (ENTRIES[kind], "quantize"),
        (CUT, ENTRIES[kind], HEAL, "quantize"),
    ):
        assert len(Recipe.parse(stages(*fine)).stages) == len(fine)


def test_a_codebook_comes_after_healing_as_quantize_does() -> None:
    assert len(Recipe.parse(stages(CUT, HEAL, ENTRIES["codebook"])).stages) == 3


def test_two_codes_for_the_same_linears_are_refused() -> None:
    why = (
        "codebook and quantize are two codes for the same linears, and codebook takes all; give it skip, or "
        "leave one"
    )
    assert refusal(stages(ENTRIES["codebook"], "quantize")) == why
    assert refusal(stages(ENTRIES["codebook"], "distill: {train: scales}", "quantize")) == why
    for fine in ("codebook: {entries: 16, skip: ['*.mlp.*']}", "codebook: {entries: 16, skip: [a]}"):
        assert len(Recipe.parse(stages(fine, "quantize")).stages) == 2
    for rest in ("{head: quantize}", "{embedding: int8}"):
        assert len(Recipe.parse(stages(ENTRIES["codebook"], f"quantize: {rest}")).stages) == 2


@pytest.mark.parametrize("kind", ENTRIES)
def test_what_is_quantised_is_not_tied(kind: str) -> None:
    why = (
        "a quantised model can't be changed again, but for what is not in codes: after the one quantize "
        "comes nothing, or "
    )
    assert refusal(stages("quantize", ENTRIES[kind])).startswith(why)


def test_scales_are_for_what_has_some() -> None:
    why = "train: scales is for what quantize or a codebook left; put one of them before it"
    for before in ([], [ENTRIES["share"]], [ENTRIES["low_rank"]], [ENTRIES["tie"]], [CUT]):
        assert refusal(stages(*before, "distill: {train: scales}")) == why
    for before in (
        [ENTRIES["codebook"]],
        ["quantize"],
        [ENTRIES["share"], "quantize"],
        [ENTRIES["codebook"], HEAL],
    ):
        assert len(Recipe.parse(stages(*before, "distill: {train: scales}")).stages) == len(before) + 1


def test_every_two_ties_can_follow_each_other() -> None:
    for one, other in combinations(ENTRIES, 2):
        for entries in ((one, other), (other, one)):
            found = Recipe.parse(stages(*(ENTRIES[kind] for kind in entries)))
            assert Recipe.parse(found.to_yaml()) == found and len(found.stages) == 2
