"""How an axis lies in one dimension of a weight: layouts that are tried, and what they are at other sizes.

A layout is a term of the grammar of shapes in which `_` stands for the channels of a unit. On a tiny model it
is chosen by a proof; at the sizes of another model, `_` follows from the length of the dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmcompress.architectures.shape_grammar import Spelling

CHANNELS = "_"
HEADS = (
    "(kv q _)",
    "(kv _)",
    "(kv q _ | kv _ | kv _)",  # queries, keys and values one after another
    "(kv (q _ | _ | _))",  # the same for each key-value head
    "(kv q _ | kv q _)",
    "(kv q _ | kv q _ | kv q _)",
    "(kv _ | kv _)",
    "(kv _ | kv _ | kv _)",
)
# of an axis that is no head; in the second, gate and up lie one after another
PLAIN = ("{0}", "({0} | {0})", "({0} _)")


def fitting(layouts: Sequence[str], cases: Sequence[tuple[Mapping[str, int], int]]) -> list[str]:
    """The layouts of a dimension that has, in each case, these sizes of axes and this length."""
    found = []
    for layout in layouts:
        counts = {channels(layout, sizes, length) for sizes, length in cases}
        if len(counts) == 1 and None not in counts:
            found.append(layout)
    return found


def channels(layout: str, sizes: Mapping[str, int], length: int) -> int | None:
    """What `_` stands for in a dimension of this length; None if the layout doesn't fit it. Where a layout
    has no `_`, 1."""
    (whole,) = Spelling.parse(layout).shape({**sizes, CHANNELS: 1})
    if not whole or length % whole or (CHANNELS not in layout and length != whole):
        return None
    return length // whole


def written(layout: str, count: int, name: str | None = None) -> str:
    """A layout as a term, with the number of channels or the name of their axis in place of `_`."""
    if name is None and count == 1 and "|" not in layout:
        layout = layout.replace(f" {CHANNELS}", "")
    text = re.sub(rf"\b{CHANNELS}\b", name or str(count), layout)
    return re.sub(r"^\((\w+)\)$", r"\1", text)
