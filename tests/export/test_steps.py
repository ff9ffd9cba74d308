"""Every loss with every optimizer against torch in float64: 20 steps, each from our own parameters and state, some of them padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from edge_agent.trainer import Trainer
from export.programs import build_programs, initial_vector
from regrow.errors import LocalError
from regrow.local_step import Step
from regrow.parameters import Layout
from regrow.task import Training
from tests.export.running import model_of, session_of, step

functional = torch.nn.functional
FEATURES, HIDDEN, OUTPUTS, BATCH, STEPS, RATE = 5, 6, 4, 8, 20, 0.05
LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "huber")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.8},
    "nesterov": {},
    "adam": {"beta1": 0.85, "beta2": 0.99, "epsilon": 1e-6},
    "adamw": {},
}
EXTRAS: list[dict[str, Any]] = [{}, {"weight_decay": 0.03, "clip_norm": 0.1, "proximal_mu": 0.2}]


def network(seed: int = 0) -> onnx.ModelProto:
    """Two dense layers with a tanh between, so that nothing flips."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(0, 0.5, (HIDDEN, FEATURES)),
        "b1": rng.normal(0, 0.5, HIDDEN),
        "w2": rng.normal(0, 0.5, (OUTPUTS, HIDDEN)),
        "b2": rng.normal(0, 0.5, OUTPUTS),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "w2", "b2"], ["logits"], transB=1),
    ]
    return model_of(nodes, {name: array.astype(np.float32) for name, array in weights.items()}, [FEATURES], OUTPUTS)


def forward(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional.linear(torch.tanh(functional.linear(x, p["w1"], p["b1"])), p["w2"], p["b2"])


def examples(loss: str, seed: int, size: int = BATCH) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, FEATURES)).astype(np.float32)
    if loss == "cross_entropy":
        return x, rng.integers(0, OUTPUTS, size)
    y = rng.random((size, OUTPUTS)) if loss == "binary_cross_entropy" else rng.normal(0, 2, (size, OUTPUTS))
    return x, y.astype(np.float32)


def torch_loss(training: Training, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if training.loss == "cross_entropy":
        weight = torch.tensor(training.class_weights, dtype=torch.float64) if training.class_weights else None
        return functional.cross_entropy(outputs, y, weight=weight, label_smoothing=training.label_smoothing)
    y = y.to(torch.float64)
    if training.loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(outputs, y)
    return functional.mse_loss(outputs, y) if training.loss == "mse" else functional.huber_loss(outputs, y, delta=training.huber_delta)


def torch_optimizer(training: Training, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    if training.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        betas = (training.beta1, training.beta2)
        return kind(parameters, lr=RATE, betas=betas, eps=training.epsilon, weight_decay=training.weight_decay)
    momentum = 0.0 if training.optimizer == "sgd" else training.momentum
    nesterov = training.optimizer == "nesterov"
    return torch.optim.SGD(parameters, lr=RATE, momentum=momentum, nesterov=nesterov, weight_decay=training.weight_decay)


TORCH_SLOTS = {"momentum": "momentum_buffer", "mean": "exp_avg", "square": "exp_avg_sq"}


def torch_step(
    training: Training, values: dict[str, Any], state: dict[str, Any], anchor: dict[str, Any], masks: dict[str, Any], x: Any, y: Any
) -> tuple[float, dict[str, Any]]:
    """(loss, new parameters and state) of one step of torch.optim in float64, begun with these parameters and this state."""
    p = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in values.items()}
    loss = torch_loss(training, forward(p, torch.tensor(x, dtype=torch.float64)), torch.tensor(y))
    away = sum(((p[name] - torch.tensor(anchor[name], dtype=torch.float64)) ** 2).sum() for name in p)
    (loss + training.proximal_mu / 2 * away).backward()
    for name, tensor in p.items():
        assert tensor.grad is not None
        tensor.grad *= torch.tensor(masks.get(name, np.ones(tensor.shape)))
    if training.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(p.values()), training.clip_norm)
    optimizer = torch_optimizer(training, list(p.values()))
    for name, tensor in p.items():
        mine = {TORCH_SLOTS[slot]: torch.tensor(state[f"state:{slot}:{name}"], dtype=torch.float64) for slot in training.slots}
        optimizer.state[tensor] = mine | ({"step": torch.tensor(float(state["state:step"]))} if training.counts_steps else {})
    optimizer.step()
    new = {f"new:{name}": tensor.detach().numpy() for name, tensor in p.items()}
    for slot in training.slots:
        new |= {f"new:state:{slot}:{name}": optimizer.state[p[name]][TORCH_SLOTS[slot]].numpy() for name in p}
    for name, mask in masks.items():
        new[f"new:{name}"] = np.where(mask == 1, new[f"new:{name}"], values[name])
    return loss.item(), new


