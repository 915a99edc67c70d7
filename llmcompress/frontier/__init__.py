"""The best model within a size: what each format costs each linear, and the choice."""
