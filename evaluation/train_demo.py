"""Train the demo model: a small Llama on the documentation text that every Python carries.

Question: can a model of under 4 MB, trained in half an hour on a laptop's CPU, be good enough that 4-bit
rounding costs something and calibration wins it back? The text is `python-docs`; its evaluation part is never
seen. Muon for the matrices (more progress per token than AdamW), AdamW for embedding and norms, cosine to
zero, sequences of 256 tokens and of 512 for the last fifth. Every width divides by 64, so each linear takes
groups of 64. Same versions and threads give the same bytes.

    python -m evaluation train-demo --out llmcompress/demo
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

# threads that wait do not burn the cores of others; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation.options import parser
from llmcompress.data.python_docs import python_docs

VOCABULARY = 1536
LENGTH = 512
END = "<|endoftext|>"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1536 entries: any text can be spelled, nothing is unknown."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """1.9 M parameters: hidden 192, 5 layers, 6 heads of 32 with 2 kv heads, ffn 384, tied head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokens_BL: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats."""
    logits = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BL[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: Tensor, sequences: int) -> float:
    """The loss over the first sequences of a token stream, in nats per token."""
    whole = stream[: stream.numel() // LENGTH * LENGTH].view(-1, LENGTH)[:sequences]
    return sum(loss_of(model, batch).item() * len(batch) for batch in torch.split(whole, 8)) / len(whole)


def rate(step: int, steps: int) -> float:
    """Warm-up over 50 steps, then a cosine to zero."""
    return min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlamaForCausalLM, stream: Tensor, heldout: Tensor, steps: int, batch_tokens: int
) -> list[dict[str, float]]:
    """Train in place on sequences drawn at random; returns the losses along the way."""
    draw = torch.Generator().manual_seed(0)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, steps)) for o in optimizers]
    history: list[dict[str, float]] = []
    running, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        length = LENGTH // 2 if step <= 0.8 * steps else LENGTH
        starts = torch.randint(stream.numel() - length, (batch_tokens // length,), generator=draw)
        loss = loss_of(model, torch.stack([stream[s : s + length] for s in starts.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            heldout_loss = mean_loss(model, heldout, 16)
            history.append(
                {"step": step, "train_loss": round(running, 4), "heldout_loss": round(heldout_loss, 4)}
            )
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{steps}  train {running:.4f}  held out {heldout_loss:.4f}  {seconds:.0f} s",
                flush=True,
            )
    return history


def main(argv: Sequence[str]) -> int:
    """Train, write the model, and say in training.json what was done."""
    options = parser("train-demo", __doc__)
    options.add_argument("--out", type=Path, required=True, help="the folder to write")
    options.add_argument("--steps", type=int, default=2200)
    options.add_argument("--batch-tokens", type=int, default=2048)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--hardware", default=platform.machine(), help="the machine, in words, for training.json"
    )
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()  # the whole text is longer than 512

    calibration, evaluation = python_docs()
    tokenizer = train_tokenizer(calibration)
    stream, heldout = (torch.tensor(tokenizer(text)["input_ids"]) for text in (calibration, evaluation))
    model = new_model()
    tokens = f"{stream.numel()} tokens to learn, {heldout.numel()} held out"
    print(f"{model.num_parameters()} parameters, {tokens}", flush=True)
    start = time.perf_counter()
    history = train(model, stream, heldout, given.steps, given.batch_tokens)
    seconds = time.perf_counter() - start

    model = model.to(torch.bfloat16)  # type: ignore[arg-type]  # a decorator hides the overload
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    # the losses are those of what is on disk
    written = LlamaForCausalLM.from_pretrained(given.out, dtype=torch.float32)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    facts: dict[str, object] = {
        "command": shlex.join(["python", "-m", "evaluation", "train-demo", *argv]),
        "hardware": given.hardware,
        "threads": given.threads,
        "versions": versions,
        "parameters": model.num_parameters(),
        "steps": given.steps,
        "tokens_per_step": given.batch_tokens,
        "seconds": round(seconds),
        "train_bytes": len(calibration.encode()),
        "train_tokens": stream.numel(),
        "heldout_bytes": len(evaluation.encode()),
        "heldout_tokens": heldout.numel(),
        "train_loss": round(mean_loss(written, stream, 64), 4),
        "heldout_loss": round(mean_loss(written, heldout, 10**9), 4),
        "history": history,
    }
    (given.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({key: value for key, value in facts.items() if key != "history"}, indent=1))
    return 0