def assert_same(ours: Any, exact: Any, before: Any, what: str) -> None:
    """The change differs by less than 1e-5 of it, but for the rounding of the sum itself."""
    moved, rounding = np.linalg.norm(exact - before), np.finfo(np.float32).eps * np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact) <= 1e-5 * moved + rounding, what


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extras", EXTRAS, ids=["plain", "decayed-clipped-pulled"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_are_those_of_torch(loss: str, optimizer: str, extras: dict[str, Any], masked: bool) -> None:
    training = Training(loss=loss, optimizer=optimizer, **OPTIMIZERS[optimizer], **extras)  # type: ignore[arg-type]  # drawn from its own words
    model = network()
    programs = build_programs(model, training=training)
    layout = Layout.from_json(programs["layout"])
    anchor = layout.unflatten(initial_vector(model))
    session = session_of(programs["train_masked" if masked else "train"])
    rng = np.random.default_rng(7)
    masks = {name: (rng.random(a.shape) < 0.6).astype(np.float32) for name, a in anchor.items() if a.ndim > 1} if masked else {}
    given = {item.name: item.shape for item in session.get_inputs()}
    state = {name: np.zeros(shape, np.float32) for name, shape in given.items() if name.startswith("state:")}
    fixed = {f"mask:{name}": mask for name, mask in masks.items()} | {"learning_rate": np.array(RATE, np.float32)}
    fixed |= {f"anchor:{name}": value for name, value in anchor.items()} if training.proximal_mu else {}
    values = dict(anchor)
    for number in range(STEPS):
        size = BATCH - 3 * (number % 2)
        x, y = examples(loss, number, size)
        loss_value, exact = torch_step(training, values, state, anchor, masks, x, y)
        feed = {"x": np.zeros((BATCH, FEATURES), np.float32), "y": np.zeros((BATCH, *y.shape[1:]), y.dtype)}
        feed["x"][:size], feed["y"][:size] = x, y
        got = step(session, feed | {"sample_weight": (np.arange(BATCH) < size).astype(np.float32)} | fixed | values | state)
        assert float(got["loss"]) == pytest.approx(loss_value, rel=1e-5)
        assert set(got) == {"loss", *(f"new:{name}" for name in (*values, *state))}
        for name, before in values.items():
            assert_same(got[f"new:{name}"], exact[f"new:{name}"], before, f"step {number}, {name}")
            assert np.array_equal(got[f"new:{name}"][masks.get(name) == 0], before[masks.get(name) == 0])
        for name in state:
            kept = masks.get(name.split(":")[-1], np.ones(())) == 1
            if name != "state:step":
                assert_same(got[f"new:{name}"] * kept, exact[f"new:{name}"] * kept, state[name] * kept, f"step {number}, {name}")
        values = {name: got[f"new:{name}"] for name in values}
        state = {name: np.asarray(got[f"new:{name}"]) for name in state}
    if training.counts_steps:
        assert state["state:step"] == STEPS


@pytest.mark.parametrize(
    "keys",
    [{"label_smoothing": 0.1}, {"class_weights": (1.0, 2.0, 0.5, 3.0)}, {"label_smoothing": 0.2, "class_weights": (0.1, 2.0, 1.0, 1.0)}],
)
def test_class_weights_and_label_smoothing_are_those_of_torch(keys: dict[str, Any]) -> None:
    training = Training(**keys)
    model = network(1)
    programs = build_programs(model, training=training)
    values = Layout.from_json(programs["layout"]).unflatten(initial_vector(model))
    session = session_of(programs["train"])
    for number in range(5):
        x, y = examples("cross_entropy", number)
        loss, exact = torch_step(training, values, {}, values, {}, x, y)
        weight = np.ones(BATCH, np.float32)
        feed = {"x": x, "y": y, "sample_weight": weight, "learning_rate": np.array(RATE, np.float32)}
        got = step(session, feed | values)
        assert float(got["loss"]) == pytest.approx(loss, rel=1e-5)
        for name, before in values.items():
            assert_same(got[f"new:{name}"], exact[f"new:{name}"], before, name)


