"""The borders to transformers, bitsandbytes, PEFT and several processes."""
