"""The tokenizer beside a model: which files it is read from, and proof that an artefact's tokenizer gives the
same tokens as its base's.

AutoTokenizer chooses the class by more than the tokenizer's own files: by `model_type`, by `auto_map`, and by
which files exist. For a Llama whose config becomes Mistral's, though the model is the same, it builds another
class, which splits text after a special token differently. So the copied files are loaded beside the written
config and compared with the base's tokenizer on text that tells such classes apart. Where they differ, they
are replaced by what the base's tokenizer saves, under the name of the class that reads tokenizer.json
unchanged.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from llmcompress.errors import CompressError, ModelError
from llmcompress.io import own_code
from llmcompress.io.checkpoint import read_json
from llmcompress.io.companion_files import CONFIG, MAP, RIGHTS, kept, links_out, shareable
from llmcompress.io.safetensors_writer import sync, writing

SETTINGS = "tokenizer_config.json"
LEGACY = ("special_tokens_map.json", "added_tokens.json")  # a saved tokenizer has these in its other files
# the class that reads tokenizer.json unchanged, whatever the model, since transformers 4
AS_IT_IS = "PreTrainedTokenizerFast"
TRAITS = (
    "special_tokens_map",
    "chat_template",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "model_max_length",
)
TEXTS = (
    *(
        "",
        " ",
        "hello",
        " hello",
        "   hello",
        "hello ",
        "Hello, world!",
        "I'm sure we'll see: it's his.",
        "don't",
        "UPPER case",
    ),
    *(
        "\n",
        "\n\n",
        "\thello\n",
        "hello\r\nworld",
        "one\n\n\ntwo  three   four",
        "def f(x):\n    return x**2 != -1\n",
    ),
    *(
        "0",
        "12345",
        "3.14159, 67,890 and 1e-9",
        "2026-11-28T23:59",
        "a1b2 c3",
        "$5 + 10% = ?",
        "<b>&amp;</b> [x](y) {z}",
    ),
    *(
        "naïve café Straße",
        "a\u0301 e\u0308",
        "日本語の文",
        "привет мир",
        "שלום",
        "🙂",
        "👩\u200d👩\u200d👧 hi 🏳️\u200d🌈",
    ),
    *(
        "▁ under▁score _",
        "\u00a0hello\u2009world\u3000",
        "\ufeffhello",
        "\x00\x7f",
        "ﬁ ½ Ⅷ",
        "https://user@example.org/a_b?c=d#e",
    ),
)
# a token surrounded by text
AROUND = (
    *("{0}", "{0}hello", "hello{0}", "hello{0}hello", "hello {0} hello", " {0}", "{0} ", "{0}\n", "\n{0}"),
    *("{0}{0}", "{0} {0}", "{0}{0}hello", "{0} hello"),
)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model. Raises ModelError if there is none, or if it needs code of its own,
    which the user has not allowed."""
    allowed = own_code.runs(folder)
    name = _outside(folder) if allowed else _own_class(folder)
    if name is not None and not allowed:
        raise own_code.refusal(f"the tokenizer of {folder}", name)
    try:
        if name is not None:
            kind: Any = own_code.class_of(folder, name)
            kind.register_for_auto_class()  # so that its code is saved with it
            found: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=True)
            return found
        known = {"config": _own_config(folder)} if allowed else {}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **known)
    except CompressError:
        raise
    except Exception as error:  # tokenizers raise bare Exceptions
        raise ModelError(
            f"{folder} has no tokenizer that loads ({_why(error)}); save the model's tokenizer there"
        ) from None


