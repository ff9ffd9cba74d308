"""Units and slices: the smaller model computes and learns exactly what the full one does with everything else at zero."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from export.forward import read_forward
from export.programs import build_programs, initial_vector, layout_of
from export.slicing import sliced_model
from export.units import find_units
from regrow.errors import LocalError, PeerError
from regrow.parameters import Layout, Tensor
from regrow.units import (
    Axis,
    Group,
    Kept,
    Units,
    gather,
    kept_count,
    scatter,
    sliced_layout,
    unit_coordinates,
    unit_importance,
    width_for_density,
    width_sizes,
    width_units,
)
from tests.export.running import feed_of, model_of, session_of, step
from tests.export.unit_models import (
    MODELS,
    TRAINABLE,
    node,
    parts,
    random,
)

RATE = 0.05


@cache
def full_step(name: str) -> Any:
    return session_of(build_programs(parts(name)[0])["train_masked"])


@st.composite
def chosen(draw: st.DrawFn, units: Units) -> dict[int, NDArray[np.int64]]:
    """Any units of every group, at least one."""
    sets = [draw(st.sets(st.integers(0, group.size - 1), min_size=1)) for group in units.groups]
    return {index: np.array(sorted(units_kept), np.int64) for index, units_kept in enumerate(sets)}


def draw_case(data: st.DataObject, name: str) -> tuple[Kept, NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """(kept, vector [n], x, y) with every parameter non-zero, biases too."""
    model, layout, units = parts(name)
    kept = data.draw(chosen(units))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    forward = read_forward(model)
    vector = rng.normal(0, 0.3, layout.size).astype(np.float32)
    x = rng.normal(size=(5, *(size or 0 for size in forward.input_shape[1:]))).astype(np.float32)
    return kept, vector, x, rng.integers(0, forward.classes, 5)


def with_weights(model: onnx.ModelProto, tensors: dict[str, NDArray[np.float32]]) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return bytes(copy.SerializeToString())


def inside_only(layout: Layout, units: Units, kept: Kept, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    zeroed = np.zeros_like(vector)
    coordinates = unit_coordinates(layout, units, kept)
    zeroed[coordinates] = vector[coordinates]
    return zeroed


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12)
@given(data=st.data())
def test_the_slice_computes_what_the_full_model_does_with_everything_else_zero(name: str, data: st.DataObject) -> None:
    model, layout, units = parts(name)
    kept, vector, x, _ = draw_case(data, name)
    full = with_weights(model, layout.unflatten(inside_only(layout, units, kept, vector)))
    small = with_weights(sliced_model(model, units, kept), gather(layout, units, kept, vector))
    expected, got = (step(session_of(program), {"x": x})["logits"] for program in (full, small))
    assert np.linalg.norm(expected) > 0
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", TRAINABLE)
@settings(max_examples=8)
@given(data=st.data())
def test_a_step_of_the_slice_is_the_masked_step_of_the_full_model(name: str, data: st.DataObject) -> None:
    """The masks are the sub-model's coordinates. Biases have no mask: those of dropped units stay still because nothing reads the unit."""
    model, layout, units = parts(name)
    kept, vector, x, y = draw_case(data, name)
    coordinates = unit_coordinates(layout, units, kept)
    before = inside_only(layout, units, kept, vector)
    inside = np.zeros(layout.size, np.float32)
    inside[coordinates] = 1
    masks = {f"mask:{t.name}": layout.unflatten(inside)[t.name] for t in layout.tensors if not t.always_kept}
    full = step(full_step(name), {**feed_of(x, y, layout.unflatten(before), RATE), **masks})
    after = layout.flatten({t.name: full[f"new:{t.name}"] for t in layout.tensors})
    outside = inside == 0
    assert np.array_equal(after[outside], before[outside])

    small_layout = sliced_layout(layout, units, kept)
    session = session_of(build_programs(sliced_model(model, units, kept))["train"])
    small = step(session, feed_of(x, y, gather(layout, units, kept, vector), RATE))
    trained = vector.copy()
    scatter(layout, units, kept, {t.name: small[f"new:{t.name}"] for t in small_layout.tensors}, trained)
    assert np.array_equal(trained[outside], vector[outside])
    assert float(small["loss"]) == pytest.approx(float(full["loss"]), rel=1e-5)
    update, expected = trained[coordinates] - vector[coordinates], after[coordinates] - before[coordinates]
    assert np.linalg.norm(expected) > 0
    assert np.linalg.norm(update - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-7 * np.linalg.norm(before)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20)
