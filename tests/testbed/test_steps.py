"""Losses, optimizers and last-layers training from task.toml to the trained model, and on torch as on onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tomllib
from numpy.typing import NDArray
from onnx import numpy_helper

from broker_server.runs import TaskFolder, load_task
from cli.gateway import built, evaluator
from cli.main import main
from edge_agent.data import open_source
from edge_agent.trainer import Trainer
from export.models import digits_mlp, reduced_cnn
from export.programs import build_programs, initial_vector, with_weights
from export.task import read_model, save_model
from export.torch_trainer import Share, TorchTrainer
from regrow.errors import LocalError
from regrow.machine import Evaluate
from regrow.task import Training
from testbed.outcome import Outcome, Spec
from testbed.simulate import Simulation, task_of
from tests.export.test_steps import BATCH, EXTRAS, FEATURES, LOSSES, OPTIMIZERS, examples, network

# ---- torch as onnxruntime ------------------------------------------------------------------------------------------------------------


OF_CLASSES: dict[str, Any] = {"label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5, 3.0)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("loss", "extras"),
    [*((loss, extras) for loss in LOSSES for extras in EXTRAS), ("cross_entropy", OF_CLASSES)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_a_wave_on_torch_takes_the_steps_of_onnxruntime(loss: str, extras: dict[str, Any], optimizer: str) -> None:
    training = Training(loss=loss, optimizer=optimizer, **OPTIMIZERS[optimizer], **extras)  # type: ignore[arg-type]  # drawn from its own words
    programs, vector = build_programs(network(), training=training), initial_vector(network())
    device, torch = Trainer(programs), TorchTrainer(programs)
    rng, shares = np.random.default_rng(0), list[Share]()
    for client in range(3):
        kept = None
        if client:
            kept = rng.random(vector.size) < 0.5
            kept[device.layout.always_kept_coordinates] = True
        start = vector + rng.normal(0, 0.1, vector.size).astype(np.float32)
        batches = [examples(loss, 10 * client + number, BATCH - 2 * (number == 5)) for number in range(6)]
        shares.append(Share(start, kept, batches, 0.02 * (1 + client)))
    for share, mine in zip(shares, torch.train_together(shares), strict=True):
        theirs = device.train(share.vector, share.kept, share.batches, share.learning_rate)
        way = np.linalg.norm(theirs.vector - share.vector)
        assert np.linalg.norm(mine.vector - theirs.vector) <= 2e-4 * way
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        if share.kept is not None:
            assert np.array_equal(mine.vector[~share.kept], share.vector[~share.kept])
    data = [examples(loss, seed, 30 + seed) for seed in range(3)]
    together = torch.evaluate_together([share.vector for share in shares], data, batch=16)
    for share, (x, y), mine_ in zip(shares, data, together, strict=True):
        score = device.evaluate(share.vector, x, y, batch=16)
        assert (mine_.loss, mine_.accuracy) == pytest.approx((score.loss, score.accuracy), rel=1e-4, abs=1e-6)


def test_torch_refuses_what_does_not_fit() -> None:
    trainer, vector = TorchTrainer(build_programs(network(), training=Training(loss="mse"))), initial_vector(network())
    x = np.zeros((3, FEATURES), np.float32)
    with pytest.raises(LocalError, match=r"y: expected float32 \[3, 4\].*got int64"):
        trainer.train(vector, None, [(x, np.zeros(3, np.int64))], 0.1)


# ---- whole runs ----------------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, x: NDArray[Any], y: NDArray[Any]) -> None:
    folder.mkdir()
    test = np.arange(len(x)) % 5 == 0
    np.savez(folder / "train.npz", x=x[~test], y=y[~test])
    np.savez(folder / "test.npz", x=x[test], y=y[test])


def made(folder: Path, model: onnx.ModelProto, training: str, loss: str) -> TaskFolder:
    """The task folder as a user makes it: new, then edited, then built."""
    save_model(model, folder.parent / "forward.onnx")
    assert main(["task", "new", str(folder), "--model", str(folder.parent / "forward.onnx"), "--loss", loss]) == 0
    (folder / "task.toml").write_text(
        f'name = "own"\n[training]\nloss = "{loss}"\nlocal_steps = 10\nbatch = 16\n{training}\n[trigger]\ninterval_s = 0.5\n'
    )
    return built(folder)


def run(folder: TaskFolder, data: Path, trainer: str, **changes: Any) -> tuple[Outcome, NDArray[np.float32]]:
    """The outcome of ten seconds, and the trained weights."""
    links = "400000,800000,4000000"
    spec = Spec(
        seconds=10.0,
        points=5,
        data="npz",
        data_folder=str(data),
        split="iid",
        clients=3,
        links=links,
        trainer=trainer,
        step_s=0.05,
        **changes,
    )
    tables = tomllib.loads((folder.path / "task.toml").read_text())
    simulation = Simulation(folder, task_of(folder, tables, spec), spec)
    outcome = simulation.run()
    return outcome, simulation._ledger.trained_weights


def test_an_autoencoder_with_adam_from_task_toml_to_the_trained_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 3)) @ rng.normal(size=(3, 8))).astype(np.float32)
    write_data(tmp_path / "data", x, rng.integers(0, 2, 400))  # labels that nobody looks at
    keys = 'target = "input"\noptimizer = "adam"\nlearning_rate = 0.01\nclip_norm = 5\nproximal_mu = 0.01'
    folder = made(tmp_path / "own", autoencoder(), keys, "mse")
    assert not (folder.path / "build" / "train.onnx").read_bytes().count(b"regrow.classes")
    for trainer in ("onnxruntime", "torch"):
        outcome, weights = run(folder, tmp_path / "data", trainer)
        assert outcome.points[0].accuracy < 0.8 < 0.95 < outcome.final_accuracy
        assert 0 < outcome.points[-1].loss < outcome.points[0].loss
        assert outcome.validation_accuracy > 0.9
        assert outcome.rejected == 0
    save_model(with_weights(read_model(folder.model_path), weights), tmp_path / "trained.onnx")
    assert np.array_equal(initial_vector(onnx.load(tmp_path / "trained.onnx")), weights)


def autoencoder() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {"down": rng.normal(0, 0.3, (8, 6)).astype(np.float32), "up": rng.normal(0, 0.3, (6, 8)).astype(np.float32)}
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "down"], ["code"]), helper.make_node("MatMul", ["code", "up"], ["again"])],
        "autoencoder",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_the_last_layer_alone_from_task_toml_to_the_trained_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (10, 64))
    y = rng.integers(0, 10, 600)
    write_data(tmp_path / "data", (centres[y] + rng.normal(0, 0.3, (600, 64))).astype(np.float32), y)
    model = digits_mlp(1)
    folder = made(tmp_path / "own", model, 'train_last = 1\noptimizer = "momentum"\nweight_decay = 0.001', "cross_entropy")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    frozen, moving = ("fc1.weight", "fc1.bias"), ("fc2.weight", "fc2.bias")
    assert [tensor.name for tensor in folder.layout.tensors] == list(moving)
    assert folder.initial.size == folder.layout.size == 330
    outcome, weights = run(folder, tmp_path / "data", "onnxruntime")
    assert outcome.points[0].accuracy < outcome.final_accuracy
    assert outcome.final_accuracy > 0.9
    trained = with_weights(read_model(folder.model_path), weights, folder.task.training.train_last)
    save_model(trained, tmp_path / "trained.onnx")
    trained = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "trained.onnx").graph.initializer}
    assert all(np.array_equal(trained[name], before[name]) for name in frozen)
    assert all(not np.array_equal(trained[name], before[name]) for name in moving)
    with pytest.raises(LocalError, match=r"training\.train_last"):
        run(folder, tmp_path / "data", "onnxruntime", settings={"training.train_last": 2})
    other, _ = run(folder, tmp_path / "data", "torch", settings={"training.optimizer": "adamw", "training.learning_rate": 0.01})
    assert other.final_accuracy > 0.9


def test_the_gateway_scores_values_on_its_own_data(tmp_path: Path) -> None:
    model = network(1)
    folder = made(tmp_path / "own", model, "", "huber")
    x, y = examples("huber", 3, 40)
    near = np.asarray(Trainer(folder.programs).layout.flatten(folder.layout.unflatten(folder.initial)))
    assert np.array_equal(near, initial_vector(model))
    np.savez(folder.path / "held.npz", x=x, y=y)
    with (folder.path / "task.toml").open("a") as file:
        file.write('[evaluation]\ndata = "held.npz"\n')
    folder = load_task(folder.path)
    source = open_source(str(folder.path / "held.npz"), validation_fraction=0.0)
    coordinates = np.arange(folder.layout.size, dtype=np.uint32)
    fitted = Trainer(folder.programs).train(folder.initial, None, [source.everything()] * 400, 0.3).vector
    for vector, low, high in ((folder.initial, 0.0, 0.05), (fitted, 0.1, 1.0)):
        found = evaluator(folder)(Evaluate(3, vector, coordinates, {4: folder.layout.size}))
        assert low <= found.accuracies[4] <= high
    np.savez(folder.path / "held.npz", x=x, y=np.zeros(40, np.int64))
    with pytest.raises(LocalError, match="whole numbers are class labels"):
        evaluator(folder)


def test_training_only_the_last_layers_costs_only_their_gradients() -> None:
    model = reduced_cnn(1)
    everything, last = (build_programs(model, training=Training(train_last=count)) for count in (4, 1))
    assert everything == build_programs(model)
    ops = [node.op_type for node in onnx.load_from_string(last["train"]).graph.node]
    assert len(ops) < 25 < len(onnx.load_from_string(everything["train"]).graph.node)
    with pytest.raises(LocalError, match=r"train_last .*: 5, but the model has 4 layers"):
        build_programs(model, training=Training(train_last=5))
