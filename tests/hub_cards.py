"""What the Hub asks of the head of a model card, as its documentation gives it: the local Hub refuses a card
that breaks it.

The Hub's own check runs on its servers and knows more: every licence, language and library. Here are the
rules that a card of ours could break. Source: modelcard.md and the pages on model cards, licences and
evaluation results of the Hub's documentation.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENSES = {
    *(
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "bigcode-openrail-m",
        "creativeml-openrail-m",
        "afl-3.0",
    ),
    *(
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
    ),
    *(
        "gpl",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "isc",
        "unlicense",
        "wtfpl",
        "odc-by",
        "etalab-2.0",
    ),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "unknown", "other"),
}
RULES: dict[str, str] = {  # of plain entries: what a string, or each string of a list, matches whole
    "base_model": ID,
    "base_model_relation": "|".join(RELATIONS),
    "language": r"[a-z]{2,3}(-[A-Za-z]{2,4})?|multilingual|code",
    "library_name": r"[a-z0-9_.-]+",
    "license": "|".join(map(re.escape, sorted(LICENSES))),
    "license_link": r"LICENSE(\.md)?|https?://\S+",
    "license_name": r"[a-z0-9.-]+",
    "pipeline_tag": r"[a-z0-9-]+",
    "tags": r"[^\s].{0,99}",
}
LISTS = ("base_model", "language", "license", "tags")


def wrong_with(text: str) -> list[str]:
    """What the Hub would refuse of a README.md, an item a rule; nothing where the card is right, or has no
    head at all."""
    head = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if head is None:
        return []
    try:
        data = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return ["the head is no YAML"]
    if not isinstance(data, dict):
        return ["the head is no mapping"]
    found = []
    for key, rule in RULES.items():
        given = data.get(key, [])
        each = given if isinstance(given, list) and key in LISTS else [given] if key in data else []
        found += [
            f'"{key}" {one!r} is not right'
            for one in each
            if not (isinstance(one, str) and re.fullmatch(rule, one))
        ]
    if "license_name" in data and data.get("license") != "other":
        found.append('"license_name" is for "license": other')
    return found + [
        wrong
        for n, model in enumerate(data.get("model-index", []))
        for wrong in _model(f"model-index[{n}]", model)
    ]


def _model(place: str, model: Any) -> list[str]:
    """What is wrong with one model of a model-index."""
    found = _strings(place, model, "name")
    for n, result in enumerate(model.get("results", [])):
        at = f"{place}.results[{n}]"
        found += _strings(f"{at}.task", result.get("task", {}), "type")
        dataset = result.get("dataset", {})
        optional = [key for key in ("config", "split", "revision") if key in dataset]
        found += _strings(f"{at}.dataset", dataset, "type", "name", *optional)
        for number, metric in enumerate(result.get("metrics", [])):
            found += _strings(
                f"{at}.metrics[{number}]", metric, "type", *(["name"] if "name" in metric else [])
            )
            if not isinstance(metric.get("value"), int | float | str) or isinstance(metric["value"], bool):
                found.append(f'"{at}.metrics[{number}].value" is required')
        if not result.get("metrics"):
            found.append(f'"{at}.metrics" is required')
    return found


def _strings(place: str, holder: dict[str, Any], *keys: str) -> list[str]:
    return [
        f'"{place}.{key}" must be a string'
        for key in keys
        if not (isinstance(holder.get(key), str) and holder[key])
    ]
