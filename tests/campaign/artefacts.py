"""Artefacts that are damaged: nonsense in their tensors is refused at load, damaged files in one line."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.campaign.bench import Bench, Count
from tests.campaign.damage import DAMAGES
from tests.campaign.forked import Child, run

FORMATS = {
    "w8a8": "[{quantize: {format: w8a8}}]",
    "w8a8-static": "[{quantize: {format: w8a8, activations: static}}]",
    "w4a8": "[{quantize: {format: w4a8, group_size: 32}}]",
    "int8-embedding": "[{quantize: {format: w8a8, embedding: int8}}]",
    "mixed": "[{quantize: {format: nf4, overrides: {'*.down_proj': {format: w8a8}}}}]",
    "sparse": "[{sparsify: {pattern: '2:4'}}]",
    "basis": "[{low_rank: {layers_per_basis: 2, keep: 0.75}}]",
    "share": "[{share: {layers: adjacent, parts: [ffn], groups: 1}}]",
    "codebook": "[{codebook: {entries: 16}}]",
}
INTEGERS = {  # what the parts of our formats must never hold
    "weight_multiplier": (0, 255),
    "weight_scale": (float("nan"), float("inf"), -1.0),
    "input_scale": (float("nan"), float("inf"), 0.0, -1.0),
    "weight_absmax": (float("nan"), float("inf")),
    "weight_levels": (float("nan"), float("inf")),
    "weight_left": (float("nan"), float("inf")),
    "weight_right": (float("nan"), float("inf")),
}


def artefacts(bench: Bench, tries: int) -> Count:
    """Put nonsense into `tries` artefacts: a value that no tensor of its kind has, a damaged file, a
    malformed config."""
    count = Count("artefacts")
    made = dict(_made(bench))
    for place in bench.places("artefact", tries):
        name = bench.draw.choice(sorted(made))
        folder = place / "artefact"
        shutil.copytree(made[name], folder)
        kind, change = bench.draw.choice(KINDS)
        what = change(bench, folder)
        if what is not None:
            nonsense = kind == "value"
            words = (
                "evaluate",
                str(folder),
                "--data",
                str(bench.folder / "facts.txt"),
                "--length",
                "24",
                "--samples",
                "2",
            )
            ended = run(bench.folder, *words)
            fault = ended.crashed or (
                f"evaluate ended with {ended.code}" if nonsense and ended.code != 2 else None
            )
            loaded = Child(bench.folder, call=lambda folder=folder: _load(folder)).wait()  # type: ignore[misc]
            fault = fault or (
                f"from_pretrained: {loaded.err[-600:]}" if loaded.code not in (0, 2, 3) else None
            )
            fault = fault or (
                f"from_pretrained ended with {loaded.code}" if nonsense and loaded.code != 2 else None
            )
            count.ended(kind, f"{name} {what}: {fault}" if fault else None)
        shutil.rmtree(place)
    return count


def _made(bench: Bench) -> Iterator[tuple[str, Path]]:
    for name, stages in FORMATS.items():
        data = f"{{source: {bench.folder / 'facts.txt'}, samples: 8, length: 24, evaluation_samples: 4}}"
        (bench.folder / f"{name}.yaml").write_text(f"data: {data}\nstages: {stages}\n")
        done = bench.run(name, bench.folder / f"artefact-{name}")
        if done.code:
            raise SystemExit(f"the undisturbed run of {name} failed: {done.err}")
        yield name, bench.folder / f"artefact-{name}"


def _load(folder: Path) -> None:
    """Load and run as a user does; exit code 2 where we refuse that, 3 where somebody else does, before it
    comes to us."""
    from transformers import AutoModelForCausalLM

    import llmcompress

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except llmcompress.CompressError as error:
        raise SystemExit(2) from error
    except Exception as error:
        ours = Path(llmcompress.__file__).parent
        if any(
            Path(frame.filename).is_relative_to(ours) for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise
        raise SystemExit(3) from error
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))


def _value(bench: Bench, folder: Path) -> str | None:
    """One element of one tensor is what none may be."""
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    named = [(name, name.rpartition(".")[2]) for name in tensors]
    targets = [(name, value) for name, part in named for value in INTEGERS.get(part, ())]
    targets += [(name, -128) for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    if not targets:
        return None
    name, value = bench.draw.choice(targets)
    flat = tensors[name].reshape(-1).clone()
    flat[bench.draw.randrange(flat.numel())] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return f"{name} holds {value}"


def _file(bench: Bench, folder: Path) -> str:
    """One file is damaged."""
    names = ("model.safetensors", "config.json")
    # a flipped bit may be a sound number
    file, damage = (folder / bench.draw.choice(names), bench.draw.choice(DAMAGES[1:]))
    damage(file, bench.draw)
    return f"{damage.__name__} {file.name}"


def _config(bench: Bench, folder: Path) -> str:
    """What config.json says of the quantisation is malformed."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    odd: Any = bench.draw.choice(
        (3, None, "x", [], {}, [3], [[]], [{}], [{"format": "nope"}], -1, 1e10, [{"linears": 5}])
    )
    part = bench.draw.choice(("schemes", "ties", "scheme"))
    schemes = config["quantization_config"].get("schemes") or [{}]
    if part == "scheme":
        key = bench.draw.choice(sorted(schemes[0]) or ["format"])
        schemes[0][key] = odd
        part = f"scheme.{key}"
    else:
        config["quantization_config"][part] = odd
    file.write_text(json.dumps(config))
    return f"{part} = {odd!r}"


KINDS: tuple[tuple[str, Callable[[Bench, Path], str | None]], ...] = (
    ("value", _value),
    ("value", _value),
    ("file", _file),
    ("config", _config),
)
