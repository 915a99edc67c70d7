"""How far is a model from its base? Measured the same way in whatever environment can load it.

Both models run in float32 on the same token sequences: KL(base || model) in nats/token over all positions,
the share of positions with the same most likely token, perplexity over the L - 1 targets of each sequence,
and what lies on disk. The whole is one forward pass of each model; logits live for one batch only. Needs
torch, transformers and safetensors, nothing of ours, so that a rival is judged through its own loader: a
plain `from_pretrained` in the environment that wrote the model.

    python -m evaluation.rivals.score --base BASE --model MODEL --evaluation FILE --json OUT.json
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def fidelity(
    base: torch.nn.Module, model: torch.nn.Module, tokens_SL: torch.Tensor, batch: int = 8
) -> dict[str, float]:
    """KL with its standard error over sequences, int64 [S, L], top-1 agreement, both perplexities."""
    kl_SL, agree, nll_base, nll_model = [], 0.0, 0.0, 0.0
    for ids_BL in tokens_SL.split(batch):
        p_BLV, q_BLV = (each(ids_BL).logits.float().log_softmax(-1) for each in (base, model))
        kl_SL.append(kl_div(q_BLV, p_BLV, log_target=True, reduction="none").sum(-1, dtype=torch.float64))
        agree += (p_BLV.argmax(-1) == q_BLV.argmax(-1)).sum().item()
        targets = ids_BL[:, 1:].flatten()
        nll_base += cross_entropy(p_BLV[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        nll_model += cross_entropy(q_BLV[:, :-1].flatten(0, 1), targets, reduction="sum").item()
    kl, predicted = torch.cat(kl_SL), tokens_SL[:, 1:].numel()
    return {
        "kl_nats_mean": kl.mean().item(),
        "kl_nats_stderr": kl.mean(1).std().item() / math.sqrt(len(kl)),
        "kl_nats_p99": kl.flatten().quantile(0.99).item(),
        "top1_agreement": agree / tokens_SL.numel(),
        "perplexity": math.exp(nll_model / predicted),
        "base_perplexity": math.exp(nll_base / predicted),
    }


def stored(folder: Path) -> dict[str, tuple[int, int]]:
    """The tensors of a folder's safetensors files by name: how many numbers each holds, in how many bytes."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is not a dict
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.numel(), tensor.numel() * tensor.element_size()
    return tensors


def storage(base: Path, model: Path) -> dict[str, float]:
    """Bytes on disk, and bits per quantised weight with all that its linear stores.

    A linear is quantised if the model stores something in place of the base's `weight` or beside it.
    """
    before, after = stored(base), stored(model)
    weights = bits = 0
    for name, (count, _) in before.items():
        inside = name.removesuffix("weight")
        parts = {
            k: size
            for k, (_, size) in after.items()
            if k.startswith(inside) and k not in before | {inside + "bias": 0}
        }
        if name.endswith(".weight") and parts:
            weights += count
            bits += 8 * (sum(parts.values()) + after.get(name, (0, 0))[1])
    return {
        "size_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "base_size_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "quantised_weights": weights,
        "bits_per_weight": bits / weights if weights else math.nan,
    }


def score(base: Path, model: Path, tokens_SL: torch.Tensor) -> dict[str, float]:
    """Everything this module measures about `model` against `base`."""
    loaded = []
    for folder in (base, model):
        loaded.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        # some loaders force float16 on a CPU and then refuse the model's own .float()
        torch.nn.Module.float(loaded[-1])
    return fidelity(loaded[0], loaded[1], tokens_SL) | storage(base, model)


def main() -> None:
    """Score one model and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("base", "model", "evaluation", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    facts = score(given.base, given.model, load_file(given.evaluation)["windows"])
    given.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
