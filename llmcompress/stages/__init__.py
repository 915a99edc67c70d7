"""The stages of a recipe, one a file: the only places where weights change.

A stage is a frozen schema (one entry of the YAML) with one method, `apply(model, context) -> StageFacts`. It
reads the model through `walk`, computes with `methods`, and leaves what became of each layer in the journal
of the run. Stages never see each other: between two of them lies nothing but a model.
"""
