"""Facts of a model's family, derived from tiny models of its config."""
