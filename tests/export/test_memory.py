"""The arithmetic of what a job takes, by hand; bench/step_memory.py holds it against what really is taken."""

from __future__ import annotations

from onnx import TensorProto, helper

from export.memory import ARENA, CONSTANT_COPIES, MASK_VECTORS, SESSIONS_BYTES, STATE_COPIES, WORKER_VECTORS, _peak, step_memory
from export.models import MODELS
from export.task import programs_of
from regrow.step_memory import StepMemory
from regrow.task import Training


def test_the_most_that_is_alive_at_once() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends))
    assert _peak(model, {"a": 100, "b": 30, "y": 1}) == 130
    assert _peak(model, {"a": 1, "b": 30, "y": 100}) == 130


def test_levels_ascend_and_masks_come_on_top() -> None:
    model = MODELS["digits_mlp"](1)
    programs = programs_of(model, (0.2, 0.5, 1.0))
    memory = step_memory(programs)
    assert StepMemory.from_json(memory.to_json()) == memory
    small, middle, whole = memory.levels
    assert small.fixed < middle.fixed < whole.fixed
    assert small.trained < middle.trained < whole.trained
    n = sum(tensor.dims[0] * (tensor.dims[1] if len(tensor.dims) > 1 else 1) for tensor in model.graph.initializer if tensor.data_type == 1)
    assert whole.fixed >= SESSIONS_BYTES + 4 * n * (WORKER_VECTORS + ARENA)
    (masked,) = step_memory(programs_of(model)).levels
    assert masked.fixed >= whole.fixed + MASK_VECTORS * 4 * n


def test_state_anchor_and_frozen_layers_are_counted() -> None:
    model = MODELS["digits_mlp"](1)

    def fixed(training: Training) -> int:
        (job,) = step_memory(programs_of(model, training=training)).levels
        return job.fixed

    n = 4 * 2410
    plain = fixed(Training())
    assert fixed(Training(optimizer="momentum")) >= plain + STATE_COPIES * n
    assert fixed(Training(optimizer="adam")) >= plain + 2 * STATE_COPIES * n
    assert fixed(Training(proximal_mu=0.1)) >= plain + STATE_COPIES * n
    frozen = 4 * (64 + 1) * 32
    assert SESSIONS_BYTES + 2 * CONSTANT_COPIES * frozen <= fixed(Training(train_last=1)) < plain
