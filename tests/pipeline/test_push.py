"""The whole round on a local Hub, each step a process of its own: run a recipe by its id, push, load,
evaluate, reproduce."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from llmcompress.errors import CompressError, OutputError
from llmcompress.pipeline.push import push
from llmcompress.report.schema import Report
from tests.bases import facts, save_base
from tests.clients import shell
from tests.hub_server import OFFLINE, TOKEN, Hub, environment, serve

# runs and a Hub in processes of their own
pytestmark = [pytest.mark.usefixtures("short_runs"), pytest.mark.slow]

RECIPE = """
data: {source: them/texts, samples: 8, length: 24, evaluation_samples: 4}
stages:
  - prune: {axis: ffn, keep: 0.75}
  - quantize: {format: nf4, group_size: 32}
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
assert not any(module.startswith("llmcompress") for module in sys.modules)
assert torch.isfinite(model(**tokenizer("fact 1", return_tensors="pt")).logits).all()
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


class World(NamedTuple):
    hub: Hub
    env: dict[str, str]
    place: Path
    commits: dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a base, a recipe and a text, and `out`, which a run by id made of them and pushed as
    me/tiny."""
    place = tmp_path_factory.mktemp("world")
    base = save_base(place / "base", num_hidden_layers=2)
    card = b"---\nlicense: mit\nlanguage: [en]\n---\n# a base\n"
    with serve() as (hub, endpoint):
        files = {file.name: file.read_bytes() for file in base.iterdir()} | {"README.md": card}
        commits = {
            "base": hub.add("them/base", files),
            "recipe": hub.add("them/recipe", {"recipe.yaml": RECIPE.encode()}),
            "texts": hub.add(
                "them/texts",
                facts("train.jsonl", "test.jsonl"),
                kind="dataset",
            ),
        }
        hub.tag("them/recipe", "v1", commits["recipe"])
        hub.add("them/recipe", {"recipe.yaml": b"stages: [prune]"})  # later than v1, and wrong
        env = environment(endpoint, place / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
        code, out, err = shell(env, "run", "them/recipe@v1", "--base", "them/base", "--out", "out", cwd=place)
        assert code == 0, err
        code, out, err = shell(env, "push", "out", "me/tiny", "--message", "first", cwd=place)
        assert code == 0, err
        assert f"/me/tiny, commit {hub.commits('me/tiny')[-1]}" in out
        yield World(hub, env, place, commits)


def test_the_report_remembers_every_commit(world: World) -> None:
    report = Report.of(world.place / "out")
    assert report.recipe and (report.recipe.source, report.recipe.revision) == (
        "them/recipe",
        world.commits["recipe"],
    )
    assert (report.base.model, report.base.revision) == ("them/base", world.commits["base"])
    assert (report.data.source, report.data.revision) == ("them/texts", world.commits["texts"])


def test_what_is_on_the_hub_is_the_artefact_with_its_card(world: World) -> None:
    there, here = world.hub.files("me/tiny"), world.place / "out"
    names = {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}
    assert (
        there.keys() - {".gitattributes"}
        == names
        >= {"recipe.yaml", "report.json", "before_after.png", "model.safetensors"}
    )
    same = names - {"README.md", "report.html", "report.json"}
    assert all(there[name] == (here / name).read_bytes() for name in same)
    report, raw = Report.from_json(there["report.json"]), json.loads((here / "report.json").read_text())
    assert report.compressed.model == "me/tiny" and raw["compressed"]["model"] == "out"
    assert report.fidelity == Report.of(here).fidelity
    card: Any = ModelCard(there["README.md"].decode())
    assert (card.data.base_model, card.data["base_model_relation"], card.data.license) == (
        "them/base",
        "quantized",
        "mit",
    )
    assert card.data.model_name == "tiny"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert (
        measured["perplexity"] == raw["compressed"]["perplexity"]
        and measured["kl_nats_mean"] == raw["fidelity"]["kl_nats_mean"]
    )
    assert 'name = "me/tiny"\n' in card.text and "llmcompress reproduce me/tiny\n" in card.text
    assert str(world.place) not in "".join(
        there[name].decode() for name in ("README.md", "report.html", "report.json", "recipe.yaml")
    )
    results = there[".eval_results/llmcompress.yaml"].decode()
    assert f"revision: {world.commits['texts']}" in results and "id: them/texts" in results


def test_an_artefact_on_the_hub_is_compared_by_its_id(world: World) -> None:
    code, out, err = shell(world.env, "compare", "me/tiny", "out", "--html", "both.html", cwd=world.place)
    assert code == 0 and not err, err
    assert "me/tiny" in out and "2 artefacts compared" in (world.place / "both.html").read_text()
    code, out, err = shell(world.env, "compare", "out", "them/base", cwd=world.place)
    assert code == 2 and "lacks report.json" in err and len(err.splitlines()) == 1


def test_text_that_not_everyone_may_read_stays_on_this_machine(world: World) -> None:
    page = world.hub.files("me/tiny")["report.html"].decode()
    assert 'class="t ' in page and "me/tiny" in page
    texts = world.hub.add("them/closed", facts("train.jsonl", "test.jsonl"), kind="dataset", gated=True)
    closed = Path(shutil.copytree(world.place / "out", world.place / "closed"))
    told = json.loads((closed / "report.json").read_text())
    told["data"] |= {"source": "them/closed", "revision": texts}
    (closed / "report.json").write_text(json.dumps(told))
    code, _, err = shell(world.env, "push", "closed", "me/closed", cwd=world.place)
    assert code == 0, err
    there = world.hub.files("me/closed")
    samples = json.loads(there["report.json"])["samples"]
    assert samples == {"paragraph": None, "continuations": [], "left_out": "the text is not public"}
    assert 'class="t ' not in there["report.html"].decode()


def test_a_second_push_sends_nothing_and_commits_nothing(world: World) -> None:
    commits = world.hub.commits("me/tiny")
    before = len(world.hub.log)
    code, out, err = shell(world.env, "push", "out", "me/tiny", cwd=world.place)
    assert code == 0 and commits[-1] in out, err
    assert world.hub.commits("me/tiny") == commits
    assert not [path for method, path in world.hub.log[before:] if method == "PUT" or "/commit/" in path]


def test_a_clean_process_loads_it_by_its_id(world: World) -> None:
    command = [sys.executable, "-c", LOAD, "me/tiny", world.hub.commits("me/tiny")[-1]]
    done = subprocess.run(
        command, env={**os.environ, **world.env}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "Linear4bit", done.stderr


def test_it_is_reproduced_bit_by_bit_from_the_hub_alone(world: World) -> None:
    shutil.rmtree(world.place / "again", ignore_errors=True)
    code, out, err = shell(world.env, "reproduce", "me/tiny", "--out", "again", cwd=world.place)
    assert code == 0, err
    assert "me/tiny: bit-equal" in out
    ours, theirs = (load_file(world.place / name / "model.safetensors") for name in ("again", "out"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_an_artefact_is_a_recipe_for_another_model_and_is_evaluated_by_its_id(world: World) -> None:
    save_base(world.place / "other", num_hidden_layers=1)
    code, _, err = shell(
        world.env, "run", "me/tiny", "--base", "./other", "--out", "smaller", cwd=world.place
    )
    assert code == 0, err
    report = Report.of(world.place / "smaller")
    assert report.recipe and (report.recipe.source, report.recipe.revision) == (
        "me/tiny",
        world.hub.commits("me/tiny")[-1],
    )
    data = ("--data", "them/texts", "--length", "24", "--samples", "4", "--json", "numbers.json")
    code, _, err = shell(
        world.env, "evaluate", "me/tiny@main", "--against", "them/base", *data, cwd=world.place
    )
    assert code == 0, err
    numbers = json.loads((world.place / "numbers.json").read_text())
    assert numbers["kl_nats_mean"] == pytest.approx(
        Report.of(world.place / "out").fidelity.kl_nats_mean, rel=1e-6
    )


def test_offline_what_is_in_the_cache_runs_and_what_is_not_says_so(world: World) -> None:
    env = world.env | OFFLINE
    code, _, err = shell(env, "run", "them/recipe@v1", "--base", "them/base", "--out", "off", cwd=world.place)
    assert code == 0, err
    report, online = Report.of(world.place / "off"), Report.of(world.place / "out")
    assert (report.recipe, report.data, report.fidelity) == (online.recipe, online.data, online.fidelity)
    assert report.base.revision == world.commits["base"]
    code, _, err = shell(env, "run", "them/unseen", "--base", "them/base", cwd=world.place)
    assert code == 2 and "recipe them/unseen is not in the cache, and HF_HUB_OFFLINE is set; unset it" in err
    unseen = ("--data", "them/unseen", "--out", "no")
    code, _, err = shell(env, "run", "them/recipe@v1", "--base", "them/base", *unseen, cwd=world.place)
    assert code == 2 and "the Hub data set them/unseen is not in the cache" in err


def test_a_recipe_from_the_hub_may_name_no_path_of_this_machine(world: World) -> None:
    (world.place / "secrets").mkdir(exist_ok=True)
    (world.place / "secrets" / "train.txt").write_text("my words\n" * 999)
    cases = {
        "base: ./base\nstages: [quantize]": "--base",
        "data: {source: secrets}\nstages: [quantize]": "--data",
        "data: {source: /etc}\nstages: [quantize]": "--data",
        "data: {source: ~/mail.txt}\nstages: [quantize]": "--data",
        "stages: [{distill: {teacher: ../teacher}}]": "save it to a file and run that, if you trust it",
        "stages: [{distill: {student: ./base}}]": "save it to a file and run that, if you trust it",
    }
    script = (
        "from llmcompress import Recipe\nfrom llmcompress.pipeline.run import run_recipe\nfrom "
        "llmcompress.errors import RecipeError\n"
    )
    for number, (entries, option) in enumerate(cases.items()):
        world.hub.add(f"evil/recipe-{number}", {"recipe.yaml": entries.encode()})
        base = None if option == "--base" else "them/base"
        script += (
            f"try:\n    run_recipe(Recipe.from_pretrained('evil/recipe-{number}'), 'evil', base={base!r})\n"
        )
        script += "except RecipeError as error:\n    print(error.exit_code, error)\n"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **world.env}, cwd=world.place, capture_output=True, text=True
    )
    for said, option in zip(done.stdout.splitlines(), cases.values(), strict=True):
        assert (
            said.startswith("2 recipe evil/")
            and "a path here, and one from the Hub may name none" in said
            and said.endswith(option.removeprefix("--"))
        )
    assert not (world.place / "evil").exists()


def test_what_is_no_whole_artefact_is_not_pushed(world: World, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(world.place / "out", tmp_path / name))

    with pytest.raises(OutputError, match="tiny is no id of a repository; give one like user/name"):
        push(world.place / "out", "tiny")
    (copy("cut") / "model.safetensors").write_bytes(
        (world.place / "out" / "model.safetensors").read_bytes()[:-9]
    )
    (copy("other") / "recipe.yaml").write_text("stages: [quantize]")
    (copy("bare") / "report.json").unlink()
    for name, why in (
        ("cut", "truncated or damaged"),
        ("other", "is not the recipe that"),
        ("bare", "report.json can't be read"),
    ):
        with pytest.raises(CompressError, match=why):
            push(tmp_path / name, "me/never")


def test_teachers_and_students_are_remembered_and_reproduced_at_their_commits(world: World) -> None:
    def files(name: str, layers: int, *kinds: str) -> dict[str, bytes]:
        folder = save_base(world.place / name, num_hidden_layers=layers)
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in kinds}

    commits = {
        "teacher": world.hub.add("them/teacher", files("teacher", 1, ".json", ".safetensors")),
        "student": world.hub.add("them/student", files("student", 1, ".json")),  # no weights: they are drawn
    }
    recipe = yaml.safe_load(RECIPE)
    lesson = {"teacher": "them/teacher@main", "student": "them/student", "steps": 2, "batch": 2}
    (world.place / "lesson.yaml").write_text(yaml.safe_dump(recipe | {"stages": [{"distill": lesson}]}))
    code, _, err = shell(
        world.env, "run", "lesson.yaml", "--base", "them/base", "--out", "taught", cwd=world.place
    )
    assert code == 0, err
    first = Report.of(world.place / "taught").stages[0].model_dump()
    assert {role: first[role] for role in commits} == {
        role: f"them/{role}@{commit}" for role, commit in commits.items()
    }
    card = (world.place / "taught" / "README.md").read_text()
    assert all(f", {role} `them/{role}` at revision `{commit}`" in card for role, commit in commits.items())
    assert commits["teacher"] not in (world.place / "taught" / "recipe.yaml").read_text()
    world.hub.add("them/teacher", files("other", 2, ".json", ".safetensors"))
    code, out, err = shell(world.env, "reproduce", "taught", "--out", "taught-again", cwd=world.place)
    assert code == 0 and "taught: bit-equal" in out, out + err
    again = Report.of(world.place / "taught-again").stages[0].model_dump()
    assert {role: again[role] for role in commits} == {role: first[role] for role in commits}


def test_a_text_given_in_the_recipes_words_is_remembered_and_reproduced(world: World) -> None:
    head = {
        "configs": [
            {
                "config_name": "en",
                "data_files": [{"split": s, "path": f"en/{s}.jsonl"} for s in ("head", "tail")],
            }
        ]
    }
    commit = world.hub.add(
        "them/many",
        {
            "README.md": f"---\n{yaml.safe_dump(head)}---\n".encode(),
            **facts("en/head.jsonl", "en/tail.jsonl", "fact"),
        },
        kind="dataset",
    )
    place = {"config": "en", "split": "head", "evaluation_split": "tail", "column": "fact"}
    given = ("--data", yaml.safe_dump({"source": "them/many", **place}, default_flow_style=True).strip())
    code, _, err = shell(
        world.env, "run", "them/recipe@v1", "--base", "them/base", *given, "--out", "many", cwd=world.place
    )
    assert code == 0, err
    told = json.loads((world.place / "many" / "report.json").read_text())["data"]
    assert {key: told[key] for key in ("source", "revision", *place)} == {
        "source": "them/many",
        "revision": commit,
        **place,
    }
    card: Any = ModelCard((world.place / "many" / "README.md").read_text())
    (dataset,) = {
        (r.dataset_type, r.dataset_config, r.dataset_split, r.dataset_revision)
        for r in card.data.eval_results
    }
    assert dataset == ("them/many", "en", "tail", commit)
    code, out, err = shell(world.env, "reproduce", "many", cwd=world.place)
    assert code == 0 and "many: bit-equal" in out, out + err


def test_a_card_that_its_owner_edited_stays_and_other_files_stay_here(world: World, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(world.place / "out", tmp_path / "mine"))
    (mine / "README.md").write_text((mine / "README.md").read_text() + "\nMy own words.\n")
    (mine / "optimizer.bin").write_bytes(b"a pickle")
    (mine / "notes.py").write_text("print()")
    (mine / "secrets.json").write_text('{"token": "mine"}')
    (mine / "users.txt").symlink_to("/etc/passwd")
    code, _, err = shell(world.env, "push", str(mine), "me/edited", "--private")
    assert code == 0, err
    there = world.hub.files("me/edited")
    assert there["README.md"] == (mine / "README.md").read_bytes()
    assert not {"optimizer.bin", "notes.py", "secrets.json", "users.txt"} & there.keys()
    assert world.hub.repos["model", "me/edited"].private


def test_a_recipe_is_pushed_alone_and_fetched_again(world: World) -> None:
    script = """
from llmcompress import Recipe
recipe = Recipe.from_pretrained("them/recipe", revision="v1")
commit = recipe.push_to_hub("me/recipe", message="mine")
again = Recipe.from_pretrained("me/recipe")
assert again.digest == recipe.digest and again.origin.revision == commit != recipe.origin.revision
own = "{base: /home/alice/base, data: {source: my texts/alice/diary.txt}, stages: [quantize]}"
Recipe.parse(own).push_to_hub("me/own")
print(commit)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **world.env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == world.hub.commits("me/recipe")[-1]
    there = world.hub.files("me/recipe")
    assert there.keys() - {".gitattributes"} == {"recipe.yaml", "README.md"}
    card: Any = ModelCard(there["README.md"].decode())
    assert card.data.tags == ["llmcompress", "recipe"] and "llmcompress run me/recipe --base" in card.text
    own = world.hub.files("me/own")
    assert b"base: ./base\n" in own["recipe.yaml"] and not [
        name for name, content in own.items() if b"alice" in content
    ]
