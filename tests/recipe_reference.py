"""`docs/recipe-reference.md`, made of the JSON Schema of recipes: `python -m tests.recipe_reference`
writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.recipe.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe-reference.md"
Schema = Mapping[str, Any]

LARGE = 1_000_000  # bounds from here on only keep numbers within what can be counted
DEFAULT_SECTIONS = ("data", "accept")  # whose defaults are those in their own tables

HEAD = """\
# Recipe reference

<!-- written by `python -m tests.recipe_reference` -->

A recipe is a YAML file. This page lists all keys, with their values and defaults. The pages of the stages say
what each stage does and what it costs, and [Choosing a recipe](choosing-a-recipe.md) names recipes for a
goal. From Python, the keys of a stage are keyword arguments of its class, such as `Prune(axis="ffn",
keep=0.75)`.

An unknown key or a wrong value is refused before anything is read, with the nearest right word. A key without
a default is not set unless you give it.

## Recipe
"""
STAGES_HEAD = """\
## Stages

`stages` is a list. Each entry is the name of one stage and its settings. A stage with all defaults can be
written as its name alone: {bare}. Stages run in the order of the
list: cut first, then share or factorise, then distill, then quantise.
"""
EXAMPLES = {
    "recipe": """\
schema: 1
base: HuggingFaceTB/SmolLM2-135M
data: {source: python-docs, samples: 128}
stages:
  - quantize: {format: nf4}
accept: {kl_nats: 0.05}
""",
    "data": """\
data: {source: Salesforce/wikitext, config: wikitext-2-raw-v1, evaluation_split: test, length: 2048}
stages:
  - quantize
""",
    "accept": """\
stages:
  - quantize: {format: int8}
accept: {kl_nats: 0.01, top1_agreement: 0.98}
""",
    "prune": """\
stages:
  - prune: {axis: [ffn, kv], parameters: 0.8}
""",
    "sparsify": """\
stages:
  - sparsify: {pattern: "2:4", score: wanda}
""",
    "tie": """\
stages:
  - tie: {fit: mean}
""",
    "share": """\
stages:
  - share: {layers: auto, groups: 3, parts: [ffn, attention], residual_rank: 8}
""",
    "low_rank": """\
stages:
  - low_rank: {keep: 0.75, layers_per_basis: 2, skip: ["*.down_proj"]}
""",
    "budget": """\
stages:
  - budget: {size: 60MB, loads_with: transformers}
""",
    "codebook": """\
stages:
  - codebook: {entries: 16, per: group, rows: 4}
""",
    "distill": """\
stages:
  - distill: {loss: jensen_shannon, steps: 300, batch: 4, learning_rate: 3.0e-4, cache: true}
""",
    "quantize": """\
stages:
  - quantize: {format: w8a8, smooth: {}, protect: 0.1, skip: ["*.0.mlp.*"]}
""",
    "kv_cache": """\
stages:
  - quantize: {format: nf4}
  - kv_cache: {bits: 4}
""",
    "overrides": """\
stages:
  - quantize:
      format: nf4
      overrides:
        "*.down_proj": {format: int8}
        kv: {group_size: 32}
""",
    "smooth": """\
stages:
  - quantize: {format: nf4, smooth: {method: awq, alpha: 0.5}}
