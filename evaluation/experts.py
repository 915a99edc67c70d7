"""What do the experts of a mixture lose, and what should one with few tokens be given besides its own?

    python -m evaluation experts [--resume] [--quick] [--out FILE]

No mixture of experts is small enough to be at hand, so one is made of wikilm-8m: each of eight experts of a
layer starts as its MLP with some noise, and a token goes to two of them (sparse upcycling, Komatsuzaki et al.
2022, arXiv:2212.05055). The whole is trained on the text of WikiText-2 for STEPS steps, so that the router
sends different words to different experts. It is written once, to out/models/wikilm-experts. Recipes are
measured on the test part of the text, by the loss against that model. Rows that borrow other shares than the
default (`routed_experts.OTHERS`) calibrate on less and less text, and so do rows with other shares of tokens
with even inputs (`routed_experts.EVEN`). An hour; the result goes to results/experts.json, after each row.
With --resume the rows that are there stay, and those that are lacking are measured. With --quick only --out
is written.

    python -m evaluation experts --rival

measures llm-compressor's GPTQ on the same sequences, and adds its row. transformers does not load experts
that it wrote, so its codes are put into the base here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS, WIKITEXT
from evaluation.options import parser
from evaluation.reference_models import FOLDER
from evaluation.results import ROOT, ExpertsRow, Rows
from evaluation.rivals import sequences
from evaluation.rivals.environments import Environment
from evaluation.rivals.score import fidelity
from evaluation.runs import known, losses, run
from llmcompress.data.sources import DataSpec
from llmcompress.io.tokenizer import tokenizer_of
from llmcompress.modeling.from_disk import DiskModel
from llmcompress.pipeline.resolve import calibration_data
from llmcompress.recipe.recipe import Recipe
from llmcompress.stages import routed_experts

PLACE = FOLDER / "wikilm-experts"
EXPERTS, CHOSEN, STEPS, AT_ONCE = 8, 2, 300, 8
NOISE, RATE = 0.2, 2e-4
NF4: Mapping[str, Any] = {"format": "nf4"}
# sequences that calibrate, and what an expert is given: tokens for each column of its inputs
SAMPLES, SHARES = (4, 16, 256), (0.0, 1 / 16, 0.25, 1.0, 4.0)
CODEBOOK: Mapping[str, Any] = {"entries": 16}
SPARSE: Mapping[str, Any] = {"pattern": "2:4"}
KEPT = {"experts": "keep"}
STAGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("quantize", {**NF4, **KEPT}),
    ("quantize", {**NF4, "rounding": "nearest"}),
    ("quantize", NF4),
    ("quantize", {**NF4, "rounding": "learned"}),
    ("quantize", {"format": "int8", "rounding": "nearest"}),
    ("quantize", {"format": "w8a8"}),
    ("quantize", {"format": "w4a8"}),
    ("codebook", {**CODEBOOK, **KEPT}),
    ("codebook", CODEBOOK),
    ("sparsify", {**SPARSE, **KEPT}),
    ("sparsify", SPARSE),
    ("sparsify", {**SPARSE, "score": "wanda"}),
    ("sparsify", {**SPARSE, "score": "magnitude"}),
    ("prune", {"axis": "expert", "keep": 6}),
    ("prune", {"axis": "ffn", "keep": 0.75}),
    ("prune", {"axis": "ffn", "keep": 0.75, "score": "wanda"}),
    ("prune", {"axis": "ffn", "keep": 0.75, "score": "magnitude", "repair": False}),
)


def made() -> Path:
    """The folder of the mixture, made now unless it is there."""
    if not PLACE.is_dir():
        base = MODELS["wikilm-8m"].base
        tokenizer = AutoTokenizer.from_pretrained(base)
        ids = tokenizer((Path(WIKITEXT) / "train.txt").read_text("utf-8"))["input_ids"]
        model = trained(mixture_of(base), torch.tensor(ids))
        half = PLACE.with_suffix(".partial")
        model.bfloat16().save_pretrained(half)
        tokenizer.save_pretrained(half)
        half.rename(PLACE)
    return PLACE


def mixture_of(base: str) -> MixtralForCausalLM:
    """A mixture with the attention of a Llama, each of whose experts is its MLP with noise."""
    dense: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    said = dense.config.to_dict()
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    also = ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    config = MixtralConfig(
        **{name: said[name] for name in (*same, *also)},
        intermediate_size=dense.config.intermediate_size,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
        bos_token_id=dense.config.bos_token_id,
        eos_token_id=dense.config.eos_token_id,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer, whole in zip(model.model.layers, dense.model.layers, strict=True):
        experts = layer.mlp.experts
        for expert in range(EXPERTS):
            gate, up, down = (
                getattr(whole.mlp, f"{name}_proj").weight.data for name in ("gate", "up", "down")
            )
            experts.gate_up_proj.data[expert] = noisy(torch.cat([gate, up]))
            experts.down_proj.data[expert] = noisy(down)
    return model


def noisy(weight: Tensor) -> Tensor:
    """A weight with noise of a share of its own deviation."""
    return weight + NOISE * weight.std() * torch.randn_like(weight)


def trained(model: MixtralForCausalLM, ids: Tensor) -> MixtralForCausalLM:
    """Train a mixture on a text, with the loss that balances its experts."""
    text = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    steps = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(steps, RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for step in range(STEPS):
        batch = text[order[step * AT_ONCE % len(order) :][:AT_ONCE]]
        loss = model(batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        steps.step()
        rate.step()
        steps.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    model.train(False)
    return model


class Job(NamedTuple):
    """A stage with its settings, the sequences that calibrate it, and what an expert is given."""

    name: str
    stage: Mapping[str, Any]
    samples: int = SAMPLES[-1]
    borrowed: float = routed_experts.OTHERS
    evened: float = routed_experts.EVEN


def jobs() -> list[Job]:
    """All stages on the most text; then the shares that an expert borrows, on less and less of it, and those
    with even inputs, where experts read fewer tokens than they have columns."""
    found = [Job(*stage) for stage in STAGES]
    found += [Job("quantize", NF4, samples, borrowed=share) for samples in SAMPLES for share in SHARES]
    found += [Job("quantize", NF4, SAMPLES[0], evened=share) for share in SHARES]
    found += [Job("quantize", NF4, SAMPLES[1], evened=0.0)]
    found += [Job("sparsify", SPARSE, SAMPLES[0], evened=share) for share in (0.0, routed_experts.EVEN)]
    return [job for place, job in enumerate(found) if job not in found[:place]]


def measures(row: ExpertsRow, job: Job) -> bool:
    """Whether a row is that of a job."""
    same = ("name", "stage", "borrowed", "evened")
    return row.tokens == job.samples * LENGTH and all(getattr(row, key) == getattr(job, key) for key in same)


def measured(job: Job, out: Path) -> ExpertsRow:
    """A stage on the mixture."""
    data = DataSpec(source=WIKITEXT, samples=job.samples, length=LENGTH, evaluation_samples=64)
    recipe = Recipe.model_validate({"stages": [{job.name: dict(job.stage)}]})
    with patch.multiple(routed_experts, OTHERS=job.borrowed, EVEN=job.evened):
        report = run(recipe, out, made(), data, overwrite=True)
    tokens = [layer.get("expert_tokens") for layer in report.stages[0].model_dump()["per_layer"]]
    return ExpertsRow(
        **losses(report),
        name=job.name,
        stage=dict(job.stage),
        tokens=report.data.calibration_tokens,
        least_tokens=min((min(of) for of in tokens if of), default=None),
        borrowed=job.borrowed,
        evened=job.evened,
        size_bytes=int(known(report.compressed.size_bytes)),
    )


def rival(work: Path, threads: int) -> ExpertsRow:
    """llm-compressor's GPTQ on all text."""
    place, group = work / "out" / PLACE.name, 64
    place.mkdir(parents=True, exist_ok=True)
    spec = DataSpec(source=WIKITEXT, samples=SAMPLES[-1], length=LENGTH, evaluation_samples=64)
    text = calibration_data(DiskModel(made(), torch.device("cpu")), spec, tokenizer_of(PLACE))
    save_file({sequences.KEY: text.calibration.contiguous()}, place / "calibration.safetensors")
    environment = Environment(work / "venvs" / "llmcompressor", "llmcompressor", threads)
    files = {"base": PLACE, "calibration": place / "calibration.safetensors"}
    written = {"out": place / "model", "facts": place / "facts.json"}
    options = [word for name, path in (files | written).items() for word in (f"--{name}", path.resolve())]
    log = place / "log.txt"
    environment.run("rival_llmcompressor", [*options, "--group", group, "--dtype", "float32"], log)
    base, model = (AutoModelForCausalLM.from_pretrained(PLACE, dtype=torch.float32) for _ in range(2))
    with_codes_of(model, place / "model")
    found = fidelity(base, model, text.evaluation)
    (version,) = environment.versions("llmcompressor").values()
    method = json.loads(written["facts"].read_text("utf-8"))["method"]
    size = sum(file.stat().st_size for file in (place / "model").glob("*.safetensors"))
    return ExpertsRow(
        name="llm-compressor",
        **{name: found[name] for name in ("kl_nats_mean", "perplexity", "base_perplexity")},
        stage={"format": f"{method} (llm-compressor {version})"},
        tokens=text.calibration_tokens,
        least_tokens=None,
        borrowed=routed_experts.OTHERS,
        evened=routed_experts.EVEN,
        size_bytes=size,
    )