@given(data=st.data())
def test_gather_and_scatter_are_inverse_and_speak_of_unit_coordinates(name: str, data: st.DataObject) -> None:
    _, layout, units = parts(name)
    kept = data.draw(chosen(units))
    coordinates = unit_coordinates(layout, units, kept)
    assert coordinates.dtype == np.uint32
    assert (coordinates[1:] > coordinates[:-1]).all()
    vector = np.arange(layout.size, dtype=np.float32)
    tensors = gather(layout, units, kept, vector)
    small = sliced_layout(layout, units, kept)
    assert np.array_equal(small.flatten(tensors), vector[coordinates])
    assert small.size == coordinates.size == kept_count(layout, units, [len(kept[group]) for group in range(len(units.groups))])
    target = np.full(layout.size, -1, np.float32)
    scatter(layout, units, kept, tensors, target)
    assert np.array_equal(target[coordinates], vector[coordinates])
    assert np.count_nonzero(target == -1) == layout.size - coordinates.size


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_belongs_when_the_units_of_all_its_axes_are_kept(name: str) -> None:
    """Against the definition, entry by entry."""
    _, layout, units = parts(name)
    rng = np.random.default_rng(0)
    kept = {i: np.sort(rng.choice(g.size, max(1, g.size // 2), replace=False)) for i, g in enumerate(units.groups)}
    inside = np.zeros(layout.size, np.bool_)
    inside[unit_coordinates(layout, units, kept)] = True
    for tensor, axes in zip(layout.tensors, units.axes, strict=True):
        belongs = inside[layout.slices[tensor.name]].reshape(tensor.shape)
        expected = np.zeros(tensor.shape, np.bool_)
        whole = [
            np.flatnonzero(np.isin(np.arange(dim) // axis.block, kept[axis.group])) if axis.group is not None else np.arange(dim)
            for dim, axis in zip(tensor.shape, axes, strict=True)
        ]
        expected[np.ix_(*whole)] = True
        assert np.array_equal(belongs, expected), tensor.name


@pytest.mark.parametrize("name", MODELS)
def test_one_program_serves_every_choice_of_as_many_units(name: str) -> None:
    model, layout, units = parts(name)
    first, rolled = width_units(units, 0.5), width_units(units, 0.5, shift=3)
    small, other = sliced_model(model, units, first), sliced_model(model, units, rolled)
    assert layout_of(read_forward(small)) == sliced_layout(layout, units, first) == layout_of(read_forward(other))
    assert np.array_equal(initial_vector(other), initial_vector(model)[unit_coordinates(layout, units, rolled)])
    assert not np.array_equal(initial_vector(small), initial_vector(other))
    if name in TRAINABLE:
        assert build_programs(small) == build_programs(other)
    whole = sliced_model(model, units, width_units(units, 1.0))
    assert layout_of(read_forward(whole)) == layout
    assert np.array_equal(initial_vector(whole), initial_vector(model))


def test_the_groups_of_the_watch_cnn() -> None:
    _, layout, units = parts("watch")
    assert units.groups == (Group("conv1.weight", 32), Group("conv2.weight", 48), Group("fc1.weight", 64))
    named = dict(zip([tensor.name for tensor in layout.tensors], units.axes, strict=True))
    assert named["conv2.weight"] == (Axis(1, owns=True), Axis(0), Axis())
    assert named["fc1.weight"] == (Axis(2, owns=True), Axis(1, block=25))
    assert named["fc2.weight"] == (Axis(), Axis(2))
    assert named["fc2.bias"] == (Axis(),)


def test_residual_sums_couple_their_branches() -> None:
    _, layout, units = parts("residual")
    assert units.groups == (Group("conv1.weight", 6), Group("conv3.weight", 5))
    named = dict(zip([tensor.name for tensor in layout.tensors], units.axes, strict=True))
    assert named["conv2.weight"] == (Axis(0, owns=True), Axis(0), Axis(), Axis())
    assert named["skip.weight"] == (Axis(1, owns=True), Axis(0), Axis(), Axis())
    assert named["fc.weight"] == (Axis(1), Axis())


def test_a_branch_that_meets_the_input_or_the_logits_is_never_sliced() -> None:
    weights = {"conv": random(3, 3, 1), "fc1": random(12, 5), "fc2": random(5, 5)}
    nodes = [
        node("Conv", ["x", "conv"], ["a"]),
        node("Add", ["a", "x"], ["b"]),
        node("Flatten", ["b"], ["c"]),
        node("MatMul", ["c", "fc1"], ["d"]),
        node("Relu", ["d"], ["e"]),
        node("MatMul", ["e", "fc2"], ["f"]),
        node("Add", ["f", "d"], ["logits"]),
    ]
    model = model_of(nodes, weights, [3, 4], 5)
    units = find_units(model)
    layout = layout_of(read_forward(model))
    assert units.groups == ()
    assert width_for_density(layout, units, 0.1) == 1.0
    assert np.array_equal(unit_coordinates(layout, units, {}), np.arange(layout.size))
    assert layout_of(read_forward(sliced_model(model, units, {}))) == layout


def test_channels_that_are_normalised_together_are_one_unit() -> None:
    _, layout, units = parts("normalised")
    assert units.groups == (Group("conv1", 6), Group("conv3", 4))
    named = dict(zip([tensor.name for tensor in layout.tensors], units.axes, strict=True))
    assert named["conv2"] == (Axis(0, 2, owns=True), Axis(0, 2), Axis(), Axis())
    assert named["gain"] == named["shift"] == named["instance.scale"] == (Axis(0, 2, owns=True),)
    assert named["grouped.scale"] == (Axis(1, 1, owns=True),)
    model, _, units = parts("group norm")
    assert units.axes[:4] == ((Axis(0, 2, owns=True), Axis(), Axis()), *[(Axis(0, 2, owns=True),)] * 2, (Axis(0, 6), Axis()))
    small = sliced_model(model, units, width_units(units, 0.5))
    assert [a.i for n in small.graph.node for a in n.attribute if a.name == "num_groups"] == [3]


def test_widths_round_up_and_rolling_windows_wrap() -> None:
    units = Units((Group("a", 10), Group("b", 3)), ((Axis(0), Axis(1)),))
    assert {k: v.tolist() for k, v in width_units(units, 0.25).items()} == {0: [0, 1, 2], 1: [0]}
    assert {k: v.tolist() for k, v in width_units(units, 0.25, shift=8).items()} == {0: [0, 8, 9], 1: [2]}
    assert {k: v.tolist() for k, v in width_units(units, 0.4, shift=19).items()} == {0: [0, 1, 2, 9], 1: [1, 2]}
    for shift in range(30):
        assert np.bincount(np.concatenate([width_units(units, 0.3, shift + i)[0] for i in range(10)])).tolist() == [3] * 10
    for size in range(1, 400):
        group = Units((Group("a", size),), ((Axis(0),),))
        assert [width_sizes(group, count / size) for count in range(1, size + 1)] == [(count,) for count in range(1, size + 1)]


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2).map(sorted))
def test_narrow_widths_lie_inside_wide_ones(widths: list[float]) -> None:
    _, layout, units = parts("residual")
    narrow, wide = (unit_coordinates(layout, units, width_units(units, width)) for width in widths)
    assert np.isin(narrow, wide).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_width_of_a_density_is_the_nearest_that_exists(name: str) -> None:
    _, layout, units = parts(name)
    realisable = sorted({k / group.size for group in units.groups for k in range(1, group.size + 1)})
    counts = [kept_count(layout, units, width_sizes(units, width)) for width in realisable]
    for density in (0.001, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.999, 1.0):
        misses = [abs(count - density * layout.size) for count in counts]
        assert width_for_density(layout, units, density) == realisable[misses.index(min(misses))]


def test_the_importance_of_a_unit_is_that_of_what_it_owns() -> None:
    layout = Layout((Tensor("w1", (2, 2)), Tensor("b1", (2,), True), Tensor("each", (4,)), Tensor("w2", (1, 4))))
    units = Units((Group("w1", 2),), ((Axis(0, owns=True), Axis()), (Axis(0, owns=True),), (Axis(0, 2, True),), (Axis(), Axis(0, 2))))
    importance = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 9, 9, 9, 9], np.float32)
    (units_importance,) = unit_importance(layout, units, importance)
    assert units_importance.dtype == np.float32
    assert units_importance.tolist() == [1 + 2 + 16 + 64 + 128, 4 + 8 + 32 + 256 + 512]


@pytest.mark.parametrize("name", MODELS)
def test_units_travel_as_json(name: str) -> None:
    _, layout, units = parts(name)
    assert Units.from_json(units.to_json(), layout) == units


MALFORMED = [
    b"",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b" " * 2_000_000,
    b'{"groups":[],"axes":[]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true],[null,1,false]]],"more":1}',
    b'{"groups":[{"name":"a","size":0}],"axes":[[[0,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":3}],"axes":[[[0,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":9000000000000000000}],"axes":[[[0,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"","size":2}],"axes":[[[0,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[1,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[-1,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,0,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true],[null,3,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true],[null,1,true]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true],[null,1,false]],[[0,1,true]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[null,1,false],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2.5}],"axes":[[[0,1,true],[null,1,false]]]}',
    b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1],[null,1,false]]]}',
]


