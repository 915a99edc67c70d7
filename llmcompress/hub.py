"""The Hugging Face Hub border: a base by its id, at a commit. Nothing that is fetched is ever executed.

Only safetensors, tokenizer and text files are taken, so a repository that holds pickles or code leaves them there. What is in
the local cache is not fetched again, and works without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmcompress.errors import ModelError

SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
WEIGHTS = ["model*.safetensors"]


def fetch(model: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str]:
    """The local folder of a model on the Hub, and the commit that it holds; ModelError where it can't be had.

    With `weights=False` only config, tokenizer and the like are fetched.
    """
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=SMALL + (WEIGHTS if weights else []))
    except HFValidationError:
        _refuse(model, "is neither a folder nor a Hub id", "give a folder that exists, or an id like user/name")
    except GatedRepoError:
        _refuse(model, "is gated", "accept its terms on the Hub and log in with `hf auth login`")
    except RepositoryNotFoundError:
        _refuse(model, "is not on the Hub or is private", "check the id, or log in with `hf auth login`")
    except RevisionNotFoundError:
        _refuse(model, f"has no revision {revision}", "give a branch, tag or commit that it has")
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        _refuse(model, f"can't be fetched ({type(error).__name__}) and is not a folder here", "check the path or the network")
    return Path(folder), Path(folder).name


def _refuse(model: str, why: str, advice: str) -> NoReturn:
    raise ModelError(f"base {model} {why}; {advice}") from None
