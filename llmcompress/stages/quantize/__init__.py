"""Quantize linears, the embedding and the output head."""
