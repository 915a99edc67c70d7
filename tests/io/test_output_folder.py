"""The artefact's folder: what is in it, that it loads, and that nothing half-written is ever seen."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.errors import OutputError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.journal import Journal
from llmcompress.io.output_folder import Writer, partial_folder, require_space
from tests.models import pico

SMALL = {
    "generation_config.json": "{}",
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer.model": "m",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "LICENSE": "free",
    "NOTICE.md": "n",
}
DROPPED = (
    "modeling_custom.py",
    "pytorch_model.bin",
    "optimizer.pt",
    "README.md",
    "model.safetensors.index.json",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    pico("llama").save_pretrained(folder)
    for name, content in {**SMALL, **dict.fromkeys(DROPPED, "{}")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(pico("llama").state_dict())


def write(
    out: Path, base: Path, state: dict[str, Tensor], shard_bytes: int = 10**9, overwrite: bool = False
) -> Path:
    writer = Writer(out, base, size_bytes=10**6, shard_bytes=shard_bytes, overwrite=overwrite)
    for name, tensor in state.items():
        writer.add({name: tensor})
    writer.close(Checkpoint.open(base).config)
    return writer.publish({"report.json": "{}", "pictures/error.png": b"\x89"})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_an_artefact_holds_the_weights_and_every_small_file_of_the_base(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    out = write(tmp_path / "out", base, state)
    expected = {*SMALL, "config.json", "model.safetensors", "report.json", "pictures/error.png"}
    assert set(files(out)) == expected
    assert {name: (out / name).read_text() for name in SMALL} == SMALL
    found = load_file(out / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}  # the partial folder is gone


def test_shards_of_any_size_load_as_the_same_model(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = pico("llama")(tokens).logits
        for size in (1, 50_000, 100_000):
            out = write(tmp_path / f"out-{size}", base, state, shard_bytes=size)
            shards = sorted(out.glob("*.safetensors"))
            assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
            assert index["weight_map"].keys() == state.keys()
            # none is larger
            assert size != 100_000 or all(file.stat().st_size <= size + 10_000 for file in shards)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, expected)


def test_a_quantised_linear_may_lie_in_several_shards(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    model, tokens, kept = pico("llama"), torch.arange(24)[None], []
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            if name == "lm_head" or bitsandbytes_layout.refusal(module.weight.shape, "nf4", 64):
                kept.append(name)
            else:
                model.set_submodule(
                    name,
                    bitsandbytes_linear.linear(
                        bitsandbytes_layout.quantize_nearest(module.weight.data, "nf4", 64, True), None
                    ),
                )
    # every tensor a shard of its own
    writer = Writer(tmp_path / "out", base, size_bytes=10**6, shard_bytes=1)
    writer.add(model.state_dict())
    config = {
        **Checkpoint.open(base).config,
        "quantization_config": bitsandbytes_layout.quantization_config("nf4", True, torch.float32, kept),
    }
    assert writer.close(config) == tmp_path / ".out.partial" / "artifact"
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(writer.artifact)  # it loads before it is published
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_same_tensors_give_the_same_bytes_in_whatever_order_of_a_dictionary(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    for out, order in (("one", list(state)), ("two", list(reversed(state)))):
        writer = Writer(tmp_path / out, base, size_bytes=10**6, shard_bytes=100_000)
        writer.add({name: state[name] for name in order})
        fields = ["model_type", "vocab_size"] if out == "one" else ["vocab_size", "model_type"]
        writer.close({field: field for field in fields})
        writer.publish({})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_tied_weight_is_written_once(tmp_path: Path, base: Path, state: dict[str, Tensor]) -> None:
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    writer = Writer(tmp_path / "out", base, size_bytes=10**6)
    writer.ties = ties
    writer.add(state)
    writer.close({**Checkpoint.open(base).config, "tie_word_embeddings": True})
    out = writer.publish({})
    assert set(load_file(out / "model.safetensors")) == set(state) - {"lm_head.weight"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tie_without_its_source_and_a_weight_written_twice_are_our_mistakes(
    tmp_path: Path, base: Path
) -> None:
    writer = Writer(tmp_path / "out", base, size_bytes=1)
    writer.ties = {"a": "b"}
    writer.add({"c": torch.ones(2)})
    with pytest.raises(ValueError, match="b, the source of a tie"):
        writer.close({})
    with pytest.raises(ValueError, match="c was written already"):
        writer.add({"c": torch.ones(2)})


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(OutputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_artefact_that_exists_stays_unless_told(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    out = write(tmp_path / "out", base, state)
    before = files(out)
    assert "exists" in refusal(lambda: write(out, base, state))
    assert files(out) == before
    write(out, base, {**state, "lm_head.weight": torch.zeros(160, 64)}, overwrite=True)
    assert not load_file(out / "model.safetensors")["lm_head.weight"].any()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, base: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "out").mkdir()
    assert "model.safetensors" in files(write(tmp_path / "out", base, state))


def test_what_is_not_an_artefact_is_never_overwritten(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert "other things" in refusal(lambda: write(tmp_path / "home", base, state, overwrite=True))
    assert "is a file" in refusal(
        lambda: write(tmp_path / "home" / "letter.txt", base, state, overwrite=True)
    )
    assert "the base" in refusal(lambda: write(base, base, state, overwrite=True))
    assert "the base" in refusal(lambda: write(tmp_path, base, state, overwrite=True))
    assert "root of a disk" in refusal(lambda: partial_folder("/"))
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, base: Path) -> None:
    need = shutil.disk_usage(tmp_path).total * 10
    assert "are free" in refusal(lambda: Writer(tmp_path / "out", base, size_bytes=need))
    assert "are free" in refusal(lambda: require_space(tmp_path / "not" / "there", need))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, base: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't write" in refusal(lambda: Writer(tmp_path / "file" / "out", base, size_bytes=1))


def test_a_run_killed_between_the_two_renames_gets_its_old_artefact_back(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    out = write(tmp_path / "out", base, state)
    before = files(out)
    partial_folder(out).mkdir()
    out.rename(partial_folder(out) / "replaced")  # as far as `publish` came
    assert "exists" in refusal(lambda: Writer(out, base, size_bytes=1))
    assert files(out) == before


ENDLESS = """
import sys
from pathlib import Path
import torch
from llmcompress.io.output_folder import Writer, partial_folder
from llmcompress.io.journal import Journal
out, base = sys.argv[1:]
Journal(partial_folder(out) / "journal", "key").save("quantize", 0, {"w": torch.ones(3)})
writer = Writer(out, base, size_bytes=1, shard_bytes=3_000_000, overwrite=True)
for i in range(10**9):
    writer.add({f"t{i}": torch.ones(1_000_000)})
    print(i, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True])
