"""What training needs survives the way in from torch."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from cli.main import MISUSED, main
from export.forward import read_forward
from export.from_torch import from_torch, from_torch_file
from regrow.errors import LocalError
from tests.testbed.processes import ROOT

torch.set_num_threads(1)


class Everything(nn.Module):
    """Two equal weights, a shared one, a frozen one, one that nothing uses, a buffer, dropout, and BatchNorm behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.twin, self.shared = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.twin.weight.data.copy_(self.first.weight.data)
        self.shared.weight = self.first.weight
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.unused = nn.Parameter(torch.rand(4))
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.rand(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = self.twin(self.dropout(self.first(x) * self.buffer))
        return self.shared(x + self.frozen)


@pytest.fixture(scope="module")
def module() -> Everything:
    torch.manual_seed(0)
    network = Everything()
    network(torch.randn(20, 1, 8, 8))  # so that the running statistics are not those of a new module
    return network


@pytest.fixture(scope="module")
def model(module: Everything) -> onnx.ModelProto:
    state = copy.deepcopy(module.state_dict())
    model = from_torch(module, torch.zeros(1, 1, 8, 8))
    assert module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    return model


def test_parameters_stay_apart_under_their_names_and_the_rest_is_constant(module: Everything, model: onnx.ModelProto) -> None:
    reals = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type == 1}
    trained = ["conv.weight", "norm.weight", "norm.bias", "first.weight", "twin.weight"]
    assert list(reals) == [*trained, "norm.running_mean", "norm.running_var"]
    for name, array in reals.items():
        np.testing.assert_array_equal(array, module.state_dict()[name].numpy(), name)
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == 1
    assert not any(node.op_type == "Dropout" for node in model.graph.node)
    assert not model.functions
    assert read_forward(model).input_shape == (None, 1, 8, 8)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_it_computes_what_the_module_does_at_inference_for_any_batch(module: Everything, model: onnx.ModelProto, batch: int) -> None:
    x = torch.randn(batch, 1, 8, 8)
    with torch.no_grad():
        expected = copy.deepcopy(module).eval()(x).numpy()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-6)


def test_no_path_of_this_machine_travels_with_the_model(model: onnx.ModelProto) -> None:
    assert str(Path(__file__).parent).encode() not in model.SerializeToString()


def test_shapes_that_an_lstm_computes_are_known() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 3, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.lstm(x)[0]
            return outputs[:, -1]

    network = Last()
    model = from_torch(network, torch.zeros(1, 5, 2))
    shapes = read_forward(model).shapes
    layers = [node.input[0] for node in read_forward(model).nodes if node.op_type == "LSTM"]
    assert [shapes[name][0] for name in layers] == [5, 5]
    x = torch.randn(4, 5, 2)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_tokens_come_in_as_whole_numbers() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    forward = read_forward(from_torch(network, torch.zeros(1, 3, dtype=torch.int64)))
    assert (forward.input_type, forward.input_shape) == (onnx.TensorProto.INT64, (None, 3))
    assert list(forward.parameters) == ["0.weight", "2.weight", "2.bias"]


def test_a_module_that_depends_on_its_data_is_refused_with_the_reason() -> None:
    class Fork(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(LocalError, match=r"torch cannot export Fork with a dynamic batch: .*data-dependent"):
        from_torch(Fork(3, 3), torch.zeros(1, 3))


def test_a_task_is_made_from_a_file_with_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "network.py").write_text(
        "from torch import nn, zeros\n\ndef small():\n    return nn.Linear(8, 3), zeros(1, 8)\n\ndef alone():\n    return nn.Linear(8, 3)\n"
    )
    assert main(["task", "new", str(tmp_path / "task"), "--model", f"{tmp_path}/network.py:small"]) == 0
    assert list(read_forward(onnx.load(tmp_path / "task" / "model.onnx")).parameters) == ["weight", "bias"]
    assert main(["task", "new", str(tmp_path / "other"), "--model", f"{tmp_path}/network.py:large"]) == MISUSED
    assert "defines no function 'large'" in capsys.readouterr().err
    with pytest.raises(LocalError, match=r"returned \(Linear\); return a torch\.nn\.Module and one tensor"):
        from_torch_file(f"{tmp_path}/network.py:alone")
    with pytest.raises(LocalError, match=r"(?s)raised TypeError: .*; it must take nothing and return"):
        from_torch_file(f"{tmp_path}/network.py:zeros")
    with pytest.raises(LocalError, match=r"no file 'nowhere\.py'"):
        from_torch_file("nowhere.py:small")


def test_an_example_of_the_wrong_shape_is_one_line_with_torch_s_own_reason(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text("from torch import nn, zeros\n\ndef net():\n    return nn.Linear(8, 3), zeros(2, 9)\n")
    words = [sys.executable, "-m", "cli.main", "model", "check", "network.py:net"]
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("regrow: network.py:net: Linear does not run on its example [batch, 9] of float32: ")
    assert "2x9 and 8x3" in line
    assert "return an example input of the shape" in line


BRANCHING = """
import torch

class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)

def net():
    return Branching(), torch.zeros(1, 8)
"""


def test_the_exporter_says_nothing_but_its_error(tmp_path: Path) -> None:
    """In a process of its own: torch's own handlers write where no fixture looks."""
    (tmp_path / "network.py").write_text(BRANCHING)

    def said(*options: str) -> list[str]:
        words = [sys.executable, "-m", "cli.main", *options, "task", "new", "task", "--model", "network.py:net"]
        done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return (done.stdout + done.stderr).splitlines()

    (line,) = said()
    assert line.startswith("regrow: network.py:net: torch cannot export Branching with a dynamic batch: ")
    assert len(said("--log")) > 1
