"""Replace the weights of a linear by indices into a small codebook."""