def test_a_run_killed_while_it_writes_leaves_the_target_as_it_was(
    tmp_path: Path, base: Path, state: dict[str, Tensor], existing: bool
) -> None:
    out = tmp_path / "out"
    before = files(write(out, base, state)) if existing else {}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(out), str(base)], stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout is not None
        written = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.01)
        process.kill()
    assert written[-1] == b"4\n"
    assert out.exists() == existing
    assert not existing or files(out) == before
    assert any((partial_folder(out) / "artifact").iterdir())  # it was in the middle of it
    # and what it had finished is still there
    assert Journal(partial_folder(out) / "journal", "key").has("quantize", 0)
    again = files(write(out, base, state, overwrite=True))
    assert again == (before or files(write(tmp_path / "other", base, state)))
    assert not partial_folder(out).exists()


def test_one_writer_at_a_time_works_on_a_result(tmp_path: Path, base: Path, state: dict[str, Tensor]) -> None:
    out = tmp_path / "out"
    with Writer(out, base, size_bytes=1) as writer:
        writer.add(state)
        before = files(writer.partial)
        told = refusal(lambda: Writer(out, base, size_bytes=1, overwrite=True))
        assert (
            f"is in use by process {os.getpid()} on {socket.gethostname()}; wait for it, or choose another "
            "out" in told
        )
        assert files(writer.partial) == before
        writer.close(Checkpoint.open(base).config)
        writer.publish({})
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def write_while(
    happens: Callable[[], object], out: Path, base: Path, state: dict[str, Tensor], overwrite: bool = False
) -> None:
    """Write an artefact; something happens just before it is published."""
    with Writer(out, base, size_bytes=1, overwrite=overwrite) as writer:
        writer.add(state)
        writer.close(Checkpoint.open(base).config)
        happens()
        writer.publish({"report.json": "{}"})


def test_what_appeared_meanwhile_stays_and_the_result_too(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    out = tmp_path / "out"

    def appears() -> None:
        out.mkdir()
        (out / "letter.txt").write_text("dear")

    write_while(lambda: None, tmp_path / "whole", base, state)
    whole = files(tmp_path / "whole")
    told = refusal(lambda: write_while(appears, out, base, state))
    kept = partial_folder(out) / "artifact"
    assert (
        f"stays as it is; the result is whole in {kept}: move {out} away and give the same command again"
        in told
    )
    assert files(out) == {"letter.txt": b"dear"} and files(kept) == whole
    assert "exists" in refusal(lambda: Writer(out, base, size_bytes=1))
    assert files(kept) == whole, "who is refused takes nothing away"
    out.rename(tmp_path / "moved")
    write_while(lambda: None, out, base, state)
    assert files(out) == whole and not partial_folder(out).exists()


def test_an_artefact_that_changed_meanwhile_is_not_overwritten(
    tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    out = write(tmp_path / "out", base, state)
    told = refusal(
        lambda: write_while(lambda: (out / "notes.txt").write_text("mine"), out, base, state, overwrite=True)
    )
    assert "is not what it was when the run began" in told
    assert files(out)["notes.txt"] == b"mine" and "model.safetensors" in files(out)


@pytest.mark.parametrize("error", [OutputError("no"), KeyboardInterrupt()])
def test_who_leaves_without_a_finished_block_leaves_nothing(
    error: BaseException, tmp_path: Path, base: Path, state: dict[str, Tensor]
) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        write_while(fails, tmp_path / "a" / "b" / "out", base, state)
    need = shutil.disk_usage(tmp_path).total * 10
    assert "are free" in refusal(lambda: Writer(tmp_path / "a" / "b" / "out", base, size_bytes=need))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
