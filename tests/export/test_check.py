"""Checking a model: every reason is named, bytes are what is really sent, and steps are really run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.check import layers_kept, levels_of, notes_of, operators, problems_of, step_costs
from export.forward import read_forward
from export.memory import step_memory
from export.models import MODELS, digits_mlp, watch_cnn
from export.programs import build_programs, initial_vector, layout_of
from export.timing import medians_s
from export.unit_programs import build_unit_programs
from regrow import indexset, values
from regrow.errors import LocalError
from regrow.levels import next_order
from regrow.order import Order, build_order, importance
from regrow.parameters import Layout
from regrow.task import Method, Task
from regrow.units import Units
from tests.export.running import model_of

DENSITIES = (0.1, 0.5, 1.0)
node = helper.make_node


def chain(*ops: onnx.NodeProto, **more: np.ndarray) -> onnx.ModelProto:
    """x -> MatMul -> the ops, from value v0 to v1 and so on -> MatMul."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((8, 8), np.float32), "w2": rng.standard_normal((8, 4), np.float32), **more}
    nodes = [node("MatMul", ["x", "w1"], ["v0"], name="first"), *ops, node("MatMul", [f"v{len(ops)}", "w2"], ["logits"], name="last")]
    model = model_of(nodes, weights, [8], 4)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_speaks_against_the_models_that_come_with_us(name: str) -> None:
    assert problems_of(MODELS[name](1)) == []


def test_every_operator_without_a_rule_is_named_not_only_the_first() -> None:
    model = chain(
        node("Mish", ["v0"], ["v1"], name="a"),
        node("Softsign", ["v1"], ["v2"], name="b"),
        node("Relu", ["v2"], ["v3"], name="fine"),
        node("Mish", ["v3"], ["v4"], name="c"),
    )
    found = problems_of(model)
    assert [(problem.op, problem.node) for problem in found] == [("Mish", "a"), ("Softsign", "b"), ("Mish", "c")]
    for problem in found:
        assert problem.op in problem.message
        assert repr(problem.node) in problem.message
        assert ("use HardSwish" if problem.op == "Mish" else "use Tanh") in problem.message
    assert operators(model) == {"MatMul": 2, "Mish": 2, "Softsign": 1, "Relu": 1}


def test_a_rule_that_refuses_is_named_beside_operators_without_one() -> None:
    pad = node("Pad", ["v1", "pads"], ["v2"], name="pad", mode="edge")
    ops = node("Softsign", ["v0"], ["v1"], name="e"), pad, node("Atan", ["v2"], ["v3"], name="s")
    found = problems_of(chain(*ops, pads=np.zeros(4, np.int64)))
    assert [(problem.op, problem.node) for problem in found] == [("Softsign", "e"), ("Pad", "pad"), ("Atan", "s")]
    assert "pad with a constant" in found[1].message
    assert "replace it" in found[2].message


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


def test_control_flow_is_named_with_what_it_holds_and_nothing_is_said_of_dependence() -> None:
    inner = node(
        "If",
        ["c"],
        ["t"],
        name="inner",
        then_branch=branch("p", node("Mish", ["v0"], ["p"], name="deep")),
        else_branch=branch("q", node("Relu", ["v0"], ["q"])),
    )
    outer = node("If", ["c"], ["v1"], name="outer", then_branch=branch("t", inner), else_branch=branch("e", node("Tanh", ["v0"], ["e"])))
    model = chain(outer, node("Softsign", ["v1"], ["v2"], name="after"), c=np.array(True))
    found = problems_of(model)
    assert [(problem.op, problem.node) for problem in found][:3] == [("If", "outer"), ("If", "inner"), ("Mish", "deep")]
    assert "export one branch" in found[0].message
    assert "inside If 'outer'" in found[1].message
    assert not any("depend" in problem.message for problem in found)
    with pytest.raises(LocalError, match=r"cannot train If \(node 'outer'\)"):
        build_programs(model)


def test_a_name_without_end_is_cut_in_messages() -> None:
    (found,) = problems_of(chain(node("Mish", ["v0"], ["v1"], name="n" * 5000)))
    assert len(found.message) < 400
    assert "nnn..." in found.message


def test_what_may_not_be_meant_is_noted() -> None:
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "held")
    held = node("Constant", [], ["held"], value=weight)
    model = chain(node("MatMul", ["v0", "held"], ["v1"]), node("Relu", ["v1"], ["v2"]))
    assert notes_of(model, "cross_entropy") == []
    model.graph.node.insert(0, held)
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(node("Softmax", ["scores"], ["logits"]))
    softmax, constant = notes_of(model, "cross_entropy")
    assert "without its last Softmax" in softmax
    assert "'held'" in constant
    assert notes_of(model, "mse") == [constant]


def test_a_fixed_batch_is_cured_for_both_exporters() -> None:
    fixed = digits_mlp(1)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    (found,) = problems_of(fixed)
    assert "dynamic_axes" in found.message
    assert "dynamic_shapes" in found.message


def test_foreign_operators_are_named_and_what_only_follows_from_them_is_not() -> None:
    model = chain(node("Gelu", ["v0"], ["v1"], name="fused", domain="com.microsoft"), node("Softsign", ["v1"], ["v2"], name="after"))
    found = problems_of(model)
    assert [(problem.op, problem.node) for problem in found] == [("com.microsoft.Gelu", "fused"), ("Softsign", "after")]
    assert "before it is optimised" in found[0].message


