"""Batch normalisation: the gradient through it, running statistics against torch's, and what is refused."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edge_agent.trainer import Trainer
from export.check import problems_of
from export.forward import read_forward
from export.programs import build_programs, initial_vector, with_weights
from export.torch_graph import graph_of_program
from regrow.errors import LocalError
from regrow.local_training import spread_batches
from regrow.task import Training
from tests.export.drawing import CLASSES, drawn, network, numbers
from tests.export.running import feed_of, model_of, session_of, step
from tests.export.unit_models import batch_norm_net, batch_norm_perceptron

functional = torch.nn.functional
Values = dict[str, torch.Tensor]
RATE = 2.0**20  # nearly all of a new value is then the update


def assert_gradients(programs: Mapping[str, bytes], forward: Callable[[torch.Tensor, Values], torch.Tensor], weights: Any, x: Any) -> None:
    """Both training programs move as float64 autograd says: 1e-4 relative; 1e-6 absolute where terms cancel, as a bias before the op."""
    y = np.random.default_rng(x.size).integers(0, CLASSES, len(x))
    exact = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in weights.items()}
    loss = functional.cross_entropy(forward(torch.tensor(x, dtype=torch.float64), exact), torch.tensor(y))
    loss.backward()
    for name in ("train", "train_masked"):
        session = session_of(programs[name])
        masks = {item.name: np.ones(item.shape, np.float32) for item in session.get_inputs() if item.name.startswith("mask:")}
        got = step(session, {**feed_of(x, y, weights, RATE), **masks})
        assert float(got["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        for key, tensor in exact.items():
            assert tensor.grad is not None
            gradient = tensor.grad.numpy()
            error = np.linalg.norm((weights[key].astype(np.float64) - got[f"new:{key}"]) / RATE - gradient)
            assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-6, f"{name}, {key}: off by {error}"


@drawn(40)
@given(
    channels=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), max_size=3),
    batch=st.integers(2, 5),
    shift=st.sampled_from([0, 8]),
    epsilon=st.sampled_from([1e-5, 0.125]),
    seed=st.integers(0, 999),
)
def test_gradients(channels: int, sizes: list[int], batch: int, shift: int, epsilon: float, seed: int) -> None:
    """Of scale, bias and input, with and without a map, also around a mean much larger than the deviation."""
    rng = np.random.default_rng(seed)
    weights = {"p": numbers(rng, channels, *sizes), "scale": numbers(rng, channels) + np.float32(1.5), "bias": numbers(rng, channels)}
    weights["head"] = numbers(rng, channels * math.prod(sizes), CLASSES)
    statistics = {"mean": numbers(rng, channels), "variance": numbers(rng, channels) ** 2 + np.float32(1)}
    node = helper.make_node("BatchNormalization", ["a", "scale", "bias", *statistics], ["o"], epsilon=epsilon)
    programs = build_programs(network([node], weights | statistics, [channels, *sizes]))

    def forward(x: torch.Tensor, q: Values) -> torch.Tensor:
        normal = functional.batch_norm(x + q["p"], None, None, q["scale"], q["bias"], training=True, eps=epsilon)
        return normal.flatten(1) @ q["head"]

    x = numbers(rng, batch, channels, *sizes) * np.float32(4) + np.float32(shift)
    assert_gradients(programs, forward, weights, x)
    graph = graph_of_program(programs["evaluate"])
    assert_gradients(programs, lambda values, q: graph.forward(q, values), weights, x)


@pytest.mark.parametrize("model", [batch_norm_net(classes=CLASSES), batch_norm_perceptron(6, CLASSES)], ids=["maps", "features"])
def test_gradients_through_several_and_finite_differences(model: onnx.ModelProto) -> None:
    programs, forward = build_programs(model), read_forward(model)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, *(size or 0 for size in forward.input_shape[1:]))).astype(np.float32)
    graph = graph_of_program(programs["evaluate"])
    assert_gradients(programs, lambda values, q: graph.forward(q, values), forward.parameters, x)
    trainer, vector, y = Trainer(programs), initial_vector(model), rng.integers(0, CLASSES, 6)

    def loss(values: Any) -> float:
        return trainer.train(values, None, [(x, y)], 0.0).loss

    gradient = (vector - trainer.train(vector, None, [(x, y)], 1.0).vector).astype(np.float64)
    along = gradient / np.linalg.norm(gradient)
    reach = 5e-3
    slope = (loss((vector + reach * along).astype(np.float32)) - loss((vector - reach * along).astype(np.float32))) / (2 * reach)
    assert slope == pytest.approx(float(np.linalg.norm(gradient)), rel=2e-2)


class Rows(torch.nn.Module):
    """A flattening that reads the batch off the data, so that the exported model computes with shapes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), x.size(1) * x.size(2) * x.size(3))


