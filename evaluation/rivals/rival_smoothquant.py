"""llm-compressor (vLLM project): SmoothQuant, then GPTQ to int8 weights under int8 activations.

Sources: Xiao et al. 2022, arXiv:2211.10438 (smoothing strength 0.8); Frantar et al. 2022, arXiv:2210.17323.
Weights have a scale for each row, activations one for each token. This is the recipe of its documentation.
"""

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.rivals.job import Job, Rows

STRENGTH = 0.8


def main() -> None:
    """Quantise the base and say what it took."""
    job = Job()
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype)
    oneshot(
        model=model,
        dataset=DataLoader(Rows(job.tokens_SL), batch_size=8),
        recipe=[
            SmoothQuantModifier(smoothing_strength=STRENGTH),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
    )
    model.save_pretrained(job.out, save_compressed=True)
    AutoTokenizer.from_pretrained(job.base).save_pretrained(job.out)
    job.finish(f"SmoothQuant {STRENGTH} and GPTQ, W8A8 with a scale per row and per token")


if __name__ == "__main__":
    main()
