"""What a board reports: golden numbers that wrong arithmetic misses, and measurements of this machine that hold together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from edge_agent import board_check
from edge_agent.board_check import GOLDEN, batches, golden_programs, initial, parity
from edge_agent.trainer import Trainer
from regrow.errors import LocalError


def test_this_machine_reaches_the_golden_numbers() -> None:
    found = parity(Trainer(golden_programs()))
    assert found["ok"], found


def test_a_machine_that_computes_otherwise_misses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_check, "LEARNING_RATE", 0.0501)
    found = parity(Trainer(golden_programs()))
    assert not found["ok"]
    assert found["parameters"] > 10 * found["tolerance"]


def test_inputs_come_from_whole_numbers() -> None:
    (x, y), (next_x, _) = batches(2)
    assert (x.dtype, x.shape, y.dtype, y.shape) == (np.float32, (20, 6, 100), np.int64, (20,))
    assert x[0, 0, :3].tolist() == [-2.0, np.float32(-1.297), np.float32(-0.594)]
    assert not np.array_equal(x, next_x)
    whole = (-1001, 7919 % 2003 - 1001, 15838 % 2003 - 1001)
    assert initial(3).tolist() == [np.float32(number / 20_000) for number in whole]


def test_the_report_has_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["board", "check", "--minutes", "0.02", "--folder", str(tmp_path), "--out", str(tmp_path / "board.json")]) == 0
    report = json.loads((tmp_path / "board.json").read_text())
    assert set(report) == {"format", "machine", "parity", "step_ms", "disk", "sensors", "warm", "peak_memory_mb"}
    assert report["step_ms"]["1"] > 0
    assert report["disk"]["write_mb_s"] > 0
    assert report["disk"]["worst_sync_ms"] >= report["disk"]["sync_ms"] > 0
    assert report["warm"]
    assert report["machine"]["packages"].keys() >= {"numpy", "onnxruntime"}
    assert {"temperature", "throttling", "power.sensor", "disk.card"} <= {finding["check"] for finding in report["sensors"]}
    assert [path.name for path in tmp_path.iterdir()] == ["board.json"]
    assert "golden numbers: reached" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="--folder"):
        board_check.disk(tmp_path / "missing")
    assert main(["board", "check", "--folder", str(tmp_path / "missing")]) == 2


def test_the_golden_files_are_few_and_small() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == ["expected.json", "layout.json", "train.onnx"]
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 20_000
