"""reproduce(): run the recipe of an artefact again from its report, and compare the two artefacts.

The report holds everything that decides the bytes: the base at its commit, the text and its hash, the number
of threads. Versions and device can differ without anyone's fault; such differences are listed first. A text
that is not the same is refused before the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmcompress import hub
from llmcompress.data.calibration import DEMO
from llmcompress.data.sources import PYTHON_DOCS, DataSpec
from llmcompress.errors import DataError, ModelError, OutputError, argument
from llmcompress.io import own_code
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.companion_files import shareable
from llmcompress.io.destination import resolved
from llmcompress.io.safetensors_writer import same
from llmcompress.io.scratch import scratch_folder
from llmcompress.io.user_paths import path_of
from llmcompress.modeling.sequential import Track, untracked
from llmcompress.pipeline.push import require_own_recipe
from llmcompress.pipeline.resolve import pick_device
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import DATA_PLACE, Report

PERPLEXITY, KL = 1e-3, 0.05  # relative tolerances of "equal within tolerance"
KL_NATS = 1e-5  # absolute tolerance of KL, in nats/token; smaller differences can't be seen
SHOWN = 5  # differing tensors that are named

Verdict = Literal["bit-equal", "equal within tolerance", "different"]


@dataclass(frozen=True)
class Reproduction:
    """The result of a second run: the verdict, the differences in words, and the two reports."""

    verdict: Verdict
    differences: tuple[str, ...]
    reported: Report
    again: Report


def reproduce(
    name: str,
    *,
    base: str | None = None,
    data: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    track: Track = untracked,
) -> Reproduction:
    """Run the recipe of an artefact again and compare weights, config and numbers.

    `name` is a folder or `user/name@revision`. `base` and `data` take the place of those in the report; they
    are required if the report names what only its author has. The second artefact is kept in `out` if that is
    given. `trust_remote_code` lets the base run code of its own, as for `compress`. Raises CompressError if
    the recipe can't be run or the text is not the same.
    """
    folder, recipe = _artefact(name)
    if out is not None:
        _require_apart(resolved(out), folder)
    reported = Report.of(folder)
    require_own_recipe(reported, recipe, folder)
    base = base or _base(reported, recipe)
    text = recipe.data.with_text(data) if data else _text(reported, recipe)
    # reports without the key are of sequences without BOS
    text = text.model_copy(update={"bos": reported.data.bos is True})
    recipe = _as_reported(recipe, reported).model_copy(update={"accept": Accept(), "export": None})
    on_cpu = pick_device(device or "cpu").type == "cpu"
    with (
        own_code.permission(trust_remote_code),
        _threads(threads_of(reported.environment.device) if on_cpu else None),
        scratch_folder() as scratch,
    ):
        target = scratch / "again" if out is None else Path(out)
        again = run_recipe(
            recipe,
            target,
            base=base,
            data=text,
            device=device,
            tokens_sha256=reported.data.sha256,
            overwrite=overwrite,
            track=track,
        )
        theirs, ours = (Checkpoint.open(each, base=False) for each in (folder, target))
        shape, values = _structure(theirs, ours), _values(theirs, ours)
    if not shape and not values:
        verdict: Verdict = "bit-equal"
    else:
        verdict = "equal within tolerance" if not shape and _close(reported, again) else "different"
    about = _surroundings(reported, again) if verdict != "bit-equal" else []
    return Reproduction(verdict, (*about, *shape, *values), reported, again)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use `count` threads within the context, and as many as before after it. With None the number stays."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of(device: str) -> int | None:
    """The number of threads in the device text of `report.metrics.environment`; None if it names none. The
    last bits of sums depend on it."""
    found = re.search(r"(\d+) threads$", device)
    return int(found[1]) if found else None


def _require_apart(out: Path, folder: Path) -> None:
    """Refuse to write the second artefact over the first, or over a folder that holds it. Errors:
    OutputError."""
    if folder.resolve().is_relative_to(out):
        raise OutputError(
            f"{argument('out')} {out} is or holds the artefact {folder} that is compared with; "
            f"choose another {argument('out')}"
        )


def _artefact(name: str) -> tuple[Path, Recipe]:
    """Return the folder of an artefact, fetched if necessary, and its recipe."""
    folder, repo = path_of(name, "artefact", ModelError), hub.split(name)[0]
    if folder.is_dir():
        return folder, Recipe.from_pretrained(name)
    if folder.exists() or not hub.is_repository(repo):
        raise ModelError(
            f"{name} is no folder; give one that `llmcompress run` wrote, or a Hub id like user/name"
        )
    recipe = Recipe.from_pretrained(name)
    assert recipe.origin is not None
    return hub.fetch(repo, recipe.origin.revision, wanted="artefact")[0], recipe


def _base(reported: Report, recipe: Recipe) -> str:
    """The base by its id and commit, or by its folder if the artefact is a folder too."""
    base = reported.base
    if base.revision is not None:
        return f"{base.model}@{base.revision}"
    if base.model != DEMO and (
        recipe.origin is not None or not path_of(base.model, "base", ModelError).is_dir()
    ):
        raise ModelError(
            f"the base {base.model} was a folder of whoever made this model; give yours with "
            f"{argument('base')}"
        )
    return base.model


def _text(reported: Report, recipe: Recipe) -> DataSpec:
    """The text that the report names. A file or folder is accepted only if the artefact is a folder too."""
    facts = reported.data
    path = path_of(facts.source, "text", DataError).exists()
    here = path and recipe.origin is None
    if facts.source != PYTHON_DOCS and not here and (facts.revision is None or path):
        raise DataError(
            f"the text {facts.source} was a file or folder of whoever made this model; give yours with "
            f"{argument('data')}"
        )
    said = {key: value for key in DATA_PLACE if (value := getattr(facts, key)) is not None}
    return recipe.data.with_place({"source": facts.source, **said})


def _as_reported(recipe: Recipe, reported: Report) -> Recipe:
    """The recipe with teachers and students from the Hub at the commits in the report."""

    def at_commit(number: int, role: str, name: str) -> str:
        told = reported.stages[number].model_dump().get(role) if number < len(reported.stages) else None
        return told if isinstance(told, str) and hub.split(told)[0] == hub.split(name)[0] else name

    return recipe.renamed(at_commit)


def _surroundings(reported: Report, again: Report) -> list[str]:
    """The differences in the base, the versions and the machine."""
    found = []
    if reported.base.revision != again.base.revision:
        found.append(f"base: made from {reported.base.revision}, here {again.base.revision}")
    then, now = reported.environment, again.environment
    for package in sorted(then.versions.keys() | now.versions.keys()):
        before, after = then.versions.get(package, "none"), now.versions.get(package, "none")
        if before != after:
            found.append(f"{package}: made with {before}, here {after}")
    if then.device != now.device:
        found.append(f"device: made on {then.device}, here {now.device}")
    return found


def _structure(one: Checkpoint, other: Checkpoint) -> list[str]:
    """The differences in config.json, and in the names, shapes and dtypes of tensors."""
    before, after = shareable(one.config), shareable(other.config)
    told = (before.keys() | after.keys()) - {"transformers_version"}  # compared by `_surroundings`
    differ = sorted(key for key in told if before.get(key) != after.get(key))
    found = [f"config.json: {key} was {before.get(key)!r:.60}, now {after.get(key)!r:.60}" for key in differ]
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        was, now = one.tensors.get(name), other.tensors.get(name)
        if was is None or now is None:
            found.append(f"{name}: {'is new' if was is None else 'is missing'}")
        elif (was.shape, was.dtype) != (now.shape, now.dtype):
            found.append(f"{name}: was {was.dtype} {list(was.shape)}, now {now.dtype} {list(now.shape)}")
    return found


def _values(one: Checkpoint, other: Checkpoint) -> list[str]:
    """The tensors of the same shape whose values differ, largest share of differing values first."""
    found = []
    for name in sorted(one.tensors.keys() & other.tensors.keys()):
        was, now = one.read(name), other.read(name)
        if (was.shape, was.dtype) == (now.shape, now.dtype) and not same(was, now):
            found.append(((was != now).float().mean().item(), name))
    lines = [
        f"{name}: {100 * share:.3g} % of its values differ"
        for share, name in sorted(found, reverse=True)[:SHOWN]
    ]
    return [*lines, f"and {len(found) - SHOWN} more tensors"] if len(found) > SHOWN else lines


def _close(reported: Report, again: Report) -> bool:
    """Whether perplexity and KL agree with the report within the tolerances above."""
    kl, kl_now = reported.fidelity.kl_nats_mean, again.fidelity.kl_nats_mean
    perplexity, perplexity_now = reported.compressed.perplexity, again.compressed.perplexity
    if kl is None or kl_now is None or perplexity is None or perplexity_now is None:
        return False
    return abs(perplexity_now - perplexity) <= PERPLEXITY * perplexity and abs(kl_now - kl) <= max(
        KL * kl, KL_NATS
    )
