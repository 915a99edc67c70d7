"""Bases whose small files say odd things: each goes on or is one line, in bounded time and memory, before the
first stage."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.errors import CompressError, ModelError
from llmcompress.io.checkpoint import DEEPEST, INDEX, Checkpoint
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.model_config import FLAGS, load_config
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.resolve import (
    calibration_data,
    config_of,
    find_base,
    require_computable,
    require_loadable,
)
from llmcompress.pipeline.run import run_recipe
from llmcompress.pipeline.stages import require_possible
from llmcompress.recipe.recipe import Recipe
from tests.bases import save_base, small_recipe, write_text
from tests.models import FAMILIES

pytestmark = pytest.mark.usefixtures("short_runs")

CPU = torch.device("cpu")
SECONDS = 60.0  # for one config, on a busy machine; the worst took 50 ms alone
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        0.5,
        1e10,
        10**12,
        2**70,
        -(2**70),
        10**400,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "nope",
        "\ud800",
        "a\0b",
        [],
        [0],
        ["nope"],
        [[]],
        {},
        {"nope": 1},
        {"rope_type": "nope"},
        {"factor": 0},
    ),
)
# Fields that the saved configs of the families leave out.
MORE = (
    *(
        "num_labels",
        "id2label",
        "rope_scaling",
        "rope_parameters",
        "quantization_config",
        "text_config",
        "torch_dtype",
    ),
    *(
        "per_layer_config",
        "layer_types",
        "pruned_heads",
        "is_encoder_decoder",
        "add_cross_attention",
        "to_dict",
        "is_causal",
    ),
    *(
        "transformers_weights",
        "fusion_config",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
    ),
)


def fields_of(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base / "config.json").read_text())
    return found


def configure(base: Path, **fields: Any) -> None:
    (base / "config.json").write_text(json.dumps({**fields_of(base), **fields}))


def mutants(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each field, also those of mappings in it, with each odd value."""
    for name in sorted({*fields, *MORE, *FLAGS}):
        for value in ODD:
            yield {**fields, name: value}
        if isinstance(fields.get(name), dict):
            for inner in fields[name]:
                for value in ODD:
                    yield {**fields, name: {**fields[name], inner: value}}


def start(base: Path, recipe: Recipe) -> None:
    """What a run does before its first stage."""
    found = find_base(str(base))
    config = config_of(found.folder, base=True)
    tokenizer = tokenizer_of(found.folder)
    Checkpoint.open(found.folder)
    model = DiskModel(found.folder, CPU)
    require_possible(recipe, model)
    require_computable(model)
    require_loadable(found.folder, config)
    calibration_data(model, recipe.data, tokenizer)


def outcome(base: Path, recipe: Recipe, fields: dict[str, Any]) -> str:
    """The one line that refuses a config, or nothing; whatever else is raised is said of the config that
    raised it."""
    (base / "config.json").write_text(json.dumps(fields))
    begin, said = time.monotonic(), ""
    for attempt in (lambda: plan_recipe(recipe, base=str(base)), lambda: start(base, recipe)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers warns of much
                attempt()
        except CompressError as error:
            said = str(error)
            # that one prints a table
            assert said.isprintable() and (len(said) < 700 or "is not a model family" in said), said
    assert time.monotonic() - begin < SECONDS
    return said


def hostile(families: tuple[str, ...], folder: Path, share: float) -> list[str]:
    """What was raised besides clear lines, by a share of all mutants of these families."""
    wrong, draw = list[str](), random.Random(0)
    recipe = small_recipe(write_text(folder / "facts.txt"))
    for family in families:
        base = save_base(folder / family, family)
        plain = fields_of(base)
        assert outcome(base, recipe, plain) == ""
        for fields in mutants(plain):
            if draw.random() < share:
                changed = {k: v for k, v in fields.items() if k not in plain or repr(plain[k]) != repr(v)}
                try:
                    outcome(base, recipe, fields)
                except Exception as error:
                    wrong.append(f"{family} {str(changed)[:120]}: {type(error).__name__}: {str(error)[:120]}")
    return wrong


@pytest.mark.slow
def test_a_config_with_one_odd_value_goes_on_or_is_one_line(tmp_path: Path) -> None:
    assert not hostile(("llama", "gpt2", "qwen3_moe"), tmp_path, share=0.008)


BOUNDED = """
import resource, sys
from pathlib import Path
from llmcompress.report.metrics import peak_memory_bytes
from tests.pipeline.test_odd_configs import hostile
resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (3000,) * 2)
wrong = hostile(tuple(sys.argv[2].split(",")), Path(sys.argv[1]), float(sys.argv[3]))
print(*wrong, sep="\\n")
print("peak", peak_memory_bytes() // 1024)  # ru_maxrss is also that of the process before exec: pytest's
sys.exit(bool(wrong))
"""


@pytest.mark.slow
def test_fields_with_odd_values_are_bounded_in_time_and_memory(tmp_path: Path) -> None:
    """A share of them that is drawn; LLMCOMPRESS_CAMPAIGN=100 is every field with every odd value."""
    share = 0.01 * float(os.environ.get("LLMCOMPRESS_CAMPAIGN", "1"))
    command = [sys.executable, "-c", BOUNDED, str(tmp_path), ",".join(FAMILIES), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 2 << 20  # KiB


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("odd") / "base")


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "base"))