""",
}
NOTES = {  # what a schema does not say
    "prune": "Give one of `keep`, `parameters` and `size`.",
    "budget": "Give one of `size`, `memory` and `tokens_per_s`.",
    "sparsify": 'Put quotes around `"2:4"` and `"4:8"`.',
    "share": "Give `layers` and `groups`, or `pairs`.",
    "low_rank": "Give `rank` or `keep`.",
}


def page(schema: Schema) -> str:
    """The page as Markdown."""
    definitions: Schema = schema["$defs"]
    bare, entries = definitions["StageEntry"]["anyOf"]
    parts = [HEAD, _table(schema), _example("recipe")]
    for section, name in (("data", "DataSpec"), ("accept", "Accept")):
        keys = definitions[name]
        parts += [f"## {section}\n", _sentence(keys), _table(keys), _example(section)]
    parts.append(STAGES_HEAD.format(bare=_listed([f"`- {name}`" for name in bare["enum"]])))
    for stage, entry in entries["properties"].items():
        settings = definitions[_name_of(entry["anyOf"][0])]
        more = f"See [the page of the stage](stages/{stage}.md). {NOTES.get(stage, '')}".rstrip() + "\n"
        parts += [f"### {stage}\n", _sentence(settings), more, _table(settings), _example(stage)]
        for key, inner in _inner(settings).items():
            parts += [f"#### {key}\n", _sentence(definitions[inner])]
            parts += [_again(definitions[inner], settings) or _table(definitions[inner]), _example(key)]
    return "\n".join(parts)


def _again(schema: Schema, stage: Schema) -> str | None:
    """The keys of settings that are keys of the stage too; None where one is not."""
    if not schema["properties"].keys() <= stage["properties"].keys():
        return None
    return f"The keys are those of the stage: {_listed([f'`{key}`' for key in schema['properties']])}.\n"


def _sentence(schema: Schema) -> str:
    return f"{schema['description']}\n"


def _example(name: str) -> str:
    return f"```yaml\n{EXAMPLES[name]}```\n"


def _table(schema: Schema) -> str:
    """The keys of an object, a row a key."""
    required = schema.get("required", ())
    lines = ["| key | values | default | what it is |", "|---|---|---|---|"]
    for key, field in schema["properties"].items():
        default = "required" if key in required else _default(key, field)
        cells = [f"`{key}`", _values(key, field), default, field["description"]]
        row = " | ".join(cell.replace("|", r"\|") for cell in cells)
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def _default(key: str, field: Schema) -> str:
    value = field.get("default")
    if value is None or key in DEFAULT_SECTIONS:
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    spelled = json.dumps(value).replace('"', "")
    return f"`{spelled}`"


def _values(key: str, field: Schema) -> str:
    """What a key takes, in words."""
    if "anyOf" in field:
        return " or ".join(_values(key, kind) for kind in field["anyOf"] if kind != {"type": "null"})
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return f"[mapping](#{key})"
    kind = field["type"]
    if kind == "array":
        return _list(key, field["items"])
    if kind == "object":
        return f"mapping of names to [settings](#{key})"
    words = {"string": "text", "boolean": "`true`, `false`", "integer": "integer", "number": "number"}
    return f"{words[kind]}{_bounds(field)}"


def _list(key: str, items: Schema) -> str:
    """A list, by what it holds."""
    if "$ref" in items:
        return f"list of [{key}](#{key})"
    if items["type"] == "array":
        return "list of lists of integers"
    return f"list of {_values(key, items) if 'enum' in items else 'names'}"


def _bounds(field: Schema) -> str:
    """` > 0 and <= 1`; empty where a number has no bounds that a user meets."""
    if "minimum" in field and field["minimum"] == field.get("maximum"):
        return f" {field['minimum']}"
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    found = [f"{sign} {field[name]:g}" for name, sign in signs.items() if abs(field.get(name, LARGE)) < LARGE]
    return f" {' and '.join(found)}" if found else ""


def _inner(schema: Schema) -> dict[str, str]:
    """Keys that hold settings of their own, with the definition of these."""
    found = {}
    for key, field in schema["properties"].items():
        for kind in (field, field.get("additionalProperties"), *field.get("anyOf", ())):
            if isinstance(kind, Mapping) and "$ref" in kind:
                found[key] = _name_of(kind)
    return found


def _name_of(reference: Schema) -> str:
    return str(reference["$ref"]).removeprefix("#/$defs/")


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(Recipe.json_schema())), encoding="utf-8")
