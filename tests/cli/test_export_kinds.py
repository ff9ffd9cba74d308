"""`regrow export` of every kind of model and loss: statistics, scores and int8 of what is not a plain classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from broker_server.runs import load_task, recover
from broker_server.store import Store
from cli.main import main
from edge_agent.trainer import Trainer
from export.forward import read_forward
from export.from_torch import from_torch
from export.zoo import ZOO
from regrow.examples import r_squared
from regrow.levels import only_prefix
from regrow.local_training import statistics_from
from tests.cli.made_runs import Arrays, make_run
from tests.cli.test_models import Fails, export, fails
from tests.export.running import model_of
from tests.export.unit_models import batch_norm_net

__all__ = ["fails"]
OWN = '\n[evaluation]\ndata = "test.npz"\n'
node = helper.make_node


def pictures(rows: int = 400, seed: int = 1) -> Arrays:
    """Ten noisy patterns of 8 x 8."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, rows)
    x = np.random.default_rng(0).random((10, 64))[y] + 0.3 * rng.standard_normal((rows, 64))
    return {"x": x.reshape(-1, 1, 8, 8).astype(np.float32), "y": y}


def normal_net() -> onnx.ModelProto:
    return batch_norm_net((1, 8, 8), 10)


def outputs(file: Path, x: NDArray[Any]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    found: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def initializers(file: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_every_level_has_the_statistics_of_its_own_weights(tmp_path: Path, granularity: str) -> None:
    run = make_run(tmp_path, model=normal_net(), arrays=pictures(), method=f'granularity = "{granularity}"', more=OWN)
    found = export(run, tmp_path / "out")
    folder, x, y = load_task(run / "task"), *pictures().values()
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, folder)
    trainer, seen = Trainer(folder.programs), []
    for row, length in zip(found["models"], ledger.order.lengths, strict=True):
        vector = only_prefix(ledger.order, ledger.trained_weights, length)
        wanted = statistics_from(trainer, vector, x)
        assert row["score"] == pytest.approx(trainer.evaluate(vector, x, y, statistics=wanted).accuracy, abs=0.005)
        statistics = read_forward(onnx.load(tmp_path / "out" / row["file"])).statistics
        for name, array in statistics.items():  # those of a smaller graph are some of the full one's
            assert np.abs(array[:, None] - wanted[name]).min(axis=1).max() < 1e-4
        seen.append(statistics["norm3.mean"].tobytes())
    assert len(set(seen)) == len(seen)
    ours, theirs = onnx.load(tmp_path / "out" / "global.onnx"), onnx.load(run / "model.onnx")
    del ours.metadata_props[:]
    assert ours == theirs
    assert any("test.npz, whose labels are not looked at" in note for note in found["notes"])


def test_statistics_come_from_calibration_before_the_runs_own_and_from_there_before_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "own", model=normal_net(), arrays=pictures(), more=OWN)
    plain = make_run(tmp_path / "plain", model=normal_net(), arrays=pictures())
    device = pictures(100, seed=2)
    np.savez(tmp_path / "device.npz", x=device["x"])  # without labels, which no one needs
    np.savez(tmp_path / "other.npz", **pictures(100, seed=3))

    def used(run: Path, *words: object) -> str:
        notes = export(run, tmp_path / "out", "--density", "1", *words)["notes"]
        return next(note for note in notes if "running means" in note)

    assert "device.npz, whose" in used(run, "--calibrate", tmp_path / "device.npz", "--data", tmp_path / "other.npz")
    assert "those of the run's model.onnx are of its" in used(run, "--calibrate", tmp_path / "device.npz")
    assert "test.npz, whose" in used(run, "--data", tmp_path / "other.npz")
    assert "other.npz, whose" in used(plain, "--data", tmp_path / "other.npz")
    np.savez(tmp_path / "one.npz", x=device["x"][:1])
    assert "1 examples are few" in used(plain, "--calibrate", tmp_path / "one.npz")
    assert "--calibrate DATA" in used(plain)
    before, after = (initializers(file) for file in (plain / "task" / "model.onnx", tmp_path / "out" / "global.onnx"))
    assert np.array_equal(before["norm1.mean"], after["norm1.mean"])
    assert not np.array_equal(before["conv1"], after["conv1"])


