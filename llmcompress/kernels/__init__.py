"""Compiled kernels and their dispatch."""
