"""A PEFT adapter beside the weights or around a model in memory: refused in one line, for with it they are
another."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.cli.app import main
from llmcompress.errors import ModelError
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.in_memory import apply_recipe
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run_recipe
from tests.artefacts import distance, live, load
from tests.bases import byte_tokenizer, save_base, small_recipe, staged_recipe, write_text

# PEFT asks transformers by an old name
pytestmark = [
    pytest.mark.usefixtures("short_runs"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def adapted(base: Path) -> peft.PeftModel:
    """A model with a LoRA adapter that changes what it computes."""
    model = AutoModelForCausalLM.from_pretrained(base)
    found = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert isinstance(found, peft.PeftModel)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, the same with an adapter beside its weights, and a text."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder / "base", num_hidden_layers=1)
    beside = folder / "beside"
    shutil.copytree(base, beside)
    adapted(base).save_pretrained(str(folder / "adapter"))
    for file in (folder / "adapter").glob("adapter*"):
        shutil.copy(file, beside)
    return base, beside, write_text(folder / "facts.txt")


@pytest.mark.slow
def test_an_adapter_beside_the_weights_is_refused_in_one_line(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, beside, text = folders
    out = tmp_path / "out"
    distill = {"distill": {"steps": 1, "batch": 2}}
    small: dict[str, Any] = {"samples": 4, "length": 24}
    acts: dict[str, Callable[[], Any]] = {
        "run": lambda: run_recipe(small_recipe(text, beside), out),
        "plan": lambda: plan_recipe(small_recipe(text, beside)),
        "evaluate": lambda: evaluate(str(beside)),
        "against": lambda: evaluate(str(base), against=str(beside)),
        "teacher": lambda: run_recipe(
            staged_recipe(text, base, {"distill": {**distill["distill"], "teacher": str(beside)}}), out
        ),
        "student": lambda: run_recipe(
            staged_recipe(text, base, {"distill": {**distill["distill"], "student": str(beside)}}), out
        ),
    }
    for act in acts.values():
        with pytest.raises(ModelError, match=r"holds a PEFT adapter .*merge_and_unload") as caught:
            act()
        assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()
    run_recipe(staged_recipe(text, base, {"quantize": {"rounding": "nearest"}}, **small), out)
    with pytest.raises(ModelError, match="holds a PEFT adapter"):
        reproduce(str(out), base=str(beside), out=tmp_path / "again")


def test_the_command_line_ends_with_two(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llmcompress", "evaluate", str(folders[1])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        "error: " in (said := capsys.readouterr().err) and "PEFT adapter" in said and "Traceback" not in said
    )


def test_a_folder_with_an_adapter_alone_is_told_as_that(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    adapted(folders[0]).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="holds a PEFT adapter"):
        plan_recipe(small_recipe(folders[2], tmp_path / "adapter"))


def test_an_adapter_around_a_model_in_memory_is_refused(folders: tuple[Path, Path, Path]) -> None:
    base, beside, text = folders
    around, recipe = adapted(base), small_recipe(text, base, rounding="nearest")
    loaded = AutoModelForCausalLM.from_pretrained(beside)
    for model in cast("tuple[Any, ...]", (around, around.get_base_model(), loaded)):
        with pytest.raises(ModelError, match=r"has a PEFT adapter.*merge_and_unload"):
            apply_recipe(recipe, model, byte_tokenizer())
    merged: Any = around.merge_and_unload()
    model, _ = apply_recipe(recipe, merged, byte_tokenizer())
    with torch.no_grad():
        assert model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize(
    "stage",
    [
        {"share": {"layers": "adjacent", "groups": 1, "steps": 0}},
        {"share": {"layers": "adjacent", "groups": 1, "steps": 0, "residual_rank": 2}},
        {"low_rank": {"layers_per_basis": 2, "keep": 0.5}},
    ],
    ids=["shared", "with-a-difference", "basis"],
)
def test_merged_into_linears_that_layers_share_an_adapter_changes_each_by_its_own(
    stage: dict[str, Any], tmp_path: Path
) -> None:
    """All that share a weight become plain and have their own; one of them alone can't, and nothing
    changes."""
    base, text = save_base(tmp_path / "base"), write_text(tmp_path / "facts.txt")
    run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    plain = live(load(tmp_path / "out"))
    settings: dict[str, Any] = {"r": 2, "target_modules": ["up_proj"], "init_lora_weights": False}
    acts: dict[str, Callable[[Any], Any]] = {
        "into the model": lambda given: given.merge_and_unload(),
        "safely": lambda given: given.merge_and_unload(safe_merge=True),
        "for a while": lambda given: given.merge_adapter() or given,
    }
    for act in acts.values():
        around = peft.get_peft_model(load(tmp_path / "out"), peft.LoraConfig(**settings))
        beside = live(cast(Any, around))
        assert distance(beside, plain) > 1e-3
        assert distance(live(act(around)), beside) < 1e-5
    cast(Any, around).unmerge_adapter()
    with cast(Any, around).disable_adapter():
        assert distance(live(cast(Any, around)), plain) < 1e-5
    alone = peft.get_peft_model(load(tmp_path / "out"), peft.LoraConfig(**settings, layers_to_transform=[0]))
    with pytest.raises(
        ModelError, match=r"share a tensor, so one alone can't change; use model.dequantize\(\) first"
    ) as caught:
        cast(Any, alone).merge_and_unload()
    assert len(str(caught.value).splitlines()) == 1
    with cast(Any, alone).disable_adapter():
        assert torch.equal(live(cast(Any, alone)), plain), "nothing was changed"


def test_a_shared_weight_is_copied_pickled_and_cast_as_one(tmp_path: Path) -> None:
    base, text = save_base(tmp_path / "base"), write_text(tmp_path / "facts.txt")
    stage = {"share": {"layers": "adjacent", "groups": 1, "steps": 0}}
    run_recipe(staged_recipe(text, base, stage, samples=4, length=24), tmp_path / "out")
    model = load(tmp_path / "out")
    plain = live(model)
    half = copy.deepcopy(model).bfloat16()
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), half):
        first, second = (layer.mlp.up_proj for layer in found.model.layers)
        assert first.weight is second.weight
        assert distance(live(found), plain) < (0.05 if found is half else 1e-6)
