"""The journal: what is saved is read back by the next run, and what is damaged or another run's counts as not
done."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import CompressError, OutputError
from llmcompress.io.checkpoint import opened
from llmcompress.io.journal import Journal, JournalFacts
from llmcompress.io.safetensors_writer import Shard, tensors_digest
from tests.io.test_safetensors_writer import some_tensors


class Found(JournalFacts):
    error: float
    kept: tuple[str, ...] = ()


class Round(JournalFacts):
    round: int


def test_a_journal_returns_what_was_saved_also_to_the_next_run(tmp_path: Path) -> None:
    tensors = some_tensors()
    Journal(tmp_path / "journal", "key").save("quantize", 3, tensors, Found(error=0.1 + 0.2, kept=("a",)))
    journal = Journal(tmp_path / "journal", "key")
    assert journal.has("quantize", 3)
    assert not journal.has("quantize", 4)
    assert not journal.has("prune", 3)
    found = journal.load("quantize", 3)
    assert journal.facts("quantize", 3, Found) == Found(error=0.1 + 0.2, kept=("a",))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in tensors)
    with pytest.raises(KeyError):
        journal.load("quantize", 4)
    with pytest.raises(KeyError):
        journal.facts("quantize", 4, Found)


def test_a_journal_of_another_run_is_discarded(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", "one").save("quantize", 0, some_tensors())
    assert not Journal(tmp_path / "journal", "two").has("quantize", 0)
    assert not Journal(tmp_path / "journal", "one").has("quantize", 0)


def test_a_block_file_cut_anywhere_or_changed_anywhere_is_not_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "key")
    journal.save("quantize", 0, {"w": torch.randn(20, 20)}, Found(error=1.0))
    file = next((tmp_path / "journal").glob("*.safetensors"))
    sound = file.read_bytes()
    for size in (0, 3, 8, 100, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:size])
        assert not journal.has("quantize", 0)
    for place in range(0, len(sound), 37):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        if journal.has("quantize", 0):  # then the change was one of white space
            assert sound[place : place + 1] == b" "
    file.write_bytes(sound)
    assert journal.has("quantize", 0)
    journal.save("quantize", 0, {"w": torch.zeros(2)})
    assert torch.equal(journal.load("quantize", 0)["w"], torch.zeros(2))


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write") as caught:
        Journal(tmp_path / "file" / "journal", "key")
    assert isinstance(caught.value, CompressError)


def test_a_key_that_can_not_be_read_and_facts_that_are_no_json_count_as_not_done(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    for damage in (b"", b"\xff", b"k\0y"):
        Journal(folder, "key").save("quantize", 0, {"w": torch.ones(2)})
        (folder / "key").write_bytes(damage)
        journal = Journal(folder, "key")
        assert not journal.has("quantize", 0) and journal.damaged == {"key"}
    for text in ("{", "[" * 100_000, "\ud800"):
        shard = Shard(folder / "shard")
        tensors = {"w": torch.ones(2)}
        shard.add("w", tensors["w"])
        sha = tensors_digest(tensors, text) if text != "\ud800" else ""
        shard.close({"key": "key", "facts": text, "sha256": sha})
        shard.file.replace(journal.file("quantize", 0))
        assert not journal.has("quantize", 0)
    assert journal.damaged == {"key", "quantize.00000.safetensors"}


def test_a_folder_in_the_place_of_a_block_is_replaced(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "key")
    (journal.file("quantize", 0) / "inner").mkdir(parents=True)
    assert not journal.has("quantize", 0)
    journal.save("quantize", 0, {"w": torch.ones(2)})
    assert journal.has("quantize", 0)
    assert {path.name for path in journal.folder.iterdir()} == {"key", "quantize.00000.safetensors"}


def test_several_share_a_journal_and_none_discards_what_another_wrote(tmp_path: Path) -> None:
    def writes(number: int) -> bool:
        for round in range(10):
            journal = Journal(tmp_path / "journal", "key", shared=True)
            journal.save("sequence", round % 2, {"w": torch.full((1000,), round % 2)}, Round(round=round % 2))
            found = journal.load("sequence", round % 2)
            assert torch.equal(found["w"], torch.full((1000,), round % 2))
            assert journal.facts("sequence", round % 2, Round).round == round % 2
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(writes, range(4)))
    assert len(list((tmp_path / "journal").iterdir())) == 2
    other = Journal(tmp_path / "journal", "other", shared=True)
    assert not other.has("sequence", 0) and Journal(tmp_path / "journal", "key", shared=True).has(
        "sequence", 0
    )


def test_a_file_is_read_once_to_know_that_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "journal", "key").save("quantize", 0, some_tensors())
    journal = Journal(tmp_path / "journal", "key")
    reads: list[Path] = []

    def watched(file: Path) -> Any:
        reads.append(file)
        return opened(file)

    monkeypatch.setattr("llmcompress.io.journal.opened", watched)
    assert all(journal.has("quantize", 0) for _ in range(3))
    assert len(reads) == 1
    journal.save("quantize", 1, some_tensors())
    assert journal.has("quantize", 1)
    assert len(reads) == 1, "what it wrote itself it need not read"
