"""Safetensors read lazily: headers only, then one tensor at a time with `pread`.

No file page counts as memory of this process, and peak memory is the largest tensor.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmcompress.algorithms.overflow import all_finite
from llmcompress.architectures.auto_classes import auto_class_name, needs_own_code
from llmcompress.errors import ModelError, first_line
from llmcompress.io.safetensors_writer import CODES, tensors_digest

Value = TypeVar("Value")

LARGEST, DEEPEST = 1 << 27, 32  # bytes and levels of the JSON beside weights; some tokenizer.json take 35 MB
INDEX = "model.safetensors.index.json"
# prefixes of a text model's names inside a multimodal model
WRAPPED = ("language_model.", "model.language_model.")
# last names of the factors of a weight that is a product, or that has a product added to it
FACTORS = ("weight_left", "weight_right")
# suffixes beside a weight whose bytes hold two codes each
PACKED = (".quant_map", "_multiplier", "_absmax", "_group_scale")
DTYPES = {code: dtype for dtype, code in CODES.items()}


def is_beside(part: str) -> bool:
    """Whether a tensor with this last name belongs to the `weight` beside it: its scales, mask, levels or
    factors."""
    return part.startswith("weight_") or part in ("SCB", "input_scale")


def is_scale(part: str) -> bool:
    """Whether a tensor with this last name belongs to the `weight` beside it and is not a factor of it."""
    return is_beside(part) and part not in FACTORS


def by_module(tensors: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Tensors, by full name, for each module that they belong to; those beside a weight belong to its
    module."""
    found: dict[str, dict[str, Value]] = {}
    for name, tensor in tensors.items():
        owner = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        found.setdefault(owner, {})[name] = tensor
    return found


FRESH = 2_000_000_000  # nanoseconds: the timestamps of some file systems have steps of one or two seconds
Stamp = tuple[tuple[tuple[str, int, int, int, int, int], ...], tuple[tuple[str, str], ...]]
_DIGESTS: dict[Stamp, str] = {}  # of the checkpoints that this process has read completely


