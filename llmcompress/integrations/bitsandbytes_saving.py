"""Saving a live model in a native bitsandbytes layout, which transformers 5.23 refuses or gets wrong.

There are three obstacles. transformers can't reverse the loading of such a checkpoint (NotImplementedError).
On a CPU with AVX512-BF16, the first forward without gradients makes bitsandbytes repack 4-bit weights in
place and round their scales to bfloat16: the model no longer holds the exact scales, and `state_dict()`
transposes what is left. And a forward leaves the biases of linears in the type that it computes in. So
`save_native` first mends the live model. Lost scales are read from the checkpoint that the model was loaded
from, if bitsandbytes' own repacking turns them into exactly the bytes that the model holds. If that is not
possible, saving is refused.

Importing this module makes plain `save_pretrained` mend or refuse in the same way, through the hook that
transformers' quantizers have for it. `state_dict()` and moving a repacked model to a GPU bypass it and stay
as wrong as before.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import ModelError, OutputError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.integrations.transformers_compat import deserializers
from llmcompress.io.destination import Seen, appear, seen
from llmcompress.io.safetensors_writer import same, sync, sync_folder, writing

TURNS = 4  # the number of repack-and-unpack cycles, at most, after which the origin of a weight is recognised
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def save_native(
    model: PreTrainedModel,
    save_directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Save a model in one of bitsandbytes' own layouts as `save_pretrained` would, so that plain
    `from_pretrained` loads it bit-equal.

    Writes config.json, generation_config.json and safetensors, all or nothing, and returns the path of the
    folder. Codes and scales are those that were loaded or quantised; every other parameter is saved as it is
    now. If a forward on a CPU has rounded scales, the checkpoint in `model.config._name_or_path` is loaded
    beside the model, from this machine only (for a Hub id, what the cache has as `main`, because a model does
    not record its revision). Its scales are used once it is proved to be the origin of the model: the codes
    are equal, and so are its scales once they are rounded. This mends the live model too. A bias that a
    forward rounded is also taken from there, or saved as it is if there is no exact value for it.

    With `overwrite`, the model in a folder that is not empty is replaced, and its other files stay. Errors:
    ModelError for a model without such linears, with adapters or offloaded weights, or whose lost scales
    can't be recovered; OutputError if the folder is not empty or can't be written.
    """
    _require_native(model)
    folder = Path(save_directory).resolve()
    if folder.is_file():
        raise OutputError(f"{folder} is a file; give the name of a folder")
    before = seen(folder)
    if not overwrite and before:
        raise OutputError(f"{folder} is not empty; choose another folder or pass overwrite=True")
    mend(model)
    with writing(folder):
        _write(model, folder, before, max_shard_size)
    return folder


