"""Layers that share weights: one tensor on disk and in memory, what was measured, and what may follow."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from llmcompress.data.calibration import load_data
from llmcompress.errors import AcceptError, ModelError
from llmcompress.formats.four_bit import FourBitLinear
from llmcompress.formats.integer_linear import IntegerLinear
from llmcompress.formats.low_rank import FactoredLinear
from llmcompress.io.checkpoint import Checkpoint
from llmcompress.io.output_folder import partial_folder
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.modeling.layerwise import InMemoryModel
from llmcompress.modeling.sequential import logits
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from tests.artefacts import CPU, TOKENS, assert_same_in_memory, distance, live, load, measured, weights_of
from tests.bases import VOCABULARY, byte_tokenizer, known, save_base, staged_recipe, write_text
from tests.models import FAMILIES, pico

pytestmark = pytest.mark.usefixtures("short_runs")

PARTS: dict[str, tuple[str, ...]] = {
    "ffn": ("ffn",),
    "attention": ("attention",),
    "both": ("attention", "ffn"),
}
# plain, norms of their own, fused, Conv1D, biases
MIXED_UP = ("llama", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def share(*pairs: list[int], **settings: Any) -> dict[str, Any]:
    return {"share": {"pairs": list(pairs) or [[0, 1]], "parts": ["ffn"], "steps": 3, **settings}}


def recipe(text: Path, base: Path, *stages: dict[str, Any], samples: int = 4) -> Recipe:
    return staged_recipe(text, base, *(stages or (share(),)), samples=samples, length=24)


def linears(family: str, *parts: str, **config: Any) -> list[str]:
    """The linears of a layer that run along the axis of a part, by name."""
    model = pico(family, **config)
    source = InMemoryModel(model.config, model.state_dict(), CPU)
    of = (
        {"attention": "attn", "ffn": "mlp"}
        if family != "gpt_neox"
        else {"attention": "attention.", "ffn": "mlp"}
    )
    names = [name for name in source.anatomy.linears if any(of[part] in name for part in parts)]
    return names + (
        [name for name in source.anatomy.linears if "fc" in name]
        if family == "opt" and "ffn" in parts
        else []
    )


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    source = InMemoryModel(
        pico(model.config.model_type).config, pico(model.config.model_type).state_dict(), CPU
    )
    return list(model.get_submodule(source.anatomy.layers).children())


def shared_names(model: PreTrainedModel, a: int = 0, b: int = 1) -> set[str]:
    """The parameters that are one in two layers."""
    one, other = (dict(layers_of(model)[index].named_parameters(remove_duplicate=False)) for index in (a, b))
    return {name for name in one if other.get(name) is one[name]}


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def alike(family: str, *parts: str, source: int = 0, target: int = 1, **config: Any) -> PreTrainedModel:
    """A model one of whose layers has the weights of another one's part."""
    model = pico(family, vocab_size=VOCABULARY, **config)
    one, other = (layers_of(model)[index] for index in (source, target))
    for name in linears(family, *parts, **config):
        other.get_parameter(f"{name}.weight").data.copy_(one.get_parameter(f"{name}.weight").data)
    return model


def header(folder: Path) -> int:
    """Bytes of the files that are not of tensors."""
    return Checkpoint.open(folder, base=False).size_bytes - sum(t.nbytes for t in weights_of(folder).values())


def details(report: Report, stage: int = 0) -> dict[str, Any]:
    return report.stages[stage].model_dump()


def refused(told: Recipe, out: Path, why: str) -> None:
    """A plan and a run refuse it, before anything is written, in one line."""
    for do in cast("list[Callable[[Recipe], Any]]", [plan_recipe, lambda given: run_recipe(given, out)]):
        with pytest.raises(ModelError, match=why) as caught:
            do(told)
        assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()


# What is written and what it loads as.

