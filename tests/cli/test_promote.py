"""`regrow promote` and `regrow predict`: what they sign off, what they refuse, and in which words."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from broker_server.promotions import Promotions
from broker_server.store import Store
from cli.main import FAILED, INTERRUPTED, MISUSED, main
from edge_agent.model_folder import About, ModelFolder
from export.models import digits_mlp
from export.task import save_model
from regrow import wire
from tests.broker_server.histories import new_run, play
from tests.edge_agent.promotion_rig import digits, linear, untrained_head
from tests.edge_agent.test_scan import words_model
from tests.testbed.processes import Child, until

Fails = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = new_run(tmp_path)
    play(path, 2)
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def check(*arguments: object) -> str:
        assert main([str(part) for part in arguments]) in (FAILED, MISUSED)
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return check


def signed(run: Path) -> Promotions:
    return Promotions(run.parent, "digits")


# ---- promote -----------------------------------------------------------------------------------------------------------------------


def test_the_model_is_the_one_of_the_durable_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "task" / "model.onnx").read_bytes()
    for _ in range(2):  # the second time changes nothing
        assert main(["promote", str(run), "--no-wait", "--by", "ada"]) == 0
        assert "digits model 1: promoted by ada at" in capsys.readouterr().out
    (decision,) = signed(run).history()
    (model,) = signed(run).files(decision).values()
    assert model != before
    assert (decision.run, decision.version, decision.who, decision.head) == (run.name, 2, "ada", None)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    play(run, 1)
    assert main(["promote", str(run), "--no-wait"]) == 0
    assert [decision.version for decision in signed(run).history()] == [2, 3]


def test_it_works_while_the_run_is_served(run: Path) -> None:
    with Store.open(run):
        assert main(["promote", str(run), "--no-wait"]) == 0
    assert signed(run).newest_number() == 1


def test_with_a_head_the_model_is_open_and_what_trains_it_goes_along(run: Path) -> None:
    assert main(["promote", str(run), "--no-wait", "--local-head"]) == 0
    (decision,) = signed(run).history()
    announced = signed(run).announcement(decision)
    assert announced.head is not None
    assert [blob.name for blob in announced.head.programs] == ["layout", "train", "initial"]
    model = onnx.load_from_string((signed(run).path / f"{decision.digest}.onnx").read_bytes())
    assert [value.name for value in model.graph.input] == ["x", "fc2.weight", "fc2.bias"]


def test_withdrawing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", str(run), "--no-wait"]) == 0
    assert main(["promote", str(run), "--withdraw", "--no-wait"]) == 0
    assert "none was promoted before, so devices use none" in capsys.readouterr().out


def test_what_cannot_be_promoted_is_refused_and_recorded_nowhere(run: Path, tmp_path: Path, fails: Fails) -> None:
    other, broken, foreign = tmp_path / "other.onnx", tmp_path / "broken.onnx", tmp_path / "foreign.onnx"
    other.write_bytes(linear())
    broken.write_bytes(b"not a model")
    model = digits_mlp(1)
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, foreign)
    assert "output scores of [10] each, but the task's model has output logits of [10] each" in fails("promote", run, "--model", other)
    assert "cannot be used on devices" in fails("promote", run, "--model", broken)
    assert "operator outside ai.onnx" in fails("promote", run, "--model", foreign)
    assert "No such file" in fails("promote", run, "--model", tmp_path / "none.onnx")
    assert "goes out as it is" in fails("promote", run, "--model", other, "--local-head")
    assert "goes with neither" in fails("promote", run, "--model", other, "--withdraw")
    assert "none to withdraw" in fails("promote", run, "--withdraw")
    assert "holds no run" in fails("promote", tmp_path)
    assert signed(run).history() == []


def test_another_file_goes_out_byte_for_byte(run: Path, tmp_path: Path) -> None:
    save_model(digits_mlp(5), tmp_path / "mine.onnx")
    assert main(["promote", str(run), "--model", str(tmp_path / "mine.onnx"), "--no-wait"]) == 0
    (decision,) = signed(run).history()
    assert list(signed(run).files(decision).values()) == [(tmp_path / "mine.onnx").read_bytes()]
    assert decision.file == "mine.onnx"


def test_a_port_that_is_taken_refuses_before_anything_is_signed(fails: Fails, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = fails("promote", run, "--port", taken.getsockname()[1], "--broker-kind", "amqtt")
    assert "cannot listen on" in said
    assert signed(run).history() == []
    assert "signed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nets.py", "nets.py:small"])
def test_a_python_file_is_told_what_is_expected(fails: Fails, run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "nets.py").write_text("x = 1\n")
    assert "expected an ONNX file" in fails("promote", run, "--model", tmp_path / name)
    (tmp_path / "model.onnx").write_text("x = 1\n")
    assert "give a forward ONNX file" in fails("promote", run, "--model", tmp_path / "model.onnx")
    assert signed(run).history() == []


def test_an_ort_file_is_refused_before_a_broker_is_started(fails: Fails, run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # which a broker would complain of first
        said = fails("promote", run, "--model", tmp_path / "model.ort", "--port", taken.getsockname()[1], "--broker-kind", "amqtt")
    assert "a .ort file is not taken" in said
    assert signed(run).history() == []


def test_ctrl_c_ends_the_waiting_and_the_broker_and_keeps_the_decision(run: Path, tmp_path: Path) -> None:
    child = Child(["promote", run, "--port", 0, "--broker-kind", "amqtt"], tmp_path / "promote.log")
    try:
        child.said("publishing; devices that are away")
        brokers = psutil.Process(child.pid).children(recursive=True)
        assert brokers
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all that it has in front
        assert child.ended() == INTERRUPTED
    finally:
        child.kill()
    assert "stays signed off" in child.text()
    assert "no answer to model 1 yet from d1" in child.text()
    assert "Traceback" not in child.text()
    assert "connection lost" not in child.text()
    until(lambda: not any(broker.is_running() for broker in brokers), "the broker has ended")
    assert signed(run).newest_number() == 1


# ---- predict -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "regrow-state-d1"
    path.mkdir()
    place(path, "toy", linear())
    return path


def place(state: Path, task: str, model: bytes, head: dict[str, np.ndarray] | None = None) -> None:
    ModelFolder(state, task).place(model, About(task, 1, wire.digest(model).hex(), "r1", 1), head)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    x, y = digits(50).everything()
    np.savez(tmp_path / "d.npz", x=x, y=y)
    return tmp_path / "d.npz"


def test_predictions_with_labels_and_without(state: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(state), "--data", str(data)]) == 0
    said = capsys.readouterr()
    assert "50 examples" in said.err
    assert "accuracy 1.000" in said.err
    x, y = np.load(data)["x"], np.load(data)["y"]
    assert [int(line.split()[0]) for line in said.out.splitlines()] == y.tolist()
    np.savez(tmp_path / "x.npz", x=x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header=",".join(f"f{i}" for i in range(64)), comments="")
    for source in (tmp_path / "x.npz", f"csv:{tmp_path / 'x.csv'}"):
        assert main(["predict", str(state), "--data", str(source)]) == 0
        alone = capsys.readouterr()
        assert alone.out.split()[::2] == said.out.split()[::2]
        assert "accuracy" not in alone.err


def test_scores_are_written(state: Path, data: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("s.npz", "s.csv"):
        assert main(["predict", str(state), "--data", str(data), "--out", str(tmp_path / name)]) == 0
    scores = np.load(tmp_path / "s.npz")["scores"]
    table = np.loadtxt(tmp_path / "s.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(table, scores)
    assert scores.shape == (50, 10)
    capsys.readouterr()
    assert "ends in .npz or .csv" in fails("predict", state, "--data", data, "--out", tmp_path / "s.txt")


@pytest.mark.usefixtures("state")
def test_a_bundle_names_the_state_beside_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "d1.json").write_text(json.dumps({"device": "d1", "broker": "mqtt://127.0.0.1:1", "password": "x"}))
    assert main(["predict", str(tmp_path / "d1.json"), "--data", str(data)]) == 0


def test_a_local_head_is_used_unless_it_shall_not_be(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = onnx.load_from_string(linear()).graph.initializer
    place(tmp_path, "toy", untrained_head()[0], {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in good})
    assert main(["predict", str(tmp_path), "--data", str(data)]) == 0
    assert "with its local head: accuracy 1.000" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "--data", str(data), "--no-head"]) == 0
    assert "accuracy 1.000" not in capsys.readouterr().err


def test_what_predict_cannot_do_it_says(state: Path, data: Path, tmp_path: Path, fails: Fails) -> None:
    place(state, "other", linear(wrong=1))
    assert "holds models of other, toy: say which with --task" in fails("predict", state, "--data", data)
    assert "no promoted model of none" in fails("predict", state, "--data", data, "--task", "none")
    assert "holds no promoted model" in fails("predict", tmp_path, "--data", data)
    (state / "models" / "other" / "current" / "model.onnx").write_bytes(b"cut")
    assert "the promoted model of other is damaged" in fails("predict", state, "--data", data, "--task", "other")
    assert "make it on the gateway" in fails("predict", tmp_path / "no.json", "--data", data)
    np.savez(tmp_path / "narrow.npz", x=np.zeros((3, 5), np.float32))
    assert "takes float32" in fails("predict", state, "--task", "toy", "--data", tmp_path / "narrow.npz")
    np.savez(tmp_path / "none.npz", z=np.zeros(3))
    assert "no array 'x'" in fails("predict", state, "--task", "toy", "--data", tmp_path / "none.npz")
    (tmp_path / "d1.json").write_text(json.dumps({"device": "d9", "broker": "mqtt://127.0.0.1:1", "password": "x"}))
    assert "regrow-state-d9" in fails("predict", tmp_path / "d1.json", "--data", data)


def test_a_token_that_the_model_does_not_know_is_one_clear_error(tmp_path: Path, fails: Fails) -> None:
    state = tmp_path / "regrow-state-d1"
    state.mkdir()
    place(state, "toy", words_model().SerializeToString())
    x = np.zeros((5, 4), np.int64)
    x[3, 1] = 30
    np.savez(tmp_path / "t.npz", x=x)
    said = fails("predict", state, "--data", tmp_path / "t.npz")
    assert said.endswith("t.npz: row 3 (the first is 0): token 30, but the model's tokens are 0 to 29")
    x[3, 1] = 29
    np.savez(tmp_path / "l.npz", x=x, y=np.array([0, 1, 2, 3, 0]))
    assert "l.npz: row 3 (the first is 0): label 3, but the task's labels are 0 to 2" in fails(
        "predict", state, "--data", tmp_path / "l.npz"
    )