def _write(model: PreTrainedModel, folder: Path, before: Seen, max_shard_size: int | str) -> None:
    """Publish the model in a folder by one rename, together with the other files seen there before. Errors:
    OutputError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh, replaced = staging / "fresh", staging / "replaced"
    try:
        if folder.exists():
            stale = shutil.ignore_patterns(*MODEL_FILES)
            shutil.copytree(
                folder, fresh, ignore=lambda at, names: stale(at, names) if Path(at) == folder else ()
            )
        model.save_pretrained(fresh, max_shard_size=max_shard_size)
        _flush(fresh)
        appear(fresh, folder, before, replaced)
        sync_folder(folder.parent)
    except FileExistsError:
        raise OutputError(
            f"{folder} is not what it was when saving began, and stays as it is; save to another folder"
        ) from None
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        if not replaced.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush everything in a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sync(file)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(inner)


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linears in one of bitsandbytes' layouts, by full name."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes_linear.LINEARS)
    )


def _require_native(model: PreTrainedModel) -> None:
    config: Any = getattr(model.config, "quantization_config", None) or {}
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    if method != "bitsandbytes" or not any(True for _ in _linears(model)):
        raise ModelError(
            f"{type(model).__name__} holds no weights in a layout of bitsandbytes "
            f"({method or 'not quantised'}); use its own save_pretrained"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "the model has adapters, which bitsandbytes' layouts can't hold; save those with save_pretrained"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("weights of the model are offloaded; load it in memory to save it")
    for name, module in _linears(model):
        int8 = isinstance(module, bitsandbytes_linear.Linear8bitLt)
        if module.weight.dtype != torch.int8 if int8 else getattr(module.weight, "quant_state", None) is None:
            raise ModelError(
                f"{name} is not quantised (llm_int8_has_fp16_weight, or never moved to a device), so what is "
                "saved would not load; load the model without that option"
            )


def mend(model: PreTrainedModel) -> None:
    """Restore in the live model what forwards changed, and let transformers save it. Errors: ModelError."""
    linears = dict(_linears(model))
    lost = [name for name, module in linears.items() if bitsandbytes_linear.scales_lost(module)]
    rounded = [name for name, module in linears.items() if _is_rounded(module.bias, model.dtype)]
    found: dict[str, Any] = {}
    if lost or rounded:
        try:
            found = dict(_linears(_loaded_again(model)))
        except (OSError, ValueError, RuntimeError) as error:
            if lost:
                raise _refusal(model, lost, f"can't be loaded again ({type(error).__name__})") from error
    if not all(_came_from(linears[name], found.get(name)) for name in lost):
        raise _refusal(model, lost, "holds other weights than this model")
    for name in lost:
        weight, state = found[name].weight, found[name].weight.quant_state
        state.to(linears[name].weight.device)
        linears[name].weight.data, linears[name].weight.quant_state = (
            weight.data.to(linears[name].weight.device),
            state,
        )
        linears[name].quant_state = state
    for name, module in linears.items():
        if module.bias is not None:
            _settle(module.bias, model.dtype, getattr(found.get(name), "bias", None))
    loading = getattr(model, "_weight_conversions", None) or []
    if loading:  # only these can't be reversed, and need not be: a state dict has the checkpoint's names
        model._weight_conversions = [entry for entry in loading if not _reads_codes(entry)]  # type: ignore[assignment]


def _reads_codes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, deserializers()) for operation in operations)


def _refusal(model: PreTrainedModel, lost: list[str], why: str) -> ModelError:
    where = model.config._name_or_path or "what it was loaded from"
    return ModelError(
        f"a forward on a CPU rounded the scales of {len(lost)} 4-bit linears ({lost[0]} ...), and {where} "
        f"{why}; save before the first forward, or load the model again and save that"
    )


def _loaded_again(model: PreTrainedModel) -> PreTrainedModel:
    """Load the model again, from this machine only. Errors: OSError, ValueError or RuntimeError if that
    fails."""
    where = str(model.config._name_or_path)
    if not where:
        raise ValueError("the model was not loaded from anywhere")
    options: dict[str, Any] = {"dtype": model.dtype, "device_map": {"": "cpu"}, "local_files_only": True}
    config = type(model.config).from_pretrained(where, local_files_only=True)
    if getattr(config, "quantization_config", None) is None:  # it was quantised while it was loaded
        options["quantization_config"] = copy.deepcopy(cast(Any, model.config).quantization_config)
    return type(model).from_pretrained(where, **options)


def _came_from(module: Any, origin: Any) -> bool:
    """Whether a linear whose scales are lost was loaded as `origin`, the linear of that name in a fresh copy
    of the model.

    It was if bitsandbytes' repacking, or a few cycles of repacking and unpacking, turns origin's tensors into
    those of the linear, bit for bit: all codes, and the scales as far as the linear still has them.
    """
    if type(origin) is not type(module):
        return False
    live, state = module.weight.quant_state, origin.weight.quant_state
    if (live.shape, live.blocksize, live.quant_type) != (state.shape, state.blocksize, state.quant_type):
        return False
    if live.original_dtype != state.dtype:
        return False
    data, turned = origin.weight.data, copy.deepcopy(state)
    for _ in range(TURNS):
        for turn in (
            bitsandbytes_layout.stock()._convert_weight_packed_for_cpu,
            bitsandbytes_layout.stock()._convert_weight_packed_for_cpu_inverse,
        ):
            data, turned = turn(data, turned)
            if _same(data, turned, module.weight.data, live):
                return True
    return False


def _same(data: Tensor, state: Any, other_data: Tensor, other: Any) -> bool:
    """Whether two weights in bitsandbytes' memory layout have the same bytes, on whatever devices."""
    if state.nested != other.nested:
        return False
    pairs = [(data, other_data), (state.code, other.code), (state.absmax, other.absmax)]
    if state.nested:
        pairs += [
            (state.offset, other.offset),
            (state.state2.absmax, other.state2.absmax),
            (state.state2.code, other.state2.code),
        ]
    return all(same(one, another) for one, another in pairs)


def _is_rounded(bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a forward left a bias in a coarser type than the model's."""
    return bias is not None and torch.finfo(bias.dtype).eps > torch.finfo(dtype).eps


def _settle(bias: nn.Parameter, dtype: torch.dtype, origin: Tensor | None) -> None:
    """Cast a bias back to its type: to origin's exact value if the bias is still that value rounded, else to
    its own value. A bias that neither fits stays as it is."""
    if bias.dtype == dtype:
        return
    for exact in ([] if origin is None else [origin.data.to(bias.device)]) + [bias.data.to(dtype)]:
        if torch.equal(exact.to(bias.dtype), bias.data):
            bias.data = exact
            return
