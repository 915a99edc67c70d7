"""The model card, README.md of an artefact: what the model is, how to load it and how good it is.

Every number comes from the report; none is typed here. The front matter carries the results as a
`model-index` in full precision, so that the Hub shows them and scripts can read them. The text below it is
the same report in words and tables. The card is written for others: `redaction.for_others` reduces names of
local files and folders to their last part. The Hub refuses paths as `base_model`, and nobody else needs them.
A recipe that is shared alone has its own card.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from llmcompress import hub
from llmcompress.data.calibration import DEMO
from llmcompress.io.local_names import is_path, short_name
from llmcompress.io.safe_parsing import Unreadable, yaml_of
from llmcompress.io.units import amount, measured_percent, number
from llmcompress.report.redaction import for_others, is_local_text, others_in
from llmcompress.report.rows import (
    CACHE_HEADER,
    Rows,
    before_after,
    cache_rows,
    cache_title,
    change,
    fidelity_rows,
    kept_rows,
    nats,
    steps,
    time_rows,
    worst_rows,
)
from llmcompress.report.schema import (
    CACHE,
    CHANGE_PICTURE,
    ERROR_PICTURE,
    PAGE,
    TRAINING_PICTURE,
    Report,
    TrainingFacts,
)

LARGEST = 1 << 16  # bytes of front matter
# entries copied from the card of the base
INHERITED = ("license", "license_name", "license_link", "language")
FOUR_BIT = {"nf4", "fp4"}
NATIVE = FOUR_BIT | {"int8"}  # formats that plain transformers loads, unless they are mixed with others
SPARSE = "sparse"
PLAIN = {SPARSE, "shared", "basis", "codebook", "q4_0", "iq4_nl"}  # that no kernel of bitsandbytes runs
CODES = {"quantize", "codebook"}  # stages whose result the Hub calls quantised
SHARE = "share"  # a stage whose result always needs our plug-in, whatever the formats
SHARED = (
    "Layers share weights, which saves bytes on disk and in memory but not time: each layer multiplies by "
    "them anew."
)
BOS = (
    "Every sequence of the text begins with the BOS token, as the model expects; what is predicted there is "
    "not scored."
)
OWN_CODE = (
    "The model has code of its own: the `.py` files beside its weights, as they came with its base. Read "
    "them before you load it.\n\n"
)
NO_SPEED = (
    "Zeros save bytes on disk, and neither time nor memory without a sparse kernel: loaded, the weights are "
    "dense. Parameters are counted as stored, zeros left out."
)


def card(report: Report, recipe_yaml: str, base_card: Mapping[str, Any], repo: str | None = None) -> str:
    """Return the text of README.md; `recipe_yaml` is quoted in full, `base_card` is the base's card data (may
    be empty).

    `report.base.revision` tells a Hub model from a folder: without it, the card names no `base_model`. `repo`
    is the id of the artefact on the Hub, once it is there. Pass the recipe in its shared form too, from
    `Recipe.for_others`.
    """
    report = for_others(report, repo)
    front = _front_of(_front_matter(report, base_card, repo))
    parts = [
        _opening(report, repo),
        _change(report),
        _loading(report, repo),
        _recipe(recipe_yaml) + _chosen(report),
        _errors(report),
    ]
    parts += [_training(report), _limits(report), _reproduction(report, repo)]
    return front + "\n\n".join(part for part in parts if part) + "\n"


def recipe_card(recipe_yaml: str, repo: str) -> str:
    """Return the README.md of a recipe that is shared alone under the id `repo`."""
    front = _front_of({"library_name": "llmcompress", "tags": ["llmcompress", "recipe"]})
    use = (
        f"## Use it\n\n```\npip install llmcompress\nllmcompress run {repo} --base user/model --out "
        "small/\n```"
    )
    what = (
        "A recipe of llmcompress, which makes a causal language model smaller and says what that cost. It "
        "holds no weights."
    )
    return front + "\n\n".join([f"# {short_name(repo)}", what, _recipe(recipe_yaml), use]) + "\n"


def front_matter(text: str) -> dict[str, Any]:
    """Return the card data at the head of a README.md; empty if there is none or it exceeds the bounds of a
    recipe."""
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml_of(parts[1], largest=LARGEST)
    except Unreadable:
        return {}
    return data if isinstance(data, dict) else {}


def evaluations(report: Report) -> list[dict[str, Any]]:
    """Return the measurements on a Hub data set as entries for .eval_results; empty if the text is not a Hub
    data set."""
    data, base = report.data, for_others(report).base
    if data.revision is None:
        return []
    at = f"@{base.revision}" if base.revision else ""
    told = f"not a benchmark of tasks: sequences of text; base {base.model}{at}, by llmcompress"
    measured = {"perplexity": report.compressed.perplexity, "kl_nats_mean": report.fidelity.kl_nats_mean}
    dataset = {"dataset_id": data.source, "dataset_revision": data.revision}
    known = {task: value for task, value in measured.items() if value is not None}
    return [{**dataset, "task_id": task, "value": value, "notes": told} for task, value in known.items()]


def _front_of(entries: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True)}---\n\n"


def _front_matter(report: Report, base_card: Mapping[str, Any], repo: str | None) -> dict[str, Any]:
    stages = {stage.name for stage in report.stages}
    formats = _formats(report)
    front: dict[str, Any] = {key: base_card[key] for key in INHERITED if _is_words(base_card.get(key))}
    if report.base.revision is not None and not _others(report):
        front["base_model"] = report.base.model
        front["base_model_relation"] = "quantized" if stages & CODES else "finetune"
    bits = {"4-bit", "bitsandbytes"} if formats & FOUR_BIT else set()
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmcompress", *sorted(stages | formats | bits)],
    }
    results = _results(report)
    name = short_name(repo or report.compressed.model)
    return front | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _others(report: Report) -> bool:
    """Whether the weights come from a student instead of the base."""
    return any(training.model_dump().get("student") for training in report.trainings)


def _formats(report: Report) -> set[str]:
    """The formats without their details, such as `sparse` for `sparse 2:4`."""
    return {linear.format.partition(" ")[0] for linear in report.linears}


def _is_words(value: Any) -> bool:
    """Whether an entry of a base's card is a string or a list of strings, none of them a path of its author's
    machine."""
    each = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and not is_path(item) for item in each)


def _results(report: Report) -> list[dict[str, Any]]:
    """The Hub's model-index: one result with all metrics on the evaluation text."""
    facts = report.fidelity
    metrics = (
        ("perplexity", "perplexity", report.compressed.perplexity),
        ("kl_nats_mean", "KL(base || compressed), mean, nats per token", facts.kl_nats_mean),
        ("kl_nats_p99", "KL(base || compressed), 99th percentile, nats per token", facts.kl_nats_p99),
        ("top1_agreement", "share of tokens with the same first choice as the base", facts.top1_agreement),
        ("perplexity_ratio", "perplexity / perplexity of the base", facts.perplexity_ratio),
    )
    measured = [
        {"type": kind, "name": name, "value": value} for kind, name, value in metrics if value is not None
    ]
    text, data = report.data.source, report.data
    place = {"config": data.config, "split": data.evaluation_split or data.split, "revision": data.revision}
    dataset = {"type": text.split()[0], "name": text} | {key: value for key, value in place.items() if value}
    result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}
    return [result] if measured else []