def vocabulary_files(folder: Path) -> list[str]:
    """Names of the files that the folder's tokenizer may consist of, according to the classes that may read
    it."""
    settings, config = (_fields(folder / name) for name in (SETTINGS, CONFIG))
    names = [fields.get("tokenizer_class") for fields in (settings, config)]
    names.append(TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type"))))
    found = {
        file
        for name in names
        if (kind := _class_of(name)) is not None
        for file in kind.vocab_files_names.values()
    }
    versions = settings.get("fast_tokenizer_files")
    found |= {str(name) for name in (versions if isinstance(versions, list) else [])}
    return sorted(
        name for name in found if isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*(\.[\w-]+)*", name)
    )


def require_portable(
    folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, within: Path
) -> None:
    """Raise ModelError if the tokenizer of a base would differ beside a model of this config; tried in a
    folder inside `within`.

    Errors: ModelError, OutputError.
    """
    with writing(within), tempfile.TemporaryDirectory(dir=within) as scratch:
        code = own_code.carried(folder)
        files = code | kept(folder, vocabulary_files(folder), code=bool(code))
        written = json.dumps(shareable(config, code=bool(code))).encode()
        for name, content in (files | {CONFIG: written}).items():
            _put(Path(scratch) / name, content)
        keep_tokens(Path(scratch), tokenizer, folder)


def keep_tokens(written: Path, tokenizer: PreTrainedTokenizerBase, base: Path) -> None:
    """Make the files in `written`, copied from `base`, give the tokens of the base's `tokenizer`; usually
    they already do.

    Otherwise they are written again from the tokenizer itself. Errors: ModelError if those give other tokens
    too, or if a link was not followed, because its target must not be published.
    """
    if (wrong := _difference(written, tokenizer)) is None:
        return
    if left := [name for name in links_out(base, vocabulary_files(base)) if name not in RIGHTS]:
        raise ModelError(
            f"{base / left[0]} is a link that leaves the folder; put the file itself in its place"
        )
    _save(written, tokenizer)
    if (wrong := _difference(written, tokenizer)) is not None:
        raise ModelError(
            f"the tokenizer of {base} would not be the same in the result: {wrong}; save it there with "
            "save_pretrained, as a tokenizer.json"
        )


def difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Return the first difference between two tokenizers in words, or None.

    Compares vocabularies, traits such as the chat template, and the tokens of `TEXTS` and of every added
    token surrounded by text.
    """
    if ours.get_vocab() != theirs.get_vocab():
        return "the vocabularies differ"
    for trait in TRAITS:
        one, other = getattr(ours, trait), getattr(theirs, trait)
        if one != other:
            return f"{trait} is {other!r:.80} and not {one!r:.80}"
    texts = [*TEXTS, *(around.format(token) for token in ours.get_added_vocab() for around in AROUND)]
    for special in (True, False):
        for text, mine, yours in zip(
            texts, *(_tokens(each, texts, special) for each in (ours, theirs)), strict=True
        ):
            if mine != yours:
                return f"{text!r:.80} is {yours} and not {mine}"
            if (
                text in TEXTS
                and isinstance(mine, list)
                and (word := ours.decode(mine)) != (other := theirs.decode(mine))
            ):
                return f"{mine} stands for {other!r:.80} and not {word!r:.80}"
    return None


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int] | str]:
    """The tokens of each text, or the error instead: some vocabularies have no token for unknown text."""
    found: list[list[int] | str]
    try:
        found = tokenizer(texts, add_special_tokens=special, verbose=False).input_ids
    except Exception as error:  # tokenizers raise bare Exceptions
        found = (
            [_why(error)] if len(texts) == 1 else [_tokens(tokenizer, [text], special)[0] for text in texts]
        )
    return found


def _difference(written: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return difference(tokenizer, tokenizer_of(written))
    except ModelError:
        return "it does not load"


def _save(written: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a loaded tokenizer, including what its class would add."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    with writing(written.parent), tempfile.TemporaryDirectory(dir=written.parent) as scratch:
        tokenizer.save_pretrained(scratch)
        settings = read_json(Path(scratch) / SETTINGS)
        said = {
            trait: getattr(tokenizer, trait)
            for trait in ("padding_side", "truncation_side", "model_input_names")
        }
        settings |= said | ({"tokenizer_class": AS_IT_IS} if fast else {})
        (Path(scratch) / SETTINGS).write_text(
            json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
        )
        for name in LEGACY:
            (written / name).unlink(missing_ok=True)
        for name, content in kept(Path(scratch), vocabulary_files(Path(scratch))).items():
            _put(written / name, content)


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(content)
        sync(opened)


def _own_class(folder: Path) -> str | None:
    """The class outside transformers, as `file.Class`, that a folder's tokenizer needs, or None if
    transformers has its class."""
    settings, config = (_fields(folder / name) for name in (SETTINGS, CONFIG))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    known = isinstance(name, str) and "Tokenizer" in name and tokenizer_class_from_name(name) is not None
    return None if known else _outside(folder)


def _own_config(folder: Path) -> Any:
    """The config of a model by the class beside it, which may run; None if it brings none."""
    named = _fields(folder / CONFIG).get(MAP)
    reference = named.get("AutoConfig") if isinstance(named, dict) else None
    kind: Any = own_code.class_of(folder, str(reference)) if reference else None
    return kind.from_pretrained(folder) if reference else None


def _outside(folder: Path) -> str | None:
    """The class that a folder's tokenizer names in `auto_map`, the fast one if there are two."""
    listed = _fields(folder / SETTINGS).get(MAP)
    named = listed.get("AutoTokenizer") if isinstance(listed, dict) else listed
    return next(reversed([*_each(named)]), None)


def _each(named: Any) -> Iterator[str]:
    """The classes in an entry of auto_map: one, or the slow and the fast one."""
    yield from (str(name) for name in (named if isinstance(named, list) else [named]) if name)


def _class_of(name: Any) -> type[PreTrainedTokenizerBase] | None:
    """The transformers class of this name; None if it does not exist, is not a tokenizer, or lacks a
    dependency."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    try:
        found = tokenizer_class_from_name(name)
        return found if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase) else None
    except ImportError:
        return None


def _fields(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _why(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