def refusal(base: Path, text: Path | None = None) -> str:
    """The line with which the start of a run refuses a base."""
    recipe = small_recipe(text or write_text(base.parent / "facts.txt"))
    with pytest.raises(ModelError) as refused:
        start(base, recipe)
    return str(refused.value)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "siluu"}, "siluu"),
    ({"architectures": -1}, "architectures are no list"),
    ({"rope_parameters": {"rope_type": "nope", "rope_theta": 10000.0}}, "nope"),
    ({"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000, which no model has"),
    ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000, and the files hold"),
    ({"num_hidden_layers": 0}, "num_hidden_layers 0, which is no size"),
    ({"vocab_size": 2**70}, "vocab_size of 71 bits, which no model has"),
    (
        {"vocab_size": 100_000},
        "vocab_size is 100000, and the files hold no tensor with more than 320 rows or columns",
    ),
    ({"head_dim": -1}, "head_dim -1, which is no size"),
    ({"pad_token_id": 10**12}, "pad_token_id of 40 bits, which no model has"),
    ({"pad_token_id": 100_000}, "builds no model of this config.json"),
    ({"num_labels": 10**9}, "num_labels 1000000000, which no model has"),
    ({"to_dict": 1}, "a field to_dict, which is no fact of a model"),
    ({"dtype": "int8"}, "dtype 'int8'; correct it to one of"),
    ({"dtype": "nope"}, "dtype 'nope'; correct it to one of"),
    ({"quantization_config": {}}, "quantization_config is empty"),
    ({"add_cross_attention": True}, "reads an encoder"),
    ({"is_causal": False}, "is_causal: false"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights; take the field out"),
    ({"text_config": {"model_type": "llama"}}, "transformers builds no model of this config.json"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields)[:40] for fields, _ in REFUSED])
def test_a_config_of_which_no_model_can_be_made_names_the_field(
    fields: dict[str, Any], message: str, base: Path
) -> None:
    configure(base, **fields)
    assert message in refusal(base)


SWITCHES: list[dict[str, Any]] = [
    {"return_dict": False},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"torchscript": True},
    {"use_cache": False},
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": "flash_attention_2"},
]


def test_flags_that_change_what_a_forward_returns_change_no_number(base: Path) -> None:
    tokens = torch.arange(12).view(1, -1)
    plain = torch.cat(list(logits(DiskModel(base, CPU), tokens)))
    sound = fields_of(base)
    for flags in SWITCHES:
        (base / "config.json").write_text(json.dumps({**sound, **flags}))
        require_loadable(base, load_config(base))
        assert torch.equal(torch.cat(list(logits(DiskModel(base, CPU), tokens))), plain), flags


def test_an_artefact_of_a_base_with_flags_loads_and_answers_as_others_do(base: Path, tmp_path: Path) -> None:
    configure(
        base,
        return_dict=False,
        use_cache=False,
        output_hidden_states=True,
        _attn_implementation="flash_attention_2",
    )
    report = run_recipe(
        small_recipe(write_text(tmp_path / "facts.txt"), base, rounding="nearest"), tmp_path / "out"
    )
    assert report.base.tokens_per_s and report.compressed.tokens_per_s
    assert not FLAGS.keys() & {k for k, v in fields_of(tmp_path / "out").items() if v != FLAGS.get(k, v)}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(8).view(1, -1))
    assert (
        found.logits.shape == (1, 8, 256)
        and found.hidden_states is None
        and found.past_key_values is not None
    )


