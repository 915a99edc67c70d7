"""AutoRound (Intel): signed gradient descent on the rounding and the range of each weight group.

Source: Cheng et al. 2023, arXiv:2309.05516. W4A16 symmetric, its default recipe: 200 iterations of 8
sequences each. torch.compile is off, as it needs a C++ compiler and changes the time, not the algorithm.
"""

from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.rivals.job import Job

ITERATIONS = 200


def main() -> None:
    """Quantise the base and say what it took."""
    job = Job()
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype),
        AutoTokenizer.from_pretrained(job.base),
        scheme="W4A16",
        group_size=job.group,
        dataset=list(job.tokens_SL.split(8)),  # tensors [8, L] are taken as they are
        nsamples=len(job.tokens_SL),
        seqlen=job.tokens_SL.shape[1],  # the default, 2048, would drop shorter sequences silently
        batch_size=8,
        iters=ITERATIONS,
        device_map=job.device,
        enable_torch_compile=False,
        seed=0,
    )
    _, folders = rounding.quantize_and_save(job.out, format="auto_round")
    method = f"AutoRound W4A16 symmetric, group {job.group}, {ITERATIONS} iterations"
    job.finish(method, folders if isinstance(folders, str) else folders[0])


if __name__ == "__main__":
    main()
