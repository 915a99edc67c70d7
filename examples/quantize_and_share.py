"""Quantise a model to native 4-bit bitsandbytes weights, load the result, and share it on the Hub.

    python examples/quantize_and_share.py
    python examples/quantize_and_share.py user/model --data my-text.txt --out small --repo me/small-model

Without arguments it compresses the embedded demo model on Python's documentation and needs no network.
Nothing is pushed without --repo.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompress import DataSpec, Quantize, compress, push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="demo", help="Hub id, folder or demo")
    parser.add_argument("--data", default="python-docs", help="text that calibrates and evaluates")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--out", default="quantized", help="folder for the result")
    parser.add_argument("--repo", help="push the result to this id on the Hub")
    args = parser.parse_args()

    # rounding="learned" loses less and takes about five times as long.
    stages = [Quantize(format="nf4", double_quant=True, rounding="gptq")]
    text = DataSpec(source=args.data, samples=args.samples, length=args.length)
    report = compress(args.base, stages, args.out, data=text, overwrite=True)

    before, after = report.base, report.compressed
    print(f"{before.size_bytes / 1e6:.2f} MB -> {after.size_bytes / 1e6:.2f} MB")
    print(f"perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}")
    print(f"KL from the base {report.fidelity.kl_nats_mean:.5f} nats/token")

    # Plain transformers loads the artefact; llmcompress is not needed for that.
    model = AutoModelForCausalLM.from_pretrained(args.out, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    inputs = tokenizer("Return the number of", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))

    if args.repo:
        pushed = push(args.out, args.repo, private=True)
        print(f"pushed to {pushed.url}")
    else:
        print(f"ready to share: llmcompress push {args.out} user/name")


if __name__ == "__main__":
    main()