def test_huber_delta_and_target_input() -> None:
    training = Training(loss="huber", huber_delta=0.3)
    model = network(2)
    programs = build_programs(model, training=training)
    values = Layout.from_json(programs["layout"]).unflatten(initial_vector(model))
    x, y = examples("huber", 1)
    loss, exact = torch_step(training, values, {}, values, {}, x, y)
    trainer = Trainer(programs)
    result = trainer.train(initial_vector(model), None, [(x, y)], RATE)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    for name, new in trainer.layout.unflatten(result.vector).items():
        assert_same(new, exact[f"new:{name}"], values[name], name)


def test_an_autoencoder_needs_no_target() -> None:
    rng = np.random.default_rng(0)
    weights = {"down": rng.normal(0, 0.3, (6, 2)).astype(np.float32), "up": rng.normal(0, 0.3, (2, 6)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "down"], ["h"]), helper.make_node("MatMul", ["h", "up"], ["logits"])]
    model = model_of(nodes, weights, [6], 6)
    own, given = Training(loss="mse", target="input", optimizer="adam"), Training(loss="mse", optimizer="adam")
    x = (rng.normal(size=(64, 2)) @ rng.normal(size=(2, 6))).astype(np.float32)
    labels = np.zeros(64, np.int64)  # not looked at
    trainer = Trainer(build_programs(model, training=own))
    vector = initial_vector(model)
    result = trainer.train(vector, None, [(x, labels)] * 300, 0.02)
    same = Trainer(build_programs(model, training=given)).train(vector, None, [(x, x)] * 300, 0.02)
    assert np.array_equal(result.vector, same.vector)
    before, after = trainer.evaluate(vector, x, labels, 20), trainer.evaluate(result.vector, x, labels, 20)
    assert before.accuracy < 0.5
    assert after.accuracy > 0.99
    reconstruction = x @ result.vector[:12].reshape(6, 2) @ result.vector[12:].reshape(2, 6)
    assert after.loss == pytest.approx(float(((reconstruction - x) ** 2).mean()), rel=1e-3)


def test_scores_of_values_are_r_squared_and_of_binary_outputs_the_right_sides() -> None:
    model, (x, y) = network(3), examples("mse", 1, 50)
    vector = initial_vector(model)
    weights = {name: torch.tensor(value) for name, value in Layout.from_json(build_programs(model)["layout"]).unflatten(vector).items()}
    outputs = forward(weights, torch.tensor(x)).numpy()
    near = (outputs + np.random.default_rng(1).normal(0, 0.3, outputs.shape)).astype(np.float32)
    expected = 1 - ((outputs - near) ** 2).sum() / ((near - near.mean(0)) ** 2).sum()
    for loss in ("mse", "huber"):
        trainer = Trainer(build_programs(model, training=Training(loss=loss)))  # type: ignore[arg-type]  # drawn from its own words
        score = trainer.evaluate(vector, x, near, batch=16)
        assert score.accuracy == pytest.approx(expected, rel=1e-4)
        assert 0 < score.accuracy < 1
        assert trainer.evaluate(vector, x, y).accuracy == 0  # worse than the mean
        assert trainer.evaluate(vector, x[:1], near[:1]).accuracy == 0  # nothing varies
        assert trainer.evaluate(vector, x[:3] * 0, np.ones((3, 4), np.float32)).examples == 3
    binary = (np.random.default_rng(2).random(outputs.shape) < 0.5).astype(np.float32)
    score = Trainer(build_programs(model, training=Training(loss="binary_cross_entropy"))).evaluate(vector, x, binary, batch=16)
    assert score.accuracy == pytest.approx(float(((outputs > 0) == (binary > 0.5)).mean()))
    theirs = functional.binary_cross_entropy_with_logits(torch.tensor(outputs), torch.tensor(binary)).item()
    assert score.loss == pytest.approx(theirs, rel=1e-5)


