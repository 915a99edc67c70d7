"""Derived anatomies kept in the cache folder, so that each config is proved once for a version of
transformers, and for the code of a model that has its own."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sys
from functools import cache
from pathlib import Path

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from llmcompress.architectures.auto_classes import OWN
from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import OutputError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import put

logger = logging.getLogger(__name__)
LARGEST = 1 << 26  # bytes of a file
VERSIONED = ("transformers.", "torch.", "llmcompress.")  # modules whose version or source is in the key
SOURCES = sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("architectures/*.py")])
_PROCESS = secrets.token_hex(8)
_ANATOMY = TypeAdapter(Anatomy)


def key_of(model: PreTrainedModel) -> str:
    """A digest of all that an anatomy follows from: class and config, versions, code of the model that is not
    in them, and the code that proves."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):  # none says how a layer is built
        config.pop(name, None)
    facts = [type(model).__qualname__, transformers.__version__, torch.__version__, config]
    said = json.dumps([*facts, _own_code_of(model), _source_digest()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _own_code_of(model: PreTrainedModel) -> list[str]:
    """What tells the code of classes outside the packages below from other code of the same names: digests of
    the files they are in, or for those that are in none, as at a prompt, a name for this process alone."""
    found = set[str]()
    for kind in {type(model.config), *(type(module) for module in model.modules())}:
        if kind.__module__.startswith(VERSIONED):
            continue
        said = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if said is None or not Path(said).is_file():
            found.add(f"{kind.__qualname__} {id(kind)} {_PROCESS}")
            continue
        # what such a file imports relatively lies beside it, and nothing else
        beside = Path(said).parent.glob("*.py") if kind.__module__.startswith(OWN) else [Path(said)]
        found |= {f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in beside}
    return sorted(found)


@cache
def _source_digest() -> str:
    """A digest of the code that proves, read once."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()


def kept(key: str) -> Anatomy | None:
    """The anatomy of a key, if it is kept."""
    try:
        with _file(key).open("rb") as stream:
            return _ANATOMY.validate_json(stream.read(LARGEST))
    except (OSError, OutputError, ValidationError):
        return None


def keep(key: str, anatomy: Anatomy) -> None:
    """Keep an anatomy, if the cache folder can be written."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        put(file, _ANATOMY.dump_json(anatomy).decode())
    except (OSError, OutputError) as error:  # then it is proved again the next time
        logger.debug("an anatomy is not kept: %s", first_line(error))


def _file(key: str) -> Path:
    return cache_folder() / "anatomies" / f"{key}.json"
