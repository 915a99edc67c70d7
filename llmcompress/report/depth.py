"""Where linears stand: their kind, such as mlp.up_proj, and the layer that holds them."""

from __future__ import annotations

import re
from collections.abc import Iterable

Points = dict[str, dict[int, float]]  # kind of linear -> layer -> value


def placed_at(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a linear: model.layers.3.mlp.experts.7.up_proj -> (3, mlp.experts.up_proj); layer is
    None outside the layers."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
    return (int(match[1]), re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "", match[2])) if match else (None, name)


def depth_of(names: Iterable[str]) -> int:
    """The number of layers that linears of these names lie in."""
    layers = (placed_at(name)[0] for name in names)
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


def by_kind(named: Iterable[tuple[str, float]], depth: int) -> Points:
    """Mean value per kind and layer, layers in order; linears outside the layers are placed at `depth`."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in named:
        layer, kind = placed_at(name)
        found.setdefault(kind, {}).setdefault(depth if layer is None else layer, []).append(value)
    return {kind: {x: sum(at[x]) / len(at[x]) for x in sorted(at)} for kind, at in found.items()}
