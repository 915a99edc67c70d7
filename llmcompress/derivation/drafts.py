"""A decoder layer whose rows are being spelled: a term for each dimension of each of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from llmcompress.derivation.axis_proofs import KV, Axes
from llmcompress.derivation.config_fields import Place
from llmcompress.derivation.layouts import channels, written

HEAD_CHANNELS = "d"  # the axis of the channels of a head that the output projection reads


@dataclass
class Draft:
    """A layer, the terms of its tensors, and the sizes of the axes in them."""

    module: nn.Module
    terms: dict[str, list[str]]
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Draft:
        """A layer whose rows are the shapes of its parameters and of the buffers that are stored."""
        shapes = {name: [*tensor.shape] for name, tensor in module.state_dict().items()}
        return cls(module, {name: [str(size) for size in shape] or ["1"] for name, shape in shapes.items()})

    def lay(self, axes: Axes, like: str, known: Mapping[str, int], reads: frozenset[Place]) -> bool:
        """Spell the dimensions that run along axes, as in the layer `like` of the tiny model, or none if one
        of them doesn't fit.

        known: the sizes of the axes here, but for those that a config leaves open. reads: the dimensions of
        the tiny model that are inputs.
        """
        layouts = axes.of(like)
        tensors = self.module.state_dict()
        shapes = {(name, dim): tensors[name].shape[dim] for name, dim in layouts}
        alone = {layout: shapes[place] for place, layout in layouts.items()}
        # where a size is open, a dimension that is the axis says it
        sizes = {axis: alone[axis] for axis in axes.sizes if axis in alone} | dict(known)
        if not axes.sizes.keys() <= sizes.keys():
            return not layouts
        counts = {place: channels(layout, sizes, shapes[place]) for place, layout in layouts.items()}
        if None in counts.values():
            return False
        of_heads = [counts[place] for place in layouts if (f"{like}.{place[0]}", place[1]) in reads]
        width = of_heads[0] or 1 if KV in sizes and of_heads else 1
        if layouts:
            self.sizes |= sizes | ({HEAD_CHANNELS: width} if width > 1 else {})
        for (name, dim), layout in layouts.items():
            count = counts[name, dim] or 1
            self.terms[name][dim] = written(layout, count, HEAD_CHANNELS if count == width > 1 else None)
        return True