@torch.no_grad()
def with_codes_of(model: Any, folder: Path) -> None:
    """Put the linears that llm-compressor wrote into a Mixtral: eight codes in an int32, and a scale for each
    group."""
    tensors = load_file(folder / "model.safetensors")
    neurons = model.config.intermediate_size
    for name in [key.removesuffix("_packed") for key in tensors if key.endswith(".weight_packed")]:
        packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"].float()
        codes = (packed[..., None] >> torch.arange(0, 32, 4)) & 15
        weight = codes.flatten(-2).float().sub(8).unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
        weight = weight.flatten(-2)
        if ".experts." not in name:
            model.get_parameter(name).copy_(weight)
            continue
        layer, _, rest = name.partition(".block_sparse_moe.experts.")
        expert, which, _ = rest.split(".")
        fused = "down_proj" if which == "down_proj" else "gate_up_proj"
        whole = model.get_parameter(f"{layer}.mlp.experts.{fused}")[int(expert)]
        part = {"down_proj": slice(None), "gate_proj": slice(neurons), "up_proj": slice(neurons, None)}[which]
        whole[part].copy_(weight)


def main(argv: Sequence[str]) -> int:
    """Measure all stages on the most text, and on less and less of it what an expert is given."""
    options = parser("experts", __doc__)
    options.add_argument("--quick", action="store_true", help="two rows")
    options.add_argument("--resume", action="store_true", help="the rows that the result file lacks")
    options.add_argument("--rival", action="store_true", help="llm-compressor alone")
    options.add_argument(
        "--work",
        type=Path,
        default=ROOT / "out" / "rivals",
        help="where environments lie; default: out/rivals",
    )
    options.add_argument("--out", type=Path, help="result file; default results/experts.json")
    given = machine.parse(options, argv, threads=1)
    if given.rival:
        merged = results.merge("experts", ("stage",), rival(given.work, given.threads), given.out)
        results.write("experts", machine.head(), {"model": PLACE.name, "rows": merged}, given.out)
        return 0
    held = results.load(results.RESULTS, "experts", Rows[ExpertsRow]) if given.resume else None
    rows = [*held.rows] if held else []
    wanted = [job for job in jobs() if not any(measures(row, job) for row in rows)]
    with tempfile.TemporaryDirectory() as folder:
        for job in wanted[:2] if given.quick else wanted:
            rows.append(measured(job, Path(folder) / "out"))
            print(rows[-1], file=sys.stderr, flush=True)
            if given.out or not given.quick:
                results.write("experts", machine.head(), {"model": PLACE.name, "rows": rows}, given.out)
    return 0
