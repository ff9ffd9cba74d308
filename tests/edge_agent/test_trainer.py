"""The device's trainer on programs of the exporter: results, arguments that do not fit, and bytes that must not be run."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_agent.trainer import Trainer
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from regrow.errors import LocalError, PeerError
from regrow.task import Training

MODEL = digits_mlp(0)
PROGRAMS = build_programs(MODEL)
VECTOR = initial_vector(MODEL)


def examples(count: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Separable: the label is the strongest of the first ten features."""
    x = np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)
    return x, x[:, :10].argmax(1)


def test_training_learns_and_evaluation_says_so() -> None:
    trainer = Trainer(PROGRAMS)
    x, y = examples(200)
    before = trainer.evaluate(VECTOR, x, y)
    start = VECTOR.copy()
    result = trainer.train(VECTOR, None, [(x[i : i + 20], y[i : i + 20]) for i in range(0, 200, 20)] * 20, 0.2)
    after = trainer.evaluate(result.vector, x, y, batch=64)
    assert np.array_equal(VECTOR, start)
    assert (result.steps, result.examples, after.examples) == (200, 4000, 200)
    assert after.accuracy > 0.9 > before.accuracy
    assert after.loss < result.loss < before.loss
    assert after.loss == pytest.approx(trainer.evaluate(result.vector, x, y, batch=200).loss, rel=1e-5)


def test_coordinates_outside_the_sub_model_keep_their_value_exactly() -> None:
    trainer = Trainer(PROGRAMS)
    kept = np.random.default_rng(1).random(trainer.layout.size) < 0.3
    kept[trainer.layout.always_kept_coordinates] = True
    result = trainer.train(VECTOR, kept, [examples(20, seed) for seed in range(5)], 0.1)
    assert np.array_equal(result.vector[~kept], VECTOR[~kept])
    assert np.mean(result.vector[kept] != VECTOR[kept]) > 0.9


def test_a_short_last_batch_counts_its_own_examples_only() -> None:
    long, short = examples(20, 1), examples(7, 2)
    together = Trainer(PROGRAMS).train(VECTOR, None, [long, short], 0.1)
    first = Trainer(PROGRAMS).train(VECTOR, None, [long], 0.1)
    second = Trainer(PROGRAMS).train(first.vector, None, [short], 0.1)  # alone, so without padding
    assert together.examples == 27
    assert np.allclose(together.vector, second.vector, rtol=1e-6, atol=1e-7)
    assert together.loss == pytest.approx((20 * first.loss + 7 * second.loss) / 27, rel=1e-6)


def test_divergence_is_returned_and_not_hidden() -> None:
    result = Trainer(PROGRAMS).train(VECTOR, None, [examples(20, seed) for seed in range(8)], 1e30)
    assert not np.isfinite(result.vector).all()


X, Y = examples(4)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.astype(np.float64), Y, r"x: expected float32 \[batch, 64\], got float64 \[4, 64\]"),
        (X[:, :63], Y, r"x: expected float32 \[batch, 64\], got float32 \[4, 63\]"),
        (X[:0], Y[:0], "at least one example"),
        (X, Y.astype(np.int32), r"y: expected int64 \[4\].*got int32 \[4\]"),
        (X, Y[:3], r"y: expected int64 \[4\].*got int64 \[3\]"),
        (X, Y - 10, r"row 0 .*label -?\d+, but the task.s labels are 0 to 9"),
        (X, Y + 10, r"row 0 .*label -?\d+, but the task.s labels are 0 to 9"),
    ],
)
def test_data_that_does_not_fit_is_our_fault(x: Any, y: Any, message: str) -> None:
    trainer = Trainer(PROGRAMS)
    with pytest.raises(LocalError, match=message):
        trainer.train(VECTOR, None, [(x, y)], 0.1)
    with pytest.raises(LocalError, match=message):
        trainer.evaluate(VECTOR, x, y)


def test_other_arguments_that_do_not_fit_are_our_fault() -> None:
    trainer = Trainer(PROGRAMS)
    with pytest.raises(LocalError, match="vector: expected float32"):
        trainer.train(VECTOR[:-1], None, [(X, Y)], 0.1)
    with pytest.raises(LocalError, match="kept: expected bool"):
        trainer.train(VECTOR, np.ones(3, bool), [(X, Y)], 0.1)
    with pytest.raises(LocalError, match="belong to every sub-model"):
        trainer.train(VECTOR, np.zeros(VECTOR.size, bool), [(X, Y)], 0.1)
    with pytest.raises(LocalError, match="no batches"):
        trainer.train(VECTOR, None, [], 0.1)
    with pytest.raises(LocalError, match="no program 'train'"):
        Trainer({"layout": PROGRAMS["layout"]}).train(VECTOR, None, [(X, Y)], 0.1)
    with pytest.raises(LocalError, match="threads"):
        Trainer(PROGRAMS, threads=0)


def train_with(program: bytes) -> None:
    Trainer(PROGRAMS | {"train": program}).train(VECTOR, None, [(X, Y)], 0.1)


