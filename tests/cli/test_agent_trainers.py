"""`regrow agent --trainer`: torch trains what onnxruntime trains, and is loaded only when it is asked for."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.gateway import Gateway
from broker_server.runs import create_run, load_task, recover
from broker_server.store import Store
from cli.device import samples_in_words, trainer_of
from cli.main import main
from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from edge_agent.worker import Worker
from export.models import digits_mlp
from export.programs import build_programs, initial_vector
from export.task import build_task, save_model
from regrow.coordinator import Coordinator
from regrow.machine import Train, Trained, TrainingFailed
from tests.testbed.processes import Child, write_digits

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
# No uplink deserves the second level, so the update has masks; values travel as they are.
TASK = """name = "digits"
[method]
name = "fedgmr"
ladder = [0.3, 1.0]
full_density_bps = 1e12
[training]
local_steps = 20
learning_rate = 0.1
[trigger]
kind = "all"
[restoration]
trigger = "none"
[wire]
up = "float32"
down = "float32"
[fleet]
join_s = 0.0
[stop]
aggregations = 1
"""


def aggregated(folder: Path, trainer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(initial model, model after the one update of an agent with this trainer)."""
    task, credentials = folder / "task", Credentials(folder / "secrets")
    task.mkdir(parents=True)
    (task / "task.toml").write_text(TASK)
    save_model(digits_mlp(1), task / "model.onnx")
    build_task(task, task / "model.onnx")
    write_digits(folder / "d1.npz", seed=1)
    path, loaded = create_run(folder / "runs", load_task(task), "run"), load_task(task)
    credentials.add_device("d1")
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(path))
        broker = Broker(folder / "broker", credentials, kind="amqtt")
        stack.callback(broker.stop)
        broker.start()
        coordinator = Coordinator(recover(store, loaded), path.name, loaded.programs, 1)
        gateway = Gateway(coordinator, store, url=broker.url, username=COORDINATOR, password=credentials.coordinator_password)
        bundle = credentials.write_bundle("d1", broker.url, folder)
        agent = Child(["agent", "--bundle", bundle, "--data", "d1.npz", "--state", "state", "--trainer", trainer], folder / "d1.log")
        stack.callback(agent.kill)
        watchdog = threading.Timer(WAIT_S, gateway.stop)
        stack.callback(watchdog.cancel)
        watchdog.start()
        gateway.run(housekeeping=lambda: broker.poll() or (None if agent.running else agent.text()))
        assert coordinator.ledger.version == 1, agent.text()
    return loaded.initial, coordinator.ledger.flat_weights.copy()


def test_an_agent_on_torch_sends_the_update_of_one_on_onnxruntime(tmp_path: Path) -> None:
    initial, theirs = aggregated(tmp_path / "onnxruntime", "onnxruntime")
    _, mine = aggregated(tmp_path / "torch", "torch")
    way = np.linalg.norm(theirs - initial)
    assert 0 < np.count_nonzero(theirs != initial) < initial.size, "a sub-model was trained"
    assert np.linalg.norm(mine - theirs) <= 1e-4 * way
    np.testing.assert_array_equal(mine == initial, theirs == initial)


# ---- what a device must not load -----------------------------------------------------------------------------------------------------


def test_the_bare_install_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import cli.main, cli.device, edge_agent.agent, edge_agent.trainer, edge_agent.worker, edge_agent.data.sources, json, sys\n"
        "cli.device.trainer_of('onnxruntime')\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(answer.stdout))
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "export", "testbed", "broker_server", "amqtt", "rich", "matplotlib"}


@pytest.mark.parametrize(("trainer", "gone"), [("torch", "torch"), ("torch-cuda", "onnx")])
def test_a_missing_package_is_one_line_with_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trainer: str, gone: str
) -> None:
    monkeypatch.setitem(sys.modules, gone, None)
    assert main(agent_words(tmp_path, trainer)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--trainer {trainer}: {gone} not installed here; pip install 'regrow[torch]'" in line


def test_torch_cuda_without_cuda_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(agent_words(tmp_path, "torch-cuda")) == 1
    assert "torch finds no CUDA device on this machine; use --trainer torch or onnxruntime" in capsys.readouterr().err


def agent_words(folder: Path, trainer: str) -> list[str]:
    write_digits(folder / "d1.npz", seed=1)
    credentials = Credentials(folder / "secrets")
    credentials.add_device("d1")
    bundle = credentials.write_bundle("d1", "mqtt://127.0.0.1:1", folder)
    return ["agent", "--bundle", str(bundle), "--data", str(folder / "d1.npz"), "--state", str(folder / "state"), "--trainer", trainer]


# ---- programs that came over the network ---------------------------------------------------------------------------------------------


def job_of(programs: dict[str, bytes]) -> Train:
    vector = initial_vector(digits_mlp(1))
    everything = np.arange(vector.size, dtype=np.uint32)
    return Train(1, 4, programs, vector, everything, vector.size, {}, steps=2, batch=10, learning_rate=0.1, seed=5)


def damaged(program: bytes, how: str) -> bytes:
    model = onnx.load_model_from_string(program)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    if how == "another file":
        outside = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
        outside.data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer.append(outside)
    elif how == "another domain":
        node.domain = "com.example"
    elif how == "no such value":
        node.input[0] = "nowhere"
    else:
        node.op_type = "Transpose"
        node.attribute.append(helper.make_attribute("perm", [1, 0]))
    return model.SerializeToString()


def test_a_program_that_fails_on_torch_ends_its_job_and_not_the_agent_s_training() -> None:
    programs, rng = build_programs(digits_mlp(1)), np.random.default_rng(0)
    source = DataSource(60, 0.2)
    source.append(rng.random((60, 64), np.float32), rng.integers(0, 10, 60))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with closing(Worker(source, results.put, make=trainer_of("torch"))) as worker:
        for how in ("another file", "another domain", "no such value", "shapes that do not fit"):
            worker.put(job_of({**programs, "evaluate": damaged(programs["evaluate"], how)}))
            assert isinstance(results.get(timeout=WAIT_S), TrainingFailed), how
        worker.put(replace(job_of(programs), number=2))
        assert isinstance(results.get(timeout=WAIT_S), Trained)


def test_the_agent_s_threads_are_torch_s() -> None:
    before = torch.get_num_threads()
    try:
        trainer_of("torch")(build_programs(digits_mlp(1)), 3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert trainer_of("onnxruntime") is Trainer


def test_an_agent_says_what_it_holds_and_that_nothing_can_be_scored() -> None:
    assert samples_in_words(480, 120) == "480 samples to train on, 120 to validate with"
    assert samples_in_words(1, 0).startswith("1 sample to train on, 0 to validate with (so it sends no scores: ")
