"""llm-compressor (vLLM project): GPTQ with static activation order, written as compressed-tensors.

Source: Frantar et al. 2022, arXiv:2210.17323. W4A16 symmetric; the block-by-block pipeline, which GPTQ
chooses by itself, gives later layers the outputs of the quantised earlier ones, and takes a GPU if there is
one.
"""

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.rivals.job import Job, Rows


def main() -> None:
    """Quantise the base and say what it took."""
    job = Job()
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group}
    scheme = {"targets": ["Linear"], "weights": weights}
    oneshot(
        model=model,
        dataset=DataLoader(Rows(job.tokens_SL), batch_size=8),  # a loader is used as it is
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    )
    model.save_pretrained(job.out, save_compressed=True)
    AutoTokenizer.from_pretrained(job.base).save_pretrained(job.out)
    job.finish(f"GPTQ W4A16 symmetric, group {job.group}, static activation order")


if __name__ == "__main__":
    main()
