"""llama.cpp, as the package xllamacpp has it: the logits and tokens of a GGUF file, and its quantiser.

    python -m evaluation.llama_cpp FILE TOLD OUT

runs a file on the sequences and texts in the JSON file TOLD, writes logits to OUT as .npy and prints tokens.
`run` starts that in a process of its own, as llama.cpp aborts where it can't go on. It needs
`pip install xllamacpp`, whose extension module exports the functions of llama.h. The package's own server
gives probabilities too, but of one token per request and as text: slow where the vocabulary is large.

The structs here restate what is used of llama.h: `Batch` whole, of the parameters of a context the first
four, of those of a model none.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.results import ROOT

INSTALLED = find_spec("xllamacpp") is not None
INSTALL = "pip install xllamacpp to run llama.cpp"
BLOCK_BYTES, BLOCK_COLUMNS = 18, 32  # of Q4_0 and IQ4_NL
MORE = 1024  # bytes beyond what is said of a struct: more than the rest of it takes


class ModelParameters(ctypes.Structure):
    """llama_model_params."""

    _fields_ = (("rest", ctypes.c_uint64 * (MORE // 8)),)


class ContextParameters(ctypes.Structure):
    """llama_context_params."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("aligned", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * (MORE // 8)),
    )


class Batch(ctypes.Structure):
    """llama_batch: token number `n` at position `pos[n]` of sequence `seq_id[n][0]`; its logits are kept if
    `logits[n]`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


Pointer, Int = ctypes.c_void_p, ctypes.c_int32
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
SILENT = Log(lambda level, line, told: None)
FUNCTIONS = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, Pointer, Pointer, *3 * [ctypes.c_int64], Pointer],
    ),
    "llama_log_set": (None, [Log, Pointer]),
    "llama_model_default_params": (ModelParameters, []),
    "llama_model_load_from_file": (Pointer, [ctypes.c_char_p, ModelParameters]),
    "llama_model_get_vocab": (Pointer, [Pointer]),
    "llama_vocab_n_tokens": (Int, [Pointer]),
    "llama_context_default_params": (ContextParameters, []),
    "llama_init_from_model": (Pointer, [Pointer, ContextParameters]),
    "llama_n_ctx": (ctypes.c_uint32, [Pointer]),
    "llama_n_batch": (ctypes.c_uint32, [Pointer]),
    "llama_n_ubatch": (ctypes.c_uint32, [Pointer]),
    "llama_n_seq_max": (ctypes.c_uint32, [Pointer]),
    "llama_set_n_threads": (None, [Pointer, Int, Int]),
    "llama_get_memory": (Pointer, [Pointer]),
    "llama_memory_clear": (None, [Pointer, ctypes.c_bool]),
    "llama_memory_seq_rm": (ctypes.c_bool, [Pointer, Int, Int, Int]),
    "llama_decode": (Int, [Pointer, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [Pointer]),
    "llama_tokenize": (
        Int,
        [Pointer, ctypes.c_char_p, Int, ctypes.POINTER(Int), Int, ctypes.c_bool, ctypes.c_bool],
    ),
}


def library() -> ctypes.CDLL:
    """The functions of llama.cpp.

    Raises:
        SystemExit: xllamacpp is not installed.
    """
    if not INSTALLED:
        sys.exit(INSTALL)
    found = ctypes.CDLL(str(import_module("xllamacpp.xllamacpp").__file__))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def quantized(W_RC: NDArray[np.float32], type_: int) -> NDArray[np.uint8]:
    """The blocks, (R, C / 32, 18), that llama.cpp's own quantiser makes of a weight, without an importance
    matrix. `type_` is the number of Q4_0 or IQ4_NL in enum ggml_type."""
    (R, C), source = W_RC.shape, np.ascontiguousarray(W_RC)
    blocks = np.empty((R, C // BLOCK_COLUMNS, BLOCK_BYTES), dtype=np.uint8)
    library().ggml_quantize_chunk(type_, source.ctypes.data, blocks.ctypes.data, 0, R, C, None)
    return blocks


def run(
    file: Path, sequences: Sequence[Sequence[int]], texts: Sequence[str] = (), threads: int = 1
) -> tuple[NDArray[np.float32], list[list[int]]]:
    """The logits, (sequence, token, vocabulary), that llama.cpp computes for sequences of one length, and the
    tokens that it makes of texts. Files beside `file` carry both ways.

    Raises:
        RuntimeError: llama.cpp failed; its log is in the message.
    """
    told, out = file.with_suffix(".told.json"), file.with_suffix(".logits.npy")
    told.write_text(json.dumps({"tokens": sequences, "texts": texts, "threads": threads}))
    files = [str(path.resolve()) for path in (file, told, out)]
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.llama_cpp", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp could not run {file} (exit code {done.returncode}):\n{done.stderr}")
    return np.load(out), json.loads(done.stdout.splitlines()[-1])


class Context:
    """A model that llama.cpp has loaded, for `sequences` sequences with `length` tokens in all.

    Raises:
        RuntimeError: It could not be loaded, or the context is not as asked for, which is what a struct that
            has changed would show.
    """

    def __init__(self, file: str, length: int, threads: int, sequences: int = 1) -> None:
        self.llama = library()
        model = self.llama.llama_model_load_from_file(file.encode(), self.llama.llama_model_default_params())
        if model is None:
            raise RuntimeError(f"{file} was not loaded")
        self.vocabulary = self.llama.llama_model_get_vocab(model)
        self.size: int = self.llama.llama_vocab_n_tokens(self.vocabulary)
        asked = self.llama.llama_context_default_params()
        asked.n_ctx = asked.n_batch = asked.n_ubatch = length
        asked.n_seq_max = sequences
        self.context = self.llama.llama_init_from_model(model, asked)
        if self.context is None:
            raise RuntimeError(f"there is no context of {length} tokens for {file}")
        made = (
            self.llama.llama_n_ctx(self.context),
            self.llama.llama_n_batch(self.context),
            self.llama.llama_n_ubatch(self.context),
        )
        # each sequence is padded to whole blocks of the cache
        if min(made) < length or max(made) >= length + 256 * sequences:
            raise RuntimeError(f"the context has {made} tokens, not {length}")
        if (most := self.llama.llama_n_seq_max(self.context)) != sequences:
            raise RuntimeError(f"the context has {most} sequences, not {sequences}")
        self.llama.llama_set_n_threads(self.context, threads, threads)
        self.memory = self.llama.llama_get_memory(self.context)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits of a sequence, (token, vocabulary).

        Raises:
            RuntimeError: llama.cpp refused the tokens.
        """
        self.llama.llama_memory_clear(self.memory, True)
        return self.read([tokens], 0)

    def read(self, sequences: Sequence[Sequence[int]], start: int) -> NDArray[np.float32]:
        """The logits of tokens, (token, vocabulary), one sequence after the other, that come after `start`
        others of each sequence.

        Raises:
            RuntimeError: llama.cpp refused the tokens.
        """
        T = sum(map(len, sequences))
        owners = [ctypes.pointer(Int(number)) for number, each in enumerate(sequences) for _ in each]
        batch = Batch(
            n_tokens=T,
            token=(Int * T)(*(token for each in sequences for token in each)),
            pos=(Int * T)(*(start + place for each in sequences for place in range(len(each)))),
            n_seq_id=(Int * T)(*T * [1]),
            seq_id=(ctypes.POINTER(Int) * T)(*owners),
            logits=(ctypes.c_int8 * T)(*T * [1]),
        )
        if code := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        found = self.llama.llama_get_logits(self.context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(found, (T, self.size)).copy()
        return logits

    def forget(self, start: int) -> None:
        """Leave out what follows the first `start` tokens of every sequence.

        Raises:
            RuntimeError: The memory of this model can't be cut there.
        """
        if not self.llama.llama_memory_seq_rm(self.memory, -1, start, -1):
            raise RuntimeError(f"the memory is not cut at {start} tokens")

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, with the first one that the file asks for."""
        coded = text.encode()
        room = len(coded) + 8
        found = (Int * room)()
        count = self.llama.llama_tokenize(self.vocabulary, coded, len(coded), found, room, True, False)
        return list(found[:count])


def main() -> None:
    """Run the file that the command line names."""
    file, told, out = sys.argv[1:]
    asked = json.loads(Path(told).read_text())
    context = Context(file, max(len(each) for each in asked["tokens"]), asked["threads"])
    np.save(out, np.stack([context.logits(each) for each in asked["tokens"]]))
    print(json.dumps([context.tokens(text) for text in asked["texts"]]))


if __name__ == "__main__":
    main()
