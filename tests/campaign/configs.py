"""A base whose config.json, or another small file of it, has an odd value: it goes on, or is refused in one
line, soon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.bases import save_base
from tests.campaign.bench import Bench, Count
from tests.campaign.forked import run
from tests.models import FAMILIES

ODD: tuple[Any, ...] = (
    *(0, -1, 1, 3, 1e10, 2**70, 10**12, 10**6, 0.5, -0.0, 1e308),
    *(None, True, False, "", "nope", "siluu", "\ud800", "x" * 5000),
    *([], {}, [0], [[]], {"a": 1}, {"type": "nope"}, {"rope_type": "nope"}, [None] * 1000),
    float("nan"),
)
# fields that any config may have
EXTRA = (
    *(
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
    ),
    *(
        "dtype",
        "torch_dtype",
        "hidden_act",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
    ),
    *(
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "per_layer_config",
        "problem_type",
    ),
    *(
        "quantization_config",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
        "torchscript",
    ),
    *(
        "transformers_version",
        "use_cache",
        "vocab_size",
        "compression_config",
        "text_config",
        "head_dim",
        "num_hidden_layers",
    ),
)
OTHERS = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
DEEP = ("[" * 200_000, '{"a":' * 100_000, "[" * 200_000 + "]" * 200_000)


def configs(bench: Bench, tries: int) -> Count:
    """Run the short recipe on `tries` bases, each with one odd value in one of its small files."""
    count = Count("configs")
    bases = {family: save_base(bench.folder / f"base-{family}", family) for family in FAMILIES}
    for place in bench.places("config", tries):
        family = bench.draw.choice(FAMILIES)
        base = place / "base"
        shutil.copytree(bases[family], base)
        what = _change(bench, base)
        words: tuple[str, ...] = (
            "run",
            str(bench.folder / "short.yaml"),
            "--base",
            str(base),
            "--out",
            str(place / "out"),
        )
        if bench.draw.random() < 0.2:
            words = (
                "evaluate",
                str(base),
                "--data",
                str(bench.folder / "facts.txt"),
                "--length",
                "24",
                "--samples",
                "2",
            )
        elif bench.draw.random() < 0.2:
            words = ("plan", str(bench.folder / "short.yaml"), "--base", str(base))
        ended = run(bench.folder, *words)
        fault = ended.crashed or (f"{ended.left} left in TMPDIR" if ended.left else None)
        left = sorted(path.name for path in place.iterdir() if path.name not in ("base", "out"))
        fault = fault or (f"a refused run left {left}" if ended.code == 2 and left else None)
        count.ended(f"code {ended.code}", f"{words[0]} {family} {what}: {fault}" if fault else None)
        shutil.rmtree(place)
    return count


def _change(bench: Bench, base: Path) -> str:
    """Put one odd value into a small file of a base; what was done, in words."""
    file = base / ("config.json" if bench.draw.random() < 0.85 else bench.draw.choice(OTHERS))
    if not file.is_file():
        file = base / "config.json"
    fields = json.loads(file.read_text())
    if bench.draw.random() < 0.04:
        file.write_text(bench.draw.choice(DEEP))
        return f"{file.name} nested deep"
    known = sorted(fields) if file.name != "config.json" else sorted({*fields, *EXTRA})
    field, value = bench.draw.choice(known), bench.draw.choice(ODD)
    if isinstance(fields.get(field), dict) and fields[field] and bench.draw.random() < 0.5:
        inner = bench.draw.choice(sorted(fields[field]))
        fields[field][inner] = value
        field = f"{field}.{inner}"
    else:
        fields[field] = value
    file.write_text(json.dumps(fields))
    return f"{file.name}: {field} = {str(value)[:40]!r}"