def network_and_model(train: bool) -> tuple[torch.nn.Sequential, onnx.ModelProto]:
    """A small torch network, a convolution with a bias before the norm, and what torch exports of it."""
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(2, 6, 3), torch.nn.BatchNorm2d(6, momentum=None), torch.nn.ReLU(), Rows(), torch.nn.Linear(24, 5)]
    net = torch.nn.Sequential(*body, torch.nn.BatchNorm1d(5, momentum=None), torch.nn.Linear(5, CLASSES)).train(train)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():  # the exporter merges equal tensors
                tensor.add_(0.1 * torch.rand_like(tensor))
    file: Any = io.BytesIO()
    mode = torch.onnx.TrainingMode.TRAINING if train else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export = {"dynamo": False, "opset_version": 18, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(net, (torch.randn(2, 2, 4, 4),), file, training=mode, do_constant_folding=False, **export)
    return net, onnx.load_from_string(file.getvalue())


def test_statistics_and_scores_are_torch_s_with_a_cumulative_average() -> None:
    net, model = network_and_model(train=True)
    trainer, vector = Trainer(build_programs(model)), initial_vector(model)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(size, 2, 4, 4)).astype(np.float32) for size in (8, 8, 3)]
    found = trainer.statistics(vector, batches)
    net.double()
    for module in net:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    for x in batches:
        net(torch.tensor(x, dtype=torch.float64))
    exact = {name: tensor.numpy() for name, tensor in net.named_buffers() if name in found}
    assert len(exact) == len(found) == 4
    for name, array in exact.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    x, y = batches[0], rng.integers(0, CLASSES, 8)
    logits = net.eval()(torch.tensor(x, dtype=torch.float64))
    score = trainer.evaluate(vector, x, y, statistics=found)
    assert score.loss == pytest.approx(functional.cross_entropy(logits, torch.tensor(y)).item(), rel=1e-5)
    # What is written is for inference, though the model was exported for training.
    written = step(session_of(with_weights(model, vector, statistics=found).SerializeToString()), {"x": x})
    np.testing.assert_allclose(next(iter(written.values())), logits.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_statistics_are_neither_parameters_nor_part_of_an_update() -> None:
    model = batch_norm_net()
    forward, trainer = read_forward(model), Trainer(build_programs(model))
    names = {tensor.name for tensor in trainer.layout.tensors}
    assert sorted(forward.statistics) == sorted(f"norm{i}.{part}" for i in (1, 2, 3) for part in ("mean", "variance"))
    assert not names & forward.statistics.keys()
    assert {f"norm{i}.{part}" for i in (1, 2, 3) for part in ("scale", "bias")} <= {
        tensor.name for tensor in trainer.layout.tensors if tensor.always_kept
    }
    assert trainer.layout.size == sum(array.size for array in forward.parameters.values())


def test_a_short_batch_is_trained_as_it_is() -> None:
    """Examples of weight 0 would enter the batch's statistics."""
    model = batch_norm_perceptron(6, CLASSES)
    programs, vector, rng = build_programs(model), initial_vector(model), np.random.default_rng(1)
    long, short = ((rng.normal(size=(size, 6)).astype(np.float32), rng.integers(0, CLASSES, size)) for size in (9, 4))
    both = Trainer(programs).train(vector, None, [long, short], 0.1).vector
    first = Trainer(programs).train(vector, None, [long], 0.1).vector
    assert np.array_equal(both, Trainer(programs).train(first, None, [short], 0.1).vector)


def test_one_number_per_channel_has_variance_0() -> None:
    model = batch_norm_perceptron(6, CLASSES)
    found = Trainer(build_programs(model)).statistics(initial_vector(model), [np.ones((1, 6), np.float32)])
    assert not np.any(found["norm1.variance"])
    assert np.array_equal(found["norm1.mean"], np.ones(6))


def test_unlabelled_examples_are_taken_from_everywhere() -> None:
    x = np.arange(2000, dtype=np.float32)[:, None]
    batches = list(spread_batches(x))
    assert len(batches) == 10
    assert all(batch.min() < 10 and batch.max() >= 1990 for batch in batches)
    assert [len(batch) for batch in spread_batches(x[:3])] == [3]


def test_what_does_not_fit_is_named() -> None:
    model = batch_norm_perceptron(6, CLASSES)
    trainer, vector = Trainer(build_programs(model)), initial_vector(model)
    x, y = np.zeros((2, 6), np.float32), np.zeros(2, np.int64)
    with pytest.raises(LocalError, match=r"the model needs .*norm1\.mean.*got none.*Trainer\.statistics"):
        trainer.evaluate(vector, x, y)
    with pytest.raises(LocalError, match="no batches"):
        trainer.statistics(vector, [])
    with pytest.raises(LocalError, match=r"x: expected float32 .batch, 6."):
        trainer.statistics(vector, [x[:, :2]])
    with pytest.raises(LocalError, match="'other': the model has no such statistic"):
        with_weights(model, vector, statistics={"other": np.zeros(6, np.float32)})
    with pytest.raises(LocalError, match=r"'norm1.mean': expected float32 .6., got float64 .5."):
        with_weights(model, vector, statistics={"norm1.mean": np.zeros(5)})
    shared = batch_norm_perceptron(6, CLASSES)
    shared.graph.node[0].input[2] = "norm1.mean"  # as the exporter does where both are 0
    with pytest.raises(LocalError, match=r"'norm1.mean' is used elsewhere too.*train the model a step"):
        read_forward(shared)
    computed = batch_norm_perceptron(6, CLASSES)
    computed.graph.node.insert(0, helper.make_node("Identity", ["norm1.mean"], ["same"]))
    computed.graph.node[1].input[3] = "same"
    with pytest.raises(LocalError, match=r"BatchNormalization \(node ''\): its statistic 'same' is no float32 initializer"):
        read_forward(computed)


def test_a_model_without_batch_normalisation_needs_no_statistics() -> None:
    model = network([helper.make_node("Relu", ["a"], ["o"])], {"p": np.ones(3, np.float32), "head": np.ones((3, CLASSES), np.float32)}, [3])
    programs = build_programs(model)
    assert "statistics" not in programs
    trainer = Trainer(programs)

    def nobody_asks() -> Any:
        yield pytest.fail("a batch was taken")

    assert trainer.statistics(initial_vector(model), nobody_asks()) == {}


@pytest.mark.parametrize("train_last", [None, 1])
def test_training_mode_beside_computed_shapes(train_last: int | None) -> None:
    """A BatchNormalization with training_mode = 1, in a graph that computes shapes, so that it is run while it is read."""

    def made(mode: dict[str, int], more: list[str]) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        weights = {"w": rng.normal(size=(6, 4)), "scale": 1 + rng.random(4), "bias": rng.normal(size=4), "fc": rng.normal(size=(4, 3))}
        weights |= {"mean": rng.normal(size=4), "variance": 1 + rng.random(4)}
        nodes = [
            helper.make_node("Shape", ["x"], ["shape"], end=1),
            helper.make_node("Concat", ["shape", "six"], ["flat"], axis=0),
            helper.make_node("Reshape", ["x", "flat"], ["rows"]),
            helper.make_node("MatMul", ["rows", "w"], ["a"]),
            helper.make_node("BatchNormalization", ["a", "scale", "bias", "mean", "variance"], ["b", *more], **mode),
            helper.make_node("MatMul", ["b", "fc"], ["logits"]),
        ]
        arrays: dict[str, Any] = {name: array.astype(np.float32) for name, array in weights.items()}
        return model_of(nodes, arrays | {"six": np.array([6])}, [2, 3], 3)

    plain = made({}, [])
    training = Training(train_last=train_last)
    for odd in (made({"training_mode": 1}, ["new_mean", "new_variance"]), made({"training_mode": 1}, [])):
        assert problems_of(odd, training) == []
        assert build_programs(odd, training=training) == build_programs(plain, training=training)
        vector = initial_vector(odd, train_last)
        made_of_it = with_weights(odd, vector, train_last)
        x = np.random.default_rng(1).random((5, 2, 3), np.float32)
        ours, theirs = (session_of(file.SerializeToString()).run(None, {"x": x})[0] for file in (made_of_it, plain))
        assert np.array_equal(ours, theirs)
