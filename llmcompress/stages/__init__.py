"""The stages of a recipe, one a folder: the only places where weights change.

A stage is a frozen schema (one entry of the YAML) whose method `apply(model, context) -> Facts` does the
work. It walks the model with `modeling`, computes with `algorithms`, and leaves what became of each layer in
the journal of the run. Stages never see each other: between two of them there is nothing but a model.
"""