CASES = [(family, "both", 3) for family in FAMILIES if family != "qwen3_moe"]
CASES += [(family, "ffn" if family in MIXED_UP else "attention", 0) for family in FAMILIES]
CASES += [("phi3", "attention", 0), ("gpt2", "attention", 0)]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("family", "parts", "rank"), CASES)
def test_every_family_loads_what_was_measured_and_stores_it_once(
    family: str, parts: str, rank: int, text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", family), tmp_path / "out"
    report = run_recipe(recipe(text, base, share(parts=list(PARTS[parts]), residual_rank=rank, steps=2)), out)
    model, names = load(out), linears(family, *PARTS[parts])
    assert shared_names(model) == {f"{name}.weight" for name in names}
    assert distance(live(model), measured(out)) < 1e-5
    one, other = (dict(layer.named_modules()) for layer in layers_of(model))
    for name in names:
        modules = [cast(FactoredLinear, owner[name]) for owner in (one, other)]
        assert all(isinstance(module, FactoredLinear) and module.scheme.rank == rank for module in modules)
        assert not rank or modules[0].weight_left is not modules[1].weight_left
    before, after = weights_of(base), weights_of(out)
    shapes = [tuple(cast(FactoredLinear, one[name]).weight.shape[1:]) for name in names]
    own = sum(2 * rank * (rows + columns) for rows, columns in shapes)
    saved = sum(math.prod(shape) for shape in shapes) - own
    assert sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in after.values()) == 4 * saved
    assert (
        known(report.compressed.size_bytes) - header(out)
        == known(report.base.size_bytes) - header(base) - 4 * saved
    )
    unique = sum(parameter.numel() for parameter in model.parameters())
    assert report.compressed.parameters == Checkpoint.open(out, base=False).parameters == unique
    assert known(report.base.parameters) - unique == saved


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", MIXED_UP)
def test_layers_that_are_equal_share_for_free(family: str, text: Path, tmp_path: Path) -> None:
    model = alike(family, "ffn", "attention")
    base = save(model, tmp_path / "base")
    for steps in (0, 4):
        report = run_recipe(
            recipe(text, base, share(parts=["ffn", "attention"], steps=steps)), tmp_path / str(steps)
        )
        assert distance(live(load(tmp_path / str(steps))), live(model)) < 1e-6
        assert report.fidelity.kl_nats_mean == pytest.approx(0, abs=1e-9), (
            "a fit that makes worse is not kept"
        )


