"""Models with code of their own: run only if the user says so, compressed as any other, and loaded by plain
transformers with that code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    dynamic_module_utils,
)

from llmcompress import ModelError, compress, evaluate, plan, reproduce
from llmcompress.cli import app
from llmcompress.data.sources import DataSpec
from llmcompress.derivation import proof_cache
from llmcompress.io import own_code
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.model_config import load_config, skeleton
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.push import outgoing
from tests.artefacts import CPU, TOKENS, distance
from tests.bases import byte_tokenizer, save_base, staged_recipe, write_text
from tests.own_code import AUTO_MAP, FILES, MODEL, save_own_base

pytestmark = pytest.mark.usefixtures("short_runs", "modules")

RAN = "raise SystemExit('code of the base was run')"
NF4 = {"quantize": {"format": "nf4", "rounding": "gptq", "group_size": 32}}
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("llmcompress") for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
print(type(model).__name__, type(model.cloth.threads[0].weave).__name__)
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder into which transformers copies code, for the tests of this file."""
    place = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place))
        patch.setattr(sys, "path", [*sys.path])
        yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_own_base(tmp_path / "base")


def recipe(base: Path, *stages: Any) -> Any:
    return staged_recipe(write_text(base.parent / "text.txt"), base, *(stages or [NF4]))


def configure(folder: Path, file: str = "config.json", **fields: Any) -> None:
    told = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(told | fields))


def loaded(folder: Path) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return cast(PreTrainedModel, model.eval())


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    "stages",
    [
        [NF4],
        [{"quantize": {"format": "w8a8", "smooth": {}, "rotate": True}}],
        [{"quantize": {"format": "int8"}}],
        [{"prune": {"axis": ["ffn", "kv"], "keep": 0.5, "multiple": 1}}, {"quantize": {"format": "w8a16"}}],
        [{"prune": {"axis": "layer", "keep": 1}}, {"distill": {"steps": 2, "batch": 2}}],
    ],
)
def test_it_is_compressed_as_any_other(base: Path, stages: list[Any], tmp_path: Path) -> None:
    told, out = recipe(base, *stages), tmp_path / "out"
    assert plan(str(base), told, trust_remote_code=True).rows
    report = compress(str(base), told, str(out), trust_remote_code=True)
    assert report.own_code is True and json.loads((out / "report.json").read_text())["own_code"] is True
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert {file.name: file.read_text() for file in out.glob("*.py")} == FILES
    card = (out / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained(name, trust_remote_code=True)" in card
    assert 'from_pretrained(name, device_map="auto", trust_remote_code=True)' in card
    assert "The model has code of its own" in card
    with own_code.permission(True), torch.no_grad():
        own_code.trust(out)
        walked = torch.cat([*logits(DiskModel(out, CPU, quantized=True), TOKENS)])
        assert distance(loaded(out)(TOKENS).logits, walked) < 1e-2


@pytest.mark.slow
def test_plain_transformers_loads_it_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(str(base), recipe(base), str(out), trust_remote_code=True)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "own"), "HF_HUB_OFFLINE": "1"}
    files = [str(out), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *files], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["WeftForCausalLM", "Linear4bit"]
    with own_code.permission(True), torch.no_grad():
        own_code.trust(out)
        walked = torch.cat([*logits(DiskModel(out, CPU, quantized=True), TOKENS)])
    assert distance(torch.load(tmp_path / "logits.pt"), walked) < 1e-2  # the kernel rounds inputs


def test_it_is_compressed_in_memory_and_saved_with_its_code(base: Path, tmp_path: Path) -> None:
    told = recipe(base, {"prune": {"axis": "ffn", "keep": 0.5, "multiple": 1}})
    model, report = compress(str(base), told, trust_remote_code=True)
    assert report.own_code is True and model.config.ffn_dim == 80
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").glob("*.py")} == FILES.keys()
    assert loaded(tmp_path / "saved").config.ffn_dim == 80
    words = byte_tokenizer()
    with pytest.raises(ModelError, match=r"the model in memory has code of its own \(WeftForCausalLM\)"):
        compress(loaded(base), told, tmp_path / "out", tokenizer=words)
    again = compress(loaded(base), told, tmp_path / "out", tokenizer=words, trust_remote_code=True)
    assert again.compressed.perplexity == report.compressed.perplexity
    with torch.no_grad():
        assert distance(model(TOKENS).logits, loaded(tmp_path / "out")(TOKENS).logits) < 1e-5
    # who has loaded it has run its code, and nothing more is run
    assert compress(loaded(base), told, tokenizer=words)[1].own_code is True


