"""Fixtures of the simulator's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main
from export.models import reduced_cnn
from export.task import save_model
from tests.testbed.bars import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files as Fashion-MNIST's."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder with the reduced CNN."""
    folder = tmp_path_factory.mktemp("tasks") / "bars"
    folder.mkdir()
    save_model(reduced_cnn(1), folder / "forward.onnx")
    assert main(["task", "new", str(folder), "--model", str(folder / "forward.onnx")]) == 0
    return folder
