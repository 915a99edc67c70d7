"""Prune a model, distill it from its base, and quantise it; then compare each step.

    python examples/prune_heal_quantize.py
    python examples/prune_heal_quantize.py user/model --data my-text.txt --steps 1000

The defaults compress the embedded demo model in some minutes on a CPU and need no network. A useful model
takes more steps.
"""

import argparse

from llmcompress import DataSpec, Distill, Prune, Quantize, compress, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="demo", help="Hub id, folder or demo")
    parser.add_argument("--data", default="python-docs", help="text that calibrates, trains and evaluates")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--out", default="chain", help="prefix of the folders for the results")
    args = parser.parse_args()

    text = DataSpec(source=args.data, samples=64, length=args.length)
    prune = Prune(axis="ffn", keep=0.75, multiple=64)  # a width that groups of 64 weights divide
    heal = Distill(steps=args.steps, batch=4, learning_rate=3e-4)
    quantize = Quantize(format="nf4", double_quant=True)

    # What the whole chain leaves, from the config alone.
    for row in plan(args.base, [prune, heal, quantize], data=text).rows:
        print(row)

    # Three runs, so that the loss of each step shows; the last one is the result.
    chains = {
        "pruned": [prune],
        "pruned, healed": [prune, heal],
        "pruned, healed, quantised": [prune, heal, quantize],
    }
    print(f"{'':27}{'MB':>8}{'KL, nats/token':>16}{'top-1 agreement':>17}")
    for number, (name, stages) in enumerate(chains.items(), start=1):
        report = compress(args.base, stages, f"{args.out}-{number}", data=text, overwrite=True)
        lost = report.fidelity
        size = report.compressed.size_bytes / 1e6
        print(f"{name:27}{size:8.2f}{lost.kl_nats_mean:16.5f}{lost.top1_agreement:17.2%}")


if __name__ == "__main__":
    main()