def test_calibration_data_that_do_not_fit_are_named(tmp_path: Path, fails: Fails) -> None:
    run = make_run(tmp_path / "plain", model=normal_net(), arrays=pictures())
    wrong = {"wide": np.zeros((5, 1, 9, 9)), "nan": np.full((5, 1, 8, 8), np.nan), "empty": np.zeros((0, 1, 8, 8))}
    for name, x in wrong.items():
        np.savez(tmp_path / f"{name}.npz", x=x.astype(np.float32))
        assert f"{name}.npz" in fails("export", run, "--calibrate", tmp_path / f"{name}.npz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_takes_batch_normalisation_into_the_layer_before_and_costs_little(tmp_path: Path) -> None:
    """A keyword spotter of depthwise convolutions, from torch."""
    spotter = ZOO["ds_cnn"]
    rng = np.random.default_rng(0)
    y = rng.integers(0, 12, 400)
    words = rng.standard_normal((12, *spotter.small.shape))
    arrays = {"x": (words[y] + rng.standard_normal((400, *spotter.small.shape))).astype(np.float32), "y": y}
    model = from_torch(spotter.module(spotter.small, 0), torch.zeros(1, *spotter.small.shape))
    run = make_run(tmp_path, model=model, arrays=arrays, more=OWN, rate=0.3)
    found = export(run, tmp_path / "out", "--density", "1", "--quantize", "none,int8,fp16", "--calibrate", tmp_path / "device.npz")
    plain, int8, fp16 = found["models"]
    assert plain["score"] > 0.6
    assert abs(int8["drop"]) <= 0.05
    assert abs(fp16["drop"]) <= 0.01
    assert int8["left_float32"] == {}
    ops = [each.op_type for each in onnx.load(tmp_path / "out" / "global.int8.onnx").graph.node]
    assert "BatchNormalization" not in ops
    assert "QuantizeLinear" in ops


def repeating() -> onnx.ModelProto:
    """[2, 4] to two numbers and back, by a transposed convolution."""
    rng = np.random.default_rng(0)
    weights = {"down": rng.normal(0, 0.4, (8, 4)), "up": rng.normal(0, 0.4, (4, 2, 4))}
    nodes = [
        node("Flatten", ["x"], ["flat"]),
        node("MatMul", ["flat", "down"], ["code"]),
        node("Unsqueeze", ["code", "axis"], ["column"]),
        node("ConvTranspose", ["column", "up"], ["logits"]),
    ]
    model = model_of(nodes, {name: array.astype(np.float32) for name, array in weights.items()} | {"axis": np.array([2])}, [2, 4], 1)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, 4]))
    return model


@pytest.mark.parametrize("target", ["input", "y"])
def test_the_score_of_an_autoencoder_is_r_squared(tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 3)) @ rng.normal(size=(3, 8))).reshape(-1, 2, 4).astype(np.float32)
    arrays = {"x": x, "y": x[:, ::-1].copy() if target == "y" else np.zeros(400, np.int64)}
    training = f'loss = "mse"\ntarget = "{target}"\noptimizer = "adam"'
    run = make_run(tmp_path, model=repeating(), arrays=arrays, training=training, rate=0.01, more=OWN)
    found = export(run, tmp_path / "out", "--quantize", "none,int8,fp16", "--calibrate", tmp_path / "device.npz", "--density", "1")
    assert found["score"] == "R^2"
    goal = x if target == "input" else arrays["y"]
    for row in found["models"]:
        error = float(((outputs(tmp_path / "out" / row["file"], x).astype(np.float64) - goal) ** 2).sum())
        assert row["score"] == pytest.approx(r_squared(error, goal))
    assert found["models"][0]["score"] > 0.6
    assert "R^2" in capsys.readouterr().out
    assert "| R^2 | drop |" in (tmp_path / "out" / "export.md").read_text()