def _opening(report: Report, repo: str | None) -> str:
    base, small, recipe = report.base, report.compressed, report.recipe
    revision = f" at revision `{base.revision}`" if base.revision else ""
    of = f", `{recipe.source}` at `{recipe.revision}`" if recipe else ""
    return (
        f"# {short_name(repo or small.model)}\n\n"
        f"`{base.model}`{revision}, compressed by llmcompress with the recipe below{of}: "
        f"{amount(base.size_bytes, 'B')} became {amount(small.size_bytes, 'B')} "
        f"({change(base.size_bytes, small.size_bytes)}), "
        f"perplexity {number(base.perplexity)} became {number(small.perplexity)}, "
        f"and the KL divergence from the base is {nats(report.fidelity.kl_nats_mean)}."
    )


def _change(report: Report) -> str:
    header = ("", "base", "compressed", "change")
    return (
        f"## Before and after\n\n{_table(header, before_after(report))}\n\n"
        f"{_table(('', 'value'), fidelity_rows(report))}\n\n"
        f"{_cache(report)}"
        f"![Bytes, perplexity and speed before and after]({CHANGE_PICTURE})\n\n"
        f"[{PAGE}]({PAGE}) shows what both models predict, token by token: download it and open it in a "
        "browser."
    )


def _cache(report: Report) -> str:
    """What the KV cache costs as it is stored."""
    if report.kv_cache is None:
        return ""
    return (
        f"{cache_title(report.kv_cache)}, beside a plain one of the same model:\n\n"
        f"{_table(CACHE_HEADER, cache_rows(report.kv_cache))}\n\n"
    )


