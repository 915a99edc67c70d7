"""Find what a run needs before it starts: the base on this machine, its tokenizer, the text in sequences, the
device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmcompress import hub
from llmcompress.architectures.auto_classes import auto_class
from llmcompress.data.calibration import DEMO, DEMO_MODEL, CalibrationData, load_data
from llmcompress.data.sources import DataSpec, Effort
from llmcompress.errors import CompressError, ModelError, RecipeError, argument
from llmcompress.integrations.transformers_compat import logging
from llmcompress.io import own_code
from llmcompress.io.checkpoint import Checkpoint, read_json, require_base, require_no_adapter
from llmcompress.io.safetensors_writer import writing
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.io.units import amount, bytes_of, share_of
from llmcompress.io.user_paths import path_of, shortened
from llmcompress.modeling.from_disk import DiskModel, no_progress_bar
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.modeling.model_config import defaults, load_config, require_readable, skeleton
from llmcompress.modeling.sequential import logits
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages.base import ModelSource


@dataclass(frozen=True)
class Base:
    """A model on this machine: the user's name for it, its folder, and its commit if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None


def find_base(
    name: str | None, revision: str | None = None, *, weights: bool = True, wanted: str = "base"
) -> Base:
    """Find a base by folder, Hub id or `demo`, and fetch it if necessary.

    With `weights=False` only its small files are fetched, and its code only if the user allows code. `wanted`
    is the role of the model in messages to the user. Raises RecipeError if no name is given, ModelError if
    there is no such model.
    """
    if name is None:
        raise RecipeError(
            f"the recipe names no base; add base: to it or pass {argument('base')} with a folder or a Hub id"
        )
    if name == DEMO:
        return Base(DEMO, DEMO_MODEL, None)
    path = path_of(name, wanted, ModelError)
    if path.is_dir():
        return Base(name, path, None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ModelError(
            f"{wanted} {name} is no folder; give the folder of a model or a Hub id like user/name"
        )
    repo, at = hub.split(name)
    folder, commit = hub.fetch(repo, revision or at, weights=weights, code=own_code.is_given(), wanted=wanted)
    return Base(repo, folder, commit)


def name_of(model: PreTrainedModel) -> str:
    """The name of a model in memory in a report: where it came from, otherwise its class."""
    return str(model.config._name_or_path or type(model).__name__)


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer given with a model in memory. Errors: ModelError if there is none."""
    if tokenizer is None:
        raise ModelError(
            "a model in memory comes without its tokenizer; give tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    return tokenizer


def config_of(folder: Path, *, base: bool = False) -> PretrainedConfig:
    """Return the config of a model. No weight is read, and no code from the folder is run that the user has
    not allowed.

    Raises ModelError if there is no config, if transformers does not know its kind, or if an adapter is
    beside it; with `base=True` also for what `run_recipe` refuses as a base.
    """
    require_no_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
    fields = read_json(folder / "config.json")
    if base:
        require_base(folder, fields)
    require_readable(folder)
    return load_config(folder)


def require_loadable(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a model that from_pretrained can't load, as the run would fail at its end when the model is
    timed. No weight is read. Errors: ModelError."""
    level = logging.get_verbosity()
    try:
        with no_progress_bar():
            logging.set_verbosity_error()
            auto_class(config).from_pretrained(
                folder, config=defaults(config), device_map="meta", local_files_only=True
            )
    except Exception as error:  # each part of transformers raises errors of its own
        raise ModelError(
            f"{folder} is not loaded by transformers ({_why(error)}); mend its small files, or fetch it again"
        ) from None
    finally:
        logging.set_verbosity(level)


def require_computable(model: LayerwiseModel) -> None:
    """Refuse missing, misshapen or non-finite weights, and a config that nothing can be computed with.

    Two tokens go through every layer, which costs one read of the base. Errors: ModelError.
    """
    try:
        for _ in logits(model, torch.zeros(1, 2, dtype=torch.int64)):
            pass
    except CompressError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ModelError(
            f"{model.where} can't be computed as its config.json says ({_why(error)}); correct it"
        ) from error


def pick_device(device: str | None) -> torch.device:
    """Return the device for the work: the one asked for, else the first GPU, else the CPU. Raises
    CompressError if there is no such device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not device:
        return torch.device("cuda" if count else "cpu")
    kind, _, number = device.partition(":")
    known = {"cpu": 1, "cuda": count}.get(kind, 0)
    if not known or not (
        device == kind or (number.isdecimal() and number.isascii() and int(number[:9]) < known)
    ):
        raise CompressError(
            f"there is no device {shortened(device)} here; use cpu, or cuda where torch sees a GPU"
        )
    return torch.device("cpu" if kind == "cpu" else device)


def _why(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def data_of(recipe: Recipe, data: str | DataSpec | None) -> DataSpec:
    """The text of a recipe, or `data` in its place; a string is taken as DataSpec.with_text takes it."""
    return recipe.data.with_text(data) if isinstance(data, str) else data or recipe.data


def bytes_within(size: str, whole: int, name: str = "size") -> int:
    """The bytes that a size stands for, of a base of so many; `name` is that of the argument. Errors:
    CompressError."""
    share = share_of(size)
    found = bytes_of(size) if share is None else int(share * whole)
    if not found:
        raise CompressError(
            f"{argument(name)} {shortened(size)} is no size; give bytes like 60MB, or a share of the "
            "base's like 40%"
        )
    if found >= whole:
        raise CompressError(
            f"{argument(name)} {shortened(size)} is no less than the base, which has {amount(whole, 'B')}; "
            "give a smaller one"
        )
    return found


@dataclass(frozen=True)
class Resolved:
    """What a recipe and the arguments of a run stand for, resolved once before any work."""

    recipe: Recipe  # with teachers and students pinned to commits
    data: DataSpec
    device: torch.device
    models: Mapping[str, Base]  # teachers and students by their pinned names; their small files are here


def resolve(recipe: Recipe, data: str | DataSpec | None, device: str | None) -> Resolved:
    """Resolve the text, the device, and the teachers and students, which are pinned to commits.

    So everything that is read of one model is from one commit, whatever is pushed meanwhile, and the facts of
    the stage name that commit. Errors: CompressError.
    """
    found: dict[str, Base] = {}

    def at_commit(_: int, role: str, name: str) -> str:
        model = find_base(name, weights=False, wanted=role)
        pinned = f"{model.name}@{model.revision}" if model.revision else name
        found[pinned] = model
        return pinned

    pinned = recipe.renamed(at_commit)
    return Resolved(pinned, data_of(recipe, data), pick_device(device), found)


def source_of(name: str, device: torch.device) -> ModelSource:
    """Return a model by folder, Hub id or `demo` that is not read yet."""
    folder = find_base(name, wanted="teacher").folder
    checkpoint = Checkpoint.open(folder)
    return ModelSource(partial(DiskModel, folder, device), checkpoint.fingerprint, checkpoint.digest)


def require_same_vocabulary(
    resolved: Resolved, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a teacher or student whose tokens are not those of the base. Errors: ModelError."""
    for stage in resolved.recipe.stages:
        for role, name in stage.models.items():
            folder = resolved.models[name].folder
            theirs = config_of(folder, base=True).vocab_size
            if theirs < config.vocab_size or (role == "student" and theirs > config.vocab_size):
                raise ModelError(
                    f"{role} {name} predicts {theirs} tokens and the base {config.vocab_size}; give one of "
                    "the same vocabulary"
                )
            if wrong := _other_words(tokenizer, tokenizer_of(folder)):
                raise ModelError(
                    f"{role} {name} has another tokenizer than the base ({wrong}); give one with the same"
                )


def _other_words(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Describe a token that has another id in the other tokenizer; None if there is none."""
    mine, yours = ours.get_vocab(), theirs.get_vocab()
    for word in sorted(mine.keys() | yours.keys(), key=lambda word: mine.get(word, len(mine))):
        if mine.get(word) != yours.get(word):
            return f"{word!r} is {mine.get(word, 'no token')} there and {yours.get(word, 'no token')} here"
    return None


def student_folder(name: str, folder: Path, seed: int, *, write: bool = True) -> Path:
    """Return the folder of a student. If it holds a config but no weights, write weights drawn by `seed` to
    `folder`.

    With `write=False` another process is expected to write them.
    """
    found = find_base(name, wanted="student").folder
    if any(found.glob("*.safetensors")):
        return found
    if not write:
        return folder
    config = config_of(found, base=True)
    skeleton(config, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dtype = config.dtype or torch.float32
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    with writing(folder), no_progress_bar():
        model.save_pretrained(folder)
    return folder


class Configured(Protocol):
    """A model that has a config."""

    @property
    def config(self) -> PretrainedConfig:
        """The config that the model is built from."""


def calibration_data(
    model: LayerwiseModel | Configured,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    training: Callable[[int], int] = lambda length: 0,
    effort: Effort | None = None,
) -> CalibrationData:
    """Return the token sequences of a recipe's data for this model.

    `training` gives the number of tokens to train on, for sequences of a length; `effort` decides how much
    text, as far as `spec` leaves that open.
    """
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    return load_data(spec, tokenizer, text.vocab_size, positions, training, effort)
