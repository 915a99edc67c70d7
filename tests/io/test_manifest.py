"""A manifest: a folder is sound as long as every file of it is there as it was written, and no other."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from llmcompress.io.manifest import MANIFEST, is_sound, manifest_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(1000))
    (folder / "inner" / "b.json").write_text("{}")
    (folder / MANIFEST).write_text(manifest_of(folder))
    return folder


def test_a_manifest_names_each_file_and_its_sha256(folder: Path) -> None:
    said = json.loads((folder / MANIFEST).read_text())
    assert said == {
        "a.bin": hashlib.sha256(bytes(1000)).hexdigest(),
        "inner/b.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert is_sound(folder)


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", MANIFEST])
def test_no_damage_goes_unseen(name: str, folder: Path) -> None:
    file = folder / name
    content = file.read_bytes()
    for damaged in (
        b"",
        content[:-1],
        content[:-1] + bytes([content[-1] ^ 1]),
        content + b" ",
        b"\xff" * len(content),
    ):
        file.write_bytes(damaged)
        assert not is_sound(folder)
    file.unlink()
    assert not is_sound(folder)
    file.mkdir()
    assert not is_sound(folder)
    file.rmdir()
    file.write_bytes(content)
    assert is_sound(folder)


def test_what_is_there_besides_and_what_is_no_folder_are_not_sound(folder: Path) -> None:
    (folder / "c").write_text("")
    assert not is_sound(folder)
    shutil.rmtree(folder)
    assert not is_sound(folder)
    folder.write_text("{}")
    assert not is_sound(folder)
