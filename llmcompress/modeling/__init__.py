"""A model, one decoder layer at a time."""
