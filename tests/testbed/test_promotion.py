"""A model on its way into use, with real processes: promoted while `serve` runs, taken by agents, withdrawn, used."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_server.broker import Kind
from cli.main import main
from edge_agent.model_folder import ModelFolder
from export.models import digits_mlp
from export.task import save_model
from tests.docs.blocks import blocks
from tests.docs.generate import ROOT
from tests.testbed.processes import Child, Fleet, task_text

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("used", stop="seconds = 100"), kind="amqtt") as fleet:
        yield fleet


def promote(fleet: Fleet, *options: object) -> Child:
    child = fleet.start(["promote", fleet.run, *options], "promote.log")
    assert child.ended() == 0, child.text()
    return child


def placed(fleet: Fleet, name: str) -> str | None:
    """The hexadecimal digest of the model that a device has in place."""
    current = ModelFolder(fleet.folder / f"{name}.state", "used").current()
    return None if current is None else current.about.digest


def a_model_comes_into_use(fleet: Fleet, kind: Kind) -> None:
    serve = fleet.serve()
    fleet.add({"one": 4000.0, "two": 4000.0})
    for name in ("one", "two"):
        fleet.device(name)
    fleet.reach_version(4)

    said = promote(fleet).text()
    assert "a running `regrow serve` publishes it" in said
    good = placed(fleet, "one")
    assert good is not None
    assert good == placed(fleet, "two")
    assert said.count("placed") >= 4  # a line each, and in the table
    before = fleet.version()
    fleet.reach_version(before + 2)  # nobody was disturbed

    bad = fleet.folder / "bad.onnx"
    save_model(digits_mlp(2), bad)  # never trained
    said = promote(fleet, "--model", bad).text()
    assert said.count("kept") >= 4
    assert "worse on this device's validation data" in said
    assert placed(fleet, "one") == placed(fleet, "two") == good
    assert "promotion device=one promotion=2 outcome=kept" in serve.text()

    assert serve.stop() == 0
    fleet.devices["one"].kill()
    fleet.device("one")
    said = promote(fleet, "--withdraw", "--port", fleet.port, "--broker-kind", kind).text()
    assert "used model 3: withdrawn by" in said
    assert said.count("placed") >= 4
    assert placed(fleet, "one") == placed(fleet, "two") == good


def test_a_model_comes_into_use(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a_model_comes_into_use(fleet, "amqtt")
    assert main(["runs", "--runs", str(fleet.runs)]) == 0
    assert "3: 2 of 2" in capsys.readouterr().out
    monkeypatch.chdir(fleet.folder)
    assert main(["predict", "one.state", "--data", "one.npz"]) == 0
    said = capsys.readouterr()
    assert "200 examples" in said.err
    assert re.search(r"accuracy [01]\.", said.err)
    classes = [int(line.split()[0]) for line in said.out.splitlines()]
    assert the_example(fleet).argmax(axis=1).tolist() == classes


def the_example(fleet: Fleet) -> NDArray[np.float32]:
    """What the lines in docs/using-the-model.md give beside this device."""
    (block,) = [block for block in blocks(ROOT / "docs" / "using-the-model.md") if block.language == "python"]
    text = block.text.replace("regrow-state-wearer-03/models/sensors", "one.state/models/used").replace("samples.npz", "one.npz")
    command = [sys.executable, "-c", f"{text}\nnp.save('scores.npy', scores)"]
    subprocess.run(command, cwd=fleet.folder, check=True, timeout=60)
    scores: NDArray[np.float32] = np.load(fleet.folder / "scores.npy")
    return scores
