"""Named tensors beside query, key and value, whose axes are named too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["CustomIO"]

_RESERVED = ("score", "b", "h", "q_idx", "kv_idx", "grad")


class CustomIO:
    """Names of tensors and of their axes: ``CustomIO({"decay": ("heads",), "bias": (1, "heads", "seq_len",
    "seq_len_kv")})``. An axis is 1 or one of the engine's names; a function gets a tensor's part in its tile, as four
    axes that broadcast with the tile.

    The order of ``tensors`` is that of the engine's arguments after query, key and value.
    """

    def __init__(self, tensors: Mapping[str, Sequence[int | str]] | None = None) -> None:
        self.tensors = {name: tuple(axes) for name, axes in (tensors or {}).items()}
        for name, axes in self.tensors.items():
            named = [axis for axis in axes if axis != 1]
            if name in _RESERVED or len(set(named)) < len(named) or not all(isinstance(axis, str) for axis in named):
                raise OptionError(
                    f"Custom input {name!r} of axes {axes}: axes are 1 or names, each name once, and a tensor is not "
                    f"called {', '.join(_RESERVED)}."
                )

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors, in order."""
        return tuple(self.tensors)

    def placed(self, tensors: Sequence[Tensor], sizes: Mapping[str, int], like: Tensor) -> tuple[Tensor, ...]:
        """The tensors with one axis for each of ``sizes``, in their order, of size 1 where a tensor lacks it.

        Raises ShapeError for tensors that are not as declared.
        """
        if len(tensors) != len(self.tensors):
            raise ShapeError(
                f"After query, key and value come {len(self.tensors)} custom inputs ({', '.join(self.names) or 'none'})"
                f"; got {len(tensors)}."
            )
        placed = []
        for tensor, (name, axes) in zip(tensors, self.tensors.items(), strict=True):
            unknown = [axis for axis in axes if axis != 1 and axis not in sizes]
            if unknown:
                raise OptionError(f"Custom input {name!r} has the axes {unknown}; there are {', '.join(sizes)} and 1.")
            expected = tuple(1 if isinstance(axis, int) else sizes[axis] for axis in axes)
            if tuple(tensor.shape) != expected:
                raise ShapeError(f"Custom input {name!r} is {axes} = {expected} here; got {tuple(tensor.shape)}.")
            order = [axes.index(axis) for axis in sizes if axis in axes]
            flat = tensor.permute(*order, *(at for at in range(len(axes)) if at not in order))
            placed.append(flat.reshape([sizes[axis] if axis in axes else 1 for axis in sizes]).to(like.device))
        return tuple(placed)

    def by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What functions get."""
        return dict(zip(self.names, tensors, strict=True))
