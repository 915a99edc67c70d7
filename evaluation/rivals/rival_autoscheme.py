"""AutoRound's AutoScheme (Intel): the bits of each linear by its sensitivity, then AutoRound under them.

Source: the documentation of auto-round 0.16, AutoScheme; Cheng et al. 2023, arXiv:2309.05516. Symmetric
weights in 2, 3, 4 and 8 bits in one group size, as many bits on average as are asked for, scales included.
It takes no token sequences, so it gets the text of the calibration sequences as a file and encodes it anew.
"""

import json
from pathlib import Path

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.rivals.job import Job

ITERATIONS = 200
BITS = (2, 3, 4, 8)
SPARE = 32  # tokens more than are read, as texts that are encoded again may be shorter


def main() -> None:
    """Quantise the base and say what it took."""
    job = Job(bits=float)
    options = [
        QuantizationScheme(bits=bits, group_size=job.group, sym=True, data_type="int", act_bits=16)
        for bits in BITS
    ]
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    text = Path(job.out).with_suffix(".jsonl")
    ahead = job.tokens_SL.roll(-1, 0)[:, :SPARE]
    texts = [tokenizer.decode(tokens) for tokens in torch.cat((job.tokens_SL, ahead), 1)]
    rows = [json.dumps({"text": each}) for each in texts]
    text.write_text("\n".join(rows), "utf-8")
    amount = {"nsamples": len(job.tokens_SL), "seqlen": job.tokens_SL.shape[1], "batch_size": 8}
    settings = {"dataset": str(text), "device_map": job.device, "enable_torch_compile": False}
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype),
        tokenizer,
        scheme=AutoScheme(avg_bits=job.given.bits, options=options, **amount, **settings),
        iters=ITERATIONS,
        seed=0,
        **amount,
        **settings,
    )
    _, folders = rounding.quantize_and_save(job.out, format="auto_round")
    method = f"AutoRound AutoScheme, {job.given.bits:g} bits on average, group {job.group}"
    job.finish(method, folders if isinstance(folders, str) else folders[0])


if __name__ == "__main__":
    main()
