"""The training programs as a whole: the watch CNN against torch, masks, padding, the written model, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.models import digits_mlp, watch_cnn
from export.programs import build_programs, initial_vector, with_weights
from regrow.errors import LocalError
from regrow.parameters import Layout
from tests.export.running import assert_close, feed_of, model_of, session_of, step

functional = torch.nn.functional
BATCH, RATE = 20, 0.05


def watch_batch(seed: int, size: int = BATCH) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 6, 100)).astype(np.float32), rng.integers(0, 7, size)


def watch_torch(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    h = torch.relu(functional.max_pool1d(functional.conv1d(x, p["conv1.weight"], p["conv1.bias"], padding=4), 2))
    h = torch.relu(functional.max_pool1d(functional.conv1d(h, p["conv2.weight"], p["conv2.bias"], padding=2), 2))
    h = torch.relu(functional.linear(h.flatten(1), p["fc1.weight"], p["fc1.bias"]))
    return functional.linear(h, p["fc2.weight"], p["fc2.bias"])


def torch_step(values: dict[str, Any], x: Any, y: Any) -> tuple[float, dict[str, Any]]:
    """(loss, new parameters) of one SGD step in float64."""
    exact = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in values.items()}
    loss = functional.cross_entropy(watch_torch(torch.tensor(x, dtype=torch.float64), exact), torch.tensor(y))
    loss.backward()
    new = {}
    for name, tensor in exact.items():
        assert tensor.grad is not None
        new[name] = (tensor.detach() - RATE * tensor.grad).numpy()
    return loss.item(), new


def parts(model: onnx.ModelProto) -> tuple[dict[str, bytes], dict[str, Any]]:
    programs = build_programs(model)
    return programs, Layout.from_json(programs["layout"]).unflatten(initial_vector(model))


def new_values(got: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("new:"): np.asarray(value) for name, value in got.items() if name.startswith("new:")}


def test_watch_cnn_has_the_86_807_parameters_of_the_lab() -> None:
    model = watch_cnn(0)
    layout = Layout.from_json(build_programs(model)["layout"])
    assert layout.size == initial_vector(model).size == 86_807
    assert [t.name for t in layout.tensors] == [tensor.name for tensor in model.graph.initializer]
    assert {t.name for t in layout.tensors if t.always_kept} == {"conv1.bias", "conv2.bias", "fc1.bias", "fc2.bias"}


def test_a_seed_gives_one_model_and_another_seed_another() -> None:
    assert np.array_equal(initial_vector(watch_cnn(3)), initial_vector(watch_cnn(3)))
    assert not np.array_equal(initial_vector(watch_cnn(3)), initial_vector(watch_cnn(4)))


def test_20_teacher_forced_steps_of_the_watch_cnn_match_float64() -> None:
    """Each step starts from our own parameters; the first one is the single-step check. Updates are compared, not only values."""
    programs, values = parts(watch_cnn(1))
    session = session_of(programs["train"])
    for number in range(20):
        x, y = watch_batch(number)
        got = step(session, feed_of(x, y, values, RATE))
        loss, exact = torch_step(values, x, y)
        assert float(got["loss"]) == pytest.approx(loss, rel=1e-5)
        new = new_values(got)
        for name, array in exact.items():
            assert_close(new[name], array, f"step {number}, {name}")
            moved = np.linalg.norm(array - values[name])
            rounding = np.finfo(np.float32).eps * np.linalg.norm(array)
            assert np.linalg.norm(new[name] - array) <= 1e-5 * moved + rounding, f"step {number}, update of {name}"
        values = new


def test_pruned_coordinates_do_not_move_at_all_and_the_others_move_as_without_masks() -> None:
    programs, values = parts(watch_cnn(2))
    x, y = watch_batch(2)
    free = new_values(step(session_of(programs["train"]), feed_of(x, y, values, RATE)))
    rng = np.random.default_rng(0)
    masks = {f"mask:{name}": (rng.random(a.shape) < 0.3).astype(np.float32) for name, a in values.items() if a.ndim > 1}
    masked = new_values(step(session_of(programs["train_masked"]), {**feed_of(x, y, values, RATE), **masks}))
    for name, before in values.items():
        mask = masks.get(f"mask:{name}", np.ones(before.shape, np.float32)).astype(bool)
        assert np.array_equal(masked[name][~mask], before[~mask]), name
        assert np.count_nonzero(masked[name][mask] != before[mask]) > 0, name
        assert np.allclose(masked[name][mask], free[name][mask], rtol=1e-6, atol=1e-7), name


def test_padding_of_weight_0_changes_nothing() -> None:
    programs, values = parts(watch_cnn(3))
    session = session_of(programs["train"])
    x, y = watch_batch(3, 13)
    plain = step(session, feed_of(x, y, values, RATE))
    feed = feed_of(np.concatenate([x, np.ones((7, 6, 100), np.float32)]), np.concatenate([y, np.zeros(7, np.int64)]), values, RATE)
    feed["sample_weight"][13:] = 0
    padded = step(session, feed)
    for name, value in plain.items():
        assert np.allclose(padded[name], value, rtol=1e-6, atol=2e-7), name


def test_sample_weights_weigh_the_loss() -> None:
    programs, values = parts(digits_mlp(0))
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4, 64)).astype(np.float32), np.array([1, 2, 3, 4])
    session = session_of(programs["train"])
    single = [float(step(session, feed_of(x[i : i + 1], y[i : i + 1], values))["loss"]) for i in range(4)]
    weights = np.array([1, 2, 0, 5], np.float32)
    together = step(session, feed_of(x, y, values) | {"sample_weight": weights})
    assert float(together["loss"]) == pytest.approx(float(np.average(single, weights=weights)), rel=1e-6)


def test_evaluate_sums_loss_and_hits() -> None:
    programs, values = parts(watch_cnn(4))
    x, y = watch_batch(4, 50)
    got = step(session_of(programs["evaluate"]), {"x": x, "y": y, **values})
    logits = watch_torch(torch.tensor(x, dtype=torch.float64), {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
    assert int(got["correct"]) == int((logits.argmax(1) == torch.tensor(y)).sum())
    assert float(got["loss_sum"]) == pytest.approx(functional.cross_entropy(logits, torch.tensor(y), reduction="sum").item(), rel=1e-5)


def test_the_model_gets_the_trained_weights() -> None:
    model = digits_mlp(0)
    vector = np.random.default_rng(2).normal(size=initial_vector(model).size).astype(np.float32)
    trained = with_weights(model, vector)
    assert np.array_equal(initial_vector(trained), vector)
    assert [node.op_type for node in trained.graph.node] == [node.op_type for node in model.graph.node]
    assert not np.array_equal(initial_vector(model), vector)


def test_programs_are_standard_onnx_and_the_same_every_time() -> None:
    first, second = build_programs(watch_cnn(0)), build_programs(watch_cnn(0))
    assert first == second
    for name in ("train", "train_masked", "evaluate"):
        program = onnx.load_from_string(first[name])
        assert (program.ir_version, [(o.domain, o.version) for o in program.opset_import]) == (9, [("", 18)])
        assert {node.domain for node in program.graph.node} == {""}


def single_layer(weight: np.ndarray[Any, Any], name: str = "w") -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", name], ["logits"])], {name: weight}, [3], 2)


def test_a_parameter_that_is_not_float32_is_refused() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w32"], ["logits"]),
    ]
    with pytest.raises(LocalError, match=r"'w' is float16.*convert the model to float32"):
        build_programs(model_of(nodes, {"w": np.ones((3, 2), np.float16)}, [3], 2))


def test_models_of_another_form_are_refused_with_the_cure() -> None:
    weight = np.ones((3, 2), np.float32)
    fixed = single_layer(weight)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(LocalError, match="dynamic first axis"):
        build_programs(fixed)
    with pytest.raises(LocalError, match=r"'loss' has a name.*rename"):
        build_programs(single_layer(weight, "loss"))
    old = single_layer(weight)
    old.opset_import[0].version = 12
    with pytest.raises(LocalError, match=r"opset 12.*13 to 21"):
        build_programs(old)
    unused = single_layer(weight)
    unused.graph.initializer.append(numpy_helper.from_array(weight, "idle"))
    with pytest.raises(LocalError, match="does not depend on parameter 'idle'"):
        build_programs(unused)
    with pytest.raises(LocalError, match="not finite"):
        initial_vector(single_layer(np.full((3, 2), np.nan, np.float32)))
