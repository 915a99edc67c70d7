"""Text in, token sequences out: every source, every refusal, and the promise that the two sides never
overlap."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmcompress.data import python_docs as python_docs_module
from llmcompress.data.calibration import DEMO_MODEL, CalibrationData, _chunks, _tokenise, load_data
from llmcompress.data.local_files import file_texts
from llmcompress.data.python_docs import python_docs
from llmcompress.data.sources import DataSpec
from llmcompress.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all: the tokens spell the text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=64)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Lines that are all different: 'fact 17: 0.1234...'."""
    draw = random.Random(seed)
    return [f"fact {number}: {draw.random()}" for number in range(count)]


def write_rows(file: Path, rows: list[str], column: str = "text") -> Path:
    """Rows as .txt, .jsonl or .parquet, by the file's name."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), column: rows}), file)
    elif file.suffix == ".jsonl":
        file.write_text(
            "".join(json.dumps({"id": number, column: row}) + "\n" for number, row in enumerate(rows))
        )
    else:
        file.write_text("".join(row + "\n" for row in rows))
    return file


def load(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int = 256, max_length: int | None = 4096, **spec: object
) -> CalibrationData:
    small: dict[str, object] = {"samples": 8, "length": 64, "evaluation_samples": 4}
    return load_data(DataSpec.model_validate(small | spec), tokenizer, vocab_size, max_length)


def spelled(tokenizer: PreTrainedTokenizerFast, sequences: torch.Tensor) -> str:
    return str(tokenizer.decode(sequences.flatten().tolist()))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_the_last_tenth_of_a_file_evaluates_and_its_head_calibrates(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast, name: str
) -> None:
    file = write_rows(tmp_path / name, sentences(400))
    layers = load(by_bytes, source=str(file), samples=90, evaluation_samples=12)
    assert layers.calibration.shape == (90, 64) and layers.evaluation.shape == (12, 64)
    assert layers.calibration.dtype == layers.evaluation.dtype == torch.int64
    assert (layers.calibration_tokens, layers.evaluation_tokens, layers.spec.source) == (
        90 * 64,
        12 * 64,
        str(file),
    )
    first = spelled(by_bytes, layers.evaluation).splitlines()[0]
    assert sentences(400).index(first) in range(355, 365)
    for sequence in layers.calibration:
        lines = [line for line in spelled(by_bytes, sequence).splitlines()[1:-1] if line]
        assert all(sentences(400).index(line) < 365 for line in lines)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_calibration_and_evaluation_text_never_overlap(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast, name: str
) -> None:
    file = write_rows(tmp_path / name, sentences(123))
    calibration, evaluation = ("".join(map(str, side)).split("\n") for side in file_texts(file, "text")[:2])
    assert [line for line in calibration + evaluation if line] == sentences(123)
    assert not (set(calibration) & set(evaluation)) - {""}


def test_a_text_of_one_line_is_divided_too(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    (tmp_path / "line.txt").write_text(" ".join(sentences(400)))
    assert load(by_bytes, source=str(tmp_path / "line.txt")).evaluation.shape == (4, 64)


def test_the_evaluation_sequences_are_the_first_of_the_evaluation_text_in_order(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    write_rows(tmp_path / "train.txt", sentences(100, seed=1))
    write_rows(tmp_path / "test.txt", sentences(100, seed=2))
    write_rows(tmp_path / "valid.txt", sentences(100, seed=3))
    (tmp_path / "trainer-notes.txt").write_text("not training text")
    layers = load(by_bytes, source=str(tmp_path))
    # valid comes before test
    assert spelled(by_bytes, layers.evaluation) == "\n".join(sentences(100, seed=3))[: 4 * 64]
    assert all(
        spelled(by_bytes, sequence) in "\n".join(sentences(100, seed=1)) for sequence in layers.calibration
    )


def test_a_folder_may_hold_shards_and_tables(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path / "calibration-00000-of-00002.jsonl", sentences(9, seed=1), column="story")
    write_rows(tmp_path / "calibration-00001-of-00002.parquet", sentences(9, seed=2), column="story")
    write_rows(tmp_path / "heldout.jsonl", sentences(40, seed=3), column="story")
    both = "\n\n".join(sentences(9, seed=1) + sentences(9, seed=2))
    layers = load(by_bytes, source=str(tmp_path), column="story", samples=len(both) // 64)
    sequences = sorted(spelled(by_bytes, sequence) for sequence in layers.calibration)
    assert sequences == sorted(both[start : start + 64] for start in range(0, len(both) - 63, 64))


def test_the_seed_draws_different_sequences_and_no_sequence_twice(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    file = str(write_rows(tmp_path / "a.txt", sentences(400)))
    one, same, other = (load(by_bytes, source=file, seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 and torch.equal(one.calibration, same.calibration)
    assert one.sha256 != other.sha256 and torch.equal(one.evaluation, other.evaluation)
    assert len({tuple(sequence) for sequence in one.calibration.tolist()}) == 8


def test_the_hash_is_over_both_token_tensors(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    import hashlib
    import struct

    layers = load(by_bytes, source=str(write_rows(tmp_path / "a.txt", sentences(400))))
    tokens = layers.calibration.flatten().tolist() + layers.evaluation.flatten().tolist()
    assert layers.sha256 == hashlib.sha256(struct.pack(f"<{len(tokens)}q", *tokens)).hexdigest()


def test_a_length_that_is_not_given_is_the_longest_that_model_and_text_allow(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    file = str(write_rows(tmp_path / "a.txt", sentences(1000)))  # about 3 000 bytes evaluate
    lengths = [
        load(
            by_bytes, source=file, length=None, samples=2, evaluation_samples=wanted, max_length=most
        ).calibration.shape[1]
        for wanted, most in ((1, 4096), (1, None), (1, 300), (4, 4096), (8, 1000))
    ]
    assert lengths == [2048, 2048, 300, 512, 250]


def test_any_text_is_tokenised_whole_and_in_order(by_bytes: PreTrainedTokenizerFast) -> None:
    text = "".join(line + "\n" for line in sentences(9000)) + "x" * 150_000
    tokens = _tokenise(text.splitlines(keepends=True), by_bytes, 10**9)
    assert spelled(by_bytes, tokens) == text
    assert torch.equal(_tokenise([text], by_bytes, 1000), tokens[:1000])


def test_text_is_read_only_as_far_as_it_is_needed(by_bytes: PreTrainedTokenizerFast) -> None:
    def endless() -> object:
        while True:
            yield "no end in sight\n"

    assert len(_tokenise(endless(), by_bytes, 5000)) == 5000  # type: ignore[arg-type]


@given(st.lists(st.text()))
@settings(max_examples=50, deadline=None)
def test_chunks_join_to_the_pieces(pieces: list[str]) -> None:
    assert "".join(_chunks(pieces)) == "".join(pieces)


def test_a_path_that_does_not_exist_is_not_asked_from_the_hub(by_bytes: PreTrainedTokenizerFast) -> None:
    for source in (
        "./corpus",
        "corpus.txt",
        "a/b/corpus",
        "~/corpus",
        "/corpus",
        "user/corpus.parquet",
        "my corpus",
    ):
        with pytest.raises(DataError, match=r"does not exist; name a .txt, .jsonl or .parquet file"):
            load(by_bytes, source=source)


def test_a_wrong_column_names_the_columns_there_are(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    for name in ("a.jsonl", "a.parquet"):
        file = write_rows(tmp_path / name, sentences(40))
        with pytest.raises(
            DataError, match="has no column 'story'; it has id, text: set column to one of them"
        ):
            load(by_bytes, source=str(file), column="story")
        with pytest.raises(DataError, match=r"column 'id' of .* holds a int, not text"):
            load(by_bytes, source=str(file), column="id")


def test_damaged_files_are_refused_in_one_line(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    damaged = {
        "empty.txt": (b"", "the calibration text of .* is empty"),
        "empty.jsonl": (b"", "the calibration text of .* is empty"),
        "latin.txt": (b"caf\xe9 " * 99, "is not UTF-8 text"),
        "half.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        "list.jsonl": (b"[1]\n", "line 1 is a list, not an object"),
        "half.parquet": (b"PAR1....", "is no Parquet file that can be read"),
        "table.csv": (b"text\na\n", "use a .txt, .jsonl or .parquet file"),
    }
    for name, (content, message) in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load(by_bytes, source=str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1


def test_too_little_text_says_how_much_there_is_and_what_to_ask_for(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    file = str(write_rows(tmp_path / "a.txt", sentences(100)))
    with pytest.raises(
        DataError,
        match=(
            r"calibration .* fills 3\d sequences of 64 tokens .* use samples: 3\d or length: 5 or give more "
            r"text"
        ),
    ):
        load(by_bytes, source=file, samples=500)
    with pytest.raises(
        DataError,
        match=r"evaluation .* fills 4 sequences .* asks for 9; use evaluation_samples: 4 or length: \d+",
    ):
        load(by_bytes, source=file, evaluation_samples=9)
    with pytest.raises(DataError, match=r"sequences of 128 tokens"):
        load(by_bytes, source=file, evaluation_samples=9, length=None)


def test_one_text_can_not_be_both_sides(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    write_rows(tmp_path / "train.txt", sentences(100))
    write_rows(tmp_path / "valid.txt", sentences(100))
    with pytest.raises(DataError, match=r"valid.txt is the same text as train.txt"):
        load(by_bytes, source=str(tmp_path))
    write_rows(tmp_path / "valid.txt", [*sentences(100), "one more line"])
    with pytest.raises(DataError, match=r"evaluation sequence 0 of .* also stands in its calibration text"):
        load(by_bytes, source=str(tmp_path))


def test_a_folder_without_a_side_says_which(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"holds no .txt, .jsonl or .parquet file and no train\* file"):
        load(by_bytes, source=str(tmp_path))
    write_rows(tmp_path / "train.txt", sentences(100))
    with pytest.raises(DataError, match=r"holds train.txt and no valid\* or test\* file"):
        load(by_bytes, source=str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, by_bytes: PreTrainedTokenizerFast) -> None:
    file = str(write_rows(tmp_path / "a.txt", sentences(100)))
    with pytest.raises(DataError, match=r"gives token \d+ and the model has 50 tokens \(0 to 49\)"):
        load(by_bytes, vocab_size=50, source=file)
    with pytest.raises(DataError, match="the base has no tokenizer"):
        load_data(DataSpec(source=file), None, 256, 512)


def test_a_length_beyond_the_model_is_refused(by_bytes: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match="length 4096 is more than the 512 positions of the model; use length: 512"
    ):
        load(by_bytes, length=4096, max_length=512)


def test_what_is_said_of_a_hub_data_set_is_refused_for_a_file(
    tmp_path: Path, by_bytes: PreTrainedTokenizerFast
) -> None:
    file = str(write_rows(tmp_path / "a.txt", sentences(100)))
    for field in ("config", "revision", "evaluation_split", "split"):
        with pytest.raises(DataError, match=f"{field} is for Hub data sets"):
            load_data(DataSpec.model_validate({"source": file, field: "test"}), by_bytes, 256, 512)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"samples": "8"},
        {"length": 1},
        {"seed": -1},
        {"evaluation_samples": 0},
        {"source": ""},
        {"sample": 3},
    ],
)
def test_a_spec_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DataSpec.model_validate(wrong)


def test_another_text_in_the_same_sequences(tmp_path: Path) -> None:
    spec = DataSpec(
        source="user/texts", config="en", column="story", split="dev", revision="v1", samples=3, length=7
    )
    (tmp_path / "a@b").write_text("")
    for text, place in (
        ("other/texts", {"source": "other/texts"}),
        ("other/texts@v2", {"source": "other/texts", "revision": "v2"}),
        (str(tmp_path / "a@b"), {"source": str(tmp_path / "a@b")}),
        ("python-docs", {"source": "python-docs"}),
        (
            "{source: other/texts, config: de, split: head}",
            {"source": "other/texts", "config": "de", "split": "head"},
        ),
        (
            " {source: facts.jsonl, column: fact, samples: 5}",
            {"source": "facts.jsonl", "column": "fact", "samples": 5},
        ),
    ):
        assert spec.with_text(text) == DataSpec.model_validate({"samples": 3, "length": 7, **place})
    for wrong, why in (
        ("{source: a, colum: b}", "colum: unknown key; use source, config, split, "),
        ("{source: a, samples: 0}", "samples: Input should be greater than or equal to 1"),
        ("{source: [a]}", "source: Input should be a valid string"),
        ("{source: a", "give a source, or a mapping like '{source: user/name"),
        ("", "source: String should have at least 1 character"),
    ):
        with pytest.raises(DataError, match=re.escape(why)) as caught:
            spec.with_text(wrong)
        assert len(str(caught.value).splitlines()) == 1


def test_a_spec_is_a_value() -> None:
    assert DataSpec() == DataSpec(source="python-docs") and hash(DataSpec()) == hash(DataSpec())
    assert DataSpec.model_validate(DataSpec(length=64).model_dump()) == DataSpec(length=64)


@pytest.mark.slow
def test_python_docs_hold_topics_and_docstrings_once_each() -> None:
    calibration, evaluation = python_docs()
    assert len(calibration) > 1_000_000 and 0.05 < len(evaluation) / len(calibration) < 0.25
    ours, theirs = (set(side.strip().split("\n\n\n")) for side in (calibration, evaluation))
    assert not {text for text in ours & theirs if len(text) > 200}
    assert "Inspect" in calibration + evaluation and "Traceback" in calibration + evaluation
    assert any(json.JSONDecoder.__doc__.strip().splitlines()[0] in side for side in (calibration, evaluation))  # type: ignore[union-attr]


def test_python_docs_are_parsed_once_and_again_where_what_was_kept_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    (library / "pydoc_data").mkdir(parents=True)
    (library / "pydoc_data" / "topics.py").write_text("topics = {'a': 'About a.'}")
    for number in range(40):
        (library / f"module_{number}.py").write_text(f'"""Module {number}."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    parsed: list[Path] = []
    plain = python_docs_module._read

    def counting(library: Path, *files: Any) -> tuple[str, str]:
        parsed.append(library)
        return plain(library, *files)

    monkeypatch.setattr(python_docs_module, "_read", counting)

    def read() -> tuple[str, str]:
        python_docs_module.python_docs.cache_clear()
        return python_docs_module.python_docs()

    try:
        first = read()
        assert "About a." in "".join(first) and all("Module" in side for side in first)
        assert read() == first and len(parsed) == 1
        (kept,) = (tmp_path / "cache" / "python-docs").iterdir()
        for damaged in (b"", b"[]", kept.read_bytes().replace(b"Module 7.", b"Module 8."), b"\xff"):
            kept.write_bytes(damaged)
            before = len(parsed)
            assert read() == first and len(parsed) == before + 1
        (library / "module_1.py").write_text('"""Another module."""')
        assert "Another module." in "".join(read())
        monkeypatch.setenv("LLMCOMPRESS_CACHE", str(kept))  # a file, where nothing can be kept
        assert "Another module." in "".join(read())
    finally:
        python_docs_module.python_docs.cache_clear()


