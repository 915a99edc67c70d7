"""The frozen table of all types: an upgrade of transformers shows here what moved."""

import re

import pytest

from llmcompress.architectures.families import FAMILIES
from llmcompress.derivation.example_configs import causal_types
from llmcompress.pipeline.families import known_families
from llmcompress.report.console import LEVELS
from tests.families_page import PAGE, row, rows


def test_the_page_lists_all_types_and_how_much_is_known_of_them() -> None:
    known = {name: line.split(" | ")[1] for name, line in rows().items()}
    assert list(known) == list(causal_types())
    walked = sum(level != LEVELS[0] for level in known.values())
    axes = sum(level == LEVELS[3] for level in known.values())
    assert f"has {len(known)} types of causal language models. {walked} of them" in PAGE.read_text("utf-8")
    assert f"the axes of {axes} are known" in PAGE.read_text("utf-8")
    assert walked >= 173
    assert axes >= 161
    for axis, least in (("ffn", 150), ("kv", 95), ("hidden", 75), ("expert", 40)):
        cut = [name for name, line in rows().items() if axis in re.split(", ", line.split(" | ")[3])]
        assert len(cut) >= least, axis


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", causal_types())
def test_the_page_shows_what_is_known_of_a_type(model_type: str) -> None:
    (facts,) = known_families([model_type])
    assert facts.derived == (model_type not in {*FAMILIES, "gpt-sw3"})
    assert row(facts) == rows()[model_type], "write it again: python -m tests.families_page"
