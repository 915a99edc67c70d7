"""What the layers of a walk hand on to later ones beside their states, such as keys and values.

It belongs to one stream of hidden states: what compressed layers hand on is other than what those of the full
model do. It is kept by sequence on the CPU, as hidden states are, from the layer that makes it on. A run that
resumes runs the finished layers anew, so nothing of it is in a journal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmcompress.integrations.layer_calls import Handed, by_sequence, of_batch
from llmcompress.modeling.host_memory import CPU, moved


class HandedOn:
    """What enters a layer of one stream beside its states, by the number of a sequence, and what leaves
    it."""

    def __init__(self, handed_on: Mapping[str, int] | None = None) -> None:
        """handed_on: as `CallForm` has it."""
        self.handed_on = dict(handed_on or {})
        self.entering: dict[int, Handed] = {}
        self._leaving: dict[int, Handed] = {}

    def of(self, first: int | None, count: int, device: torch.device) -> Handed:
        """What enters the layer for `count` sequences from the number `first` on."""
        if not self.entering:
            return {}
        if first is None:
            raise ValueError("which sequences are they? This layer is called with what others hand on")
        return of_batch([moved(self.entering[first + i], device) for i in range(count)])

    def keep(self, first: int, count: int, entered: Handed, left: Handed) -> None:
        """Keep what left the layer for these sequences. What a mapping held as it `entered` is kept
        already."""
        new = dict[str, object]()
        for name, value in left.items():
            if self.handed_on[name] == 0:
                was = entered.get(name, {})
                value = {key: each for key, each in value.items() if was.get(key) is not each}
            new[name] = value
        for i, each in enumerate(by_sequence(moved(new, CPU), count) if new else []):
            self._leaving[first + i] = each

    def advance(self) -> None:
        """Let what left the layer enter the next one."""
        for number, left in self._leaving.items():
            entered = self.entering.get(number, {})
            self.entering[number] = {
                name: {**entered.get(name, {}), **value} if self.handed_on[name] == 0 else value
                for name, value in left.items()
            }
        self._leaving = {}

    def copy(self) -> HandedOn:
        """The same for a stream that goes its own way from here on."""
        found = HandedOn(self.handed_on)
        found.entering = dict(self.entering)
        return found