def _loading(report: Report, repo: str | None) -> str:
    said = OWN_CODE if report.own_code else ""
    return (
        f"## Load it\n\n{said}```\n{install_command(report)}\n```\n\n```python\n"
        f"{loading_code(report, repo)}\n```"
    )


def needed(report: Report) -> tuple[str, ...]:
    """The packages beside transformers that load the model."""
    formats = _formats(report)
    stages = {stage.name for stage in report.stages}
    uneven = any(_uneven(stage.model_dump().get("widths")) for stage in report.stages)
    # reports of earlier versions don't say it
    ours = report.plug_in or bool(formats - NATIVE) or SHARE in stages or uneven
    return (*(("bitsandbytes",) if formats - PLAIN else ()), *(("llmcompress",) if ours else ()))


def install_command(report: Report) -> str:
    """The command that installs what loads the model."""
    packages = dict.fromkeys((*needed(report), *(("llmcompress",) if _stores_cache(report) else ())))
    return " ".join(("pip install transformers accelerate", *packages))


def _stores_cache(report: Report) -> bool:
    """Whether `generate` stores keys and values in fewer bits once llmcompress is imported."""
    return any(stage.name == CACHE for stage in report.stages)


def loading_code(report: Report, repo: str | None) -> str:
    """Python that loads the model and lets it write."""
    loads = report.auto_class or "AutoModelForCausalLM"
    also = ""
    if "llmcompress" in needed(report):
        also = "import llmcompress  # without it, from_pretrained raises\n"
    elif _stores_cache(report):
        also = "import llmcompress  # without it, generate makes a plain KV cache\n"
    named = (
        f'"{repo}"'
        if repo
        else f'"{short_name(report.compressed.model)}"  # this folder, or its id on the Hub'
    )
    code = ", trust_remote_code=True" if report.own_code else ""
    return f"""{also}from transformers import {loads}, AutoTokenizer

name = {named}
tokenizer = AutoTokenizer.from_pretrained(name{code})
model = {loads}.from_pretrained(name, device_map="auto"{code})
prompt = tokenizer("The first", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))"""


def _uneven(widths: Mapping[str, Sequence[int]] | None) -> bool:
    """Whether layers differ in width."""
    return any(len(set(counts)) > 1 for counts in (widths or {}).values())


def _recipe(recipe_yaml: str) -> str:
    longest = max((len(run) for run in re.findall("`+", recipe_yaml)), default=0)
    fence = "`" * max(3, longest + 1)  # longer than any run of backticks in the recipe
    return f"## Recipe\n\n{fence}yaml\n{recipe_yaml.strip()}\n{fence}"


