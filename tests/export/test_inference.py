"""Inference models: a level's model is the level, every form runs and says nearly the same, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_agent.trainer import Trainer
from export.forward import read_forward
from export.inference import Examples, Request, level_model, write_forms
from export.models import digits_mlp, watch_cnn
from export.programs import build_programs, initial_vector, layout_of, with_weights
from export.quantize import as_float16, as_int8
from export.timing import session_of
from export.units import find_units
from regrow.errors import LocalError
from regrow.levels import only_prefix
from regrow.order import Order, build_order
from regrow.unit_order import build_unit_order, ranks_of

DENSITIES = (0.1, 0.5, 1.0)


def digits(seed: int, rows: int) -> Examples:
    """Ten noisy patterns of 64 numbers."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, rows)
    x = np.random.default_rng(0).random((10, 64), np.float32)[y] + 0.3 * rng.standard_normal((rows, 64), np.float32)
    return Examples(f"digits {seed}", x, y)


@pytest.fixture(scope="module")
def trained() -> onnx.ModelProto:
    """The digits perceptron after 200 steps."""
    model, data = digits_mlp(1), digits(1, 1000)
    batches = [(data.x[start : start + 50], data.y[start : start + 50]) for _ in range(10) for start in range(0, 1000, 50)]
    return with_weights(model, Trainer(build_programs(model)).train(initial_vector(model), None, batches, 0.2).vector)


def logits(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = session_of(model.SerializeToString()).run(None, {"x": x})[0]
    return found


def unit_order(model: onnx.ModelProto, seed: int) -> Order:
    """Units in a random order, so that a level keeps others than the first ones."""
    units = find_units(model)
    layout = layout_of(read_forward(model), units)
    importance = np.random.default_rng(seed).random(layout.size, np.float32)
    return build_unit_order(layout, units, ranks_of("w", layout, units, importance, 0), DENSITIES, 0)


@pytest.mark.parametrize("make", [digits_mlp, watch_cnn])
@pytest.mark.parametrize("level", range(3))
def test_a_level_of_units_is_smaller_and_the_same_function_as_its_zeros(make: Callable[[int], onnx.ModelProto], level: int) -> None:
    model = make(3)
    flat, order = initial_vector(model), unit_order(model, 3)
    units = find_units(model)
    layout = layout_of(read_forward(model), units)
    small = level_model(model, flat, order, level, (layout, units, DENSITIES))
    zeros = with_weights(model, only_prefix(order, flat, order.lengths[level]))
    shape = [int(size or 0) for size in read_forward(model).input_shape[1:]]
    x = np.random.default_rng(4).standard_normal((5, *shape), np.float32)
    np.testing.assert_allclose(logits(small, x), logits(zeros, x), rtol=1e-4, atol=1e-5)
    assert sum(array.size for array in read_forward(small).parameters.values()) == order.lengths[level]


def test_a_level_of_weights_is_zero_where_it_has_nothing() -> None:
    model = digits_mlp(2)
    flat = initial_vector(model) + np.float32(1)  # no weight of its own is 0
    order = build_order(layout_of(read_forward(model)), np.abs(flat), DENSITIES, 0)
    for level, length in enumerate(order.lengths):
        made = initial_vector(level_model(model, flat, order, level, None))
        assert set(np.flatnonzero(made).tolist()) == set(order.coordinates[:length].tolist())
        np.testing.assert_array_equal(made[made != 0], flat[np.sort(order.coordinates[:length])])


@pytest.mark.parametrize("file_format", ["onnx", "ort"])
def test_every_form_runs_and_says_nearly_the_same(trained: onnx.ModelProto, tmp_path: Path, file_format: str) -> None:
    held_out = digits(2, 500)
    request = Request(("none", "int8", "fp16"), file_format, held_out, digits(3, 600))  # type: ignore[arg-type]  # a parameter of the test
    plain, int8, fp16 = write_forms(trained, tmp_path / "global", 1.0, request, {"regrow.run": "one"})
    assert plain.score is not None
    assert plain.score > 0.9
    assert plain.score == float((logits(trained, held_out.x).argmax(axis=1) == held_out.y).mean())
    for row in (int8, fp16):
        assert row.score is not None
        assert row.drop == plain.score - row.score
        assert abs(row.drop) <= 0.02
        assert row.size_bytes < plain.size_bytes
    assert plain.drop == 0
    assert {(row.parameters, row.opset, row.ir_version) for row in (plain, int8, fp16)} == {(2410, 18, 9)}
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(row.file for row in (plain, int8, fp16))
    for row in (plain, int8, fp16):
        assert row.size_bytes == (tmp_path / row.file).stat().st_size
    if file_format == "onnx":
        for row in (plain, int8, fp16):
            model = onnx.load(tmp_path / row.file)
            onnx.checker.check_model(model, full_check=True)
            assert {entry.key: entry.value for entry in model.metadata_props}["regrow.run"] == "one"


def test_calibration_data_unlike_the_models_costs_accuracy_and_the_drop_says_so(trained: onnx.ModelProto, tmp_path: Path) -> None:
    held_out, device = digits(2, 500), digits(3, 600)
    faint = Examples("faint", np.float32(0.02) * device.x, device.y)
    (good,) = write_forms(trained, tmp_path / "good", 1.0, Request(("int8",), "onnx", held_out, device))
    (bad,) = write_forms(trained, tmp_path / "bad", 1.0, Request(("int8",), "onnx", held_out, faint))
    assert good.score is not None
    assert bad.score is not None
    assert bad.drop is not None
    assert bad.drop > 0.2
    assert bad.score < good.score - 0.2


def test_int8_is_int8_per_channel_and_fp16_is_fp16(trained: onnx.ModelProto) -> None:
    small = as_int8(trained, digits(3, 100).x)
    sizes = {tensor.name: tensor for tensor in small.graph.initializer}
    weights = [tensor for tensor in sizes.values() if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2]
    assert sorted(tuple(tensor.dims) for tensor in weights) == [(10, 32), (32, 64)]
    scales = [tuple(tensor.dims) for name, tensor in sizes.items() if "weight" in name and name.endswith("scale")]
    assert sorted(scales) == [(10,), (32,)]
    assert {entry.domain for entry in small.opset_import} == {""}
    half = as_float16(trained)
    assert all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in half.graph.initializer)
    ends = [*half.graph.input, *half.graph.output]
    assert all(end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for end in ends)