def test_attention_beside_experts_is_shared_for_free_where_it_is_equal(text: Path, tmp_path: Path) -> None:
    model = alike("qwen3_moe", "attention")
    run_recipe(
        recipe(text, save(model, tmp_path / "base"), share(parts=["attention"], steps=0)), tmp_path / "out"
    )
    assert distance(live(load(tmp_path / "out")), live(model)) < 1e-6
    refused(
        recipe(text, tmp_path / "base", share(parts=["attention", "ffn"])),
        tmp_path / "none",
        "the ffn of a qwen3_moe model has no linears that can be shared; share other parts",
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_difference_of_full_rank_loses_nothing(family: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    run_recipe(recipe(text, base, share(residual_rank=64, steps=0), samples=16), tmp_path / "out")
    assert distance(live(load(tmp_path / "out")), live(load(base))) < 1e-3


@pytest.mark.slow
def test_more_rank_and_more_steps_lose_less(text: Path, tmp_path: Path) -> None:
    base, lost = save_base(tmp_path / "base"), {}
    for name, settings in {
        "bare": {"steps": 0},
        "fit": {"steps": 60},
        "rank": {"steps": 0, "residual_rank": 32},
    }.items():
        report = run_recipe(recipe(text, base, share(**settings), samples=16), tmp_path / name)
        lost[name] = known(report.fidelity.kl_nats_mean)
        nats = [layer["nats"] for layer in details(report)["per_layer"]]
        lost[f"{name}, said"] = sum(nats)
    assert lost["fit"] < lost["bare"] and lost["fit, said"] < lost["bare, said"]
    assert lost["rank"] < lost["bare"] and lost["rank, said"] < lost["bare, said"]


def test_what_is_not_fitted_stays_as_it_was(text: Path, tmp_path: Path) -> None:
    """Of three layers one is in no group; of those that are, norms and biases are their own."""
    base = save_base(tmp_path / "base", "gpt2", num_hidden_layers=3)
    report = run_recipe(recipe(text, base, share([2, 0])), tmp_path / "out")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert details(report)["groups"] == [[0, 2]]
    assert {name for name in before if name.startswith("transformer.h.1.")} <= after.keys()
    for name, tensor in after.items():
        if not name.startswith(("transformer.h.0.", "transformer.h.2.")) or "attn.c_attn.weight" in name:
            assert torch.equal(tensor, before[name]), name
    moved = [name for name in after if name.endswith(".bias") and not torch.equal(after[name], before[name])]
    assert any(".h.0." in name for name in moved) and any(".h.2." in name for name in moved)
    assert {entry.name for entry in report.stages[0].kept} == {
        f"transformer.h.1.mlp.{name}" for name in ("c_fc", "c_proj")
    }
    ties = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ties"]
    assert ties == {
        f"transformer.h.2.mlp.{name}.weight": f"transformer.h.0.mlp.{name}.weight"
        for name in ("c_fc", "c_proj")
    }


# What transformers does with it.


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Two layers of three share all, with a difference of their own."""
    folder = tmp_path_factory.mktemp("artefact")
    base = save_base(folder / "base", request.param, num_hidden_layers=3)
    run_recipe(recipe(text, base, share([0, 2], parts=["attention", "ffn"], residual_rank=2)), folder / "out")
    return folder / "out"


def test_it_is_saved_again_bit_for_bit_whole_and_in_shards(artefact: Path, tmp_path: Path) -> None:
    model = load(artefact)
    expected = live(model)
    model.save_pretrained(tmp_path / "whole")
    once, again = weights_of(artefact), weights_of(tmp_path / "whole")
    assert once.keys() == again.keys() and all(
        torch.equal(tensor, again[name]) for name, tensor in once.items()
    )
    model.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ties = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["ties"]
        for folder in (artefact, tmp_path / "shards")
    ]
    assert ties[0] == ties[1]
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        found = load(folder)
        assert shared_names(found, 0, 2) == shared_names(model, 0, 2) != set()
        assert torch.equal(live(found), expected)
    assert torch.equal(measured(tmp_path / "shards"), measured(artefact))
    counts = [Checkpoint.open(folder, base=False).parameters for folder in (artefact, tmp_path / "shards")]
    assert counts[0] == counts[1]


def test_it_stays_shared_when_it_is_moved_cast_copied_and_tied_anew(artefact: Path) -> None:
    expected, names = live(load(artefact)), shared_names(load(artefact), 0, 2)
    placed = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(artefact, device_map="cpu"))
    half = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(artefact, dtype=torch.bfloat16))
    cast_ = cast(PreTrainedModel, cast(Any, load(artefact)).to(torch.bfloat16))
    copied, anew = copy.deepcopy(load(artefact)), load(artefact)
    anew.tie_weights()
    for model, near in ((placed, 0.0), (half, 0.05), (cast_, 0.05), (copied, 0.0), (anew, 0.0)):
        assert shared_names(model, 0, 2) == names != set()
        assert distance(live(model), expected) <= near
    assert {parameter.dtype for parameter in cast_.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in cast_.parameters()) == sum(p.numel() for p in anew.parameters())


def test_tokens_are_the_same_with_and_without_a_cache_and_a_body_has_no_head(artefact: Path) -> None:
    model = cast(Any, load(artefact))
    told: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, slow = (model.generate(TOKENS, use_cache=cache, **told) for cache in (True, False))
    assert torch.equal(cached, slow) and cached.shape[1] > TOKENS.shape[1]
    body = cast(Any, AutoModel.from_pretrained(artefact))
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, model.base_model(TOKENS).last_hidden_state)
    found = [
        p
        for name, p in body.named_parameters(remove_duplicate=False)
        if name.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight"))
    ]
    assert len(found) == 3 and found[0] is found[2] and found[0] is not found[1]


def test_it_is_a_plain_model_again_once_it_is_dequantised(artefact: Path, tmp_path: Path) -> None:
    model = cast(Any, load(artefact))
    expected = live(model)
    plain = model.dequantize()
    assert (
        not any(isinstance(module, FactoredLinear) for module in plain.modules())
        and shared_names(plain, 0, 2) == set()
    )
    assert distance(live(plain), expected) < 1e-5
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any("_left" in name or "_right" in name for name in weights_of(tmp_path / "plain"))
    assert distance(live(load(tmp_path / "plain")), expected) < 1e-5


FORGOTTEN = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(f"{type(error).__name__}: {error}"[:2000])
else:
    raise SystemExit("it loaded")
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("artefact", ["gpt2"], indirect=True)
def test_without_the_import_it_raises(artefact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGOTTEN, str(artefact)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mismatch" in done.stdout.lower() or "size" in done.stdout.lower()


# Which layers.


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("by", ["auto", "kl", "cosine", "cka"])
def test_two_layers_that_are_copies_are_found(by: str, text: Path, tmp_path: Path) -> None:
    model = alike("llama", "ffn", "attention", source=1, target=3, num_hidden_layers=4)
    for name, parameter in layers_of(model)[3].named_parameters():
        parameter.data.copy_(layers_of(model)[1].get_parameter(name).data)
    base = save(model, tmp_path / "base")
    stage = {"share": {"layers": by, "groups": 3, "parts": ["ffn"], "steps": 0}}
    report = run_recipe(recipe(text, base, stage), tmp_path / "out")
    facts = details(report)
    assert (facts["layers"], facts["groups"]) == (by, [[1, 3]])
    assert facts.get("kl_nats", [0.0]) == pytest.approx([0.0], abs=1e-9)
    assert distance(live(load(tmp_path / "out")), live(model)) < 1e-6


def test_the_loss_of_a_swap_is_that_of_the_model_with_it(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    told = recipe(text, base, {"share": {"layers": "kl", "groups": 2, "parts": ["attention"], "steps": 0}})
    facts = details(run_recipe(told, tmp_path / "out"))
    sequences = load_data(told.data, byte_tokenizer(), VOCABULARY, None).calibration
    with torch.no_grad():
        expected, lost = cast(Any, load(base))(sequences).logits.log_softmax(-1), {}
        for given_up, source in permutations(range(3), 2):
            other = alike("llama", "attention", source=source, target=given_up, num_hidden_layers=3)
            had = cast(Any, other)(sequences).logits.log_softmax(-1)
            lost[given_up, source] = float((expected.exp() * (expected - had)).sum(-1).mean())
    best = min(lost, key=lambda pair: lost[pair])
    assert facts["kl_nats"] == pytest.approx([lost[best]], rel=1e-4)
    assert facts["groups"] == [sorted(best)]


def test_neighbours_are_groups_without_any_measuring(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", num_hidden_layers=4)
    report = run_recipe(
        recipe(text, base, {"share": {"layers": "adjacent", "groups": 2, "steps": 0}}), tmp_path / "out"
    )
    assert details(report)["groups"] == [[0, 1], [2, 3]] and "kl_nats" not in details(report)
    model = load(tmp_path / "out")
    assert shared_names(model, 0, 1) == shared_names(model, 2, 3) != set() and not shared_names(model, 1, 2)
    assert distance(live(model), measured(tmp_path / "out")) < 1e-5


# What may not be.


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"pairs": [[0, 2]]}, "pairs name layer 2; this model has layers 0 to 1"),
        ({"layers": "kl", "groups": 2}, "groups: 2 leaves the 2 layers as they are; use fewer"),
        ({"layers": "adjacent", "groups": 5}, "groups: 5 leaves the 2 layers as they are; use fewer"),
        (
            {"pairs": [[0, 1]], "residual_rank": 65},
            "residual_rank 65: a rank of 65 is no less than .*; use a smaller one",
        ),
    ],
)
def test_groups_that_can_not_be_are_refused_before_anything_is_read(
    settings: dict[str, Any], why: str, text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    refused(recipe(text, base, {"share": settings}), tmp_path / "out", why)


@pytest.mark.slow
def test_layers_of_other_widths_are_refused_by_the_axis(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    prune = {"prune": {"axis": "ffn", "parameters": 0.7, "allocation": "sensitivity", "multiple": 1}}
    uneven = run_recipe(recipe(text, base, prune), tmp_path / "uneven")
    assert len(set(details(uneven)["widths"]["ffn"])) == 2
    why = 'layers 0 and 1 have [0-9]+ and [0-9]+ of axis "ffn"; .* group layers of the same widths'
    for settings in (share(), {"share": {"layers": "kl", "groups": 1}}):
        refused(recipe(text, tmp_path / "uneven", settings), tmp_path / "out", why)
    with pytest.raises(ModelError, match=why) as told:  # known only once the stage before is done
        run_recipe(recipe(text, base, prune, share()), tmp_path / "out")
    assert len(str(told.value).splitlines()) == 1 and not (tmp_path / "out").exists()
    run_recipe(recipe(text, tmp_path / "uneven", share(parts=["attention"])), tmp_path / "other")
    model = load(tmp_path / "other")
    assert shared_names(model) == {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert distance(live(model), measured(tmp_path / "other")) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(live(load(tmp_path / "again")), live(model))


def test_what_is_shared_already_is_refused(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    why = r"model.layers.1.mlp.*_proj is shared already; share other layers or parts"
    refused(recipe(text, base, share(), share([1, 2])), tmp_path / "out", why)


# What may follow.

QUANTIZED = [
    ("llama", {"format": "nf4", "group_size": 32}),
    ("gpt2", {"format": "nf4", "rounding": "nearest", "double_quant": True}),
    ("opt", {"format": "w8a8"}),
    ("gpt2", {"format": "w4a8"}),
    ("phi3", {"format": "w4a8", "activations": "static"}),
]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("family", "settings"), QUANTIZED, ids=str)
def test_what_is_shared_is_quantised_once(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base, out, names = save_base(tmp_path / "base", family), tmp_path / "out", linears(family, "ffn")
    stages = share(), {"quantize": settings}
    report = run_recipe(recipe(text, base, *stages), out)
    model, tensors = load(out), weights_of(out)
    assert shared_names(model) >= {f"{name}.weight" for name in names}
    inner = [linear.name for linear in report.linears]
    assert len(inner) == len(set(inner)) == 2 * len(linears(family, "ffn", "attention"))
    prefix = inner[0].partition(".0.")[0]
    for name in names:
        one, other = (cast(Any, layer.get_submodule(name)) for layer in layers_of(model))
        for part, tensor in one.stored().items():
            lies = [f"{prefix}.{index}.{name}.{part}" in tensors for index in (0, 1)]
            assert lies == [True, part == "input_scale"], (
                "each layer reads its own inputs, and the weight is stored once"
            )
            assert (getattr(other, part) is getattr(one, part)) == (part != "input_scale") and tensor.numel()
        if isinstance(one, FourBitLinear):
            assert one.kernel and one.kernel[0] is other.kernel[0]
        elif settings["format"] == "w4a8":
            assert (
                isinstance(one, IntegerLinear) and one.expanded is not None and one.expanded is other.expanded
            )
    ours, theirs = live(model), measured(out)
    apart_BL = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    # an activation on a tie may be rounded up here and down there, which moves its token, but not the others
    assert float(apart_BL.median()) < (0.02 if "4" in settings["format"] else 1e-4)
    assert float(apart_BL.max()) < (0.1 if "4" in settings["format"] else 0.02)
    assert report.compressed.parameters == Checkpoint.open(out, base=False).parameters
    rows = plan_recipe(recipe(text, base, *stages)).rows
    assert rows[-1].parameters == report.compressed.parameters
    result, again = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert shared_names(result) == shared_names(model) and again.linears == report.linears
    assert again.compressed.parameters == report.compressed.parameters
    assert distance(live(result), live(model)) < 1e-6
    model.save_pretrained(tmp_path / "again")
    saved = weights_of(tmp_path / "again")
    assert saved.keys() == tensors.keys() and all(
        torch.equal(saved[name], tensor) for name, tensor in tensors.items()
    )


def test_codes_that_are_shared_stay_one_when_they_are_moved(text: Path, tmp_path: Path) -> None:
    run_recipe(
        recipe(text, save_base(tmp_path / "base"), share(), {"quantize": {"rounding": "nearest"}}),
        tmp_path / "out",
    )
    model = cast(Any, load(tmp_path / "out"))
    expected = live(model)
    half = model.to(torch.bfloat16)
    one, other = (cast(FourBitLinear, layer.get_submodule("mlp.up_proj")) for layer in layers_of(half))
    assert one.weight is other.weight and one.kernel[0] is other.kernel[0]
    assert distance(live(half), expected) < 0.05
    plain = cast(Any, load(tmp_path / "out")).dequantize()
    assert distance(live(plain), measured(tmp_path / "out")) < 1e-5


def test_a_weight_with_a_difference_is_not_quantised_and_the_others_are(text: Path, tmp_path: Path) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    report = run_recipe(recipe(text, base, share(residual_rank=2), {"quantize": {"format": "w8a8"}}), out)
    kept = {entry.name: entry.why for entry in report.stages[1].kept}
    assert kept["model.layers.1.mlp.up_proj"] == "is stored as shared already"
    assert {linear.name.split(".")[3] for linear in report.linears} == {"self_attn"}
    assert distance(live(load(out)), measured(out)) < 3e-3


@pytest.mark.parametrize(
    "settings",
    [{"smooth": {}}, {"rotate": True}, {"protect": 0.1}, {"rounding": "learned", "steps": 2}],
    ids=lambda s: next(iter(s)),
)
def test_what_needs_layers_by_themselves_is_refused(
    settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base, name = save_base(tmp_path / "base"), next(iter(settings))
    quantize = {"quantize": {"format": "w8a8", **settings}}
    refused(
        recipe(text, base, share(), quantize),
        tmp_path / "out",
        f"{name} is for layers by themselves, .* leave {name}",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [{"codebook": {"entries": 16}}, {"low_rank": {"layers_per_basis": 2, "rank": 8}}],
    ids=lambda s: next(iter(s)),
)
def test_another_tie_takes_the_linears_that_are_left(
    after: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    tied = {"tie": {"fit": "mean"}}
    report = run_recipe(recipe(text, base, share(), after, tied), out)
    model = load(out)
    ours = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    bases = {f"self_attn.{name}_proj.weight_right" for name in "qkvo"} if "low_rank" in after else set()
    assert shared_names(model) == ours | bases
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert distance(live(model), measured(out)) < 1e-5
    assert report.compressed.parameters == Checkpoint.open(out, base=False).parameters
    stages = share(), after, tied
    result, again = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert shared_names(result) == shared_names(model) and distance(live(result), live(model)) < 1e-5
    assert (
        again.compressed.parameters
        == report.compressed.parameters
        == plan_recipe(recipe(text, base, *stages)).rows[-1].parameters
    )


LESSON = {"steps": 8, "batch": 4, "learning_rate": 1e-3}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [share(residual_rank=2), {"distill": LESSON}]),
        ("gpt2", [share(parts=["attention", "ffn"]), {"distill": {**LESSON, "train": "norms"}}]),
        (
            "gpt2",
            [
                share(),
                {"distill": {**LESSON, "steps": 3}},
                {"quantize": {"format": "w8a8", "rounding": "nearest"}},
            ],
        ),
        (
            "llama",
            [
                share(),
                {"quantize": {"group_size": 32, "rounding": "nearest"}},
                {"distill": {**LESSON, "train": "scales"}},
            ],
        ),
    ],
    ids=["rank", "norms", "then w8a8", "nf4 scales"],
)
def test_what_is_healed_stays_shared(
    family: str, stages: list[dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    base, out = save_base(tmp_path / "base", family), tmp_path / "out"
    report = run_recipe(recipe(text, base, *stages), out)
    found = next(stage.model_dump() for stage in report.stages if stage.name == "distill")
    assert found["kl_after"] < found["kl_before"] and not found["notes"]
    model = load(out)
    parts = stages[0]["share"]["parts"]
    assert shared_names(model) >= {f"{name}.weight" for name in linears(family, *parts)}
    assert distance(live(model), measured(out)) < (0.02 if "quantize" in str(stages) else 1e-5)
    result, _ = apply_recipe(
        recipe(text, base, *stages), AutoModelForCausalLM.from_pretrained(base).eval(), byte_tokenizer()
    )
    assert shared_names(result) == shared_names(model) and distance(live(result), live(model)) < 1e-4


def test_lora_is_refused_for_what_is_shared(text: Path, tmp_path: Path) -> None:
    lesson = {"distill": {**LESSON, "train": "lora"}}
    told = recipe(text, save_base(tmp_path / "base"), share(), lesson)
    with pytest.raises(ModelError, match="train: lora is for linears that are plain"):
        run_recipe(told, tmp_path / "out")


# In memory, interrupted, planned, told.


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_a_model_in_memory_becomes_what_the_folder_holds(family: str, text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    told = recipe(text, base, share(parts=["attention"], residual_rank=2))
    result, report, _ = assert_same_in_memory(told, base, tmp_path)
    assert shared_names(result) == shared_names(load(tmp_path / "out")) != set()
    assert report.compressed.parameters == sum(p.numel() for p in result.parameters())
    assert torch.equal(live(load(tmp_path / "saved")), live(result))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    stages: list[dict[str, Any]] = [
        {"share": {"layers": "kl", "groups": 2, "steps": 3}},
        {"quantize": {"format": "w8a8"}},
    ]
    told = recipe(text, base, *stages)
    run_recipe(told, tmp_path / "once")
    for lost in (
        ["journal/share.00002", "journal-1/quantize.00002"],
        [
            "journal/groups.00000",
            "journal/fit.*",
            "journal/share.*",
            "journal/fisher.00000",
            "journal-1/quantize.00001",
        ],
    ):
        with pytest.raises(AcceptError):
            run_recipe(
                told.model_copy(update={"accept": Accept(kl_nats=1e-12)}), tmp_path / "again", overwrite=True
            )
        for name in lost:
            for file in partial_folder(tmp_path / "again").glob(f"{name}.safetensors"):
                file.unlink()
        run_recipe(told, tmp_path / "again", overwrite=True)
        for written in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / written).read_bytes() == (
                tmp_path / "once" / written
            ).read_bytes(), (lost, written)


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": [[0, 1]], "parts": ["ffn", "attention"], "residual_rank": 4},
        {"layers": "adjacent", "groups": 1},
        {"layers": "kl", "groups": 2, "parts": ["attention"]},
    ],
    ids=str,
)
def test_a_plan_foretells_the_parameters_and_bytes(
    settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    told = recipe(text, base, {"share": {**settings, "steps": 0}})
    plan = plan_recipe(told)
    rows, notes = plan.rows, plan.notes
    report = run_recipe(told, tmp_path / "out")
    assert rows[1].parameters == report.compressed.parameters
    assert 0 <= known(report.compressed.size_bytes) - rows[1].size_bytes < 8000  # the header
    assert any("these numbers are for neighbours" in note for note in notes) == (
        settings.get("layers") == "kl"
    )
    assert (rows[1].flops_per_token > rows[0].flops_per_token) == ("residual_rank" in settings), (
        "there is no speed in it"
    )


def test_the_report_and_the_card_say_what_was_done(text: Path, tmp_path: Path) -> None:
    run_recipe(
        recipe(text, save_base(tmp_path / "base"), share(parts=["attention", "ffn"])), tmp_path / "out"
    )
    facts = details(Report.of(tmp_path / "out"))
    assert (facts["name"], facts["layers"], facts["groups"], facts["parts"]) == (
        "share",
        "given",
        [[0, 1]],
        ["attention", "ffn"],
    )
    assert "14 linears share 7 weights; operations per token are unchanged" in facts["notes"][0]
    assert all(layer["nats"] >= 0 for layer in facts["per_layer"]) and len(facts["per_layer"]) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import llmcompress" in card, "without it from_pretrained raises, and the card does not say so"
    install = card.split("```")[1]
    assert "llmcompress" in install and "bitsandbytes" not in install


def test_what_is_measured_block_by_block_is_what_the_loss_says(text: Path, tmp_path: Path) -> None:
    """The weights of the file, read layer by layer, give the logits that the model of both layers' weights
    gives."""
    base, out = save_base(tmp_path / "base", "opt"), tmp_path / "out"
    run_recipe(recipe(text, base, share(residual_rank=2)), out)
    tensors = weights_of(out)
    whole: dict[str, Tensor] = {
        name: t for name, t in tensors.items() if "_left" not in name and "_right" not in name
    }
    for index in (0, 1):
        for name in ("fc1", "fc2"):
            own, first = (f"model.decoder.layers.{layer}.{name}" for layer in (index, 0))
            product = tensors[f"{own}.weight_left"] @ tensors[f"{own}.weight_right"]
            whole[f"{own}.weight"] = tensors[f"{first}.weight"][0] + product
    model = pico("opt", vocab_size=VOCABULARY)
    model.load_state_dict(whole, strict=False)
    model.tie_weights()
    found = torch.cat(list(logits(DiskModel(out, CPU, quantized=True), TOKENS)))
    assert distance(found, live(model)) < 1e-5
