"""The algorithms, one a file: pure functions of tensors that return new tensors.

Nothing here knows a model, a config, a device choice or a file. Shape suffixes throughout: R rows (outputs of
a linear), C columns (its inputs), G groups of columns under one scale, L levels of a grid, T tokens, D hidden
width.
"""
