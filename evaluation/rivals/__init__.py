"""Quantisers and pruners of others, each in its own environment, measured on the same sequences as ours."""