NESTED = {
    "lists": b"[" * 200_000,
    "mappings": b'{"a":' * 100_000,
    "sound but deep": b'{"a":' * (DEEPEST + 2) + b"1" + b"}" * (DEEPEST + 2),
    "list in it": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    "long number": b'{"a": ' + b"9" * 100_000 + b"}",
    "bytes": b"\xff\xfe\x00",
    "nothing": b"",
}


@pytest.mark.parametrize("case", NESTED)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        INDEX,
    ],
)
def test_json_that_is_too_deep_is_one_line_whatever_file_it_is_in(name: str, case: str, base: Path) -> None:
    (base / name).write_bytes(NESTED[case])
    if name == INDEX:
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    assert f"{name} is " in refusal(base)


def test_a_file_that_is_far_too_large_is_not_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.io.checkpoint.LARGEST", 1 << 20)
    with (base / "config.json").open("r+b") as file:
        file.truncate(1 << 34)  # a hole: it takes no room
    assert "config.json has more than 1048576 bytes" in refusal(base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


def without_metadata(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    del index["metadata"]
    (base / INDEX).write_text(json.dumps(index))


def renamed(name: str) -> Callable[[Path], None]:
    def rename(base: Path) -> None:
        index = json.loads((base / INDEX).read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        (base / INDEX).write_text(json.dumps(index))

    return rename


def truncated_index(base: Path) -> None:
    (base / INDEX).write_bytes((base / INDEX).read_bytes()[:200])


def shard_that_is_a_folder(base: Path) -> None:
    shard = min(base.glob("model-*.safetensors"))
    shard.unlink()
    shard.mkdir()


def header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    def write(base: Path) -> None:
        shard = min(base.glob("model-*.safetensors"))
        shard.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64))

    return write


def odd_dtype(name: str) -> Callable[[Path], None]:
    return header(
        json.dumps(
            {"a": {"dtype": name, "shape": [8], "data_offsets": [0, 64 if name == "U64" else 8]}}
        ).encode()
    )


def empty_shard(base: Path) -> None:
    min(base.glob("model-*.safetensors")).write_bytes(b"")


TWICE = (
    b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
    b'"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'
)
DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("no metadata", without_metadata, "has no metadata, which from_pretrained asks for"),
    ("truncated index", truncated_index, "is not JSON"),
    ("truncated name", renamed("model-00001-of-"), "has no weight_map of file names"),
    ("pickle", renamed("pytorch_model.bin"), "has no weight_map of file names"),
    ("parent", renamed("../base/model-00001-of-00002.safetensors"), "has no weight_map of file names"),
    ("parent alone", renamed(".."), "has no weight_map of file names"),
    ("absolute", renamed("/etc/model.safetensors"), "has no weight_map of file names"),
    ("long", renamed("x" * 5000 + ".safetensors"), "has no weight_map of file names"),
    ("null byte", renamed("a\0.safetensors"), "has no weight_map of file names"),
    ("folder", shard_that_is_a_folder, "lacks 1 of the files its index names"),
    ("empty", empty_shard, "is truncated or damaged"),
    ("length beyond the file", header(b"{}", 1 << 40), "is truncated or damaged"),
    ("largest length", header(b"{}", 2**64 - 1), "is truncated or damaged"),
    ("deep header", header(b'{"a":' * 50_000), "is truncated or damaged"),
    ("a name twice", header(TWICE), "is truncated or damaged"),
    ("F8_E8M0", odd_dtype("F8_E8M0"), ""),
    ("U64", odd_dtype("U64"), ""),
    ("no such dtype", odd_dtype("F7"), "is truncated or damaged"),
]


@pytest.mark.parametrize(
    ("damage", "message"), [entry[1:] for entry in DAMAGED], ids=[entry[0] for entry in DAMAGED]
)
def test_damaged_weight_files_are_one_line(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", max_shard_size="300KB")
    assert (base / INDEX).is_file()
    damage(base)
    assert message in refusal(base)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_tensors_of_a_multimodal_model_under_a_text_config_are_named(prefix: str, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    assert f"the tensors of a multimodal one ({prefix}" in refusal(base)


def test_a_base_that_transformers_can_not_load_is_refused_before_the_first_stage(base: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": "many"}))
    assert "is not loaded by transformers" in refusal(base)
