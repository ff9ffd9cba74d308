"""Which units a forward model has: what of it is kept or dropped together (export.slicing then drops it).

One walk in execution order. Every value computed from `x` has its channels along axis 1; a Conv or a dense layer opens a new
*channel space*, a residual sum joins two, everything else passes them on. What is left of joining are the groups of units, except
the spaces that may not be sliced: the input's and the logits'. Where channels are normalised together, they only leave
together: then a unit is several channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import onnx
from onnx import helper

from export.forward import Forward, read_forward
from regrow.errors import LocalError, shortened
from regrow.units import Axis, Group, Kept, Units


def find_units(model: onnx.ModelProto) -> Units:
    """The unit groups of a forward model; their axes follow the tensors of its layout.

    Raises:
        LocalError: the model is not of the form that forward.read_forward describes, or an op is not one of those below; the message names
            op, node and cure.
    """
    return units_of(walk_of(read_forward(model)))


@dataclass(eq=False)
class _Space:
    """Channels that are kept or dropped together.

    Attributes:
        number: in the order of opening.
        name: of the weight that produced it.
        fixed: never sliced.
        unit: channels per unit.
        joined: the space that this one has become part of.
    """

    number: int
    name: str
    channels: int
    fixed: bool = False
    unit: int = 1
    joined: _Space | None = None

    def root(self) -> _Space:
        return self if self.joined is None else self.joined.root()


@dataclass(frozen=True)
class _Channels:
    """What an axis consists of: the channels of a space, each with `each` entries (behind a Flatten), or 1 / each channels per entry."""

    space: _Space
    each: Fraction = Fraction(1)


@dataclass(frozen=True)
class _Claim:
    """One axis of a parameter."""

    channels: _Channels | None = None
    owns: bool = False


@dataclass
class Walk:
    """What is known of a model's channels; `walk_of` gets to its end.

    Attributes:
        values: what axis 1 of each value computed from `x` consists of.
        claims: of each parameter met so far, one per axis.
        views: parameters with axes of size 1 put in: the parameter's name, and where each of its axes lies now.
        statistics: whose channels the running means and variances are of, by name.
        spaces: in the order in which they were opened, the input's first.
    """

    forward: Forward
    values: dict[str, _Channels] = field(default_factory=dict)
    claims: dict[str, tuple[_Claim, ...]] = field(default_factory=dict)
    views: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    statistics: dict[str, _Claim] = field(default_factory=dict)
    spaces: list[_Space] = field(default_factory=list)

    def opened(self, name: str, channels: int, *, fixed: bool = False) -> _Channels:
        self.spaces.append(_Space(len(self.spaces), name, channels, fixed))
        return _Channels(self.spaces[-1])


@dataclass(frozen=True)
class _Site:
    """One node on the walk."""

    walk: Walk
    node: onnx.NodeProto

    def refused(self, why: str) -> LocalError:
        op = f"{self.node.domain}.{self.node.op_type}" if self.node.domain else self.node.op_type
        output = self.node.output[0].removeprefix("forward:")
        return LocalError(f"cannot slice {op} (node {shortened(self.node.name)!r}, output {shortened(output)!r}) into units: it {why}")

    def attribute(self, name: str, default: int) -> int:
        found = (helper.get_attribute_value(item) for item in self.node.attribute if item.name == name)
        return int(next(found, default))

    def channels(self, index: int = 0) -> _Channels:
        """What axis 1 of an input consists of."""
        if len(self.node.input) <= index or self.node.input[index] not in self.walk.values:
            raise self.refused(f"needs as input {index} a value computed from x; compute weights outside the model")
        return self.walk.values[self.node.input[index]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value with fixed axes; the batch is 0."""
        shape = self.walk.forward.shapes.get(name)
        if not shape or None in shape[1:]:
            raise self.refused(f"has {name.removeprefix('forward:')!r}, a shape only known at run time; fix every axis but the batch")
        return (shape[0] or 0, *(int(size or 0) for size in shape[1:]))

    def weight(self, index: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape of an input that is a parameter."""
        name = self.node.input[index] if len(self.node.input) > index else ""
        if name not in self.walk.forward.parameters:
            raise self.refused(f"needs as input {index} a float32 initializer; store the weight as one, in the layout in which it is used")
        return name, self.walk.forward.parameters[name].shape

    def claim(self, name: str, claims: Iterable[_Claim]) -> None:
        if name in self.walk.claims:
            raise self.refused(f"uses parameter {shortened(name)!r}, which another node uses too; give each its own copy")
        self.walk.claims[name] = tuple(claims)

    def claim_vector(self, index: int, channels: _Channels, entries: int) -> None:
        """A parameter with one number per entry of axis 1, itself of one axis; or the same constant for all of them."""
        constant = self.walk.forward.constants.get(self.node.input[index])
        if constant is not None and constant.shape == (entries,) and np.all(constant == constant[0]):
            return
        name, shape = self.weight(index)
        if shape != (entries,):
            raise self.refused(f"has parameter {shortened(name)!r} of shape {list(shape)}; it needs one number per channel, [{entries}]")
        self.claim(name, [_Claim(channels, owns=True)])


def _conv(site: _Site) -> _Channels:
    source = site.channels()
    weight, shape = site.weight(1)
    if site.attribute("group", 1) != 1:
        raise site.refused("is grouped, so a channel is not free to leave; use group = 1")
    if source.each != 1:
        raise site.refused("reads an axis 1 that is not one entry per channel; leave the channels apart until the dense layers")
    made = site.walk.opened(weight, shape[0])
    site.claim(weight, [_Claim(made, owns=True), _Claim(source), *[_Claim()] * (len(shape) - 2)])
    if len(site.node.input) > 2 and site.node.input[2]:
        site.claim_vector(2, made, shape[0])
    return made


def _dense(site: _Site) -> _Channels:
    """Gemm, or MatMul of a matrix with a matrix."""
    source = site.channels()
    weight, shape = site.weight(1)
    if len(site.shape(site.node.output[0])) != 2 or len(shape) != 2 or site.attribute("transA", 0):
        raise site.refused("is not of the form [batch, in] x [in, out]; flatten the features first")
    turned = bool(site.attribute("transB", 0))
    made = site.walk.opened(weight, shape[0] if turned else shape[1])
    claims = [_Claim(source), _Claim(made, owns=True)]
    site.claim(weight, reversed(claims) if turned else claims)
    if len(site.node.input) > 2 and site.node.input[2]:
        _claim_broadcast(site, 2, made)
    return made


def _claim_broadcast(site: _Site, index: int, channels: _Channels) -> None:
    """An operand that is the same number everywhere, or a parameter with one number per channel (biases, normalisation weights)."""
    operand = site.node.input[index]
    constant = site.walk.forward.constants.get(operand)
    if constant is not None and constant.size == 1:
        return
    if operand in site.walk.views:
        name, places = site.walk.views[operand]
        shape = site.shape(operand)
    else:
        name, shape = site.weight(index)
        places = tuple(range(len(shape)))
    whole = site.shape(site.node.output[0])
    axis = 1 - (len(whole) - len(shape))  # where axis 1 of the output lies in the operand
    if len(shape) > len(whole) or axis not in places or shape[axis] != whole[1] or any(size != 1 for size in shape[:axis]):
        raise site.refused(
            f"spreads parameter {shortened(name)!r} of shape {list(shape)} over several channels; give every channel its own number"
        )
    site.claim(name, (_Claim(channels, owns=True) if place == axis else _Claim() for place in places))


def _unsqueeze(site: _Site) -> None:
    """A parameter made to broadcast, as torch writes normalisation weights."""
    name, shape = site.weight(0)
    axes = site.walk.forward.constants.get(site.node.input[1])
    if axes is None:
        raise site.refused("puts axes in where only the run time tells; give them as a constant")
    rank = len(shape) + axes.size
    inserted = {int(axis) % rank for axis in axes}
    site.walk.views[site.node.output[0]] = name, tuple(axis for axis in range(rank) if axis not in inserted)


def _combined(site: _Site) -> _Channels:
    """Two branches number by number, or one with a bias, a scale or a constant."""
    branches = [index for index, name in enumerate(site.node.input) if name in site.walk.values]
    if len(branches) < 2:
        index = branches[0] if branches else 0
        channels = site.channels(index)
        if site.shape(site.node.input[index]) != site.shape(site.node.output[0]):
            raise site.refused("stretches its input; give it the shape of the output")
        _claim_broadcast(site, 1 - index, channels)
        return channels
    first, second = site.channels(0), site.channels(1)
    if site.shape(site.node.input[0]) != site.shape(site.node.input[1]) or first.each != second.each:
        raise site.refused("combines branches whose channels do not agree one by one; give both the same shape")
    _join(first.space.root(), second.space.root())
    return first


def _join(first: _Space, second: _Space) -> None:
    if first is second:
        return
    first, second = sorted((first, second), key=lambda space: space.number)
    first.fixed, first.unit = first.fixed or second.fixed, math.lcm(first.unit, second.unit)
    second.joined = first


def _same_channels(site: _Site) -> _Channels:
    return site.channels()


def _rearranged(site: _Site) -> _Channels:
    """Flatten and Reshape: numbers keep their order, so a channel, or several, stay one run of the flattened axes."""
    channels = site.channels()
    before, after = site.shape(site.node.input[0]), site.shape(site.node.output[0])
    each = Fraction(after[1], channels.space.channels) if len(after) > 1 else Fraction(0)
    if math.prod(before[1:]) != math.prod(after[1:]) or 1 not in (each.numerator, each.denominator):
        raise site.refused("does not keep the batch first and the channels together; reshape to [batch, features]")
    root = channels.space.root()
    root.unit = math.lcm(root.unit, each.denominator)
    return _Channels(channels.space, each)


def _instance_norm(site: _Site) -> _Channels:
    channels = site.channels()
    entries = site.shape(site.node.input[0])[1]
    for index in (1, 2):
        site.claim_vector(index, channels, entries)
    return channels


def _batch_norm(site: _Site) -> _Channels:
    channels = _instance_norm(site)
    for name in site.node.input[3:5]:
        site.walk.statistics[name.removeprefix("stat:")] = _Claim(channels, owns=True)
    return channels


def _group_norm(site: _Site) -> _Channels:
    """Channels that share mean and variance form one unit, so that those of the others stay as they are when it leaves."""
    channels, count = site.channels(), site.attribute("num_groups", 1)
    space = channels.space.root()
    if channels.each != 1 or space.channels % count:
        raise site.refused("normalises groups that are not whole channels; let num_groups divide the channels, before the dense layers")
    space.unit = math.lcm(space.unit, space.channels // count)
    for index in (1, 2):
        # One number per group until opset 20, one per channel from 21.
        entries = site.weight(index)[1][0]
        site.claim_vector(index, _Channels(space, Fraction(entries, space.channels)), entries)
    return channels


_RULES: dict[str, Callable[[_Site], _Channels | None]] = {
    "Add": _combined,
    "AveragePool": _same_channels,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Div": _combined,
    "Flatten": _rearranged,
    "Gemm": _dense,
    "GlobalAveragePool": _same_channels,
    "GroupNormalization": _group_norm,
    "Identity": _same_channels,
    "InstanceNormalization": _instance_norm,
    "LeakyRelu": _same_channels,
    "MatMul": _dense,
    "MaxPool": _same_channels,
    "Mul": _combined,
    "Relu": _same_channels,
    "Reshape": _rearranged,
    "Sigmoid": _same_channels,
    "Sub": _combined,
    "Tanh": _same_channels,
    "Unsqueeze": _unsqueeze,
}


def walk_of(forward: Forward) -> Walk:
    """The whole walk.

    Raises:
        LocalError: as find_units.
    """
    walk = Walk(forward)
    walk.values["x"] = walk.opened("x", forward.input_shape[1] or 0, fixed=True)
    for node in forward.nodes:
        if not any(name in walk.values or name in walk.views or name in forward.parameters for name in node.input):
            continue  # arithmetic on shapes
        site = _Site(walk, node)
        if node.domain not in ("", "ai.onnx") or node.op_type not in _RULES:
            known = ", ".join(sorted(_RULES))
            raise site.refused(f"has no rule; replace it by supported ops ({known}), or use granularity = 'weight'")
        channels = _RULES[node.op_type](site)
        if channels is not None:
            walk.values[node.output[0]] = channels
    if forward.logits not in walk.values:
        raise LocalError("the model's output does not depend on its input x; export the network from features to logits")
    walk.values[forward.logits].space.root().fixed = True
    for name in forward.parameters:
        if name not in walk.claims:
            raise LocalError(f"the output does not depend on parameter {shortened(name)!r}; remove it from the model")
    return walk


def _groups(walk: Walk) -> list[_Space]:
    return [space for space in walk.spaces if space.joined is None and not space.fixed]


def units_of(walk: Walk) -> Units:
    """What find_units says, of a walk that is at hand."""
    return _as_units(walk, [walk.claims[name] for name in walk.forward.parameters])


def statistics_units(walk: Walk) -> Units:
    """The same for the running statistics, as if they were parameters, in the forward graph's order."""
    return _as_units(walk, [(walk.statistics[name],) for name in walk.forward.statistics])


def _as_units(walk: Walk, claims: Iterable[tuple[_Claim, ...]]) -> Units:
    groups = _groups(walk)

    def axis(claim: _Claim) -> Axis:
        if claim.channels is None or claim.channels.space.root().fixed:
            return Axis()
        space = claim.channels.space.root()
        return Axis(groups.index(space), int(claim.channels.each * space.unit), claim.owns)

    axes = tuple(tuple(axis(claim) for claim in of_one) for of_one in claims)
    return Units(tuple(Group(space.name, space.channels // space.unit) for space in groups), axes)


def left_of(walk: Walk, kept: Kept, value: str, full: int) -> int:
    """What is left of `full` numbers, each for as many channels of a value computed from `x`."""
    space = walk.values[value].space.root()
    return full if space.fixed else full * len(kept[_groups(walk).index(space)]) * space.unit // space.channels
