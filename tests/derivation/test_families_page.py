"""The frozen table of all types: an upgrade of transformers shows here what moved."""

import pytest

from llmcompress.architectures.families import FAMILIES
from llmcompress.pipeline.families import known_families
from tests.families_page import PAGE, written


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_families_shows_what_is_known() -> None:
    facts = known_families()
    assert sum(of.level > 0 for of in facts) >= 173
    assert {of.model_type for of in facts if not of.derived} == {*FAMILIES, "gpt-sw3"}
    assert sum(of.level == 3 for of in facts) >= 150
    for axis, least in (("ffn", 150), ("kv", 95), ("hidden", 75), ("expert", 40)):
        assert sum(axis in of.axes for of in facts) >= least, axis
    assert written(facts) == PAGE.read_text("utf-8"), "write it again: python -m tests.families_page"
