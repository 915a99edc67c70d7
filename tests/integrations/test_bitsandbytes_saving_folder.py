"""What `save_native` refuses, and what it does to the folder it is given: it appears whole, or is as it
was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress import save_native
from llmcompress.errors import ModelError, OutputError
from llmcompress.formats import bitsandbytes_layout
from llmcompress.pipeline.in_memory import apply_recipe
from tests.bases import byte_tokenizer, save_base, small_recipe, write_text
from tests.integrations.test_bitsandbytes_saving import (
    artefact,
    by_four,
    by_kind,
    different,
    forward,
    load,
    quantised,
    repack,
    stored,
)

pytestmark = pytest.mark.usefixtures("short_runs")


def damaged(made: Path, part: str) -> None:
    """Change one number of the artefact on disk."""
    tensors = load_file(made / "model.safetensors")
    name = next(
        name
        for name in tensors
        if f"up_proj.{part}" in name and (part != "weight" or name.endswith(".weight"))
    )
    tensors[name] = tensors[name].clone()
    if part == "weight.quant_state":
        text = bytes(tensors[name].tolist()).replace(b"float32", b"float64", 1)
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        tensors[name].view(-1)[0] += 1
    save_file(tensors, made / "changed.safetensors", {"format": "pt"})
    (made / "changed.safetensors").replace(made / "model.safetensors")


@by_four
@pytest.mark.parametrize("plain", [False, True])
def test_lost_scales_are_refused_where_the_origin_is_gone_or_another(
    kind: str, plain: bool, tmp_path: Path
) -> None:
    made = artefact(tmp_path / "made", kind)
    model = load(made)
    repack(model)

    def save() -> None:
        model.save_pretrained(tmp_path / "again") if plain else save_native(model, tmp_path / "again")

    for part in ("weight", "weight.absmax", "weight.quant_state"):
        shutil.copytree(made, tmp_path / "kept")
        damaged(made, part)
        with pytest.raises(
            ModelError,
            match=r"14 4-bit linears .* holds other weights than this model; save before the first",
        ):
            save()
        shutil.rmtree(made)
        (tmp_path / "kept").rename(made)
    # 112 rows, which no repacking takes
    sizes: dict[str, Any] = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
    for other, config in ((kind, sizes), ("int8", {})):
        made.rename(tmp_path / "kept")
        artefact(made, other, **config)
        with pytest.raises(ModelError, match="holds other weights"):
            save()
        shutil.rmtree(made)
        (tmp_path / "kept").rename(made)
    made.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"can't be loaded again \(OSError\); save before the first forward"):
        save()
    assert {path.name for path in tmp_path.iterdir()} - {"again"} == {"moved"} and not stored(
        tmp_path / "again"
    )
    model.config._name_or_path = str(tmp_path / "moved")
    save()
    assert not different(stored(tmp_path / "again"), stored(tmp_path / "moved"))


@pytest.mark.skipif(
    bitsandbytes_layout.stock().has_avx512bf16(),
    reason="on this CPU a forward rounds the scales too, and saving is refused",
)
def test_a_rounded_bias_is_saved_as_it_is_where_the_origin_is_gone(tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", "fp4-bf16", "qwen2")
    model, expected = load(made), stored(made)
    made.rename(tmp_path / "moved")
    forward(model)
    expected |= {
        name: tensor.bfloat16().float() for name, tensor in expected.items() if name.endswith("_proj.bias")
    }
    assert not different(stored(save_native(model, tmp_path / "again")), expected)


def test_what_is_no_native_model_is_refused(tmp_path: Path) -> None:
    made, base = artefact(tmp_path / "made", "nf4"), save_base(tmp_path / "base")
    with pytest.raises(
        ModelError,
        match=r"LlamaForCausalLM holds no weights .* \(not quantised\); use its own save_pretrained",
    ):
        save_native(load(base), tmp_path / "again")
    ours, _ = apply_recipe(
        small_recipe(write_text(tmp_path / "text.txt"), base, format="w8a8"), load(base), byte_tokenizer()
    )
    with pytest.raises(ModelError, match=r"\(llmcompress\); use its own save_pretrained"):
        save_native(ours, tmp_path / "again")
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj is not quantised"):
        save_native(quantised(base, "int8", llm_int8_has_fp16_weight=True), tmp_path / "again")
    offloaded, adapted = load(made), load(made)
    offloaded.model.norm.to("meta")
    with pytest.raises(ModelError, match="offloaded"):
        save_native(offloaded, tmp_path / "again")
    adapted._hf_peft_config_loaded = True
    with pytest.raises(ModelError, match="adapters"):
        save_native(adapted, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_not_empty_is_left_alone_unless_it_is_said(tmp_path: Path) -> None:
    model, out = load(artefact(tmp_path / "made", "nf4")), tmp_path / "out"
    byte_tokenizer().save_pretrained(out)
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("theirs")
    (out / "model-00001-of-00009.safetensors").write_text("stale")
    names = {path.name for path in out.iterdir()}
    with pytest.raises(OutputError, match=r"out is not empty; choose another folder or pass overwrite=True"):
        save_native(model, out)
    assert {path.name for path in out.iterdir()} == names
    save_native(model, out, overwrite=True)
    kept = names - {"model-00001-of-00009.safetensors"}
    assert {path.name for path in out.iterdir()} == kept | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert (out / "sub" / "config.json").read_text() == "theirs"
    save_native(model, out, overwrite=True, max_shard_size="100KB")
    assert (out / "model.safetensors.index.json").is_file() and not (out / "model.safetensors").exists()
    save_native(model, out, overwrite=True)
    assert (out / "model.safetensors").is_file() and not (out / "model.safetensors.index.json").exists()
    with pytest.raises(OutputError, match="is a file"):
        save_native(model, out / "config.json", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert not different(stored(save_native(model, tmp_path / "empty")), stored(out))


@by_kind
def test_a_model_is_saved_over_the_folder_that_it_was_loaded_from(kind: str, tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", kind)
    model, expected = load(made), stored(made)
    before = forward(model)
    repack(model)
    model.model.norm.weight.data = expected["model.norm.weight"] = model.model.norm.weight.data * 2
    assert not different(stored(save_native(model, made, overwrite=True)), expected)
    model.model.norm.weight.data = model.model.norm.weight.data / 2
    assert torch.equal(forward(model), before)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_save_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", "nf4")
    model, expected = load(made), {path.name: path.read_bytes() for path in made.iterdir()}
    for folder in (made, tmp_path / "again"):
        with pytest.raises(ValueError, match="not supported"):
            # found out when config.json is written
            save_native(model, folder, overwrite=True, max_shard_size="a lot")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write"):
        save_native(model, tmp_path / "file" / "again")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_into_the_folder_while_a_model_was_saved_is_not_lost(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = load(artefact(tmp_path / "made", "nf4")), tmp_path / "out"
    if overwrite:
        save_native(model, out)
    plain = type(model).save_pretrained

    def slow(self: Any, *args: Any, **named: Any) -> None:
        plain(self, *args, **named)
        out.mkdir(exist_ok=True)
        (out / "letter.txt").write_text("dear")

    monkeypatch.setattr(type(model), "save_pretrained", slow)
    before = {path.name for path in out.iterdir()} if overwrite else set[str]()
    with pytest.raises(OutputError, match="is not what it was when saving began, and stays as it is"):
        save_native(model, out, overwrite=overwrite)
    assert {path.name for path in out.iterdir()} == before | {"letter.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}