def test_outputs_of_any_shape_and_features_that_are_whole_numbers() -> None:
    """A model of one value without an axis of its own, and one of tokens whose outputs have two axes."""
    column = np.random.default_rng(0).normal(size=(FEATURES, 1)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["column"]),
        helper.make_node("Squeeze", ["column", "last"], ["logits"]),
    ]
    flat = model_of(nodes, {"w": column}, [FEATURES], 1)
    flat.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "last"))
    del flat.graph.output[0].type.tensor_type.shape.dim[1]
    x = np.random.default_rng(1).normal(size=(9, FEATURES)).astype(np.float32)
    trainer = Trainer(build_programs(flat, training=Training(loss="mse")))
    result = trainer.train(column[:, 0], None, [(x, x @ column[:, 0] + 1)], 0.1)
    assert result.loss == pytest.approx(1, rel=1e-5)
    with pytest.raises(LocalError, match=r"y: expected float32 \[9\].*got int64 \[9\]; whole numbers are class labels"):
        trainer.train(column[:, 0], None, [(x, np.zeros(9, np.int64))], 0.1)

    nodes = [
        helper.make_node("Cast", ["x"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["real", "w"], ["wide"]),
        helper.make_node("Reshape", ["wide", "shape"], ["logits"]),
    ]
    tokens = model_of(nodes, {"w": np.eye(FEATURES, 6, dtype=np.float32)}, [FEATURES], 6)
    tokens.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    tokens.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 2, 3]), "shape"))
    tokens.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    tokens.graph.output[0].type.tensor_type.shape.dim.add(dim_value=3)
    trainer = Trainer(build_programs(tokens, training=Training(loss="mse", optimizer="adam")))
    x, y = np.arange(20).reshape(4, FEATURES), np.ones((4, 2, 3), np.float32)
    short = trainer.train(initial_vector(tokens), None, [(x, y), (x[:3], y[:3])], 0.1)
    assert np.isfinite(short.vector).all()
    with pytest.raises(LocalError, match=r"x: expected int64 \[batch, 5\], got float32"):
        trainer.train(initial_vector(tokens), None, [(x.astype(np.float32), y)], 0.1)
    with pytest.raises(LocalError, match=r"y: expected float32 \[4, 2, 3\]"):
        trainer.evaluate(initial_vector(tokens), x, y[:, 0])


def test_state_begins_at_zero_in_every_round() -> None:
    model = network(4)
    trainer = Trainer(build_programs(model, training=Training(optimizer="adam", proximal_mu=0.1)))
    batches = [examples("cross_entropy", seed) for seed in range(3)]
    first = trainer.train(initial_vector(model), None, batches, RATE)
    trainer.train(first.vector, None, batches, RATE)
    assert np.array_equal(trainer.train(initial_vector(model), None, batches, RATE).vector, first.vector)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_dropped_never_moves(optimizer: str) -> None:
    training = Training(optimizer=optimizer, weight_decay=0.1, clip_norm=0.5, proximal_mu=0.3)  # type: ignore[arg-type]  # drawn from its own words
    model = network(5)
    trainer = Trainer(build_programs(model, training=training))
    kept = np.random.default_rng(0).random(trainer.layout.size) < 0.3
    kept[trainer.layout.always_kept_coordinates] = True
    vector = initial_vector(model)
    result = trainer.train(vector, kept, [examples("cross_entropy", seed) for seed in range(6)], RATE)
    assert np.array_equal(result.vector[~kept], vector[~kept])
    assert (result.vector[kept] != vector[kept]).all()


def test_only_what_is_not_the_default_is_said_and_the_default_says_nothing() -> None:
    def said(training: Training) -> dict[str, str]:
        program = onnx.load_from_string(build_programs(network(), training=training)["train"])
        return {entry.key: entry.value for entry in program.metadata_props}

    assert said(Training(learning_rate=0.7, local_steps=3)) == {"regrow.classes": "4"}
    assert said(Training(optimizer="adam")) == {"regrow.classes": "4", "regrow.step": '{"optimizer":"adam"}'}
    assert Step.from_metadata(said(Training(loss="mse", clip_norm=2))["regrow.step"]) == Step(loss="mse", clip_norm=2)


def test_a_step_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(LocalError, match=r"3 weights for 4 classes"):
        build_programs(network(), training=Training(class_weights=(1.0, 1.0, 1.0)))
    with pytest.raises(LocalError, match=r'"input" needs .* the output is \[batch, 4\]'):
        build_programs(network(), training=Training(loss="mse", target="input"))
