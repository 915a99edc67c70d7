"""The page of all keys of recipes is that of the schema, and says of each what it is."""

import json

from llmcompress.recipe.entries import STAGES
from llmcompress.recipe.recipe import Recipe
from tests.recipe_reference import PAGE, page


def test_the_page_is_that_of_the_schema() -> None:
    found = PAGE.read_text(encoding="utf-8")
    assert found == page(json.loads(Recipe.json_schema())), "run: python -m tests.recipe_reference"


def test_the_page_has_every_stage_and_every_key() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n### ")[1:])
    assert [*sections] == [*STAGES]
    for name, stage in STAGES.items():
        assert all(f"| `{key}` |" in sections[name] for key in stage.model_fields)
        assert f"  - {name}" in sections[name]
