"""Derived anatomies kept in the cache folder, so that each config is proved once for a version of
transformers."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from pathlib import Path

import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from llmcompress.architectures.spec import Anatomy
from llmcompress.errors import OutputError, first_line
from llmcompress.io.cache import cache_folder
from llmcompress.io.safetensors_writer import put

logger = logging.getLogger(__name__)
LARGEST = 1 << 26  # bytes of a file
SOURCES = sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("architectures/*.py")])
_ANATOMY = TypeAdapter(Anatomy)


def key_of(model: PreTrainedModel) -> str:
    """A digest of all that an anatomy follows from: class and config, versions, and the code that proves."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):  # none says how a layer is built
        config.pop(name, None)
    facts = [type(model).__qualname__, transformers.__version__, torch.__version__, config]
    said = json.dumps([*facts, _source_digest()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


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
