"""Sub-models made of whole units: which parameters belong to which output channel or neuron, and the smaller tensors that remain.

A *unit* is an output channel of a convolution or an output neuron of a dense layer. Tensors whose channels must agree (both sides of a
residual sum) share one *group* of units. `export.units` reads the groups off the forward graph; from then on nobody needs the graph.

A parameter belongs to a sub-model when the unit of every one of its axes is kept. Sliced tensors are row-major and units ascend, so the
flat vector of the smaller model is `vector[unit_coordinates(...)]`: the same numbers in the same order, whichever way they are taken.

Nothing is rescaled: HeteroFL's scaler, which divides activations by the width, would make the values of two widths incomparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError, PeerError
from regrow.parameters import MAX_COORDINATES, MAX_DIMENSIONS, MAX_JSON_BYTES, MAX_NAME_CHARACTERS, MAX_TENSORS, Layout, Tensor

MAX_GROUPS = 10_000
Kept = Mapping[int, NDArray[np.int64]]
"""Group index -> int64, ascending: the units that a sub-model keeps; every group is named and keeps at least one."""


class Axis(NamedTuple):
    """What one axis of a parameter tensor consists of.

    Attributes:
        group: index of the group whose units lie along the axis; None where the axis is never sliced.
        block: consecutive entries per unit; more than 1 behind a Flatten, where a unit is a channel with all its positions.
        owns: the tensor is part of what computes the units of this axis (a weight's output axis, a bias), not a reader of them.
    """

    group: int | None = None
    block: int = 1
    owns: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are kept or dropped together wherever they occur.

    Raises:
        LocalError: the name is empty, too long or not printable, or there is no unit.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise LocalError(f"unit group name {self.name!r}: needs 1 to {MAX_NAME_CHARACTERS} printable characters")
        if type(self.size) is not int or not 1 <= self.size <= MAX_COORDINATES:
            raise LocalError(f"unit group {self.name}: {self.size} units, needs 1 to {MAX_COORDINATES}")


@dataclass(frozen=True, slots=True)
class Units:
    """The unit groups of a model, and where their units lie in its parameters.

    Attributes:
        groups: in the order in which the forward graph produces them.
        axes: one entry per tensor of the layout, in its order; each has one entry per axis of the tensor.

    Raises:
        LocalError: an axis names no group, a group occurs nowhere, or a tensor has two axes that own.
    """

    groups: tuple[Group, ...]
    axes: tuple[tuple[Axis, ...], ...]

    def __post_init__(self) -> None:
        if len(self.groups) > MAX_GROUPS or not 1 <= len(self.axes) <= MAX_TENSORS:
            raise LocalError(f"units: {len(self.groups)} groups over {len(self.axes)} tensors, at most {MAX_GROUPS} over {MAX_TENSORS}")
        seen: set[int] = set()
        for number, axes in enumerate(self.axes):
            if len(axes) > MAX_DIMENSIONS or sum(axis.owns for axis in axes) > 1:
                raise LocalError(f"units: tensor {number} needs up to {MAX_DIMENSIONS} axes, of which one may own")
            for axis in axes:
                if axis.group is not None and not 0 <= axis.group < len(self.groups):
                    raise LocalError(f"units: tensor {number} names group {axis.group}, but there are {len(self.groups)}")
                if axis.block < 1 or (axis.group is None and axis != Axis()):
                    raise LocalError(f"units: tensor {number} has the axis {tuple(axis)}; blocks are positive, and 1 without a group")
                seen.update(() if axis.group is None else (axis.group,))
        idle = sorted(set(range(len(self.groups))) - seen)
        if idle:
            raise LocalError(f"units: no tensor has units of group {self.groups[idle[0]].name!r}")

    def check(self, layout: Layout) -> None:
        """Nothing, if every axis has exactly the units of its group.

        Raises:
            LocalError: these units are not those of this layout.
        """
        if len(self.axes) != len(layout.tensors):
            raise LocalError(f"units: describe {len(self.axes)} tensors, but the layout has {len(layout.tensors)}")
        for tensor, axes in zip(layout.tensors, self.axes, strict=True):
            sizes = [None if axis.group is None else self.groups[axis.group].size * axis.block for axis in axes]
            fits = all(size in (None, dim) for size, dim in zip(sizes, tensor.shape, strict=False))
            if len(axes) != len(tensor.shape) or not fits:
                raise LocalError(f"units: tensor {tensor.name} has shape {tensor.shape}, which these groups do not fill")

    def to_json(self) -> bytes:
        """The units as one line of JSON, the inverse of `from_json`.

        Raises:
            LocalError: the JSON would exceed the 1 MiB that `from_json` accepts.
        """
        groups = [_GroupJson(group.name, group.size) for group in self.groups]
        text = msgspec.json.encode(_UnitsJson(groups, [[_AxisJson(*axis) for axis in axes] for axes in self.axes]))
        if len(text) > MAX_JSON_BYTES:
            raise LocalError(f"units: {len(text)} bytes of JSON, at most {MAX_JSON_BYTES} may travel")
        return text

    @staticmethod
    def from_json(data: bytes, layout: Layout) -> Units:
        """The units that `to_json` wrote, checked against the layout that came with them, so that no size is taken on trust.

        Raises:
            PeerError: anything is wrong with the bytes, or they are not about this layout.
        """
        if len(data) > MAX_JSON_BYTES:
            raise PeerError(f"units: {len(data)} bytes of JSON, at most {MAX_JSON_BYTES} are accepted")
        try:
            parsed = _units_decoder.decode(data)
            groups = tuple(Group(entry.name, entry.size) for entry in parsed.groups)
            units = Units(groups, tuple(tuple(Axis(a.group, a.block, a.owns) for a in axes) for axes in parsed.axes))
            units.check(layout)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LocalError) as error:
            raise PeerError(f"units: {error}") from error
        return units


def unit_coordinates(layout: Layout, units: Units, kept: Kept) -> NDArray[np.uint32]:
    """uint32, ascending: the flat coordinates of all parameters that belong to the sub-model of these units.

    A bias belongs only with its unit, although the layout calls it always kept: that flag speaks of single weights. What
    belongs to every sub-model here are the tensors without a group, such as the last layer's bias.

    Raises:
        LocalError: the units are not those of this layout, or `kept` is not as `Kept` says.
    """
    units.check(layout)
    _check_kept(units, kept)
    pieces = []
    for tensor, axes in zip(layout.tensors, units.axes, strict=True):
        inside = np.zeros(1, np.uint32)
        for dim, axis in zip(tensor.shape, axes, strict=True):
            inside = (inside[:, None] * np.uint32(dim) + _entries(axis, dim, kept)).reshape(-1)
        pieces.append(inside + np.uint32(layout.slices[tensor.name].start))
    return np.concatenate(pieces)


def sliced_layout(layout: Layout, units: Units, kept: Kept) -> Layout:
    """The layout of the smaller model: the same tensors with the sizes that are left.

    Raises:
        LocalError: as unit_coordinates.
    """
    units.check(layout)
    _check_kept(units, kept)
    shapes = _shapes(layout, units, [len(kept[group]) for group in range(len(units.groups))])
    return Layout(tuple(Tensor(t.name, shape, t.always_kept) for t, shape in zip(layout.tensors, shapes, strict=True)))


def gather(layout: Layout, units: Units, kept: Kept, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The smaller model's tensors by name, copied out of the full model's flat vector.

    Args:
        vector: float32 [n], in flat coordinates. Not modified.

    Raises:
        LocalError: as unit_coordinates, or the vector is not float32 [n].
    """
    _check_vector(layout, vector, "gather")
    return sliced_layout(layout, units, kept).unflatten(vector[unit_coordinates(layout, units, kept)])


def scatter(layout: Layout, units: Units, kept: Kept, tensors: Mapping[str, NDArray[Any]], vector: NDArray[np.float32]) -> None:
    """Write the smaller model's tensors back to where they came from; the inverse of `gather`.

    Args:
        tensors: float32, exactly the tensors and shapes of `sliced_layout`.
        vector: float32 [n], in flat coordinates. Modified in place, on the kept coordinates only.

    Raises:
        LocalError: as gather, or the tensors are not those of the sliced layout.
    """
    _check_vector(layout, vector, "scatter")
    values = sliced_layout(layout, units, kept).flatten(tensors)
    vector[unit_coordinates(layout, units, kept)] = values


def width_sizes(units: Units, width: float) -> tuple[int, ...]:
    """How many units of each group a width keeps: ceil(width * size).

    Raises:
        LocalError: the width is not in (0, 1].

    Source: HeteroFL (arXiv 2010.01264) and FjORD (arXiv 2102.13451), which round up, so that no layer ever vanishes.
    """
    if not 0.0 < width <= 1.0:
        raise LocalError(f"width {width} is not in (0, 1]")
    # k/size times size may come out a rounding error above k, which is not meant to keep one unit more.
    return tuple(max(1, math.ceil(width * group.size * (1 - 1e-12))) for group in units.groups)


def width_units(units: Units, width: float, shift: int = 0) -> dict[int, NDArray[np.int64]]:
    """The units of a width slice: in every group a window of ceil(width * size) units that begins at `shift` and wraps around.

    Args:
        width: fraction of the units of each group, in (0, 1].
        shift: 0 for the first units (HeteroFL, FjORD: narrow slices lie inside wide ones); the round's number for FedRolex.

    Raises:
        LocalError: the width is not in (0, 1], or the shift is negative.

    Source: HeteroFL (arXiv 2010.01264), FjORD (arXiv 2102.13451); FedRolex (arXiv 2212.01548), whose
        windows roll in every layer.
    """
    if shift < 0:
        raise LocalError(f"shift {shift} is negative; windows roll forward")
    sizes = width_sizes(units, width)
    windows = [(np.arange(count, dtype=np.int64) + shift) % group.size for group, count in zip(units.groups, sizes, strict=True)]
    return {index: np.sort(window) for index, window in enumerate(windows)}


def unit_importance(layout: Layout, units: Units, importance: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """How much each unit matters, per group: the sum over the parameters that it owns.

    A unit owns what computes it: its row of the producing weight, its bias, its normalisation weights; in a residual stream the rows of
    every producer. What reads it belongs to the reader, so that nothing counts twice.

    Args:
        importance: float32 [n], >= 0, by flat coordinate (regrow.order.importance).

    Returns:
        One float32 [size] per group.

    Raises:
        LocalError: the units are not those of this layout, or the importance is not float32 [n].
    """
    units.check(layout)
    _check_vector(layout, importance, "unit_importance")
    totals = [np.zeros(group.size, np.float64) for group in units.groups]
    for tensor, axes in zip(layout.tensors, units.axes, strict=True):
        values = importance[layout.slices[tensor.name]].reshape(tensor.shape)
        for number, axis in enumerate(axes):
            if axis.owns and axis.group is not None:
                others = tuple(other for other in range(len(axes)) if other != number)
                totals[axis.group] += values.sum(axis=others, dtype=np.float64).reshape(-1, axis.block).sum(axis=1)
    return [total.astype(np.float32) for total in totals]


def kept_count(layout: Layout, units: Units, kept_sizes: Sequence[int]) -> int:
    """How many parameters a sub-model has that keeps this many units of each group, whichever they are.

    Raises:
        LocalError: the units are not those of this layout, or a size is not in 1 .. size of its group.
    """
    units.check(layout)
    if len(kept_sizes) != len(units.groups):
        raise LocalError(f"kept sizes: {len(kept_sizes)} of them for {len(units.groups)} groups")
    for group, count in zip(units.groups, kept_sizes, strict=True):
        if not 1 <= count <= group.size:
            raise LocalError(f"kept sizes: {count} units of group {group.name!r}, which has {group.size}; keep at least one")
    return sum(math.prod(shape) for shape in _shapes(layout, units, kept_sizes))


def width_for_density(layout: Layout, units: Units, density: float) -> float:
    """The width whose sub-model comes nearest to density * n parameters; of two equally near ones the smaller.

    A width acts on both sides of a weight, so it lies near the square root of the density. Only widths k / size of some group make a
    difference; each adds at least one unit, so their counts ascend strictly and bisection finds the nearest.

    Args:
        density: parameters kept / n, in (0, 1].

    Raises:
        LocalError: the density is not in (0, 1], or the units are not those of this layout.
    """
    if not 0.0 < density <= 1.0:
        raise LocalError(f"density {density} is not in (0, 1]")
    units.check(layout)
    if not units.groups:
        return 1.0
    widths = np.unique(np.concatenate([np.arange(1, group.size + 1) / group.size for group in units.groups]))
    target = density * layout.size

    def count(index: int) -> int:
        return kept_count(layout, units, width_sizes(units, float(widths[index])))

    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= target else (middle + 1, high)
    if low and target - count(low - 1) <= count(low) - target:
        low -= 1
    return float(widths[low])


def _shapes(layout: Layout, units: Units, kept_sizes: Sequence[int]) -> list[tuple[int, ...]]:
    return [
        tuple(d if axis.group is None else int(kept_sizes[axis.group]) * axis.block for d, axis in zip(tensor.shape, axes, strict=True))
        for tensor, axes in zip(layout.tensors, units.axes, strict=True)
    ]


def _entries(axis: Axis, dim: int, kept: Kept) -> NDArray[np.uint32]:
    """The indices along one axis that are kept."""
    if axis.group is None:
        return np.arange(dim, dtype=np.uint32)
    entries = kept[axis.group][:, None] * axis.block + np.arange(axis.block)
    return entries.reshape(-1).astype(np.uint32)


def _check_kept(units: Units, kept: Kept) -> None:
    if kept.keys() != set(range(len(units.groups))):
        raise LocalError(f"kept units: groups {sorted(kept)}, needs each of 0 .. {len(units.groups) - 1}")
    for index, group in enumerate(units.groups):
        chosen = kept[index]
        if chosen.dtype != np.int64 or chosen.ndim != 1 or chosen.size == 0:
            raise LocalError(f"kept units of group {group.name!r}: {chosen.dtype}{chosen.shape}, needs int64 [at least 1]")
        if chosen[0] < 0 or chosen[-1] >= group.size or (chosen[1:] <= chosen[:-1]).any():
            raise LocalError(f"kept units of group {group.name!r}: need ascending, distinct indices below {group.size}")


def _check_vector(layout: Layout, vector: NDArray[np.float32], what: str) -> None:
    if vector.dtype != np.float32 or vector.shape != (layout.size,):
        raise LocalError(f"{what}: {vector.dtype}{vector.shape}, not float32({layout.size},)")


_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_COORDINATES)]


class _GroupJson(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    size: _Size


class _AxisJson(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    group: Annotated[int, msgspec.Meta(ge=0, lt=MAX_GROUPS)] | None
    block: _Size
    owns: bool


class _UnitsJson(msgspec.Struct, forbid_unknown_fields=True):
    groups: Annotated[list[_GroupJson], msgspec.Meta(max_length=MAX_GROUPS)]
    axes: Annotated[
        list[Annotated[list[_AxisJson], msgspec.Meta(max_length=MAX_DIMENSIONS)]], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)
    ]


_units_decoder = msgspec.json.Decoder(_UnitsJson)
