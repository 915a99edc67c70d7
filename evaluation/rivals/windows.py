"""The very windows that `evaluation/bench.py` uses, as files that every rival reads: calibration-MODEL and evaluation-MODEL.

    python evaluation/rivals/windows.py --model wikilm-8m --out DIR

Run in the project's own environment, for the text is read as a run reads it.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import LENGTH, MODELS

from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.resolve import calibration_data, find_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    base, text = MODELS[given.model]
    folder = find_base(base).folder
    spec = DataSpec(source=text, length=LENGTH, bos=False)
    data = calibration_data(DiskModel(folder, torch.device("cpu")), spec, tokenizer_of(folder))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, windows in (("calibration", data.calibration), ("evaluation", data.evaluation)):
        file = given.out / f"{name}-{given.model}.safetensors"
        save_file({"windows": windows.contiguous()}, file)
        print(f"{file}: {tuple(windows.shape)}")
    print(f"base: {folder}")


if __name__ == "__main__":
    main()
