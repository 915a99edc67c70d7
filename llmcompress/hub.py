"""The border to the Hugging Face Hub: reads models, recipes and data sets at a commit, and pushes in one
commit.

Nothing that is fetched is executed, except the code of a model that the user allows (`io.own_code`). Only
then is code fetched, at the commit of the weights. Otherwise only safetensors and the small files that
transformers knows by name are fetched, so pickles and code in a repository are not. A recipe is read as
bytes, and its size is checked before it is fetched. Files in the local cache are not fetched again and work
without a network. The token is the user's own, from `hf auth login` or HF_TOKEN; no function here takes or
shows one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    constants,
    eval_result_entries_to_yaml,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmcompress.errors import CompressError, DataError, ModelError, OutputError, first_line
from llmcompress.io import companion_files

SMALL = [
    *companion_files.TRAVELS,
    *companion_files.RARE,
    "model.safetensors.index.json",
    "README.md",
    "recipe.yaml",
    "report.json",
]
WEIGHTS = ["model*.safetensors"]
CODE = ["*.py"]
TERMS = "accept its terms on the Hub and log in with `hf auth login`"
MEND = "correct the head of README.md beside the weights, which is then pushed as it is"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_PART = r"[A-Za-z0-9_][\w.-]*"


def is_id(name: str) -> bool:
    """Whether a name is spelled like a Hub id: `name` or `user/name`."""
    return re.fullmatch(rf"{_PART}(/{_PART})?", name, re.ASCII) is not None


def is_repository(name: str) -> bool:
    """Whether a name is a Hub id with a user: `user/name`."""
    return is_id(name) and "/" in name


def split(name: str) -> tuple[str, str | None]:
    """Split `user/name@revision` into id and revision; the revision is None if not given."""
    repo, at, revision = name.partition("@")
    return repo, revision if at else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash and not a branch or tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def offline() -> bool:
    """Whether the user has set HF_HUB_OFFLINE, so that there is no network."""
    return bool(constants.HF_HUB_OFFLINE)


def fetch(
    model: str, revision: str | None, *, weights: bool = True, code: bool = False, wanted: str = "base"
) -> tuple[Path, str]:
    """Return the local folder of a model on the Hub, and its commit.

    With `weights=False` only config, tokenizer and the like are fetched, with `code=True` also its code.
    `wanted` is what the model is to the user. Errors: ModelError if it cannot be fetched.
    """
    patterns = [*SMALL, *(WEIGHTS if weights else []), *(CODE if code else [])]
    with _asked(f"{wanted} {model}", revision, ModelError, "check the path or the network"):
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns)
    return Path(folder), Path(folder).name


def read(
    repo: str, file: str, revision: str | None, *, largest: int, wanted: str, error: type[CompressError]
) -> tuple[bytes, str]:
    """Return the bytes of one small file of a model repository, and its commit.

    A file of more than `largest` bytes is refused before it is fetched. Raises `error` if it cannot be read.
    """
    with _asked(f"{wanted} {repo}", revision, error, "check the id or the network", file):
        found = hf_hub_download(repo, file, revision=revision, dry_run=True)
        if (found.file_size or 0) > largest:
            raise error(
                f"{file} of {repo} has {found.file_size} bytes, and may have {largest}; give another {wanted}"
            )
        # by the revision as given, which the cache remembers for offline use
        path = Path(hf_hub_download(repo, file, revision=revision))
    with path.open("rb") as opened:
        return opened.read(largest + 1), path.parent.name


def dataset_commit(source: str, revision: str | None) -> str:
    """Return the commit that a branch, tag or commit of a data set stands for.

    Errors: DataError, also if there is no network.
    """
    with _asked(f"data set {source}", revision, DataError, "check the id or the network"):
        return str(HfApi().dataset_info(source, revision=revision).sha)


def is_public_dataset(source: str, revision: str) -> bool:
    """Whether everyone may read a data set; False if the Hub can't be asked."""
    try:
        with _asked(f"data set {source}", revision, DataError, "check the id or the network"):
            about = HfApi().dataset_info(source, revision=revision)
    except DataError:
        return False
    return not about.private and not about.gated


@dataclass(frozen=True)
class Pushed:
    """A commit on the Hub, and its page."""

    commit: str
    url: str


def push(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    message: str,
    replaced: Iterable[str] = (),
    other: str | None = None,
) -> Pushed:
    """Put files into the repository `repo` on the Hub in one commit, creating the repository if needed.

    Content that is there already is not sent again, nor are large files that an interrupted upload had
    finished: they are known by their hash. Files of the repository that match one of the patterns `replaced`
    and are not in `files` are deleted in that commit. A repository that holds the file `other` is refused, as
    it is of another kind. Errors: OutputError.
    """
    api = HfApi()
    if offline():
        raise OutputError(f"{repo} can't be pushed while HF_HUB_OFFLINE is set; unset it")
    with _asked(
        f"repository {repo}", None, OutputError, "run the same command again: what arrived is not sent again"
    ):
        where = api.create_repo(repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(where.repo_id))
        if other in there:
            raise OutputError(
                f"{repo} has {other}: an artefact and an export don't go into one repository; give another"
            )
        stale = [name for name in there - set(files) if any(fnmatch(name, pattern) for pattern in replaced)]
        added = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in sorted(files.items())
        ]
        gone = [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        try:
            made = api.create_commit(where.repo_id, [*added, *gone], commit_message=message)
        except HfHubHTTPError:
            raise
        except ValueError as error:  # the client has the Hub check the card before it sends anything
            raise OutputError(f"the Hub refuses the card: {error}; {MEND}") from None
    return Pushed(made.oid, str(where))


def evaluation_results(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a file of .eval_results; each entry has the fields of huggingface_hub's
    EvalResultEntry."""
    known = [EvalResultEntry(**entry) for entry in entries]
    return yaml.safe_dump(eval_result_entries_to_yaml(known), sort_keys=False, allow_unicode=True)


@contextmanager
def _asked(
    what: str, revision: str | None, kind: type[CompressError], advice: str, file: str = "a file"
) -> Iterator[None]:
    """Raise errors of the Hub and of the network as a CompressError of one line.

    `what` is the subject of the message, such as `base user/name`.
    """

    def refuse(why: str, todo: str) -> NoReturn:
        raise kind(f"{what} {why}; {todo}") from None

    try:
        yield
    except CompressError:
        raise
    except HFValidationError:
        refuse("is neither a folder nor a Hub id", "give a folder that exists, or an id like user/name")
    except GatedRepoError:
        refuse("is gated", TERMS)
    except RepositoryNotFoundError:
        refuse("is not on the Hub or is private", f"check the id, or {LOGIN}")
    except RevisionNotFoundError:
        refuse(f"has no revision {revision}", "give a branch, tag or commit that it has")
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline():
            refuse(
                "is not in the cache, and HF_HUB_OFFLINE is set", "unset it, or fetch it once with a network"
            )
        refuse(f"can't be fetched ({type(error).__name__}) and is not a folder here", advice)
    except EntryNotFoundError:
        refuse(f"lacks {file}", "give one that llmcompress wrote")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            refuse(f"denies access (HTTP {status})", LOGIN)
        said = f": {error.server_message[:200]}" if error.server_message else ""
        refuse(f"can't be had (HTTP {status}{said})", advice)
    except Exception as error:  # the network, the disk and the client raise a dozen kinds
        refuse(f"can't be had ({type(error).__name__}: {first_line(error)[:200]})", advice)
