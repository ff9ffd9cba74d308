"""Scores in NumPy are those of the evaluation programs."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from edge_agent.trainer import Trainer
from export.programs import build_programs, initial_vector
from regrow.errors import LocalError
from regrow.local_step import Step
from regrow.scoring import score_outputs
from regrow.task import Training
from tests.export.test_steps import examples, network


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse", "huber"])
def test_they_are_the_evaluation_programs(loss: str) -> None:
    training = Training(loss=loss, huber_delta=0.3 if loss == "huber" else 1.0)
    x, y = examples(loss, 3)
    model = network()
    expected = Trainer(build_programs(model, training=training)).evaluate(initial_vector(model), x, y)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    found = score_outputs(outputs, x, y, training)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert found.examples == expected.examples


def test_the_target_may_be_the_input() -> None:
    x = np.random.default_rng(0).random((5, 3), np.float32)
    score = score_outputs(x + 1, x, np.zeros(5, np.int64), Step(loss="mse", target="input"))
    assert (score.loss, score.accuracy) == (pytest.approx(1.0), 0.0)
    assert score_outputs(x, x, np.zeros(5, np.int64), Step(loss="mse", target="input")).accuracy == 1.0


@pytest.mark.parametrize(
    ("outputs", "y", "loss"),
    [
        (np.zeros((4, 3), np.float32), np.zeros(5, np.int64), "cross_entropy"),
        (np.zeros((4, 3), np.float32), np.full(4, 3), "cross_entropy"),
        (np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32), "cross_entropy"),
        (np.zeros((4, 3, 2), np.float32), np.zeros(4, np.int64), "cross_entropy"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.int64), "mse"),
        (np.zeros((4, 3), np.float32), np.zeros((4, 2), np.float32), "huber"),
    ],
)
def test_what_does_not_fit_together_is_said(outputs: np.ndarray, y: np.ndarray, loss: str) -> None:
    with pytest.raises(LocalError, match=r"the model (gives|knows)|label 3, but the task.s labels are 0 to 2"):
        score_outputs(outputs, np.zeros((4, 1), np.float32), y, Step(loss=loss))
