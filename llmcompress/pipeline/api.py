"""The Python API: `compress` and `plan`, for models by name or in memory and recipes in any accepted form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.architectures.auto_classes import OWN, auto_class
from llmcompress.data.sources import DataSpec, Effort
from llmcompress.errors import RecipeError
from llmcompress.io import own_code
from llmcompress.io.scratch import scratch_folder
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import no_progress_bar
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import Plan, plan_recipe
from llmcompress.pipeline.resolve import Base, config_of, data_of, find_base, name_of, require_tokenizer
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe import shipped
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.base import Stage

AnyRecipe = str | os.PathLike[str] | Recipe | Stage | Sequence[Stage] | Mapping[str, Any]
AnyModel = str | os.PathLike[str] | PreTrainedModel | None


@overload
def compress(
    model: AnyModel,
    recipe: AnyRecipe,
    out: None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> tuple[PreTrainedModel, Report]: ...


@overload
def compress(
    model: AnyModel,
    recipe: AnyRecipe,
    out: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Report: ...


def compress(
    model: AnyModel,
    recipe: AnyRecipe,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Report | tuple[PreTrainedModel, Report]:
    """Compress a model by a recipe.

    With `out` the result is written to that folder, one decoder layer at a time, and its report is returned;
    the same call resumes a run that was interrupted. Without `out` the model is compressed in memory and
    returned with its report.

    Args:
        model: Hub id, folder, `demo`, a `PreTrainedModel`, or None for the base that the recipe names. A
            model in memory is changed in place and returned if its shapes stay; otherwise a new model is
            returned.
        recipe: name of a shipped recipe, file, folder, Hub id, `Recipe`, a stage or a list of stages, or a
            mapping as YAML would give it.
        out: folder for the result. It must not exist, unless `overwrite` is True and it holds a finished
            result.
        tokenizer: the tokenizer of a `PreTrainedModel`; a model given by name brings its own.
        data: calibration and evaluation text in place of the recipe's, as a `DataSpec` or as `--data` takes
            it.
        effort: `fast`, `balanced` or `best`, in place of the recipe's: how much text, rounding and steps,
            where the recipe does not say them. Without any, text is as for `balanced`.
        device: `cpu` or `cuda`; the first GPU where there is one.
        overwrite: replace a finished result in `out`.
        trust_remote_code: let the base run code of its own, which lies beside its weights and which
            `auto_map` in its configs names. It is copied to `out`. Teachers and students run theirs only if
            it is the same.
        track: callable that shows progress; it takes an iterable, a description and the number of items,
            and yields the items.

    Raises:
        CompressError: the input is wrong; the message says what was given, why not, and what to do.
        AcceptError: the result misses a bound of the recipe's `accept`. Nothing is published.
    """
    told = recipe_of(recipe)
    if out is None:
        with own_code.permission(trust_remote_code):
            loaded, words = _in_memory(model, told, tokenizer)
            return apply_recipe(
                told.model_copy(update={"data": data_of(told, data)}),
                loaded,
                words,
                effort=effort,
                device=device,
                track=track,
            )
    run = partial(
        run_recipe,
        told,
        Path(out),
        data=data,
        effort=effort,
        overwrite=overwrite,
        device=device,
        track=track,
    )
    if not isinstance(model, PreTrainedModel):
        with own_code.permission(trust_remote_code):
            return run(base=None if model is None else os.fspath(model))
    if type(model).__module__.startswith(OWN) and not trust_remote_code:
        raise own_code.refusal("the model in memory", type(model).__name__)
    with own_code.permission(trust_remote_code), scratch_folder() as folder, no_progress_bar():
        words = require_tokenizer(tokenizer)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return run(base=Base(name_of(model), folder, None))


def plan(
    model: str | os.PathLike[str] | None,
    recipe: AnyRecipe,
    *,
    data: str | DataSpec | None = None,
    effort: Effort | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Estimate what a run would give and cost from the model's config alone; no weight is read and nothing is
    run.

    Arguments and errors are those of `compress`. Sizes are exact except for file headers; times are right to
    a factor of about two.
    """
    with own_code.permission(trust_remote_code):
        return plan_recipe(
            recipe_of(recipe),
            base=None if model is None else os.fspath(model),
            data=data,
            effort=effort,
            device=device,
        )


def recipe_of(recipe: AnyRecipe) -> Recipe:
    """Return the `Recipe` for any form that `compress` takes. Errors: RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | os.PathLike):
        return shipped.resolve(os.fspath(recipe))
    if isinstance(recipe, Mapping):
        return Recipe.of_entries(dict(recipe))
    if isinstance(recipe, Stage):
        return Recipe.of_entries({"stages": [recipe]})
    if isinstance(recipe, Sequence):
        return Recipe.of_entries({"stages": list(recipe)})
    raise RecipeError(
        f"a recipe can't be a {type(recipe).__name__}; give a name, a file, a Recipe, a mapping, or a list "
        "of stages"
    )


def _in_memory(
    model: AnyModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in memory and its tokenizer; a model given by name is loaded."""
    if isinstance(model, PreTrainedModel):
        return model, require_tokenizer(tokenizer)
    name = recipe.base if model is None else os.fspath(model)
    found = find_base(name, recipe.revision if model is None else None)
    own_code.trust(found.folder)
    config = config_of(found.folder, base=True)
    with no_progress_bar():
        loaded: PreTrainedModel = auto_class(config).from_pretrained(
            found.folder, config=config, dtype="auto"
        )
    return loaded.eval(), tokenizer or tokenizer_of(found.folder)
