"""What leaves this machine, by a push or in the folder of an artefact: no file that lay there by chance, no
local path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmcompress.errors import OutputError, RecipeError
from llmcompress.pipeline.push import outgoing
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from llmcompress.report.redaction import for_others
from llmcompress.report.schema import RecipeFacts, Report
from llmcompress.stages.distill.stage import Distill
from tests.bases import save_base, write_text
from tests.caches import own_cache

pytestmark = pytest.mark.usefixtures("short_runs")

ODD = "Zq7secret"  # in every path here, and in nothing that may be shared
NAMES = ("base", "teacher", "student", "diary.txt", "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an odd name with a base that tells of it, a teacher, a student, and what a recipe made of
    them: `out`."""
    folder = tmp_path_factory.mktemp("place") / f"{ODD} dir" / "alice"
    for name in ("base", "teacher", "student"):
        save_base(folder / name, num_hidden_layers=1)
    tell(folder / "base", folder)
    tell(folder / "student", folder)
    (folder / "base" / "credentials.json").write_text('{"token": "hf_Zq7secret"}')
    (folder / "base" / "notes.txt").write_text(ODD)
    (folder / "base" / "users.txt").symlink_to("/etc/passwd")
    head = f"---\nlicense: other\nlicense_link: {folder}/LICENSE\n---\n# {ODD}\n"
    (folder / "base" / "README.md").write_text(head)
    write_text(folder / "diary.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCOMPRESS_CACHE", str(own_cache(folder / "cache")))
        run_recipe(recipe(folder), folder / "out", base=str(folder / "base"))
    return folder


def tell(model: Path, folder: Path) -> None:
    """Have the configs of a model say where it was loaded from, as those of many models do."""
    said = {
        "_name_or_path": f"{ODD}/model",
        "name_or_path": str(folder),
        "special_tokens_map_file": f"{folder}/a.json",
    }
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(fields | said | {"nested": {"origin": f"{folder}/x"}}))


def recipe(folder: Path) -> Recipe:
    """A student that learns from a teacher, whose answers are kept, and is then quantised."""
    lesson = {
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "steps": 2,
        "batch": 2,
        "cache": True,
    }
    data = {"source": str(folder / "diary.txt"), "samples": 8, "length": 24, "evaluation_samples": 4}
    stages = [{"distill": lesson}, {"quantize": {"rounding": "nearest"}}]
    return Recipe.model_validate({"base": str(folder / "base"), "data": data, "stages": stages})


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """The artefact, to change."""
    return Path(shutil.copytree(place / "out", tmp_path / "copy"))


def sent(folder: Path) -> dict[str, bytes]:
    files = outgoing(folder, "me/tiny")[0]
    return {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in files.items()
    }


def test_a_push_names_no_path_of_this_machine(place: Path) -> None:
    files, message = outgoing(place / "out", "me/tiny")
    there = sent(place / "out")
    for words in (ODD, str(Path.home()) + "/", str(place.parent.parent), "alice"):
        assert not [name for name, content in there.items() if words.encode() in content]
        assert words not in message + "".join(files)
    assert message == "base compressed by llmcompress"
    assert there.keys() >= {
        "config.json",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "report.json",
        "model.safetensors",
    }
    report = Report.from_json(there["report.json"])
    assert (report.base.model, report.data.source) == ("base", "diary.txt")
    assert report.trainings[0].model_dump().items() >= {"teacher": "teacher", "student": "student"}.items()
    assert any("were in the cache" in note for note in report.stages[0].notes)


def test_the_folder_of_an_artefact_names_paths_in_report_and_recipe_alone(place: Path) -> None:
    files = {
        str(file.relative_to(place / "out")): file for file in (place / "out").rglob("*") if file.is_file()
    }
    told = {
        name
        for name, file in files.items()
        if ODD.encode() in file.read_bytes() or b"alice" in file.read_bytes()
    }
    assert told == {"report.json", "recipe.yaml"}
    raw = json.loads(files["report.json"].read_text())
    kept = [raw["base"].pop("model"), raw["compressed"].pop("model"), raw["data"].pop("source")]
    kept += [raw["stages"][0].pop("teacher"), raw["stages"][0].pop("student")]
    assert {Path(name).name for name in kept} == set(NAMES) and ODD not in json.dumps(raw)
    assert not {"credentials.json", "notes.txt", "users.txt"} & files.keys()


def test_a_local_artefact_is_reproduced_from_its_folder_alone(place: Path) -> None:
    assert reproduce(str(place / "out")).verdict == "bit-equal"