def _chosen(report: Report) -> str:
    """What an effort chose where the recipe that was run says nothing; empty if everything was said."""
    if report.effort is None:
        return ""
    chosen = ", ".join(f"`{key}: {value}`" for key, value in report.effort.chosen.items())
    return f"\n\nChosen by effort `{report.effort.level}`: {chosen}."


def _errors(report: Report) -> str:
    parts = []
    if report.linears:
        parts += [
            "## Where the error is",
            f"![Relative error of each linear over depth]({ERROR_PICTURE})",
            _table(("largest errors", "format", "bits", "relative error"), worst_rows(report)),
        ]
    if report.kept:
        parts += ["Kept as they were:", _table(("linear", "why"), kept_rows(report))]
    notes = [f"- {stage.name}: {note}" for stage in report.stages for note in stage.notes]
    return "\n\n".join([*parts, "\n".join(notes)]) if notes else "\n\n".join(parts)


def _training(report: Report) -> str:
    if not report.trainings:
        return ""
    picture = f"![KL on held-out text over the steps of training]({TRAINING_PICTURE})"
    return "\n\n".join(["## Training", *map(_trained, report.trainings), picture])


def _trained(training: TrainingFacts) -> str:
    tokens = training.steps_done * training.batch * training.length
    settings = (
        f"`{training.loss}`, {steps(training)} steps of {training.batch:,} x {training.length:,} tokens "
        f"({amount(tokens)} in all), learning rate {training.learning_rate:g}"
    )
    for role, name in others_in(training).items():
        repo, commit = hub.split(name)
        settings += (
            f", {role} `{repo}` at revision `{commit}`"
            if hub.is_commit(commit)
            else f", {role} `{short_name(name)}`"
        )
    if training.best[0] == 0:
        return (
            f"{settings}: nothing was better than the start, KL {nats(training.kl_before)} on held-out "
            "text, which is kept."
        )
    return (
        f"{settings}: KL(teacher || student) on held-out text went from {number(training.kl_before)} to "
        f"{nats(training.kl_after)} at step {training.best[0]:,}, "
        f"{measured_percent(training.recovered)} recovered."
    )


def _limits(report: Report) -> str:
    data = report.data
    limits = (
        *((BOS,) if data.bos else ()),
        f"Measured on {data.evaluation_tokens:,} tokens of one text ({data.source}). The interval says how "
        "far another sample of that text would move the perplexity; other languages, tasks, long contexts, "
        "instruction following and safety were not measured.",
        f"Calibrated on {data.calibration_tokens:,} tokens of the same source: text unlike it may lose more.",
        "The mean KL hides rare tokens that changed much more; the 99th percentile shows some of them.",
        f"Tokens per second are those of batch size 1 on {report.environment.device}; elsewhere it may be "
        "otherwise.",
        "Whatever limits the base has, and its licence, hold here too.",
        *((NO_SPEED,) if SPARSE in _formats(report) else ()),
        *((SHARED,) if any(stage.name == SHARE for stage in report.stages) else ()),
    )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _reproduction(report: Report, repo: str | None) -> str:
    again = f"llmcompress reproduce {repo or 'path/to/' + short_name(report.compressed.model)}"
    if report.base.revision is None and report.base.model != DEMO:
        again += f" --base {shlex.quote(f'path/to/{report.base.model}')}"
    if is_local_text(report):
        again += f" --data {shlex.quote(f'path/to/{report.data.source}')}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.environment.versions.items()))
    return f"""## Reproduce it

```
{again}
```

It runs the recipe again and says whether the same bytes come out.

Recipe digest `{report.recipe_digest}`, tokens sha256 `{report.data.sha256}`.
Made with {versions} on {report.environment.device}; peak memory {amount(report.cost.peak_memory_bytes, "B")}.

{_table(("stage", "time", "share"), time_rows(report))}"""


def _table(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table: the first column and words are left-aligned, numbers right-aligned."""
    rule = [":--" if place == 0 or name == "why" else "--:" for place, name in enumerate(header)]
    lines = [header, rule, *([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