def test_malformed_json_is_the_peers_fault() -> None:
    layout = Layout((Tensor("w", (2, 3)),))
    good = b'{"groups":[{"name":"a","size":2}],"axes":[[[0,1,true],[null,1,false]]]}'
    assert Units.from_json(good, layout).to_json() == good
    for data in MALFORMED:
        with pytest.raises(PeerError, match="units: "):
            Units.from_json(data, layout)
    for cut, byte in itertools.product(range(len(good)), b'0"]'):
        damaged = good[:cut] + bytes([byte]) + good[cut + 1 :]
        try:
            Units.from_json(damaged, layout)
        except PeerError:
            continue


def refusal(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], shape: list[int], classes: int = 2) -> str:
    with pytest.raises(LocalError) as caught:
        find_units(model_of(nodes, weights, shape, classes))
    return str(caught.value)


def test_what_cannot_be_sliced_is_refused_with_op_node_and_cure() -> None:
    head = [node("Flatten", ["h"], ["flat"]), node("MatMul", ["flat", "fc"], ["logits"])]
    grouped = refusal([node("Conv", ["x", "c"], ["h"], name="dw", group=4), *head], {"c": random(4, 1, 1), "fc": random(12, 2)}, [4, 3])
    assert "Conv (node 'dw', output 'h')" in grouped
    assert "use group = 1" in grouped
    batch = {"p": random(4, 3), "fc": random(12, 2)}
    unknown = refusal([node("Add", ["x", "p"], ["a"]), node("LRN", ["a"], ["h"], name="lrn", size=3), *head], batch, [4, 3])
    assert "LRN (node 'lrn'" in unknown
    assert "granularity = 'weight'" in unknown
    spread = refusal([node("Add", ["x", "s"], ["h"]), *head], {"s": random(3), "fc": random(12, 2)}, [4, 3])
    assert "parameter 's' of shape [3]" in spread
    assert "every channel its own number" in spread
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["logits"])]
    assert "give each its own copy" in refusal(nodes, {"w": random(2, 2)}, [2])
    pooled = [node("GlobalAveragePool", ["x"], ["a"]), node("Mul", ["x", "a"], ["h"]), *head]
    assert "give both the same shape" in refusal(pooled, {"fc": random(12, 2)}, [4, 3])
    computed = [node("Relu", ["w"], ["v"]), node("MatMul", ["x", "v"], ["logits"])]
    assert "compute weights outside the model" in refusal(computed, {"w": random(2, 2)}, [2])
    dense = [node("MatMul", ["x", "w"], ["a"]), node("GlobalAveragePool", ["a"], ["b"]), node("Flatten", ["b"], ["logits"])]
    assert "flatten the features first" in refusal(dense, {"w": random(3, 5)}, [2, 3])
    mixed = [node("Reshape", ["x", "to"], ["a"]), node("Conv", ["a", "c"], ["h"]), *head]
    weights = {"to": np.array([-1, 6, 2]), "c": random(3, 6, 1), "fc": random(6, 2)}
    assert "reshape to [batch, features]" in refusal(mixed, weights, [4, 3])
    idle = [node("MatMul", ["x", "w"], ["logits"])]
    assert "does not depend on parameter 'idle'" in refusal(idle, {"w": random(2, 2), "idle": random(2)}, [2])