def test_the_demo_model_reads_python_docs() -> None:
    if not (DEMO_MODEL / "tokenizer.json").is_file():
        pytest.skip(f"no demo model at {DEMO_MODEL}: run evaluation/train_demo.py")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    layers = load_data(DataSpec(), tokenizer, len(tokenizer), 512)
    assert layers.calibration.shape == (128, 512) and layers.evaluation.shape == (64, 512)
    assert str(tokenizer.decode(layers.evaluation[0].tolist())) in python_docs()[1]


@pytest.mark.parametrize(("model", "text"), [("wikilm-8m", "wikitext-2"), ("stories260K", "tinystories")])
def test_the_shared_models_read_the_shared_texts(model: str, text: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: the shared models and texts are not part of the repository")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    layers = load_data(
        DataSpec(source=str(SHARED / "data" / text), samples=32), tokenizer, len(tokenizer), 256
    )
    assert layers.calibration.shape == (32, 256) and layers.evaluation.shape == (64, 256)


def test_the_demo_model_is_small_and_knows_its_language() -> None:
    if not (DEMO_MODEL / "training.json").is_file():
        pytest.skip(f"no demo model at {DEMO_MODEL}: run evaluation/train_demo.py")
    training = json.loads((DEMO_MODEL / "training.json").read_text())
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) < 4_100_000
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    assert model.num_parameters() == training["parameters"] < 2_000_000
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    sequences = load_data(
        DataSpec(samples=1, evaluation_samples=8), tokenizer, len(tokenizer), 512
    ).evaluation
    with torch.no_grad():
        loss = model(input_ids=sequences, labels=sequences).loss.item()
    # eight sequences, and another Python carries another text
    assert abs(loss - training["heldout_loss"]) < 0.5
