"""Store the KV cache in 8 or 4 bits."""