def test_the_recipe_that_is_shared_is_that_of_its_report_and_its_names_are_no_ids(place: Path) -> None:
    there = sent(place / "out")
    told = Recipe.parse(there["recipe.yaml"])
    assert told.digest == Report.from_json(there["report.json"]).recipe_digest
    lesson = told.stages[0]
    assert isinstance(lesson, Distill)
    assert (told.base, told.data.source) == ("./base", "./diary.txt")
    assert (lesson.teacher, lesson.student) == ("./teacher", "./student")
    told._origin = RecipeFacts(source="me/tiny", revision="ab" * 20)
    cases = (
        (None, None, "with data"),
        ("python-docs", None, "with base"),
        ("python-docs", "demo", "save it to a file"),
    )
    for data, base, advice in cases:
        with pytest.raises(
            RecipeError, match=rf"a path here, and one from the Hub may name none; .*{advice}"
        ):
            told.require_own_names(data=data, base=base)


def test_what_somebody_put_beside_an_artefact_is_not_sent(place: Path, copy: Path) -> None:
    before = sent(copy)
    for name in (
        "secrets.json",
        "notes.txt",
        "screenshot.png",
        "model-old.safetensors",
        "run.py",
        "my.model",
        ".env",
    ):
        (copy / name).write_text("mine")
    (copy / ".eval_results").mkdir(exist_ok=True)
    (copy / ".eval_results" / "mine.yaml").write_text("mine")
    for name in ("users.txt", "vocab.txt", "LICENSE", "training.png"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to("/etc/passwd")
    after = sent(copy)
    assert after == {name: content for name, content in before.items() if name != "training.png"}
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to("/etc/passwd")
    assert b"root:" not in sent(copy)["README.md"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_artefact_whose_parts_are_elsewhere_is_not_pushed(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).rename(tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    with pytest.raises(
        OutputError, match=rf"{name} is a link that leaves the folder; put the file itself in its place"
    ):
        outgoing(copy, "me/tiny")


def test_what_was_written_before_goes_without_paths_too(place: Path, copy: Path) -> None:
    """An artefact of an earlier version, whose configs, notes and card tell of this machine."""
    tell(copy, place)
    raw = json.loads((copy / "report.json").read_text())
    raw["stages"][0]["notes"].append(f"the rest were in {place}/cache; {place / 'diary.txt'} was short")
    raw["stages"][1]["facts"] = {"of": [f"{Path.home()}/models/x", {"file": str(place / "base")}]}
    (copy / "report.json").write_text(json.dumps(raw))
    card = (copy / "README.md").read_text() + f"\nMy own words of {place / 'base'}, and of /usr/local/bin.\n"
    (copy / "README.md").write_text(card)
    there = sent(copy)
    assert not [name for name, content in there.items() if ODD.encode() in content]
    report = json.loads(there["report.json"])
    assert report["stages"][0]["notes"][-1].endswith("diary.txt was short")
    assert report["stages"][1]["facts"] == {"of": ["x", {"file": "base"}]}
    assert there["README.md"].decode().endswith("\nMy own words of base, and of /usr/local/bin.\n")


@pytest.mark.parametrize(
    ("source", "shared"),
    [
        ("secret dir/alice/diary.txt", "./diary.txt"),
        ("alice/diary.txt", "./diary.txt"),
        ("~/texts", "./texts"),
        ("C:\\texts\\a.txt", "./a.txt"),
        ("python-docs", "python-docs"),
        ("Salesforce/wikitext", "Salesforce/wikitext"),
    ],
)
def test_a_recipe_alone_is_shared_without_paths(source: str, shared: str) -> None:
    told = Recipe.model_validate(
        {"data": {"source": source}, "base": "meta/llama@v1", "stages": [{"quantize": {}}]}
    )
    assert (told.for_others().data.source, told.for_others().base) == (shared, "meta/llama@v1")
    assert source != shared or told.for_others() == told


def test_a_folder_spelled_as_an_id_is_known_by_the_report_and_by_being_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = json.loads((place / "out" / "report.json").read_text())
    raw["base"]["model"], raw["data"]["source"], raw["stages"] = "alice/base", "alice/texts", []
    entries = {"base": "alice/base", "data": {"source": "alice/texts"}, "stages": [{"quantize": {}}]}
    told, reported = Recipe.model_validate(entries), Report.model_validate(raw)
    assert told.local_names(reported) == {"alice/base", "alice/texts"} and told.local_names() == set()
    assert for_others(reported).data.source == "texts"
    there = {"base": raw["base"] | {"revision": "ab" * 20}, "data": raw["data"] | {"revision": "ab" * 20}}
    on_hub = Report.model_validate(raw | there)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice" / "base").mkdir(parents=True)
    assert told.local_names() == {"alice/base"} and told.local_names(on_hub) == set()
    assert for_others(on_hub).data.source == "alice/texts"
