"""The sequences that bench.py calibrates and evaluates on, as files that every rival reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from evaluation.models import SUBJECTS
from evaluation.results import Sequences
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.resolve import calibration_data, find_base

KEY = "windows"  # of the tensor in a file: int64 [S, L]


class Files(NamedTuple):
    """The base's folder and its two files of sequences."""

    base: Path
    calibration: Path
    evaluation: Path


def write(model: str, folder: Path) -> Files:
    """Write calibration-MODEL and evaluation-MODEL to a folder."""
    base = find_base(SUBJECTS[model].base).folder
    data = calibration_data(DiskModel(base, torch.device("cpu")), SUBJECTS[model].data(), tokenizer_of(base))
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(base, *(folder / f"{side}-{model}.safetensors" for side in ("calibration", "evaluation")))
    save_file({KEY: data.calibration.contiguous()}, files.calibration)
    save_file({KEY: data.evaluation.contiguous()}, files.evaluation)
    return files


def described(file: Path) -> Sequences:
    """Name, shape and token hash of a file."""
    tokens = load_file(file)[KEY]
    S, L = tokens.shape
    return Sequences(
        file=file.name, shape=(S, L), sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    )