def test_wrong_arguments_are_refused() -> None:
    model, layout, units = parts("digits")
    first = width_units(units, 0.5)
    for kept, words in [
        ({}, "needs each of 0 .. 0"),
        ({0: first[0], 1: first[0]}, "needs each of 0 .. 0"),
        ({0: np.array([], np.int64)}, "at least 1"),
        ({0: np.array([1, 0])}, "ascending"),
        ({0: np.array([1, 1])}, "ascending"),
        ({0: np.array([0, 32])}, "below 32"),
        ({0: np.array([-1, 2])}, "below 32"),
        ({0: np.array([0], np.int32)}, "int64"),
    ]:
        with pytest.raises(LocalError, match=words):
            unit_coordinates(layout, units, kept)
        with pytest.raises(LocalError, match=words):
            sliced_model(model, units, kept)
    with pytest.raises(LocalError, match="find_units"):
        sliced_model(model, parts("residual")[2], first)
    with pytest.raises(LocalError, match="the layout has 8"):
        unit_coordinates(parts("watch")[1], units, first)
    with pytest.raises(LocalError, match="do not fill"):
        Units((Group("a", 3),), ((Axis(0),),)).check(Layout((Tensor("a", (4,)),)))
    with pytest.raises(LocalError, match="gather: float64"):
        gather(layout, units, first, np.zeros(layout.size))  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(LocalError, match=r"fc1.weight.*\(32, 64\)"):
        scatter(layout, units, first, layout.unflatten(initial_vector(model)), initial_vector(model))
    with pytest.raises(LocalError, match="width 0 is not in"):
        width_units(units, 0)
    with pytest.raises(LocalError, match="shift -1"):
        width_units(units, 1, -1)
    with pytest.raises(LocalError, match=r"density 1\.5"):
        width_for_density(layout, units, 1.5)
    for sizes in ([0], [33], [1, 1]):
        with pytest.raises(LocalError, match="kept sizes"):
            kept_count(layout, units, sizes)
