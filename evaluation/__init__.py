"""Measurements of llmcompress: `python -m evaluation` lists them, RESULTS.md holds what they found."""
