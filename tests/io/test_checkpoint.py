"""Checkpoints in every state of disrepair."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout
from llmcompress.io import checkpoint
from llmcompress.io.checkpoint import Checkpoint, check_finite
from tests.models import pico


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of many shards."""
    folder = tmp_path_factory.mktemp("base")
    pico("llama").save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_sharded_checkpoint_reads_as_the_model_it_was(saved: Path) -> None:
    checkpoint, state = Checkpoint.open(saved), pico("llama").state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        entry = checkpoint.tensors[name]
        assert (entry.shape, entry.dtype, entry.size_bytes) == (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.nbytes,
        )
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.parameters == sum(tensor.numel() for tensor in state.values())
    assert checkpoint.size_bytes == sum(file.stat().st_size for file in saved.glob("*.safetensors"))


def test_four_bit_codes_count_as_the_weights_they_stand_for(tmp_path: Path) -> None:
    packed = bitsandbytes_layout.quantize_nearest(torch.randn(32, 128), "nf4", 64, True)
    stored = {f"model.layer.{name}": tensor for name, tensor in bitsandbytes_layout.tensors(packed).items()}
    save_file({**stored, "model.norm.weight": torch.ones(7)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path, base=False).parameters == 32 * 128 + 7


def test_a_fingerprint_stays_under_a_copy_and_changes_with_any_weight(saved: Path, base: Path) -> None:
    assert Checkpoint.open(base).fingerprint() == Checkpoint.open(saved).fingerprint()
    file = next(iter(sorted(base.glob("*.safetensors"))))
    tensors = load_file(file, backend="pread")  # the file is written again below
    for tensor in tensors.values():
        tensor.view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint.open(base).fingerprint() != Checkpoint.open(saved).fingerprint()


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_refused(base: Path) -> None:
    (base / "config.json").unlink()
    assert "no config.json" in refusal(base)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_named(base: Path, text: str) -> None:
    (base / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(base)


def test_a_pickle_is_refused_with_the_way_to_convert_it(base: Path) -> None:
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    assert "no model.safetensors" in refusal(base)
    (base / "pytorch_model.bin").write_bytes(b"never opened")
    assert "pytorch_model.bin" in refusal(base)
    assert "save_pretrained" in refusal(base)


def test_a_missing_shard_is_named(base: Path) -> None:
    file = sorted(base.glob("*.safetensors"))[2]
    file.unlink()
    assert file.name in refusal(base)


def test_an_index_without_file_names_is_refused(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    for content in ("{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        assert "weight_map" in refusal(base)


def test_an_index_that_lists_what_no_shard_holds_is_refused(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    assert "model.extra.weight" in refusal(base)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(base: Path, size: int) -> None:
    file = sorted(base.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is truncated or damaged" in refusal(base)


def test_a_quantised_base_is_refused_and_read_on_request(base: Path) -> None:
    configure(base, quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised already (bitsandbytes)" in refusal(base)
    assert Checkpoint.open(base, base=False).tensors


@pytest.mark.parametrize(
    ("fields", "causal"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, False),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}, True),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, True),
        ({"architectures": ["LlavaModel"], "model_type": "llava"}, False),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, True),
        ({"architectures": None}, True),
        ({"architectures": None, "model_type": "t5"}, False),
        ({"architectures": None, "model_type": "unheard_of"}, False),
        ({"architectures": None, "model_type": None}, False),
    ],
)
def test_only_causal_language_models_are_bases(base: Path, fields: dict[str, Any], causal: bool) -> None:
    configure(base, **fields)
    if causal:
        assert Checkpoint.open(base).tensors
    else:
        assert "no causal language model" in refusal(base)


def test_a_tensor_that_is_not_there_is_named(saved: Path) -> None:
    with pytest.raises(ModelError, match="no tensor missing"):
        Checkpoint.open(saved).read("missing")


def test_values_that_are_not_finite_are_counted() -> None:
    weight = torch.ones(4, 8)
    check_finite(weight, "w")
    check_finite(torch.arange(3), "codes")
    weight[0, 0], weight[1, 2] = torch.nan, -torch.inf
    with pytest.raises(ModelError, match="w: 2 of 32 values"):
        check_finite(weight, "w")


def test_a_fingerprint_and_a_digest_read_every_byte(base: Path) -> None:
    file = next(iter(sorted(base.glob("*.safetensors"))))
    whole, seen = file.read_bytes(), set[tuple[str, str]]()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [start, *range(start + 4097, len(whole), 50_021), len(whole) - 1]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        opened = Checkpoint.open(base)
        seen.add((opened.fingerprint(), opened.digest()))
    assert len({one for one, _ in seen}) == len({other for _, other in seen}) == len(set(places))


def test_files_that_are_as_they_were_are_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    first = Checkpoint.open(base).digest()
    once = len(read)
    assert Checkpoint.open(base).digest() == first and len(read) == 2 * once, (
        "so fresh that a clock may not tell"
    )
    monkeypatch.setattr(checkpoint, "FRESH", -1)
    assert [Checkpoint.open(base).digest() for _ in range(3)] == [first] * 3 and len(read) == 3 * once
    file = next(iter(sorted(base.glob("*.safetensors"))))
    content, before = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    time.sleep(0.05)  # more than a tick of the file system's clock
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps the date
    assert Checkpoint.open(base).digest() != first
