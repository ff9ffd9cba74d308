"""Which engine trains in a simulation, by name: onnxruntime as on devices, or torch, which is loaded only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Protocol

from edge_agent.data.source import DataSource
from edge_agent.trainer import Trainer
from edge_agent.worker import LevelTrainers, train_job
from regrow.errors import LocalError, UsageError
from regrow.local_training import Training
from regrow.machine import Train, Trained

TRAINERS = ("onnxruntime", "torch", "torch-cuda")


class Engine(Protocol):
    """`whole` trains and scores the full model; `train` does whole jobs; `together`: whether it gains by getting many at once."""

    @property
    def whole(self) -> Training: ...

    @property
    def together(self) -> bool: ...

    def train(self, jobs: Sequence[tuple[DataSource, Train]]) -> list[Trained]: ...


class OnnxEngine:
    """What devices do, one job after the other."""

    together = False

    def __init__(self, programs: Mapping[str, bytes]) -> None:
        self.whole = Trainer(programs)
        self._trainers = LevelTrainers(programs)

    def train(self, jobs: Sequence[tuple[DataSource, Train]]) -> list[Trained]:
        """The jobs' results in their order; errors as edge_agent.worker.train_job."""
        return [train_job(self._trainers, source, job) for source, job in jobs]


def check_trainer(name: str) -> None:
    """What can be told of a trainer before the first run, without a task.

    Raises:
        LocalError: the name is unknown, torch is not installed, or there is no CUDA device.
    """
    if name not in TRAINERS:
        raise UsageError(f"trainer {name!r}: known are {', '.join(TRAINERS)}")
    if name == "onnxruntime":
        return
    if find_spec("torch") is None:
        raise LocalError(f"trainer {name}: torch is not installed here; pip install 'regrow[sim,torch]'")
    if name == "torch-cuda":
        from export.torch_trainer import check_cuda

        check_cuda()


def engine_of(name: str, programs: Mapping[str, bytes]) -> Engine:
    """The engine of that name for a task's programs.

    Raises:
        LocalError: the name is unknown, torch is not installed, there is no CUDA device, or torch lacks an op of the model.
        PeerError: a layout is malformed.
    """
    check_trainer(name)
    if name == "onnxruntime":
        return OnnxEngine(programs)
    from testbed.torch_engine import TorchEngine

    return TorchEngine(programs, device="cuda" if name == "torch-cuda" else "cpu", together=True)