class Entry(NamedTuple):
    """The shape and dtype of a stored tensor, and its `file` by its name inside the checkpoint's folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: config.json as a dictionary and every tensor's entry by name, sorted by file
    and name.

    Tensors that config.json ties to other tensors of one of our models are listed too, after the rest:
    `aliases` maps each to the stored tensor.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    files: frozenset[str] = frozenset()  # the weight files, by their names in the folder

    @cached_property
    def by_module(self) -> dict[str, dict[str, Entry]]:
        """The tensors, by full name, for each module."""
        return by_module(self.tensors)

    @classmethod
    def open(cls, folder: str | Path, *, base: bool = True) -> Checkpoint:
        """Read the headers of a (sharded) checkpoint; `base=False` also accepts what can't be compressed,
        such as our artefacts.

        Errors: ModelError for a missing folder or config, an adapter, pickles, missing, truncated or damaged
        files, and (as a base) for a model that is already quantised or is not a causal language model.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(
                f"no folder {folder}; give a folder with config.json and safetensors, or a Hub id"
            )
        require_no_adapter(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
        config = read_json(folder / "config.json")
        if base:
            require_base(folder, config)
        listed = _files(folder)
        tensors = {
            name: entry
            for file in sorted(set(listed.values()))
            for name, entry in _entries(folder / file).items()
        }
        lost = sorted(name for name in listed if name and name not in tensors)
        if lost:
            raise ModelError(
                f"{folder}: the index lists {lost[0]}, which {listed[lost[0]]} doesn't hold; download it "
                "again"
            )
        text_alone = base and not isinstance(config.get("text_config"), dict)
        if text_alone and (inner := next((name for name in tensors if name.startswith(WRAPPED)), None)):
            raise ModelError(
                f"{folder} has the config.json of a text model and the tensors of a multimodal one "
                f"({inner}); take both from the same source"
            )
        aliases = _aliases(folder, config, tensors)
        every = tensors | {name: tensors[source] for name, source in aliases.items()}
        return cls(folder, config, every, aliases, frozenset(listed.values()))

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether the folder has all weight files, not just the small files beside them."""
        if (folder / "model.safetensors").is_file():
            return True
        return (folder / INDEX).is_file() and all(
            (folder / file).is_file() for file in _listed(folder).values()
        )

    def only(self, names: Collection[str], aliases: Mapping[str, str] | None = None) -> Checkpoint:
        """The same checkpoint with only these tensors, and with more `aliases`: new names for some of
        them."""
        tensors = {name: entry for name, entry in self.tensors.items() if name in names}
        every = {name: source for name, source in self.aliases.items() if name in tensors} | dict(
            aliases or {}
        )
        return replace(
            self, tensors=tensors | {name: tensors[source] for name, source in every.items()}, aliases=every
        )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype. Errors: ModelError for a name that isn't stored."""
        if name not in self.tensors:
            raise ModelError(
                f"{self.folder} has no tensor {name}; its files are not those of its config.json"
            )
        tensor: Tensor = self._handles[self.tensors[name].file].get_tensor(self.aliases.get(name, name))
        return tensor

    @cached_property
    def _handles(self) -> dict[str, Any]:
        return {file: opened(self.folder / file) for file in {entry.file for entry in self.tensors.values()}}

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files on disk, including tensors that a loader ignores."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def parameters(self) -> int:
        """The number of stored weights. Tied weights count once and each packed code counts as one; scales,
        their parts and zeros do not count."""
        packed = {
            name.removesuffix(mark)
            for name in self.tensors
            for mark in PACKED
            if name.endswith(f".weight{mark}")
        }
        count = 0
        for name, entry in self.tensors.items():
            weight, dot, _ = name.partition(".weight.")
            if (
                name not in self.aliases
                and not (dot and f"{weight}.weight" in packed)
                and not is_scale(name.rpartition(".")[2])
            ):
                number = torch.Size(entry.shape).numel()
                # a codebook index takes log2(levels) bits per weight
                if (levels := self.tensors.get(f"{name}_levels")) is not None:
                    number = number * 8 // (levels.shape[-1] - 1).bit_length()
                # bytes may be stored as another type
                count += number * (2 * entry.dtype.itemsize if name in packed else 1)
        return count

    def fingerprint(self) -> str:
        """Return a digest of the config and of the names, shapes and bytes of all tensors, however they are
        spread over files."""
        return hashlib.sha256(
            f"{json.dumps(self.config, sort_keys=True)} {self.digest()}".encode()
        ).hexdigest()

    def digest(self) -> str:
        """The same digest without the config. Reads all tensors, unless this process has read them and their
        files have not changed since."""
        stamp = self._stamp()
        known = None if stamp is None else _DIGESTS.get(stamp)
        if known is None:
            each = (tensors_digest({name: self.read(name)}) for name in sorted(self.tensors))
            known = hashlib.sha256("".join(each).encode()).hexdigest()
            if stamp is not None and self._stamp() == stamp:
                _DIGESTS[stamp] = known
        return known

    def _stamp(self) -> Stamp | None:
        """Which files these are, and when they changed; None if that is so recent that the clock may not show
        the next change.

        The time of change (ctime) is set by the system only, so neither the preserved date of a copy nor
        `touch` hides a change of content.
        """
        found, now = [], time.time_ns()
        for name in sorted({entry.file for entry in self.tensors.values()}):
            about = (self.folder / name).stat()
            if now - max(about.st_mtime_ns, about.st_ctime_ns) < FRESH:
                return None
            found.append(
                (name, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            )
        return (tuple(found), tuple(sorted(self.aliases.items())))


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ModelError if a weight has NaN or infinite values."""
    if tensor.is_floating_point() and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; the base is damaged, take a "
            "sound copy"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of at most LARGEST bytes and DEEPEST levels. Errors: ModelError for anything
    else."""
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST + 1)
    except OSError as error:
        raise ModelError(f"{file} can't be read ({error.strerror}); download it again") from None
    if len(text) > LARGEST:
        raise ModelError(f"{file} has more than {LARGEST} bytes, which no such file has; download it again")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({first_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}, not an object; download it again")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return value
    raise ModelError(f"{file} is more than {DEEPEST} levels deep, which no such file is; download it again")


def require_no_adapter(folder: Path) -> None:
    """Raise ModelError if a PEFT adapter lies beside the weights: `from_pretrained` would add it to them."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which from_pretrained adds to the "
            "weights; merge it with merge_and_unload() and save the result to another folder, or move the "
            "adapter's files to one of their own"
        )


def require_base(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for a model that is quantised, or that is not a causal language model."""
    if not config.get("quantization_config", True) and config["quantization_config"] is not None:
        raise ModelError(f"{folder} has a config.json whose quantization_config is empty; remove it")
    if codes := config.get("quantization_config") or config.get("compression_config"):
        method = codes.get("quant_method", "unknown method") if isinstance(codes, dict) else codes
        # empty schemes: one of our pruned models, with nothing quantised
        if not isinstance(codes, dict) or codes.get("schemes") != []:
            raise ModelError(
                f"{folder} is quantised already ({method}); give the model that it was made from"
            )
    kind, architectures = str(config.get("model_type")), config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelError(
            f"{folder} has a config.json whose architectures are no list: {str(architectures)[:40]}; "
            "correct it"
        )
    if auto_class_name(kind, architectures) is None and needs_own_code(config) is None:
        found = architectures[0] if architectures else f"model_type {kind}"
        raise ModelError(
            f"{folder} is no causal language model ({found}), nor a multimodal one around it; give one whose "
            "class ends in ForCausalLM or ForConditionalGeneration"
        )


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> file as the index lists them. The one file of an unsharded model is listed under the
    empty name."""
    if (folder / "model.safetensors").is_file():  # from_pretrained also looks for it before the index
        return {"": "model.safetensors"}
    if (folder / INDEX).is_file():
        listed = _listed(folder)
        missing = sorted(file for file in set(listed.values()) if not (folder / file).is_file())
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the files its index names ({missing[0]}); download them "
                "again"
            )
        return listed
    pickles = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)
    )
    if pickles:
        raise ModelError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which can run code and is never opened "
            "here; convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(
        f"{folder} has no model.safetensors and no {INDEX}; give the folder that save_pretrained wrote"
    )


def _listed(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index. Errors: ModelError."""
    index = read_json(folder / INDEX)
    listed = index.get("weight_map")
    plain = isinstance(listed, dict) and listed and all(map(_is_shard, listed.values()))
    if not isinstance(listed, dict) or not plain:
        raise ModelError(f"{folder / INDEX} has no weight_map of file names; download it again")
    if not isinstance(index.get("metadata"), dict):
        raise ModelError(
            f'{folder / INDEX} has no metadata, which from_pretrained asks for; add "metadata": {{}} to it'
        )
    return listed


def _is_shard(file: Any) -> bool:
    """Whether `file` is the name of a safetensors file in the same folder."""
    named = isinstance(file, str) and len(file) < 256 and "\0" not in file
    return named and file.endswith(".safetensors") and Path(file).name == file


def named_ties(ties: Any) -> dict[str, str]:
    """The ties of config.json: tensor -> the tensor that it is tied to. Errors: ModelError for values that
    are not names, or for a cycle."""
    if ties is None:
        return {}
    if not isinstance(ties, Mapping) or not all(isinstance(source, str) for source in ties.values()):
        raise ModelError(
            f"config.json has ties that are not names of tensors: {str(ties)[:80]}; take it again from its "
            "source"
        )
    try:
        TopologicalSorter({target: [source] for target, source in ties.items()}).prepare()
    except CycleError as error:
        raise ModelError(
            f"config.json ties {error.args[1][0]} to itself; take it again from its source"
        ) from None
    return dict(ties)


def _aliases(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Entry]) -> dict[str, str]:
    """Tensor -> stored tensor for the ties of our plug-in whose targets are not stored, both by their names
    in the files."""
    codes, found = config.get("quantization_config"), dict[str, str]()
    ties = named_ties(codes.get("ties")) if isinstance(codes, dict) else {}
    for target, source in ties.items():
        stored = source in tensors  # if not, the files may omit the first part of the model's names
        own, other = (name if stored else name.partition(".")[2] for name in (target, source))
        if other not in tensors:
            raise ModelError(
                f"{folder} has no tensor {source}, to which config.json ties {target}; download it again"
            )
        if own not in tensors:
            found[own] = other
    return found


def opened(file: Path) -> Any:
    """Open a safetensors file; only its header is read. Errors: ModelError."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}); download it again") from None


def _entries(file: Path) -> dict[str, Entry]:
    handle, entries = opened(file), {}
    for name in sorted(handle.keys()):
        stored = handle.get_slice(name)
        if stored.get_dtype() not in DTYPES:
            raise ModelError(
                f"{file}: {name} has dtype {stored.get_dtype()}, which no base has; give the original model"
            )
        entries[name] = Entry(tuple(stored.get_shape()), DTYPES[stored.get_dtype()], file.name)
    return entries
