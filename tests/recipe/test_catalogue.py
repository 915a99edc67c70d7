"""What the list of shipped recipes says follows from each file: its head and its stages."""

from __future__ import annotations

import json

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe import catalogue, shipped
from llmcompress.recipe.catalogue import NATIVE, PLUGIN, TRANSFORMERS, Measured

HEAD = """# What it does,
# in two lines.
# measured (evaluation/results/fidelity-*.json; small models):
#   demo: KL 0.02673 nats (0.264 x stock bitsandbytes at the same bytes), perplexity 34.888 -> 35.112, 29 s
#   other: KL 0.5 nats, perplexity 7.838 -> 7.936, 1600 s
#   third: KL 0.05 nats, perplexity 7.838 -> 7.936
"""
STAGES = {  # stages: purpose, what is left, what loads the result
    "[quantize]": ("4 bits per weight", "4.5 bits per weight", NATIVE),
    "[{quantize: {format: fp4, double_quant: true}}]": ("4 bits per weight", "4.127 bits per weight", NATIVE),
    "[{quantize: {group_size: 32}}, distill]": ("4 bits per weight", "5 bits per weight", NATIVE),
    "[{quantize: {embedding: int8}}]": (
        "4 bits per weight",
        "4.5 bits per weight, embedding in 8 bits",
        PLUGIN,
    ),
    '[{quantize: {overrides: {"*.down_proj": {format: int8}}}}]': (
        "4 bits per weight",
        "4.5 to 8 bits per weight",
        PLUGIN,
    ),
    '[{quantize: {overrides: {"*.down_proj": {format: fp4}}}}]': (
        "4 bits per weight",
        "4.5 bits per weight",
        NATIVE,
    ),
    "[{quantize: {format: int8, protect: 0.1}}]": (
        "8 bits per weight",
        "8 bits per weight, 10 % of the weights kept in their dtype",
        NATIVE,
    ),
    "[{quantize: {format: w8a8, protect: 0.1}}]": ("8 bits per weight", "8 bits per weight", PLUGIN),
    "[{quantize: {format: w4a8, group_size: 64}}]": ("4 bits per weight", "4.125 bits per weight", PLUGIN),
    "[{codebook: {entries: 16, per: row}}]": (
        "4 bits per weight",
        "16 values per row, 4 bits per weight",
        PLUGIN,
    ),
    "[{prune: {axis: ffn, keep: 0.75}}, quantize]": (
        "prune and quantise",
        "75 % of the feed-forward neurons; 4.5 bits per weight",
        NATIVE,
    ),
    "[{prune: {axis: layer, keep: 12}}, distill]": ("fewer parameters", "12 layers", TRANSFORMERS),
    "[{prune: {axis: [ffn, kv], parameters: 0.8}}]": ("fewer parameters", "80 % of the parameters", PLUGIN),
    "[{prune: {axis: ffn, size: 100MB, allocation: uniform}}]": (
        "fewer parameters",
        "100 MB before quantisation",
        TRANSFORMERS,
    ),
    "[{prune: {axis: hidden, parameters: 0.8}}]": (
        "fewer parameters",
        "80 % of the parameters",
        TRANSFORMERS,
    ),
    "[{prune: {axis: sublayer, keep: 0.9}}]": (
        "fewer parameters",
        "90 % of the attentions and feed-forward parts",
        PLUGIN,
    ),
    "[{sparsify: {pattern: '2:4'}}]": ("sparse weights", "50 % of the weights, 2:4", PLUGIN),
    "[{sparsify: {pattern: unstructured, keep: 0.4}}]": ("sparse weights", "40 % of the weights", PLUGIN),
    "[{share: {layers: auto, groups: 3, parts: [ffn, attention]}}]": (
        "shared or factorised weights",
        "3 sets of feed-forward and attention weights",
        PLUGIN,
    ),
    "[{share: {pairs: [[2, 3]]}}]": (
        "shared or factorised weights",
        "one set of feed-forward weights in 1 group of layers",
        PLUGIN,
    ),
    "[{low_rank: {keep: 0.75}}]": (
        "shared or factorised weights",
        "75 % of the parameters of linears",
        PLUGIN,
    ),
    "[tie]": ("shared or factorised weights", "one matrix for embedding and head", TRANSFORMERS),
    "[distill]": ("distillation", "the whole model", TRANSFORMERS),
}


@pytest.mark.parametrize("stages", STAGES)
def test_stages_say_what_is_left_and_what_loads_it(stages: str) -> None:
    entry = catalogue.entry("a", f"stages: {stages}")
    assert (entry.purpose, entry.leaves, entry.loads_with) == STAGES[stages]


def test_the_head_says_what_it_does_and_what_was_measured() -> None:
    entry = catalogue.entry("a", f"{HEAD}data: {{samples: 8}}\n# no head\nstages: [quantize]")
    assert entry.does == "What it does, in two lines."
    against = "0.264 x stock bitsandbytes at the same bytes"
    assert entry.measured == (
        Measured("demo", 0.02673, 34.888, 35.112, 29, against),
        Measured("other", 0.5, 7.838, 7.936, 1600, None),
        Measured("third", 0.05, 7.838, 7.936, None, None),
    )


def test_a_recipe_that_names_its_base_is_one_to_try() -> None:
    assert catalogue.entry("a", "base: demo\nstages: [quantize]").purpose == "first try"


def test_a_damaged_file_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"shipped recipe a .*; install llmcompress again"):
        catalogue.entry("a", "stages: [")


def test_every_shipped_recipe_is_listed_with_what_it_does_and_cost() -> None:
    entries = catalogue.entries()
    assert sorted(entry.name for entry in entries) == list(shipped.names())
    order = [catalogue.PURPOSES.index(entry.purpose) for entry in entries]
    assert order == sorted(order)
    for entry in entries:
        assert entry.does.endswith("."), entry.name
        assert entry.measured, entry.name
    assert json.loads(json.dumps([entry.to_dict() for entry in entries]))[0]["name"] == "demo"
