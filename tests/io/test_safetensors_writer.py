"""Files against safetensors' own reader."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llmcompress.io.safetensors_writer import CODES, Shard, same


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(5, 3, generator=generator) * 50).to(dtype) for i, dtype in enumerate(CODES)
    }
    strange = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6, generator=generator).T,
    }
    return {**tensors, **strange}


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_shard_reads_back_through_safetensors(tmp_path: Path, backend: str) -> None:
    tensors, shard = some_tensors(), Shard(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    shard.close({"format": "pt"})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]  # no spool stays
    assert shard.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(shard.file, framework="pt", backend=backend) as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(shard.file, backend=backend)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8),
            tensor.contiguous().view(-1).view(torch.uint8),
        )


def test_same_is_equal_bit_by_bit() -> None:
    one = torch.tensor([[1.0, float("nan")], [0.0, 2.0]])
    assert same(one, one.clone()) and same(one, one.t().contiguous().t())
    assert not same(one, -one) and not same(one, one.half()) and not same(one, one.reshape(4))
    assert not same(torch.tensor(0.0), torch.tensor(-0.0))
