"""Tie the input embedding and the output head."""