def test_two_questions_with_yes_or_no(tmp_path: Path, fails: Fails) -> None:
    arrays = pictures()
    arrays["y"] = np.stack([arrays["y"] > 4, arrays["y"] % 2 > 0], axis=1).astype(np.float32)
    model = batch_norm_net((1, 8, 8), 2)
    run = make_run(tmp_path, model=model, arrays=arrays, training='loss = "binary_cross_entropy"', more=OWN)
    found = export(run, tmp_path / "out", "--density", "1")
    assert found["score"] == "right signs"
    signs = outputs(tmp_path / "out" / "global.onnx", arrays["x"]) > 0
    assert found["models"][0]["score"] == pytest.approx(float((signs == (arrays["y"] > 0.5)).mean()))
    np.savez(tmp_path / "class.npz", **pictures())
    np.savez(tmp_path / "bare.npz", x=arrays["x"])
    assert "class.npz: the model gives float32 [400, 2]" in fails("export", run, "--data", tmp_path / "class.npz", "--out", tmp_path / "o")
    assert "it has no targets to score with" in fails("export", run, "--data", tmp_path / "bare.npz", "--out", tmp_path / "o")


def token_model() -> onnx.ModelProto:
    """Five tokens, an embedding, an LSTM whose last state is classified."""
    rng = np.random.default_rng(0)
    shapes = {"table": (20, 6), "W": (1, 32, 6), "R": (1, 32, 8), "B": (1, 64), "out": (4, 8), "bias": (4,)}
    weights = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("Gather", ["table", "x"], ["vectors"]),
        node("Transpose", ["vectors"], ["steps"], perm=[1, 0, 2]),
        node("LSTM", ["steps", "W", "R", "B"], ["all", "last"], hidden_size=8),
        node("Squeeze", ["last", "axis"], ["state"]),
        node("Gemm", ["state", "out", "bias"], ["logits"], transB=1),
    ]
    model = model_of(nodes, weights | {"axis": np.array([0])}, [5], 4)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def test_tokens_and_what_int8_leaves_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.random.default_rng(0).integers(0, 20, (400, 5))
    arrays = {"x": tokens, "y": tokens[:, -1] % 4}
    run = make_run(tmp_path, model=token_model(), arrays=arrays, training='optimizer = "adam"', rate=0.02, more=OWN)
    found = export(run, tmp_path / "out", "--quantize", "none,int8,fp16", "--calibrate", tmp_path / "device.npz", "--density", "1")
    assert [row["score"] > 0.9 for row in found["models"]] == [True] * 3
    assert found["models"][1]["left_float32"] == {"LSTM": 448}
    assert any("LSTM (448 numbers)" in note for note in found["notes"])
    capsys.readouterr()
    assert main(["model", "check", "--task", str(run / "task"), "--batch", "8", "--steps", "1"]) == 0
    assert "the optimizer remembers 1337 numbers" in capsys.readouterr().out
    np.savez(tmp_path / "beyond.npz", x=tokens + 60, y=arrays["y"])
    asked = ["export", str(run), "--out", str(tmp_path / "no"), "--quantize", "int8", "--calibrate", str(tmp_path / "beyond.npz")]
    assert main(asked) == 1
    assert ", but the model's tokens are 0 to " in capsys.readouterr().err


def test_the_last_layer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, model=normal_net(), arrays=pictures(), training="train_last = 1", more=OWN)
    found = export(run, tmp_path / "out", "--density", "0.5")
    before = initializers(run / "task" / "model.onnx")
    for row in found["models"]:
        after = initializers(tmp_path / "out" / row["file"])
        assert {name for name in before if not np.array_equal(before[name], after[name])} == {"fc2", "fc2.bias"}
    assert [row["nonzero"] for row in found["models"]] == [818 - 35, 818]
    assert any("densities are of the 70 trained parameters" in note for note in found["notes"])
    assert not any("running means" in note for note in found["notes"])
    capsys.readouterr()
    assert main(["model", "check", "--run", str(run), "--steps", "1", "--batch", "8"]) == 0
    assert "train_last = 1: 794 numbers stay as they are" in capsys.readouterr().out
