"""The golden numbers of `regrow board check`: a program of the watch CNN, and where torch ends with it. Run me to write them anew."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edge_agent.board_check import GOLDEN, LEARNING_RATE, STEPS, batches, expected_of, initial
from export.models import watch_cnn
from export.task import build_task, save_model
from export.torch_trainer import TorchTrainer


def files() -> dict[str, bytes]:
    """What belongs into edge_agent/golden."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "task.toml").write_text('name = "board"\n')
        save_model(watch_cnn(1), folder / "model.onnx")
        build_task(folder, folder / "model.onnx")
        programs = {name: (folder / "build" / name).read_bytes() for name in ("layout.json", "train.onnx", "evaluate.onnx")}
    torch = TorchTrainer({name.partition(".")[0]: data for name, data in programs.items()}, 1)
    result = torch.train(initial(torch.layout.size), None, batches(STEPS), LEARNING_RATE)
    text = json.dumps(expected_of(result.vector, result.loss), indent=1) + "\n"
    del programs["evaluate.onnx"]
    return {**programs, "expected.json": text.encode()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, data in files().items():
        (GOLDEN / name).write_bytes(data)