def test_zeros_stay_zeros_in_int8(trained: onnx.ModelProto) -> None:
    order = build_order(layout_of(read_forward(trained)), np.abs(initial_vector(trained)), DENSITIES, 0)
    part = level_model(trained, initial_vector(trained), order, 0, None)
    small = as_int8(part, digits(3, 100).x)
    zeros = sum(int((array == 0).sum()) for array in read_forward(part).parameters.values())
    int8 = [onnx.numpy_helper.to_array(tensor) for tensor in small.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(int((array == 0).sum()) for array in int8 if array.ndim == 2) >= zeros


def test_a_cnn_in_every_form(tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((64, 6, 100), np.float32)
    data = Examples("windows", x, np.zeros(64, np.int64))
    rows = write_forms(watch_cnn(1), tmp_path / "cnn", 1.0, Request(("none", "int8", "fp16"), "onnx", data, data))
    assert [row.file for row in rows] == ["cnn.onnx", "cnn.int8.onnx", "cnn.fp16.onnx"]
    wanted = logits(watch_cnn(1), x)
    for row, off in zip(rows, (1e-6, 0.2, 0.01), strict=True):
        found = logits(onnx.load(tmp_path / row.file), x)
        assert float(np.abs(found - wanted).max()) <= off * float(np.abs(wanted).max())


def test_data_that_does_not_fit_is_refused(trained: onnx.ModelProto, tmp_path: Path) -> None:
    good = digits(1, 20)
    wide = Examples("wide.npz", np.zeros((20, 65), np.float32), good.y)
    whole = Examples("whole.npz", good.x.astype(np.int64), good.y)
    label = Examples("label.npz", good.x, good.y + 1)
    for held_out, said in (
        (wide, r"wide.npz: an example is float32 \[65\]"),
        (whole, "whole.npz: an example is int64"),
        (label, "0 to 9"),
    ):
        with pytest.raises(LocalError, match=said):
            write_forms(trained, tmp_path / "m", 1.0, Request(held_out=held_out))
    with pytest.raises(LocalError, match=r"wide.npz: an example is float32 \[65\]"):
        write_forms(trained, tmp_path / "m", 1.0, Request(("int8",), calibration=wide))
    with pytest.raises(LocalError, match="--calibrate"):
        write_forms(trained, tmp_path / "m", 1.0, Request(("int8",)))
    assert not list(tmp_path.iterdir())
    assert write_forms(trained, tmp_path / "m", 1.0, Request(("int8",), calibration=label))[0].score is None  # labels are not looked at


def test_a_model_that_gives_no_numbers_is_refused(trained: onnx.ModelProto, tmp_path: Path) -> None:
    flat = initial_vector(trained)
    with pytest.raises(LocalError, match="is not finite"):
        write_forms(with_weights(trained, np.full_like(flat, np.inf)), tmp_path / "m", 1.0, Request())