def test_a_program_that_points_to_a_file_is_refused_before_onnxruntime_sees_it() -> None:
    program = onnx.load_from_string(PROGRAMS["train"])
    tensor = program.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    with pytest.raises(PeerError, match="another file"):
        train_with(program.SerializeToString())
    del tensor.external_data[:]
    with pytest.raises(PeerError, match="another file"):
        train_with(program.SerializeToString())
    hidden = onnx.load_from_string(PROGRAMS["train"])
    hidden.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=tensor))
    with pytest.raises(PeerError, match="another file"):
        train_with(hidden.SerializeToString())


def test_control_flow_functions_and_foreign_operators_are_refused() -> None:
    loop = onnx.load_from_string(PROGRAMS["train"])
    loop.graph.node.append(helper.make_node("If", ["c"], ["r"], then_branch=loop.graph, else_branch=loop.graph))
    with pytest.raises(PeerError, match="a subgraph"):
        train_with(loop.SerializeToString())
    foreign = onnx.load_from_string(PROGRAMS["train"])
    foreign.graph.node.append(helper.make_node("EPContext", [], ["r"], domain="com.microsoft"))
    with pytest.raises(PeerError, match=r"outside ai\.onnx"):
        train_with(foreign.SerializeToString())
    function = onnx.load_from_string(PROGRAMS["train"])
    function.functions.add(name="f")
    with pytest.raises(PeerError, match="functions"):
        train_with(function.SerializeToString())


def test_a_program_of_another_model_is_refused() -> None:
    with pytest.raises(PeerError, match="the layout needs"):
        train_with(PROGRAMS["evaluate"])
    with pytest.raises(PeerError, match="layout"):
        Trainer(PROGRAMS | {"layout": b"{}"})


def told(program: bytes, said: str) -> bytes:
    """The program with this as its step."""
    changed = onnx.load_from_string(program)
    kept = [entry for entry in changed.metadata_props if entry.key != "regrow.step"]
    del changed.metadata_props[:]
    changed.metadata_props.extend(kept)
    changed.metadata_props.add(key="regrow.step", value=said)
    return changed.SerializeToString()


ADAM = build_programs(MODEL, training=Training(loss="mse", optimizer="adam", proximal_mu=0.1))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"loss":"mse","optimizer":"adamw","proximal_mu":0.2}', None),  # has the same inputs and outputs, and does what it does
        ("{", "metadata regrow.step: "),
        ('{"loss":"mae"}', "metadata regrow.step: "),
        ('{"loss":"mse","momentum":0.5}', "momentum at"),
        ("{}", "the layout needs|is tensor"),
        ('{"loss":"mse"}', "the layout needs"),
        ('{"loss":"mse","optimizer":"momentum","proximal_mu":0.1}', "the layout needs"),
        ('{"loss":"mse","optimizer":"adam"}', "the layout needs"),
        ('{"loss":"mse","target":"input","optimizer":"adam","proximal_mu":0.1}', "the layout needs"),
        ('{"optimizer":"adam","proximal_mu":0.1}', "the layout needs|is tensor"),
    ],
)
def test_a_program_that_is_not_what_it_says_is_refused(said: str, message: str | None) -> None:
    trainer = Trainer(ADAM | {"train": told(ADAM["train"], said)})
    y = np.ones((4, 10), np.float32)
    if message is None:
        assert np.isfinite(trainer.train(VECTOR, None, [(X, y)], 0.1).vector).all()
        return
    with pytest.raises(PeerError, match=message):
        trainer.train(VECTOR, None, [(X, y)], 0.1)


def test_a_loss_that_is_no_number_is_refused() -> None:
    changed = onnx.load_from_string(PROGRAMS["train"])
    last = next(node for node in changed.graph.node if node.output[0] == "loss")
    last.output[0] = "inner"
    changed.graph.node.append(helper.make_node("Shape", ["new:fc1.weight"], ["loss"]))
    changed.graph.output[0].CopyFrom(helper.make_tensor_value_info("loss", TensorProto.INT64, [2]))
    with pytest.raises(PeerError, match=r"'loss' is int64 \[2\], not one number"):
        train_with(changed.SerializeToString())


def test_an_evaluation_that_is_not_what_it_says_is_refused() -> None:
    trainer = Trainer(ADAM | {"evaluate": told(ADAM["evaluate"], '{"loss":"binary_cross_entropy"}')})
    with pytest.raises(PeerError, match=r"outputs differ.*correct.*squared_error"):
        trainer.evaluate(VECTOR, X, np.ones((4, 10), np.float32))
    assert Trainer(ADAM).evaluate(VECTOR, X, np.ones((4, 10), np.float32)).examples == 4


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_the_bytes_only_a_peer_error_comes_out(data: st.DataObject) -> None:
    program = bytearray(PROGRAMS["train"])
    if data.draw(st.booleans()):
        program = program[: data.draw(st.integers(0, len(program) - 1))]
    for _ in range(data.draw(st.integers(1, 4))):
        if program:
            program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    # Some changes are harmless (a name, a weight of the graph); everything else than PeerError fails the test.
    with contextlib.suppress(PeerError):
        train_with(bytes(program))
