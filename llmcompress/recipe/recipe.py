"""A recipe: base, data, stages and accept as one frozen value, with a YAML form and a digest.

Equal text gives an equal digest and, on the same machine and versions, equal output bytes. An error in a
recipe is reported in one line before anything else is read: the key and its place, what is wrong with it, and
the nearest valid word. A recipe from the Hub is treated as data: nothing in it is run, and it can't name a
file of this machine.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)

from llmcompress import hub
from llmcompress.data.calibration import DEMO
from llmcompress.data.local_files import kind_of
from llmcompress.data.sources import EFFORTS, PYTHON_DOCS, DataSpec, Effort
from llmcompress.errors import RecipeError, argument
from llmcompress.exports.target import TargetName
from llmcompress.io.local_names import short_name
from llmcompress.io.safe_parsing import Unreadable, yaml_of
from llmcompress.io.safetensors_writer import put, writing
from llmcompress.io.user_paths import path_of
from llmcompress.recipe.entries import STAGES, AnyStage, StageEntry, require_order
from llmcompress.report.model_card import recipe_card
from llmcompress.report.schema import CARD, RecipeFacts
from llmcompress.stages.quantize.config import Override
from llmcompress.stages.quantize.smoothing import Smooth
from llmcompress.stages.quantize.stage import Quantize

if TYPE_CHECKING:
    from llmcompress.report.schema import Report

SCHEMA = 1  # of recipes: llmcompress 0.N reads schemas up to N, so a newer recipe can say what to install
FILE = "recipe.yaml"  # its name in an artefact and in a repository on the Hub
LARGEST = 1 << 17  # bytes of a recipe file, which may name each linear of a large model
SHORT = reprlib.Repr()  # shortens wrong values in errors
SHORT.maxlevel = 2


class Accept(BaseModel):
    """Bounds on the loss. A result that misses one is not published."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kl_nats: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest mean KL(base || compressed), in nats/token"
    )
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest perplexity relative to the base"
    )
    top1_agreement: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="lowest top-1 agreement with the base"
    )


