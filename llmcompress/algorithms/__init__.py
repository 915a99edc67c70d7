"""The algorithms, one per file: pure functions of tensors that return new tensors.

Nothing here depends on a model, a config, a choice of device or a file. Shape suffixes throughout: R rows
(outputs of a linear), C columns (its inputs), G groups of columns under one scale, L levels of a grid, T
tokens, D hidden width.
"""
