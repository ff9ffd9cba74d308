"""`regrow serve` takes every method by name, from task.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.gateway import built
from cli.main import MISUSED, main
from export.models import digits_mlp
from export.task import save_model
from regrow.coordinator import Coordinator
from regrow.ledger import Ledger
from regrow.methods import METHODS, named
from regrow.task import task_from_tables

COMPOSED = ("fiarse+restore", "fedgmr-fa", "fedgmr-sync")


def task_folder(folder: Path, method: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "task.toml").write_text(f'name = "toy"\n\n[method]\nname = "{method}"\nladder = [0.5, 1.0]\n')
    save_model(digits_mlp(1), folder / "model.onnx")
    return folder


@pytest.mark.parametrize("method", [*METHODS, *COMPOSED])
def test_a_method_is_served_by_its_name(tmp_path: Path, method: str) -> None:
    folder = built(task_folder(tmp_path / "toy", method))
    tables = named(method)
    tables["method"] |= {"name": method, "ladder": (0.5, 1.0)}
    assert folder.task == task_from_tables({"name": "toy", **tables}, "here")
    ledger = Ledger.start(folder.task, folder.layout, folder.initial, folder.units)
    assert Coordinator(ledger, "run", folder.programs, 1).ledger.order.size == folder.layout.size


def test_serve_refuses_a_wrong_name_with_its_line_and_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = task_folder(tmp_path / "toy", "fiarse+restored")
    assert main(["serve", str(folder), "--runs", str(tmp_path / "runs"), "--port", "0"]) == MISUSED
    said = capsys.readouterr().err
    assert "task.toml:4: name at $.method: method 'fiarse+restored'" in said
    assert all(name in said for name in METHODS)
    assert not list((tmp_path / "runs").glob("*/log.sqlite"))