class Recipe(BaseModel):
    """What is done to which model, on which text, and how much it may lose."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, title="llmcompress recipe")

    version: int = Field(
        default=SCHEMA,
        alias="schema",
        ge=1,
        le=SCHEMA,
        strict=True,
        description="version of the recipe language",
    )
    base: str | None = Field(
        default=None, min_length=1, description="Hub id or folder of the model; `demo` is the embedded one"
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="commit, branch or tag of a base on the Hub",
    )
    data: DataSpec = Field(default=DataSpec(), description="text for calibration and evaluation")
    effort: Effort | None = Field(
        default=None,
        description="how much text, rounding and steps, where the recipe does not say them; as `balanced` if "
        "nothing is given",
    )
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1, description="what is done, in order")]
    accept: Accept = Field(default=Accept(), description="bounds that the result must keep")
    export: TargetName | Annotated[tuple[TargetName, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="engines, one or a list, for which the result is repacked too, each in a folder beside "
        "it, as OUT-gguf",
    )
    _origin: RecipeFacts | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _stages_can_follow_each_other(self) -> Recipe:
        require_order(self.stages)
        return self

    @model_serializer(mode="wrap")
    def _only_what_was_set(self, handler: Any) -> Any:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}

    def training_tokens(self, length: int) -> int:
        """The number of tokens that the training stages ask for, if sequences of the data have `length`
        tokens."""
        return max(stage.training_tokens(length) for stage in self.stages)

    @property
    def exports(self) -> tuple[str, ...]:
        """The targets that the result is exported to."""
        return (self.export,) if isinstance(self.export, str) else self.export or ()

    @property
    def student(self) -> str | None:
        """The model that replaces the base, or None."""
        return self.stages[0].models.get("student")

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher models other than the base."""
        return tuple(stage.models["teacher"] for stage in self.stages if "teacher" in stage.models)

    def with_effort(self, effort: Effort | None) -> Recipe:
        """Return the recipe with this effort in place of its own, and the settings of stages written out that
        it decides. With None its own effort decides; if it has none, the stages keep their defaults. Errors:
        RecipeError."""
        word = self.effort if effort is None else effort
        if word is None:
            return self
        if word not in EFFORTS:
            raise RecipeError(f"{argument('effort')} is {word}; use {', '.join(EFFORTS)}")
        stages = tuple(
            stage.with_effort(word, self.stages[:number]) for number, stage in enumerate(self.stages)
        )
        return self.model_copy(update={"effort": word, "stages": stages})

    def renamed(self, name_of: Callable[[int, str, str], str]) -> Recipe:
        """The recipe with other names for its teachers and students: `name_of` receives the stage's number,
        the role and the name."""
        stages = tuple(
            stage.with_models({role: name_of(number, role, name) for role, name in stage.models.items()})
            for number, stage in enumerate(self.stages)
        )
        return self.model_copy(update={"stages": stages})

    @property
    def digest(self) -> str:
        """Return the sha256 of the recipe with every default filled in."""
        text = json.dumps(self.model_dump(mode="json", exclude={"version"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, without settings at their defaults; parses back to an equal recipe."""
        entries = {"schema": SCHEMA} | self.model_dump(mode="json", exclude_unset=True, exclude={"version"})
        return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)

    @classmethod
    def json_schema(cls) -> str:
        """The JSON Schema of a recipe as text, for editors."""
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | cls.model_json_schema()
        return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"

    @property
    def origin(self) -> RecipeFacts | None:
        """The Hub repository and commit that the recipe comes from; None for a local recipe."""
        return self._origin

    @classmethod
    def parse(cls, text: str | bytes, where: str = "recipe") -> Recipe:
        """Parse a recipe from YAML. Raises RecipeError with one line that begins with `where`."""
        try:
            entries = yaml_of(text, largest=LARGEST)
        except Unreadable as error:
            raise RecipeError(f"{where} {error}; give a recipe file") from None
        if not isinstance(entries, dict):
            raise RecipeError(
                f"{where} holds {_kind(entries)}, not a mapping; a recipe begins with base:, data: or stages:"
            )
        if isinstance(newer := entries.get("schema"), int) and newer > SCHEMA:
            raise RecipeError(
                f"{where} has schema {newer}, this llmcompress reads up to {SCHEMA}; install llmcompress "
                f'0.{newer} or newer: pip install -U "llmcompress>=0.{newer}"'
            )
        return cls.of_entries(entries, where)

    @classmethod
    def of_entries(cls, entries: dict[str, Any], where: str = "recipe") -> Recipe:
        """Make a recipe from parsed YAML; stages may be objects. Raises RecipeError with one line that begins
        with `where`."""
        try:
            return cls.model_validate(entries)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error)}") from None

    @classmethod
    def from_file(cls, file: str | Path) -> Recipe:
        """Read a recipe from a YAML file. Raises RecipeError if there is none or it is wrong."""
        path = path_of(file, "recipe", RecipeError)
        if not path.is_file():
            raise RecipeError(
                f"no recipe file {path}; give the path of a .yaml file, a folder that holds {FILE}, or a "
                "Hub id"
            )
        with path.open("rb") as opened:
            return cls.parse(opened.read(LARGEST + 1), str(path))

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Recipe:
        """Load a recipe from a file, or from a folder or Hub repository that holds recipe.yaml, as every
        artefact does.

        `revision` is a branch, tag or commit, which may also follow the id as `user/name@revision`. It is
        resolved to a commit, which the recipe and the reports of its runs record. Errors: RecipeError.
        """
        path = path_of(name, "recipe", RecipeError)
        if path.is_dir():
            return cls.from_file(path / FILE)
        repo, at = hub.split(str(name))
        if path.is_file() or path.suffix in (".yaml", ".yml") or not hub.is_repository(repo):
            return cls.from_file(path)
        text, commit = hub.read(
            repo, FILE, revision or at, largest=LARGEST, wanted="recipe", error=RecipeError
        )
        recipe = cls.parse(text, f"recipe {repo}@{commit[:8]}")
        recipe._origin = RecipeFacts(source=repo, revision=commit)
        return recipe

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write recipe.yaml into a folder, which is created if needed, and return the file. Errors:
        OutputError."""
        with writing(Path(folder)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            put(Path(folder) / FILE, self.to_yaml())
        return Path(folder) / FILE

    def push_to_hub(self, repo: str, *, private: bool = False, message: str | None = None) -> str:
        """Upload the result of `for_others` to `repo` on the Hub and return the commit. Errors:
        OutputError."""
        text = self.for_others().to_yaml()
        files = {FILE: text.encode(), CARD: recipe_card(text, repo).encode()}
        return hub.push(repo, files, private=private, message=message or "Recipe of llmcompress").commit

    def local_names(self, reported: Report | None = None) -> set[str]:
        """The names in the recipe that are files and folders of this machine.

        `reported`, the report of the recipe's run, tells which names are. Any other name is local if it
        exists or can't be an id on the Hub.
        """
        # a name, the name in the report, whether that one is on the Hub
        asked: list[tuple[str, str | None, bool]] = []
        base, data = (reported.base, reported.data) if reported else (None, None)
        if self.base is not None:
            asked.append(
                (self.base, base.model if base else None, base is not None and base.revision is not None)
            )
        asked.append(
            (self.data.source, data.source if data else None, data is not None and data.revision is not None)
        )
        for number, stage in enumerate(self.stages):
            facts = reported.stages[number].model_dump() if reported and number < len(reported.stages) else {}
            for role, name in stage.models.items():
                repo, commit = hub.split(str(facts.get(role)))
                asked.append(
                    (name, repo if hub.is_commit(commit) else facts.get(role), hub.is_commit(commit))
                )

        def is_local(name: str, told: str | None, on_hub: bool) -> bool:
            repo = hub.split(name)[0]
            if told in (name, repo):
                return not on_hub
            return not hub.is_id(repo) or kind_of(Path(name)) is not None or path_of(name, "recipe").exists()

        return {
            name
            for name, told, on_hub in asked
            if name not in (DEMO, PYTHON_DOCS) and is_local(name, told, on_hub)
        }

    def for_others(self, reported: Report | None = None) -> Recipe:
        """The recipe in the form that is shared: a local name becomes `./` and its last part, which can't be
        taken for a Hub id.

        `reported` is as in `local_names`.
        """
        here = self.local_names(reported)

        def told(name: str) -> str:
            return f"./{short_name(name)}" if name in here else name

        changed: dict[str, Any] = {}
        if self.base in here:
            changed["base"] = told(self.base)
        if self.data.source in here:
            changed["data"] = self.data.model_copy(update={"source": told(self.data.source)})
        return self.renamed(lambda number, role, name: told(name)).model_copy(update=changed)

    def require_own_names(self, *, base: str | None = None, data: str | DataSpec | None = None) -> None:
        """Raise RecipeError if a recipe from the Hub names files of this machine, unless the user gave other
        names in their place.

        Its author must not be able to read files of this machine, whose text might end up in what is shared
        later.
        """
        if self.origin is None:
            return
        named = [("data.source", self.data.source, argument("data"))] if data is None else []
        if base is None and self.base is not None:
            named.append(("base", self.base, argument("base")))
        named += [(role, name, "") for stage in self.stages for role, name in stage.models.items()]
        for place, name, option in named:
            if name == (PYTHON_DOCS if place == "data.source" else DEMO):
                continue
            if not hub.is_id(hub.split(name)[0]) or path_of(name, place, RecipeError).exists():
                advice = (
                    f"give your own with {option}"
                    if option
                    else "save it to a file and run that, if you trust it"
                )
                raise RecipeError(
                    f"recipe {self.origin.source} names {place} {name}, a path here, and one from the Hub "
                    f"may name none; {advice}"
                )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _explain(error: ValidationError) -> str:
    """Return the first error, such as `stages.0.quantize.formt: unknown key; did you mean format?`."""
    errors = error.errors(include_url=False)
    beside = [
        one for one in errors if one["type"] == "extra_forbidden" and one["loc"][:-1] == errors[0]["loc"][:-1]
    ]
    # a missing key may be misspelt: then the unknown key beside it is reported
    first = beside[0] if errors[0]["type"] == "missing" and beside else errors[0]
    path, kind, given = first["loc"], first["type"], first.get("input")
    place = ".".join(str(part) for part in path if not str(part).startswith(KINDS))
    if kind == "extra_forbidden":
        known = _known(path[:-1])
        if path[:-2] == ("stages",):
            place, wrong = f"stages.{path[1]}", f'"{path[-1]}" is no stage'
        else:
            wrong = "unknown key"
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return f"{place}: {wrong}; " + (
            f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        )
    if kind == "missing":
        return f"{place}: is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    shown = f", not {SHORT.repr(given)[:80]}" if kind != "value_error" else ""
    return f"{place + ': ' if place else ''}{message}{shown}"


KINDS = ("literal[", "constrained-")  # what pydantic adds to a location besides keys
KEYS: dict[str, type[BaseModel]] = {"data": DataSpec, "accept": Accept, "smooth": Smooth, **STAGES}


def _known(path: tuple[int | str, ...]) -> list[str]:
    """The valid keys at a place of the recipe."""
    model: Any = Recipe
    for part in path:
        if part == "stages":
            model = StageEntry
        elif model is Quantize and part == "overrides":
            model = Override
        elif isinstance(part, str):
            model = KEYS.get(part, model)
    return [field.alias or name for name, field in model.model_fields.items()]