def test_a_model_that_cannot_be_read_says_why_and_names_its_operators_too() -> None:
    model = chain(node("Softsign", ["v0"], ["v1"], name="c"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    found = problems_of(model)
    assert [problem.op for problem in found] == ["Softsign", ""]
    assert "dynamic first axis" in found[1].message
    fixed = digits_mlp(1)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert [problem.op for problem in problems_of(fixed)] == [""]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite")])
def test_weights_that_are_not_numbers_are_a_reason(value: float, said: str) -> None:
    model = digits_mlp(1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((32, 64), value, np.float32), model.graph.initializer[0].name))
    (found,) = problems_of(model)
    assert said in found.message


def test_a_model_without_units_is_refused_where_units_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    twice = {"w": rng.standard_normal((8, 8), np.float32), "o": rng.standard_normal((8, 4), np.float32)}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("MatMul", ["b", "o"], ["logits"])]
    model = model_of(nodes, twice, [8], 4)
    assert problems_of(model) == []
    (found,) = problems_of(model, units=True)
    assert "another node uses too" in found.message


def weight_order(model: onnx.ModelProto) -> Order:
    flat = initial_vector(model)
    return build_order(layout_of(read_forward(model)), importance("w", flat), DENSITIES, 0)


def test_bytes_are_those_of_the_code_that_encodes() -> None:
    model = watch_cnn(1)
    order, flat = weight_order(model), initial_vector(model)
    levels = levels_of(order, flat, DENSITIES)
    assert [level.density for level in levels] == list(DENSITIES)
    assert [level.parameters for level in levels] == list(order.lengths)
    sets = indexset.encode_levels(order)
    for number, level in enumerate(levels):
        assert level.index_bytes == sum(map(len, sets[: number + 1]))
        for dtype in ("float32", "float16", "int8", "int4"):
            assert level.update_bytes[dtype] == values.encoded_size(dtype, level.parameters, order.always_kept)  # type: ignore[arg-type]  # a literal
    assert levels[-1].update_bytes["float32"] == 4 * 86_807


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_what_levels_keep_of_layers_adds_up(granularity: str) -> None:
    model = digits_mlp(1)
    programs = build_programs(model) if granularity == "weight" else build_unit_programs(model, DENSITIES)
    layout = Layout.from_json(programs["layout"])
    units = Units.from_json(programs["units"], layout) if granularity == "unit" else None
    flat = initial_vector(model)
    task = Task(name="t", method=Method(ladder=DENSITIES, granularity=granularity))  # type: ignore[arg-type]  # a parameter of the test
    order = next_order(task, layout, units, importance("w", flat), flat, 0)
    kept = layers_kept(layout, order)
    for level, length in enumerate(order.lengths):
        assert round(sum(kept[tensor.name][level] * tensor.size for tensor in layout.tensors)) == length
    assert all(kept[tensor.name] == [1.0, 1.0, 1.0] for tensor in layout.tensors if tensor.always_kept)


@pytest.mark.parametrize("make", [digits_mlp, watch_cnn])
def test_steps_are_run_for_every_program_batch_and_thread(make: Callable[[int], onnx.ModelProto]) -> None:
    model = make(1)
    programs, flat, order = build_programs(model), initial_vector(model), weight_order(model)
    steps = list(step_costs(programs, order, flat, (1, 20), (1, 2), 2, 2**40))
    assert [(step.program, step.batch) for step in steps] == [("train", 1), ("train_masked", 1), ("train", 20), ("train_masked", 20)]
    (job,) = step_memory(programs).levels
    for step in steps:
        assert step.parameters == flat.size
        assert step.memory_bytes == job.fixed + job.trained * step.batch + job.scored * 256
        assert sorted(step.seconds) == [1, 2]
        assert all(0 < seconds < 60 for seconds in step.seconds.values())


def test_units_have_a_program_for_each_level_and_smaller_ones_take_less() -> None:
    model = watch_cnn(1)
    programs = build_unit_programs(model, DENSITIES)
    layout = Layout.from_json(programs["layout"])
    flat = initial_vector(model)
    task = Task(name="t", method=Method(ladder=DENSITIES, granularity="unit"))
    order = next_order(task, layout, Units.from_json(programs["units"], layout), importance("w", flat), flat, 0)
    steps = list(step_costs(programs, order, flat, (20,), (1,), 2, 2**40))
    assert [step.program for step in steps] == ["train:0", "train:1", "train"]
    assert [step.parameters for step in steps] == list(order.lengths)
    sizes = [step.memory_bytes or 0 for step in steps]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_what_does_not_fit_into_memory_is_not_run_and_says_so() -> None:
    model = digits_mlp(1)
    steps = list(step_costs(build_programs(model), weight_order(model), initial_vector(model), (1, 90_000), (1,), 1, 30_000_000))
    small, large = steps[0], steps[2]
    assert small.seconds
    assert not small.skipped
    assert not large.seconds
    assert "30000000 are free" in large.skipped


def test_no_steps_are_run_when_none_are_wanted() -> None:
    model = digits_mlp(1)
    steps = list(step_costs(build_programs(model), weight_order(model), initial_vector(model), (1,), (1,), 0, 2**40))
    assert [(step.seconds, step.skipped) for step in steps] == [({}, ""), ({}, "")]


def test_medians_take_turns_and_leave_the_first_round_out() -> None:
    calls: list[str] = []
    found = medians_s([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4
    assert len(found) == 2
    calls.clear()
    medians_s([lambda: calls.append("a")], 100, most_s=0.0)
    assert len(calls) == 4, "three rounds and the one before, whatever the time"


def test_half_precision_parameters_are_refused_by_name() -> None:
    model = model_of([node("MatMul", ["x", "w"], ["logits"])], {"w": np.ones((8, 4), np.float16)}, [8], 4)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    (found,) = problems_of(model)
    assert "'w' is float16" in found.message
