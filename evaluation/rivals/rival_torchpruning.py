"""Torch-Pruning (DepGraph): channels and heads cut from every layer alike, by magnitude or Taylor.

Source: Fang et al. 2023, arXiv:2301.12900. As in its own example for language models
(examples/LLMs/prune_llm.py): one ratio for all that is cut, ranked within each group of coupled layers,
widths rounded to 4, key and value heads kept where queries share them. `scope` says what is cut: all (the
example: hidden width, ffn and query heads), inner (ffn and query heads) or ffn. The ratio is the least that
leaves at most `share` of the parameters of the decoder layers, by bisection. Taylor takes the gradient of the
mean loss over all calibration sequences, magnitude looks at no text. Nothing is repaired or trained after.

Version 1.6.1 has two faults that stand in the way. Its search for a group never ends on the slices of rotary
embeddings and on a key-value cache, so the graph is traced without them: they stay within a head, and heads
are cut whole. And where no more query heads would stay than there are key heads, it takes the layer for one
of ordinary attention, wants to cut the keys too, finds that none would be left and skips the layer without a
word; `keep_shared` takes the keys out of the cut before.
"""

import sys
from copy import deepcopy
from unittest.mock import patch

import torch
import torch_pruning as tp
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from evaluation.rivals.job import Job

IMPORTANCES = {
    "taylor": tp.importance.GroupTaylorImportance(group_reduction="mean"),
    "magnitude": tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
}
SCOPES = ("all", "inner", "ffn")
TRIALS = 12  # halvings of the ratio: finer than one step of any width
SLACK = 0.02  # how much less than the share may be left, as a part of it


def gradients(model: PreTrainedModel, tokens_SL: torch.Tensor, batch: int = 8) -> None:
    """Leave the gradient of the mean loss over int64 sequences [S, L] in the parameters, for Taylor."""
    for ids_BL in tokens_SL.split(batch):
        loss = model(ids_BL, labels=ids_BL, use_cache=False).loss
        (loss * len(ids_BL) / len(tokens_SL)).backward()


def trace(model: PreTrainedModel, ids_BL: torch.Tensor) -> torch.Tensor:
    """Logits without rotary embeddings and cache, for the graph alone."""
    with patch.object(sys.modules[type(model).__module__], "apply_rotary_pos_emb", lambda q, k, *_: (q, k)):
        logits: torch.Tensor = model(ids_BL, use_cache=False).logits
        return logits


def pruned(base: PreTrainedModel, importance: str, scope: str, ratio: float) -> PreTrainedModel:
    """A copy of the base with `ratio` of each width cut; the base and its gradients stay as they are."""
    model, config = deepcopy(base), base.config
    for copy, parameter in zip(model.parameters(), base.parameters(), strict=True):
        copy.grad = parameter.grad  # what deepcopy leaves out
    attention = [layer.self_attn for layer in model.model.layers]
    queries = dict.fromkeys((each.q_proj for each in attention), config.num_attention_heads)
    keys = dict.fromkeys(
        (linear for each in attention for linear in (each.k_proj, each.v_proj)), config.num_key_value_heads
    )
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        forward_fn=trace,
        importance=IMPORTANCES[importance],
        global_pruning=False,
        pruning_ratio=ratio,
        head_pruning_ratio=0.0 if scope == "ffn" else ratio,
        ignored_layers=[model.lm_head] if scope == "all" else [model.lm_head, model.model.embed_tokens],
        num_heads=queries | keys,
        prune_num_heads=True,
        prune_head_dims=False,
        out_channel_groups={},  # its default is one dict for all pruners
        round_to=4,
    )
    if config.num_key_value_heads < config.num_attention_heads:
        keep_shared(pruner, set(keys))
    pruner.step()
    for each in attention:
        each.num_key_value_groups = each.q_proj.out_features // each.k_proj.out_features
    model.tie_weights()  # the cut gave a tied head a weight of its own
    return model


def keep_shared(pruner: tp.pruner.BasePruner, shared: set[torch.nn.Module]) -> None:
    """Keep key and value heads that queries share out of every cut, before the graph checks what is left."""
    graph, check = pruner.DG, pruner.DG.check_pruning_group

    def without(group: tp.Group) -> bool:
        for index, (step, _) in enumerate(group):
            if step.target.module in shared and graph.is_out_channel_pruning_fn(step.handler):
                group[index] = (step, [])
        return bool(check(group))

    graph.check_pruning_group = without


def size(model: PreTrainedModel) -> int:
    """Parameters of the decoder layers."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def search(base: PreTrainedModel, importance: str, scope: str, share: float) -> tuple[PreTrainedModel, float]:
    """The base cut by the least ratio that leaves at most `share` of its layers, and that ratio."""
    low, high, best = 0.0, 1.0, None
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        model = pruned(base, importance, scope, ratio)
        if size(model) > share * size(base):
            low = ratio
        else:
            high, best = ratio, model
    if best is None or size(best) < (1 - SLACK) * share * size(base):
        raise SystemExit(f"no ratio leaves {(1 - SLACK) * share:.4f} to {share} of the layers")
    return best, high


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """The config of what is left; Mistral's where heads do not divide the hidden width, as Llama's wants."""
    first = model.model.layers[0]
    hidden, head = model.lm_head.in_features, first.self_attn.head_dim
    fields = model.config.to_dict() | {
        "hidden_size": hidden,
        "intermediate_size": first.mlp.down_proj.in_features,
        "num_attention_heads": first.self_attn.q_proj.out_features // head,
        "num_key_value_heads": first.self_attn.k_proj.out_features // head,
        "head_dim": head,
    }
    if fields["model_type"] == "llama" and hidden % fields["num_attention_heads"]:
        fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return AutoConfig.for_model(**fields)


@torch.inference_mode()
def save(model: PreTrainedModel, folder: str, ids_BL: torch.Tensor) -> None:
    """Write the cut model as a checkpoint of its own shape, and check the logits of what is loaded again."""
    shaped = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.float32)
    shaped.load_state_dict(model.state_dict())
    shaped.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(loaded(ids_BL).logits, model(ids_BL).logits)


def main() -> None:
    """Prune the base and say what it took."""
    job = Job(importance=str, scope=str, share=float)
    importance, scope, share = job.given.importance, job.given.scope, job.given.share
    if importance not in IMPORTANCES or scope not in SCOPES:
        raise SystemExit(f"importance is one of {', '.join(IMPORTANCES)}, scope one of {', '.join(SCOPES)}")
    # eager: the graph has to see how keys are repeated for their queries
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype, attn_implementation="eager").eval()
    if importance == "taylor":
        gradients(base, job.tokens_SL)
    model, ratio = search(base, importance, scope, share)
    save(model, job.out, job.tokens_SL[:8])
    AutoTokenizer.from_pretrained(job.base).save_pretrained(job.out)
    job.finish(f"{type(IMPORTANCES[importance]).__name__}, {scope}, ratio {ratio:.4f}")


if __name__ == "__main__":
    main()
