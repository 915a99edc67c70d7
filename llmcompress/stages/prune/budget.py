"""How much of a model stays: a share or number of units, or a number of parameters or bytes to reach.

A budget is never exceeded. It is for the whole model as the stage finds it, including what the stage can't
cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from llmcompress.errors import ModelError
from llmcompress.io.safe_parsing import MOST_COUNTED, MOST_STORED
from llmcompress.io.units import bytes_of
from llmcompress.modeling.layerwise import LayerwiseModel
from llmcompress.stages.base import Settings

HEADER = 160  # most bytes of a file's header for a tensor, and for the header itself
NEAR = 0.01  # relative tolerance within which a budget is to be reached
STEPS = (64, 32, 16, 8, 4, 2, 1)  # multiples of a width; kernels prefer the first ones


class PruningBudget(Settings):
    """`keep`, or `parameters`, or `size`; with `multiple`."""

    keep: (
        Annotated[float, Field(gt=0, le=1)]
        | Annotated[int, Field(ge=1, le=MOST_COUNTED)]
        | Annotated[
            tuple[Annotated[int, Field(ge=0, le=MOST_COUNTED)], ...], Field(min_length=1, strict=False)
        ]
        | None
    ) = Field(
        default=None,
        description="units that stay in each layer, or layers that stay: a share or a number; of `ffn`, `kv` "
        "or `q` also a list with a number for each layer; 0 of `kv` takes its attention out, 0 of `ffn` its "
        "feed-forward part",
    )
    parameters: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=2, le=MOST_STORED)] | None = (
        Field(
            default=None,
            description="parameters that stay in the whole model: a share of those it has now, or a number",
        )
    )
    size: Annotated[int, Field(ge=1, le=MOST_STORED)] | None = Field(
        default=None,
        description="bytes on disk to reach, before anything is quantised; a number, or text like `100MB`",
    )
    multiple: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        default=None,
        description="number of units is a multiple of this; default: 64 for `ffn` and `hidden` (less where "
        "a budget needs it), else 1",
    )

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = bytes_of(value)
        if found is None:
            raise ValueError("is no size; write bytes, or 100MB, 1.5GB, 700MiB")
        return found

    @model_validator(mode="after")
    def _one_of_them(self) -> PruningBudget:
        given = [name for name in ("keep", "parameters", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of keep, parameters and size, not {' and '.join(given) or 'none'}")
        return self

    def spent(self, model: LayerwiseModel, widths: Mapping[str, Sequence[int]] | None = None) -> int:
        """What the model takes of the budget with these widths: bytes if the budget is a size, otherwise
        parameters."""
        return model.parameters(widths) if self.size is None else model.stored_bytes(widths)

    def allowed(self, model: LayerwiseModel) -> int:
        """What the model may take: bytes with `size`, parameters with `parameters`."""
        if self.size is not None:
            tensors = len(model.anatomy.rows(model.config)) + 1
            return max(0, self.size - HEADER * tensors)
        assert self.parameters is not None
        whole = model.parameters()
        return int(self.parameters * whole) if isinstance(self.parameters, float) else self.parameters

    def layers(self, model: LayerwiseModel) -> int:
        """Number of layers that stay. Errors: ModelError if none would go, or if too many would have to."""
        total = len(model.layers)
        if self.keep is not None:
            return self.count("layer", total, 1)
        own = sorted(self._of_layer(model, index) for index in range(total))
        whole, allowed = self.spent(model), self.allowed(model)
        for gone in range(total):
            if whole - sum(own[:gone]) <= allowed:
                return total - gone
        raise self.refuse(model, whole - sum(own[:-1]))

    def _of_layer(self, model: LayerwiseModel, index: int) -> int:
        """The parameters or bytes of one layer that count towards the budget."""
        sizes = {
            f"{model.layer_name(index)}.{name}": p.numel()
            for name, p in model.layers[index].named_parameters()
        }
        return sum(
            size * (1 if self.size is None else model.dtype_of(name).itemsize) for name, size in sizes.items()
        )

    def uniform(
        self, model: LayerwiseModel, axis: str, sizes: Sequence[int], multiple: int
    ) -> tuple[int, ...]:
        """Units of an axis that stay in layers of `sizes` units, if all lose alike. Errors: ModelError as
        `layers`."""
        if isinstance(self.keep, tuple):
            return _listed(axis, self.keep, sizes)
        if self.keep is not None:
            return tuple(self.count(axis, size, multiple) if size else 0 for size in sizes)
        allowed = self.allowed(model)

        def at(step: int) -> tuple[int, ...]:
            """The widest multiples of a step within the budget, or one step."""
            low, high = 1, -(-max(sizes) // step)  # steps
            while low < high:
                middle = (low + high + 1) // 2
                fits = self.spent(model, {axis: [min(middle * step, size) for size in sizes]}) <= allowed
                low, high = (middle, high) if fits else (low, middle - 1)
            return tuple(min(low * step, size) for size in sizes)

        for step in (
            [multiple] if self.multiple else [step for step in (multiple, *STEPS) if step <= multiple]
        ):
            counts = at(step)
            reached = self.spent(model, {axis: counts})
            if (1 - NEAR) * allowed <= reached <= allowed or (
                list(counts) == list(sizes) and reached <= allowed
            ):
                return counts
        if reached > allowed:
            raise self.refuse(model, reached)
        return counts

    def count(self, axis: str, size: int, multiple: int) -> int:
        """Units of `size` that stay by `keep`. Errors: ModelError if more would stay than there are, or all
        of them by rounding."""
        keep = self.keep
        assert keep is not None and not isinstance(keep, tuple), "a list is for single layers"
        if isinstance(keep, int):
            if self.multiple and keep % self.multiple:
                raise ModelError(f'keep {keep} of axis "{axis}" is no multiple of {self.multiple}')
            count = keep
        elif keep == 1:
            return size
        else:
            count = max(multiple, round(keep * size / multiple) * multiple)
        if count >= size:
            raise ModelError(
                f'keep {keep:g} of axis "{axis}" leaves {count} of {size} units (multiples of '
                f"{multiple}): nothing would be cut; use a smaller keep or multiple"
            )
        return count

    def refuse(self, model: LayerwiseModel, least: int) -> ModelError:
        """The error for a budget below the `least` that the model can take of it."""
        said, unit = (
            (f"parameters: {self.parameters:g}", "parameters")
            if self.size is None
            else (f"size: {self.size}", "bytes")
        )
        return ModelError(
            f"{said} can't be reached: what this stage may cut leaves at least {least} of "
            f"{self.spent(model)} {unit}; allow more, or cut other axes too"
        )


def _listed(axis: str, keep: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The units that stay in each layer by a list. Errors: ModelError if it is not one of this model."""
    if len(keep) != len(sizes):
        raise ModelError(
            f"keep lists {len(keep)} layers, and this model has {len(sizes)}; give one number each"
        )
    for index, (count, size) in enumerate(zip(keep, sizes, strict=True)):
        if count > size > 0:
            raise ModelError(
                f'keep {count} of axis "{axis}" in layer {index}, which has {size}; give at most as many'
            )
    return tuple(count if size else 0 for count, size in zip(keep, sizes, strict=True))