def test_evaluate_and_reproduce_ask_too(base: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", recipe(base)
    report = compress(str(base), told, str(out), trust_remote_code=True)
    for ask in (
        lambda: evaluate(str(out), data=told.data),
        lambda: reproduce(str(out)),
        lambda: plan(str(base), told),
    ):
        with pytest.raises(
            ModelError, match=r"has code of its own \(modeling_weft.WeftForCausalLM\), which llmc"
        ):
            ask()
    spec: DataSpec = told.data
    found = evaluate(str(out), against=str(base), data=spec, trust_remote_code=True)
    assert found.kl_nats_mean == pytest.approx(report.fidelity.kl_nats_mean, rel=1e-6)
    assert reproduce(str(out), trust_remote_code=True).verdict == "bit-equal"


def test_it_is_pushed_with_its_code(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(str(base), recipe(base), str(out), trust_remote_code=True)
    (out / "other.py").write_text(RAN)
    files, _ = outgoing(out, "me/weft")
    assert {name for name in files if name.endswith(".py")} == FILES.keys()
    assert json.loads(bytes(files["config.json"]))["auto_map"] == AUTO_MAP


def test_without_the_option_it_is_refused_in_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        (base / name).write_text(RAN)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(base).to_yaml())
    for words in (
        ["run", file, "--out", tmp_path / "out"],
        ["plan", file],
        ["evaluate", base],
        ["run", file, "--base", base, "--out", tmp_path / "out"],
    ):
        monkeypatch.setattr(sys, "argv", ["llmcompress", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said == [
            f"error: {base} has code of its own (modeling_weft.WeftForCausalLM), which llmcompress does not "
            "run unasked; read it, then add --trust-remote-code"
        ]
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_it_with_the_option(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(recipe(base, {"prune": {"axis": "ffn", "keep": 0.5}}).to_yaml())
    for words in (["plan", file], ["run", file, "--out", out], ["reproduce", out]):
        monkeypatch.setattr(sys, "argv", ["llmcompress", *map(str, words), "--trust-remote-code"])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert not stopped.value.code
        said = capsys.readouterr().out
        assert words[0] != "run" or "trust_remote_code=True)." in said
        assert words[0] != "reproduce" or "bit-equal" in said


def test_a_recipe_allows_no_code(base: Path, tmp_path: Path) -> None:
    """Not for its base, and not for a teacher with other code, though the user allowed that of the base."""
    told = recipe(base)
    with pytest.raises(Exception, match="trust_remote_code"):
        type(told).model_validate(told.model_dump() | {"trust_remote_code": True})
    teacher = shutil.copytree(base, tmp_path / "teacher")
    stage = {"distill": {"teacher": str(teacher), "steps": 2, "batch": 2}}
    kept = recipe(base, {"prune": {"axis": "ffn", "keep": 0.5}}, stage)
    compress(str(base), kept, str(tmp_path / "same"), trust_remote_code=True)
    (teacher / "weft_gain.py").write_text(RAN)
    with pytest.raises(
        ModelError,
        match=r"teacher has code of its own .* and trust_remote_code=True is for that of the model",
    ):
        compress(str(base), kept, str(tmp_path / "out"), trust_remote_code=True)


def test_permission_ends_with_the_call(base: Path) -> None:
    plan(str(base), recipe(base), trust_remote_code=True)
    assert not own_code.is_given() and not own_code.runs(base)
    with pytest.raises(ModelError, match="does not run unasked"):
        load_config(base)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("../evil.Foo", r"names '../evil.Foo' in auto_map, which is no class in a file beside its config"),
        ("/tmp/evil.Foo", r"names '/tmp/evil.Foo' in auto_map, which is no class"),
        ("evil", "names 'evil' in auto_map, which is no class"),
        ("os.path.join", "names 'os.path.join' in auto_map, which is no class"),
        ("other/repo--evil.Foo", r"names code of another repository in auto_map \(other/repo--evil.Foo\)"),
        ("missing.Foo", "has no missing.py, which missing.Foo needs"),
        ("configuration_weft.Nothing", "can't be imported .*AttributeError"),
        ("weft_gain.Gain", "names weft_gain.Gain in auto_map, which is no PreTrainedModel"),
    ],
)
def test_an_odd_auto_map_is_refused_in_one_line(base: Path, named: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(RAN)
    configure(base, auto_map=AUTO_MAP | {"AutoModelForCausalLM": named})
    with pytest.raises(ModelError, match=why) as refused:
        compress(str(base), recipe(base), str(tmp_path / "out"), trust_remote_code=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("modeling_weft.py", "import a_package_that_nobody_has", "can't be imported .*pip install a_package"),
        ("modeling_weft.py", "def broken(", "can't be imported .*SyntaxError"),
        ("weft_gain.py", "1 / 0", "can't be imported .*ZeroDivisionError"),
        ("weft_gain.py", "from .inner.part import x", r"imports .inner.part, which is no file beside it"),
        ("weft_gain.py", "from ..evil import x", r"imports ..evil, which is no file beside it"),
        ("weft_gain.py", "from .lost import x", "has no lost.py, which weft_gain.py needs"),
    ],
)
def test_code_that_fails_is_refused_in_one_line(
    base: Path, file: str, text: str, why: str, tmp_path: Path
) -> None:
    (base / file).write_text(f"{text}\n")
    with pytest.raises(ModelError, match=why) as refused:
        compress(str(base), recipe(base), str(tmp_path / "out"), trust_remote_code=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_model_that_returns_no_states_is_not_distilled(base: Path, tmp_path: Path) -> None:
    (base / "modeling_weft.py").write_text(MODEL.replace("(last,) if output_hidden_states else None", "None"))
    with pytest.raises(
        ModelError, match="WeftForCausalLM returns no hidden states, which distill asks of it"
    ):
        compress(
            str(base),
            recipe(base, {"distill": {"steps": 2, "batch": 2}}),
            str(tmp_path / "out"),
            trust_remote_code=True,
        )


def test_code_that_lies_elsewhere_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "weft_gain.py").rename(tmp_path / "elsewhere.py")
    (base / "weft_gain.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(ModelError, match=r"weft_gain.py is a link that leaves the folder"):
        compress(str(base), recipe(base), str(tmp_path / "out"), trust_remote_code=True)


def test_other_code_of_the_same_name_is_proved_anew(tmp_path: Path) -> None:
    keys = set()
    for number, (name, old, new) in enumerate(
        (
            ("modeling_weft.py", "", ""),
            ("modeling_weft.py", "F.silu", "F.gelu"),
            ("weft_gain.py", "1 +", "2 +"),
        )
    ):
        folder = save_own_base(tmp_path / str(number))
        (folder / name).write_text((folder / name).read_text().replace(old, new) if old else FILES[name])
        with own_code.permission(True):
            own_code.trust(folder)
            keys.add(proof_cache.key_of(skeleton(load_config(folder), torch.float32)))
    assert len(keys) == 3
    folder = save_own_base(tmp_path / "as the first")
    with own_code.permission(True):
        own_code.trust(folder)
        assert proof_cache.key_of(skeleton(load_config(folder), torch.float32)) in keys


def test_a_run_does_not_resume_with_other_code(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.pipeline import disk_store

    keys = list[str]()
    key_of = disk_store._key

    def noted(*given: Any) -> str:
        keys.append(key_of(*given))
        return keys[-1]

    monkeypatch.setattr(disk_store, "_key", noted)
    told = recipe(base)
    for number, text in enumerate((MODEL, MODEL, MODEL.replace("F.silu", "F.gelu"))):
        (base / "modeling_weft.py").write_text(text)
        compress(str(base), told, str(tmp_path / f"out{number}"), trust_remote_code=True)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.slow
def test_a_known_type_is_native_without_the_option_and_its_own_with_it(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    whole = recipe(base)
    plain = compress(str(base), whole, str(tmp_path / "plain"))
    # the names that transformers has, as in repositories whose code it took in
    named = {
        "AutoConfig": "configuration_own.LlamaConfig",
        "AutoModelForCausalLM": "modeling_own.LlamaForCausalLM",
    }
    configure(base, auto_map=named)
    for name in ("configuration_own.py", "modeling_own.py"):
        (base / name).write_text(RAN)
    native = compress(str(base), whole, str(tmp_path / "native"))
    assert native.own_code is None and not list((tmp_path / "native").glob("*.py"))
    assert native.compressed.perplexity == plain.compressed.perplexity
    (base / "configuration_own.py").write_text(
        "import transformers\nclass LlamaConfig(transformers.LlamaConfig):\n    pass\n"
    )
    (base / "modeling_own.py").write_text(
        "import transformers\nfrom .configuration_own import LlamaConfig\n"
        "class LlamaForCausalLM(transformers.LlamaForCausalLM):\n    config_class = LlamaConfig\n"
    )
    own = compress(str(base), whole, str(tmp_path / "own"), trust_remote_code=True)
    assert own.own_code is True and type(loaded(tmp_path / "own")).__module__.startswith("transformers_mod")
    assert own.base.perplexity == plain.base.perplexity
    narrow = recipe(base, {"prune": {"axis": "ffn", "keep": 0.5}})
    for cut in (
        compress(str(base), narrow, trust_remote_code=True)[0],
        compress(loaded(base), narrow, tokenizer=byte_tokenizer())[0],
    ):
        assert type(cut).__module__.startswith("transformers_modules.base")
    assert type(cast(Any, AutoModelForCausalLM).from_pretrained(base)) is transformers.LlamaForCausalLM


def test_a_class_for_a_config_of_transformers_stays_that_models_alone(tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base", "llama"), save_base(tmp_path / "other", "llama")
    configure(base, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass OwnForCausalLM(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        found = super().forward(*args, **kwargs)\n"
        "        return found\n"
    )
    told = recipe(base, {"prune": {"axis": "ffn", "keep": 0.5}})
    compress(str(base), told, str(tmp_path / "out"), trust_remote_code=True)
    assert type(loaded(tmp_path / "out")).__name__ == "OwnForCausalLM"
    assert type(cast(Any, AutoModelForCausalLM).from_pretrained(other)) is transformers.LlamaForCausalLM
    with pytest.raises(ModelError, match="a class of its own, OwnForCausalLM, and a config of transformers"):
        compress(loaded(base), told, tokenizer=byte_tokenizer())


def test_a_tokenizer_with_code_of_its_own(base: Path, tmp_path: Path) -> None:
    configure(
        base,
        "tokenizer_config.json",
        tokenizer_class="WeftTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_weft.WeftTokenizer"]},
    )
    (base / "tokenization_weft.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class WeftTokenizer(PreTrainedTokenizerFast):\n"
        "    def weave(self):\n        return 'woven'\n"
    )
    out = tmp_path / "out"
    compress(str(base), recipe(base), str(out), trust_remote_code=True)
    assert (out / "tokenization_weft.py").read_bytes() == (base / "tokenization_weft.py").read_bytes()
    words = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert words.weave() == "woven"
    with own_code.permission(True):
        own_code.trust(out)
        assert tokenizer_of(out)("fact 1").input_ids == words("fact 1").input_ids


def test_nothing_is_written_beside_the_cache_of_modules(base: Path, modules: Path, tmp_path: Path) -> None:
    before = {*base.rglob("*")}
    compress(str(base), recipe(base), str(tmp_path / "out"), trust_remote_code=True)
    assert {*base.rglob("*")} == before
    assert not list((tmp_path / "out").rglob("*.pyc"))
    copies = {file.parents[1].name for file in modules.glob("transformers_modules/*/*/modeling_weft.py")}
    assert not copies & {"artifact", "joint"}  # the code of the base is imported once, not each copy
