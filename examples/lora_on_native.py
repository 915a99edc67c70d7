"""Train a LoRA adapter of PEFT on a native 4-bit artefact.

    pip install peft
    python examples/lora_on_native.py
    python examples/lora_on_native.py user/model --data my-text.txt

The base is quantised with llmcompress. Everything after that is transformers and PEFT: the 4-bit codes stay
as they are, and only the adapter learns. It trains on the help topics that Python carries, so no network is
needed.
"""

import argparse
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llmcompress import DataSpec, Quantize, compress


def batches(tokenizer: PreTrainedTokenizerBase, length: int, size: int) -> tuple[torch.Tensor, ...]:
    """Batches [size, length] of token ids from Python's help topics, in order."""
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt", verbose=False).input_ids[0]
    sequences = ids[: len(ids) // length * length].view(-1, length)
    return sequences.split(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="demo", help="Hub id, folder or demo")
    parser.add_argument("--data", default="python-docs", help="text that calibrates the quantisation")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--out", default="quantized-for-lora", help="folder for the 4-bit model")
    parser.add_argument("--adapter", default="adapter", help="folder for the adapter")
    args = parser.parse_args()

    text = DataSpec(source=args.data, samples=64, length=args.length)
    compress(args.base, [Quantize(format="nf4")], args.out, data=text, overwrite=True)

    model = AutoModelForCausalLM.from_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    # Train before the first forward in eval mode: on CPUs with AVX512-BF16 that one reorders 4-bit weights.
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step, input_ids in zip(range(args.steps), batches(tokenizer, args.length, size=4), strict=False):
        input_ids = input_ids.to(model.device)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(args.adapter)

    # The adapter loads onto the artefact, as onto any bitsandbytes checkpoint.
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.out), args.adapter).eval()
    inputs = tokenizer("The import statement", return_tensors="pt").to(again.device)
    print(tokenizer.decode(again.generate(**inputs, max_new_tokens=20)[0]))


if __name__ == "__main__":
    main()
