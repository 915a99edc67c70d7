"""What a decoder layer need not compute again, once the first of its linears have their final weights.

A stage that solves for one group of linears after another runs the layer up to each group. A submodule whose
linears are all solved, such as self_attn, gives the same output in every later pass, so that output is kept.
Where a submodule returns the output of its last linear as it is, the input of that linear is enough for it:
the group was read already, and nothing before it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.modeling.host_memory import CPU, moved, to_host


class FinishedParts:
    """Outputs of submodules of one stream of a layer by batch and name, and inputs of linears, on the CPU.

    `last` maps a submodule to the linear that comes last in it. A part of a batch has a key of its own, and
    nothing that is kept for the whole batch is used for it.
    """

    def __init__(self, last: Mapping[str, str]) -> None:
        self.last = last
        self._outputs: dict[Hashable, dict[str, Any]] = {}
        self._inputs: dict[Hashable, dict[str, Tensor]] = {}
        # submodule -> what it returns besides the output of its last linear; None where it returns another
        self._beside: dict[str, tuple[Any, ...] | None] = {}

    def output(self, batch: Hashable, submodule: str) -> Any | None:
        """The output of a submodule for a batch, if it is kept."""
        return self._outputs.get(batch, {}).get(submodule)

    def keep_input(self, batch: Hashable, linear: str, x: Tensor) -> None:
        """Keep what a linear reads, if it is the last of a submodule."""
        if linear in self.last.values():
            self._inputs.setdefault(batch, {})[linear] = to_host(x)

    def forget(self, outputs: Collection[str], inputs: Collection[str]) -> None:
        """Forget the outputs of some submodules and the inputs of some linears, which have changed."""
        for kept, names in ((self._outputs, outputs), (self._inputs, inputs)):
            for known in kept.values():
                for name in known.keys() & {*names}:
                    del known[name]

    def drop(self, batch: int) -> None:
        """Forget everything of a batch and of its parts."""
        for kept in (self._outputs, self._inputs):
            for key in [key for key in kept if key == batch or (isinstance(key, tuple) and key[0] == batch)]:
                del kept[key]

    def clear(self) -> None:
        """Forget everything."""
        self._outputs.clear()
        self._inputs.clear()

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return not any(self._outputs.values()) and not any(self._inputs.values())

    @contextmanager
    def reused(
        self,
        module: nn.Module,
        batch: Hashable,
        device: torch.device,
        final: Collection[str] = (),
        wanted: Collection[str] = (),
    ) -> Iterator[None]:
        """Let submodules return the outputs that are kept for a batch, and keep those of `final`.

        A submodule of `wanted` is run nevertheless.
        """
        names = {*self._outputs.get(batch, {}), *final} - {*wanted}
        modules = {name: module.get_submodule(name) for name in names}
        own: dict[str, Any] = {name: part.__dict__.get("forward") for name, part in modules.items()}
        for name, part in modules.items():
            part.forward = partial(self._output, name, part, part.forward, batch, device)
        try:
            yield
        finally:
            for name, part in modules.items():
                del part.forward
                if own[name] is not None:
                    part.forward = own[name]

    def _output(
        self,
        name: str,
        module: nn.Module,
        run: Callable[..., Any],
        batch: Hashable,
        device: torch.device,
        *args: Any,
        **named: Any,
    ) -> Any:
        """The output of a submodule: kept, from the input of its last linear, or computed now."""
        outputs = self._outputs.setdefault(batch, {})
        if name in outputs:
            return moved(outputs[name], device)
        x = self._inputs.get(batch, {}).pop(self.last.get(name, ""), None)
        if x is not None and self._beside.get(name) is not None:
            out = self._from_input(name, module, x.to(device))
        else:
            out = self._observed(name, module, run, *args, **named)
        outputs[name] = moved(out, CPU)
        return out

    def _from_input(self, name: str, module: nn.Module, x: Tensor) -> Any:
        """The output of a submodule from what its last linear reads; hooks have seen that input already."""
        linear = module.get_submodule(self.last[name].removeprefix(f"{name}."))
        beside = self._beside[name]
        out = linear.forward(x)
        return (out, *beside) if beside else out

    def _observed(
        self, name: str, module: nn.Module, run: Callable[..., Any], *args: Any, **named: Any
    ) -> Any:
        """Run a submodule, and see whether it returns the very output of its last linear."""
        if name not in self.last or name in self._beside:
            return run(*args, **named)
        seen: list[Any] = []
        linear = module.get_submodule(self.last[name].removeprefix(f"{name}."))
        hook = linear.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            out = run(*args, **named)
        finally:
            hook.remove()
        first, *rest = out if isinstance(out, tuple) else (out,)
        plain = len(seen) == 1 and first is seen[0] and not any(isinstance(each, Tensor) for each in rest)
        self._beside[name] = (*rest,) if plain else None
        return out
