"""GPTQModel (ModelCloud): GPTQ with its own group-aware activation order, written in the GPTQ format.

Source: Frantar et al. 2022, arXiv:2210.17323. 4 bits symmetric, its defaults otherwise. `environments.py`
sets GPTQMODEL_CPU_WORKERS, without which it does not start on a machine of two cores.
"""

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from evaluation.rivals.job import Job


def main() -> None:
    """Quantise the base and say what it took."""
    job = Job()
    model = GPTQModel.load(
        job.base, QuantizeConfig(bits=4, group_size=job.group), device=job.device, dtype=job.dtype
    )
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens_SL]
    model.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
    model.save(job.out)
    job.finish(f"GPTQ W4 symmetric, group {job.group}, group-aware activation order")


if __name__ == "__main__":
    main()
