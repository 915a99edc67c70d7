"""An export on the Hub: all of its files, a card that loads it from there, and a repository of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress.errors import OutputError
from llmcompress.exports.card import FILE
from llmcompress.pipeline.export import export
from llmcompress.pipeline.push_export import is_export, outgoing
from tests.clients import shell
from tests.exports.artefacts import grouped, written
from tests.hub_server import TOKEN, environment, serve


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    artefact = written(tmp_path / "small", grouped())
    return export(artefact, "compressed-tensors", tmp_path / "small-ct").folder


def test_all_files_of_an_export_are_sent(exported: Path) -> None:
    assert is_export(exported)
    (exported / "notes.txt").write_text("mine")
    files, about = outgoing(exported, "me/small-ct")
    named = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    assert files.keys() == named - {"notes.txt"}
    assert {"model.safetensors", "config.json", "tokenizer.json", FILE, "README.md"} <= files.keys()
    assert about == "small exported to compressed-tensors by llmcompress"
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert 'name = "me/small-ct"' in card.decode() and '"small-ct"' not in card.decode()
    assert str(exported.parent) not in card.decode() + json.dumps(json.loads((exported / FILE).read_text()))


def test_an_export_that_is_not_whole_is_not_sent(exported: Path) -> None:
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(OutputError, match="bytes of weights, and its export"):
        outgoing(exported, "me/small-ct")
    (exported / FILE).write_text("{}")
    with pytest.raises(OutputError, match="can't be read"):
        outgoing(exported, "me/small-ct")


def test_a_link_that_leaves_the_folder_is_not_followed(exported: Path, tmp_path: Path) -> None:
    weights = exported / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(OutputError, match="is a link that leaves the folder"):
        outgoing(exported, "me/small-ct")


@pytest.mark.slow
def test_an_export_has_a_repository_of_its_own(exported: Path, tmp_path: Path) -> None:
    with serve() as (hub, endpoint):
        env = environment(endpoint, tmp_path / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
        code, out, err = shell(env, "push", str(exported), "me/small-ct")
        assert code == 0 and "/me/small-ct, commit" in out, err
        there = hub.files("me/small-ct")
        assert there["model.safetensors"] == (exported / "model.safetensors").read_bytes()
        hub.add("me/artefact", {"report.json": b"{}"})
        code, _, err = shell(env, "push", str(exported), "me/artefact")
        assert code == 2 and "an artefact and an export don't go into one repository" in err
        assert hub.files("me/artefact").keys() - {".gitattributes"} == {"report.json"}
