"""Whatever is announced as a model, a device neither raises nor runs what it could not check, and keeps the model that it has."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.fuzz_wire import mutate
from edge_agent.inference import Inference
from edge_agent.model_folder import ModelFolder
from regrow import topics, wire
from regrow.errors import PeerError
from regrow.intake import PIECE, Intake, Try
from regrow.machine import Connected, Received, Save, Subscribe
from regrow.publication import PIECE_BYTES, blob
from tests.edge_agent.promotion_rig import TASK, Rig, linear

GOOD = linear()


# ---- messages ----------------------------------------------------------------------------------------------------------------------


def announced(model: bytes, **more: Any) -> wire.Promotion:
    return wire.Promotion(number=7, run="r1", model=blob("model", model), **more)


def intake(model: bytes) -> tuple[Intake, list[tuple[str, bytes]]]:
    """A device that fetches a model, and what it is sent."""
    machine = Intake("d1", {}, [], {}, local_head=True)
    machine.step(Connected(), 0.0, quiet=True)
    layout, train = b"{}" * 30, b"x" * 100
    promotion = announced(model, head=wire.Head([blob("layout", layout), blob("train", train)], 5, 5, 0.1))
    said = [(topics.promotion(TASK), wire.encode(promotion))]
    for found, data in ((blob("model", model), model), (blob("layout", layout), layout), (blob("train", train), train)):
        said += [(topics.promoted_file(TASK, found.digest, i), bytes(piece)) for i, piece in enumerate(wire.pieces(data, PIECE_BYTES))]
    return machine, said


def test_mutated_messages_never_raise_and_nothing_unchecked_is_kept() -> None:
    rng = random.Random(3)
    for _ in range(30):
        machine, said = intake(bytes(rng.randbytes(3 * PIECE_BYTES + 5)))
        machine.step(Received(*said[0]), 0.0, quiet=True)
        for turn in range(40):
            topic, data = said[turn % len(said)]
            for effect in machine.step(Received(topic, mutate(data, rng)), float(turn), quiet=True):
                assert not isinstance(effect, Try) or effect.promotion.model is None, "it tries a model that nobody made"
                if isinstance(effect, Save) and effect.name.startswith(PIECE):
                    assert effect.name == PIECE + wire.digest(effect.data).hex()


@pytest.mark.parametrize(
    "lie",
    [
        {"size": wire.MAX_MODEL_BYTES + 1},
        {"size": 2**31 - 1},
        {"size": 0},
        {"pieces": []},
        {"pieces": [bytes(16)] * 1000},
        {"size": PIECE_BYTES + 1},
    ],
)
def test_an_announcement_that_lies_about_sizes_is_refused_before_anything_is_fetched(tmp_path: Path, lie: dict[str, Any]) -> None:
    rig = Rig(tmp_path)
    true = blob("model", GOOD)
    rig.announce(wire.Promotion(number=1, run="r1", model=msgspec.structs.replace(true, **lie)))
    said = rig.live()
    assert said is not None
    assert said.outcome == "failed"
    assert rig.delivered == [topics.promotion(TASK)]


def test_pieces_that_do_not_make_the_whole_are_not_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    true = rig.promote(GOOD, 1).model
    assert true is not None
    other = wire.digest(b"another model")
    rig.retained[topics.promoted_file(TASK, other, 0)] = GOOD
    rig.announce(wire.Promotion(number=1, run="r1", model=msgspec.structs.replace(true, digest=other)))
    said = rig.live()
    assert said is not None
    assert said.outcome == "failed"
    assert "do not make the whole" in said.reason
    assert ModelFolder(rig.path, TASK).current() is None


def test_a_flood_of_tasks_is_bounded() -> None:
    machine = Intake("d1", {}, [], {})
    machine.step(Connected(), 0.0, quiet=True)
    asked = 0
    for number in range(100):
        effects = machine.step(Received(topics.promotion(f"t{number}"), wire.encode(announced(GOOD))), 0.0, quiet=True)
        asked += sum(isinstance(effect, Subscribe) for effect in effects)
    assert asked == 1
    assert len(machine._heard) == 8


# ---- models ------------------------------------------------------------------------------------------------------------------------


def proto() -> onnx.ModelProto:
    return onnx.load_from_string(GOOD)


def with_external_data(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../../etc/passwd")


def with_control_flow(model: onnx.ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["scores"], ["out"])], "b", [], [helper.make_tensor_value_info("out", 1, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["scores2"], then_branch=branch, else_branch=branch))


def with_a_function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function("own", "f", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 18)])
    )


def with_a_foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[0].domain = "com.microsoft"


def with_two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 64]))


def with_a_fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def with_two_outputs(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["scores"], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 10]))


def with_whole_numbers_in(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "cast"


def with_infinite_scores(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full(10, np.inf, np.float32), "b"))


def with_one_row_for_all(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = "all"
    model.graph.node.append(helper.make_node("ReduceMax", ["all"], ["scores"], keepdims=1, axes=None))


@pytest.mark.parametrize(
    "twist",
    [
        with_external_data,
        with_control_flow,
        with_a_function,
        with_a_foreign_operator,
        with_two_inputs,
        with_a_fixed_batch,
        with_two_outputs,
        with_whole_numbers_in,
        with_infinite_scores,
        with_one_row_for_all,
    ],
    ids=lambda twist: twist.__name__,
)
def test_a_model_that_no_promotion_of_ours_has_is_refused_and_the_old_one_stays(
    tmp_path: Path, twist: Callable[[onnx.ModelProto], None]
) -> None:
    rig = Rig(tmp_path)
    rig.promote(linear(wrong=3), 1)
    rig.live()
    model = proto()
    twist(model)
    rig.promote(model.SerializeToString(), 2)
    said = rig.live()
    assert said is not None
    assert said.outcome == "failed", said
    assert said.current == wire.digest(linear(wrong=3))


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, GOOD[:-9], b"GIF89a" + bytes(100)])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        Inference(data)


def test_mutated_models_only_ever_raise_peer_errors() -> None:
    rng = random.Random(5)
    for _ in range(150):
        try:
            Inference(mutate(GOOD, rng))
        except PeerError:
            continue


def test_an_int8_model_is_taken(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    rig = Rig(tmp_path / "state")

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        left = iter([{"x": rig.source.validation()[0]}])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / "float.onnx").write_bytes(GOOD)
        whole = Path(aside) / "int8.onnx"
        quantize_static(Path(aside) / "float.onnx", whole, Reader(), QuantFormat.QDQ, weight_type=QuantType.QInt8)
        rig.promote(whole.read_bytes(), 1)
    said = rig.live()
    assert said is not None
    assert said.outcome == "placed", said.reason
    assert said.new is not None
    assert said.new.accuracy > 0.9
