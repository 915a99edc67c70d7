"""The command line: what each command prints and writes, and one clear line with the right exit code for
whatever is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.cli.app import err, main, out
from llmcompress.formats.integer import IntegerLayout
from llmcompress.recipe import shipped
from tests.bases import save_base, small_recipe, write_text
from tests.clients import Result, shell
from tests.exports.artefacts import written
from tests.report.test_search_page import facts

COMMANDS = (
    "advise",
    "run",
    "plan",
    "evaluate",
    "report",
    "compare",
    "push",
    "export",
    "reproduce",
    "recipes",
    "doctor",
    "schema",
)
EVALUATION = ["model", "perplexity", "perplexity_ci95", "tokens", "size_bytes", "tokens_per_s"]
AGAINST = ["kl_nats_mean", "kl_nats_p99", "top1_agreement"]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process as the shell would."""
    monkeypatch.setattr(out, "width", 200)
    monkeypatch.setattr(err, "width", 200)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmcompress", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        else:
            code = 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a text, a recipe, and the artefact that the shell made of them."""
    folder = tmp_path_factory.mktemp("shelf")
    save_base(folder / "base", num_hidden_layers=2)
    text = write_text(folder / "facts.txt")
    (folder / "recipe.yaml").write_text(small_recipe(text).to_yaml())
    done = shell({}, "run", folder / "recipe.yaml", "--base", folder / "base", "--out", folder / "out")
    assert done.code == 0, done.err
    (folder / "printed.txt").write_text(done.out)
    return folder


def test_run_prints_the_report_and_says_where_the_result_lies(shelf: Path) -> None:
    printed = (shelf / "printed.txt").read_text()
    for words in (
        "KL(base || compressed), mean",
        "bytes on disk",
        "kept as they were",
        "lm_head",
        "quantize",
    ):
        assert words in printed
    assert f"The compressed model lies in {shelf / 'out'}" in " ".join(printed.split())
    assert (shelf / "out" / "model.safetensors").is_file() and (shelf / "out" / "report.json").is_file()


def test_report_prints_what_run_printed_and_writes_the_page_anew(shelf: Path, cli: Cli) -> None:
    page = shelf / "out" / "report.html"
    before = page.read_bytes()
    page.write_text("something else")
    done = cli("report", shelf / "out")
    assert done.code == 0 and not done.err
    *printed, last = done.out.splitlines()
    assert printed == (shelf / "printed.txt").read_text().splitlines()[: len(printed)]
    assert last == f"page: {page}" and page.read_bytes() == before


def test_report_opens_the_page_in_a_browser(shelf: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opens(address: str) -> bool:
        opened.append(address)
        return True

    monkeypatch.setattr("webbrowser.open", opens)
    assert cli("report", shelf / "out", "--open").code == 0
    assert opened == [(shelf / "out" / "report.html").resolve().as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert "no browser can be started here" in cli("report", shelf / "out", "--open").err


def test_a_page_that_can_not_be_written_is_a_warning_unless_it_is_to_be_opened(
    shelf: Path, cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(shelf / "out", tmp_path / "made")
    (tmp_path / "made" / "report.html").unlink()
    (tmp_path / "made" / "report.html").mkdir()
    done = cli("report", tmp_path / "made")
    assert done.code == 0 and "KL(base || compressed), mean" in done.out
    assert done.err.startswith("warning: ") and "report.html can't be written" in done.err
    refused(cli("report", tmp_path / "made", "--open"), "report.html can't be written", tmp_path)


def test_compare_prints_artefacts_by_size_and_writes_a_page(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    other = Path(shutil.copytree(shelf / "out", tmp_path / "other"))
    told = json.loads((other / "report.json").read_text())
    told["compressed"]["size_bytes"] += 1000
    told["fidelity"]["kl_nats_mean"] *= 2
    (other / "report.json").write_text(json.dumps(told))
    done = cli("compare", other, shelf / "out", "--html", tmp_path / "both.html")
    assert done.code == 0 and not done.err
    rows = [line.split() for line in done.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[-1] for row in rows] == [str(shelf / "out"), str(other)]
    assert "1" in rows[1][8:-3] and "1" not in rows[0][8:-3]  # the larger one is beaten by the first
    assert done.out.splitlines()[-1] == f"page: {tmp_path / 'both.html'}"
    assert "2 artefacts compared" in (tmp_path / "both.html").read_text()


def test_advise_prints_recipes_that_fit_and_the_commands_to_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("advise", "demo", "--size", "48%", "--for", "vllm")
    assert done.code == 0, done.err
    assert "1 w4a16" in done.out and "nf4-learned-tuned" in done.out
    assert "llmcompress run w4a16 --base demo --out demo-w4a16 && llmcompress export demo-w4a16 " in done.out
    assert "llmcompress run nf4-learned-tuned --base demo --out demo-nf4-learned-tuned\n" in done.out
    assert "w8a8" not in done.out
    done = cli("advise", "demo", "--for", "llama.cpp")
    assert "--to gguf" in done.out and "nf4" not in done.out
    found = json.loads(cli("advise", "demo", "--size", "48%", "--json").out)
    assert found["advice"][0]["command"] == "llmcompress search demo --size 48%"
    assert found["advice"][1]["recipe"] == "nf4-learned-tuned"
    assert found["size_bytes"] > found["advice"][1]["size_bytes"] > 0
    refused(cli("advise", "demo", "--size", "1kB"), "fits in --size 1kB; give more bytes", tmp_path)
    refused(cli("advise", tmp_path), "has no config.json", tmp_path)


def test_what_can_not_be_compared_is_one_clear_line(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    refused(cli("compare", shelf / "out"), "a comparison is of two artefacts or more", tmp_path)
    refused(cli("compare", shelf / "out", shelf / "out"), "is given twice", tmp_path)
    refused(cli("compare", shelf / "out", shelf / "base"), "report.json can't be read", tmp_path)
    refused(cli("compare", shelf / "out", "no such thing"), "is no folder", tmp_path)
    html = ("--html", tmp_path / "none" / "page.html")
    other = shutil.copytree(shelf / "out", tmp_path / "other")
    refused(cli("compare", shelf / "out", other, *html), "give another --html file", tmp_path)


def test_a_search_is_within_one_kind_of_budget(cli: Cli, tmp_path: Path) -> None:
    refused(
        cli("search", "demo"), "search needs --size, like --size 40%, or --frontier, or --memory", tmp_path
    )
    both = ("search", "demo", "--size", "40%", "--tokens-per-s", "2x")
    refused(cli(*both), "got --size and --tokens-per-s; give one of them", tmp_path)
    refused(cli("search", "demo", "--frontier", "--memory", "1GB"), "got --size and --memory", tmp_path)
    refused(
        cli("search", "demo", "--size", "40%", "--context", "9"), "--memory counts; leave it out", tmp_path
    )


def test_the_report_of_a_search_is_printed_and_its_page_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(facts(context=512, counted="memory").model_dump_json())
    done = cli("report", tmp_path)
    assert done.code == 0, done.err
    assert "in memory within 25%" in done.out and "in memory: 2.4 MB, 24.00 % of the base" in done.out
    assert f"page: {tmp_path / 'search.html'}" in done.out.replace("\n", "")
    assert "with the keys and values of 512 tokens" in (tmp_path / "search.html").read_text()
    (tmp_path / "search.json").write_text("{}")
    refused(cli("report", tmp_path), "search again to write it anew", tmp_path)


def test_plan_says_what_to_expect_and_runs_nothing(shelf: Path, cli: Cli) -> None:
    before = sorted(shelf.rglob("*"))
    done = cli("plan", shelf / "recipe.yaml", "--base", shelf / "base")
    assert done.code == 0 and not done.err
    for words in (
        "to expect",
        "quantize (nf4, gptq)",
        "14 linears are quantised, 1 kept",
        "8 sequences of 24 tokens",
    ):
        assert words in done.out
    assert sorted(shelf.rglob("*")) == before


def test_plan_takes_the_best_effort_that_fits_in_a_time(shelf: Path, cli: Cli) -> None:
    arguments = ("plan", shelf / "recipe.yaml", "--base", shelf / "base")
    done = cli(*arguments, "--time", "1000h")
    assert done.code == 0 and "quantize (nf4, learned)" in done.out
    assert done.err.startswith("in 1000 h 00 min: effort best (fast about ") and "--effort best" in done.err
    assert len(done.err.splitlines()) == 1
    done = cli(*arguments, "--effort", "fast")
    assert done.code == 0 and not done.err and "effort fast: stages.0.quantize.rounding gptq" in done.out


def test_run_takes_an_effort(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = {"data": {"source": str(shelf / "facts.txt"), "length": 16}, "stages": ["quantize"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("--base", shelf / "base", "--out", tmp_path / "out", "--effort", "fast")
    done = cli("run", tmp_path / "recipe.yaml", *arguments)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "out" / "report.json").read_text())["effort"]
    assert told == {
        "level": "fast",
        "chosen": {"data.samples": 32, "stages.0.quantize.rounding": "gptq"},
    }
    assert "effort fast: data.samples 32" in " ".join(done.out.split())


def test_run_takes_the_best_effort_that_fits_in_a_time(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    data = {"source": str(shelf / "facts.txt"), "samples": 4, "length": 16}
    recipe = {"data": data, "stages": [{"quantize": {"rounding": "nearest"}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("--base", shelf / "base", "--out", tmp_path / "out", "--time", "1000h")
    done = cli("run", tmp_path / "recipe.yaml", *arguments)
    assert done.code == 0, done.err
    assert "in 1000 h 00 min: effort best (fast about " in done.err
    assert "effort: best" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--time", "30"), "--time 30 is no time; give one like 30m, 2h, 90s or 1h30m"),
        (("--time", "0m"), "--time 0m is no time"),
        (("--time", "1s"), "no effort fits in --time 1.0 s (fast about "),
        (("--time", "30m", "--effort", "fast"), "--effort and --time both decide the effort; give one"),
        (("--effort", "most"), "--effort is most; use fast, balanced, best"),
    ],
)
def test_a_wrong_effort_or_time_is_one_clear_line(
    command: str, given: tuple[str, ...], message: str, shelf: Path, cli: Cli, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out") if command == "run" else ()
    arguments = (shelf / "recipe.yaml", "--base", shelf / "base", *out)
    refused(cli(command, *arguments, *given), message, tmp_path)


def test_evaluate_writes_the_keys_of_the_contract(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    data = ("--data", shelf / "facts.txt", "--length", 24, "--samples", 4)
    done = cli("evaluate", shelf / "out", *data, "--json", tmp_path / "alone.json")
    assert done.code == 0 and "perplexity" in done.out
    alone: dict[str, Any] = json.loads((tmp_path / "alone.json").read_text())
    assert list(alone) == EVALUATION and alone["tokens"] == 4 * 23
    done = cli(
        "evaluate", shelf / "out", "--against", shelf / "base", *data, "--json", tmp_path / "both.json"
    )
    both: dict[str, Any] = json.loads((tmp_path / "both.json").read_text())
    assert done.code == 0 and list(both) == [*EVALUATION, *AGAINST]
    report = json.loads((shelf / "out" / "report.json").read_text())
    assert both["kl_nats_mean"] == pytest.approx(report["fidelity"]["kl_nats_mean"], rel=1e-6)
    assert (
        both["perplexity"]
        == alone["perplexity"]
        == pytest.approx(report["compressed"]["perplexity"], rel=1e-6)
    )


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"llmcompress {metadata.version('llmcompress')}\n", "")


def test_help_is_there_for_every_command(cli: Cli) -> None:
    assert all(command in cli("--help").out for command in COMMANDS)
    assert all(cli(command, "--help").code == 0 for command in COMMANDS)


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_name_wins(
    shelf: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("plan", "nf4-gptq", "--base", shelf / "base", "--data", "{source: python-docs, samples: 3}")
    assert done.code == 0 and not done.err
    assert "quantize (nf4, gptq)" in done.out and "3 sequences of" in done.out
    (tmp_path / "nf4-gptq").write_text("stages: [{quantize: {format: fp4}}]")
    done = cli("plan", "nf4-gptq", "--base", shelf / "base")
    assert done.code == 0 and "quantize (fp4, gptq)" in done.out
    assert (
        done.err
        == "warning: recipe nf4-gptq: taken from the file of that name here, not the shipped recipe\n"
    )
    refused(cli("plan", "nf4-gtpq", "--base", shelf / "base"), "did you mean nf4-gptq?", tmp_path)


@pytest.mark.slow
def test_recipes_lists_all_by_purpose(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("recipes")
    assert done.code == 0 and not done.err
    assert all(f" {name} " in done.out for name in shipped.names())
    monkeypatch.setattr(out, "width", 80)
    assert all(f" {name} " in cli("recipes").out for name in shipped.names()), "names are not divided"
    assert "4 bits per weight" in done.out and "bitsandbytes" in done.out
    listed = json.loads(cli("recipes", "--json").out)
    assert sorted(entry["name"] for entry in listed) == list(shipped.names())
    assert {"purpose", "does", "leaves", "loads_with", "measured", "stages"} <= listed[0].keys()


def test_doctor_prints_what_its_json_says(cli: Cli) -> None:
    facts = json.loads(cli("doctor", "--json").out)
    assert facts.keys() == {"versions", "platform", "cpu", "compiler", "gpus", "kernels"}
    done = cli("doctor")
    assert done.code == 0 and not done.err
    assert all(kernel["runs"] in " ".join(done.out.split()) for kernel in facts["kernels"])


def test_schema_prints_json(cli: Cli) -> None:
    assert json.loads(cli("schema").out)["title"] == "llmcompress recipe"


@pytest.mark.slow
def test_progress_of_a_run_that_is_not_on_a_terminal_is_plain_lines(shelf: Path, tmp_path: Path) -> None:
    arguments = ("run", shelf / "recipe.yaml", "--base", shelf / "base", "--out", tmp_path / "out")
    lines = [
        line for line in shell({}, *arguments).err.splitlines() if line.startswith("quantize (nf4, gptq): ")
    ]
    assert lines[0].startswith("quantize (nf4, gptq): 1 of 2, ") and " left" in lines[0]
    assert lines[-1].startswith("quantize (nf4, gptq): 2 of 2, ") and lines[-1].endswith(" elapsed")


def refused(done: Result, message: str, folder: Path, *, code: int = 2) -> None:
    assert done.code == code, done
    assert not done.out, done.out
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.err
    assert "Traceback" not in done.err
    # nothing at --out, nothing half-written beside it
    assert not (folder / "out").exists() and not list(folder.glob(".*"))


WRONG_RECIPES = {
    "unknown key": (
        "stages: [{quantize: {group_siz: 64}}]",
        "stages.0.quantize.group_siz: unknown key; did you mean group_size?",
    ),
    "wrong type": ("stages: [{quantize: {double_quant: 7}}]", "stages.0.quantize.double_quant"),
    "impossible value": ("stages: [{quantize: {group_size: 48}}]", "stages.0.quantize.group_size"),
    "unknown stage": ("stages: [quantise]", "did you mean quantize?"),
    "no base": ("stages: [quantize]", "the recipe names no base; add base: to it or pass --base"),
    "missing base": ("{base: ./nonesuch, stages: [quantize]}", "base ./nonesuch is no folder"),
    "empty": ("", "holds nothing, not a mapping"),
    "markup": ("{'[red]x[/]': 1, stages: [quantize]}", "[red]x[/]: unknown key"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_a_wrong_recipe_is_one_clear_line(command: str, case: str, cli: Cli, tmp_path: Path) -> None:
    text, message = WRONG_RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    out = ["--out", tmp_path / "out"] if command == "run" else []
    refused(cli(command, tmp_path / "recipe.yaml", *out), message, tmp_path)


def configure(base: Path, **fields: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **fields}))


def no_causal_model(base: Path) -> None:
    configure(base, architectures=["LlamaForSequenceClassification"])


def nan(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def nan_outside_the_blocks(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def truncated(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


def empty_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"")


def pickle_only(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def quantised(base: Path) -> None:
    configure(base, quantization_config={"quant_method": "gptq", "bits": 4})


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def half_a_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "lla')


def unknown_kind(base: Path) -> None:
    configure(base, model_type="nonesuch", architectures=["NonesuchForCausalLM"])


def unknown_family(base: Path) -> None:
    configure(base, model_type="hrm_text", architectures=["HrmTextForCausalLM"])


def senseless_config(base: Path) -> None:
    configure(base, hidden_size="wide")


def missing_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def other_shapes(base: Path) -> None:
    configure(base, intermediate_size=640)


def no_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")


def tokenizer_with_code(base: Path) -> None:
    fields = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    (base / "evil.py").write_text("raise SystemExit('code of the base was run')")
    (base / "tokenizer.json").unlink()


def model_with_code(base: Path) -> None:
    configure(
        base, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )
    (base / "evil.py").write_text("raise SystemExit('code of the base was run')")


WRONG_BASES: list[tuple[Callable[[Path], None], str]] = [
    (no_causal_model, "is no causal language model (LlamaForSequenceClassification)"),
    (nan, "model.layers.1.mlp.up_proj.weight: 1 of 20480 values are NaN or infinite"),
    (nan_outside_the_blocks, "values are NaN or infinite"),
    (truncated, "is truncated or damaged"),
    (empty_weights, "is truncated or damaged"),
    (pickle_only, "has its weights in a pickle (pytorch_model.bin)"),
    (no_weights, "has no model.safetensors"),
    (quantised, "is quantised already (gptq)"),
    (no_config, "has no config.json"),
    (half_a_config, "is not JSON"),
    (unknown_kind, "nonesuch"),
    (unknown_family, "a hrm_text model can't be compressed layer by layer"),
    (senseless_config, "hidden_size"),
    (missing_tensor, "has no tensor for model.layers.1.mlp.up_proj.weight (1 missing)"),
    (other_shapes, "does not fit its config.json"),
    (no_tokenizer, "has no tokenizer that loads"),
    (broken_tokenizer, "has no tokenizer that loads"),
    (tokenizer_with_code, "has code of its own (evil.Evil), which llmcompress does not run unasked"),
    (model_with_code, "has code of its own (evil.Evil), which llmcompress does not run unasked"),
]


@pytest.mark.parametrize(
    ("damage", "message"), WRONG_BASES, ids=[damage.__name__ for damage, _ in WRONG_BASES]
)
def test_a_wrong_base_is_one_clear_line(
    damage: Callable[[Path], None], message: str, shelf: Path, cli: Cli, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(shelf / "base", tmp_path / "base"))
    damage(base)
    files = {file: file.read_bytes() for file in base.iterdir()}
    done = cli("run", shelf / "recipe.yaml", "--base", base, "--out", tmp_path / "out")
    refused(Result(done.code, "", last_line(done.err)), message, tmp_path)
    assert {file: file.read_bytes() for file in base.iterdir()} == files


def last_line(text: str) -> str:
    """Without the lines of progress before it."""
    lines = text.replace("\r", "\n").splitlines()
    assert all(" elapsed" in line or not line or line.startswith("Loading weights") for line in lines[:-1]), (
        text
    )
    return lines[-1] if lines else ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nonesuch.txt"), "nonesuch.txt does not exist"),
        (("--data", "./nonesuch"), "does not exist"),
        (("--device", "abacus"), "there is no device abacus here"),
        (("--out", "/"), "is the root of a disk"),
        (("--out", "recipe.yaml"), "is a file; give the name of a folder"),
        (("--out", "base"), "is or holds the base"),
        (("--out", "old"), "exists; choose another --out or pass --overwrite"),
        (("--out", "old", "--overwrite"), "holds other things than a model"),
        (("--out", "base", "--overwrite"), "is or holds the base"),
        (("--out", "recipe.yaml/out"), "can't write"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    arguments: tuple[str, ...],
    message: str,
    shelf: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(shelf / "recipe.yaml", tmp_path)
    shutil.copytree(shelf / "base", tmp_path / "base")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "letter.txt").write_text("Dear")
    monkeypatch.chdir(tmp_path)
    done = cli(
        "run",
        "recipe.yaml",
        "--base",
        "base",
        *(() if "--out" in arguments else ("--out", "out")),
        *arguments,
    )
    refused(done, message, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "old", "recipe.yaml"}


def test_an_empty_text_and_a_short_one_are_one_clear_line(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    for content, message in (("", "is empty"), ("too short " * 20, "fills")):
        (tmp_path / "text.txt").write_text(content)
        given = ("--base", shelf / "base", "--out", tmp_path / "out", "--data", tmp_path / "text.txt")
        refused(cli("run", shelf / "recipe.yaml", *given), message, tmp_path)


def test_a_recipe_that_is_no_file_is_one_clear_line(cli: Cli, tmp_path: Path) -> None:
    for name in (tmp_path / "none.yaml", tmp_path):
        refused(cli("run", name, "--out", tmp_path / "out"), "no recipe file", tmp_path)


def test_a_report_that_is_not_there_is_one_clear_line(cli: Cli, tmp_path: Path) -> None:
    refused(cli("report", tmp_path), "report.json can't be read", tmp_path)
    (tmp_path / "report.json").write_text("{}")
    refused(cli("report", tmp_path), "is not a report of llmcompress", tmp_path)


def test_what_can_not_be_evaluated_is_one_clear_line(shelf: Path, cli: Cli, tmp_path: Path) -> None:
    text = ("--data", shelf / "facts.txt", "--length", 24, "--samples", 2)
    refused(cli("evaluate", tmp_path / "none", *text), "is no folder", tmp_path)
    refused(cli("evaluate", shelf / "base", "--against", tmp_path, *text), "has no config.json", tmp_path)
    refused(cli("evaluate", shelf / "base", "--data", tmp_path / "none.txt"), "does not exist", tmp_path)
    refused(
        cli("evaluate", shelf / "base", *text[:2], "--length", 4096), "more than the 96 positions", tmp_path
    )
    done = cli("evaluate", shelf / "base", *text, "--json", tmp_path / "none" / "a.json")
    assert done.code == 2 and last_line(done.err).startswith("error: can't write")


@pytest.mark.slow
def test_a_shell_sees_the_exit_codes(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("stages: [{quantize: {group_siz: 64}}]")
    refused(
        shell({}, "run", tmp_path / "wrong.yaml", "--out", tmp_path / "out"),
        "did you mean group_size?",
        tmp_path,
    )
    strict = (shelf / "recipe.yaml").read_text() + "accept: {kl_nats: 1.0e-9}\n"
    (tmp_path / "strict.yaml").write_text(strict)
    done = shell(
        {"COLUMNS": "40"},
        "run",
        tmp_path / "strict.yaml",
        "--base",
        shelf / "base",
        "--out",
        tmp_path / "out",
    )
    assert done.code == 3 and "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert (
        line.startswith("error: the result misses accept: kl_nats is ") and "at most 1e-09 was asked" in line
    )
    assert not (tmp_path / "out").exists() and list(
        (tmp_path / ".out.partial" / "journal").glob("quantize.*")
    )


FULL_DISK = """
import resource, signal, sys
from llmcompress.cli.app import err, main, out
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.slow
# bytes of one file: not even a layer fits, or not the whole artefact
@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_disk_that_is_full_half_way_is_one_clear_line(limit: int, shelf: Path, tmp_path: Path) -> None:
    arguments = [
        "run",
        str(shelf / "recipe.yaml"),
        "--base",
        str(shelf / "base"),
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-c", FULL_DISK, str(limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: can't write") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial" / "artifact").exists()


def test_export_says_what_became_of_the_matrices(cli: Cli, tmp_path: Path) -> None:
    written(tmp_path / "small", IntegerLayout("w8a16"))
    done = cli("export", tmp_path / "small", "--to", "compressed-tensors", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "compressed-tensors: 308 kB -> 309 kB" in done.out
    assert "w8a16 -> pack-quantized int8, one scale per row, inputs as they are" in done.out
    assert f"The export lies in {tmp_path / 'out'}." in done.out
    refused = cli("export", tmp_path / "small", "--to", "onnx", "--out", tmp_path / "other")
    assert refused.code == 2 and "--to onnx is no target; give one of: " in refused.err
