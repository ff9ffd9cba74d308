"""Training on torch, beside edge_agent.trainer: the same step, for one client or for several of a wave at once. Imports torch.

Several clients are one more axis in front: their parameters, masks and batches are stacked, the forward graph is mapped over the clients
(torch.func.vmap), and since no client's loss depends on another's parameters, the gradient of the sum of their losses holds the gradient
of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.torch_graph import graph_of_program
from export.torch_steps import FlatOptimizer, client_losses, score_sums
from regrow.errors import LocalError, PeerError
from regrow.examples import Examples, described, r_squared
from regrow.local_training import Batch, Score, Statistics, TrainResult, average_statistics
from regrow.parameters import Layout

# What torch raises (its own exceptions, out of memory too, are RuntimeErrors), and what a graph that contradicts itself leads to.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


@contextmanager
def _telling() -> Iterator[None]:
    """Failures of the program are told as the device's trainer tells onnxruntime's, so that they end a job and not the training thread."""
    try:
        yield
    except _FAILURES as error:
        raise PeerError(f"program 'evaluate' failed on torch: {error!r}") from error


@dataclass(frozen=True)
class Share:
    """One client's part of a wave: the arguments of `Trainer.train`."""

    vector: NDArray[np.float32]
    kept: NDArray[np.bool_] | None
    batches: Iterable[Batch]
    learning_rate: float


class TorchTrainer:
    """edge_agent.trainer.Trainer on torch, in float32.

    Its results are onnxruntime's up to rounding. On the CPU they repeat to the bit for the same clients in the same wave; how clients are
    put together changes the rounding.

    Args:
        programs: 'layout' and 'evaluate'; the training step is derived from the forward graph in the latter.
        threads: of torch on the CPU, in this whole process.
        device: "cpu" or "cuda".

    Raises:
        PeerError: the layout is malformed, or the program fails.
        LocalError: a program is missing or has an op that torch does not run here, or there is no CUDA.
    """

    def __init__(self, programs: Mapping[str, bytes], threads: int = 1, *, device: str = "cpu") -> None:
        missing = [name for name in ("layout", "evaluate") if name not in programs]
        if missing:
            raise LocalError(f"there is no program {missing[0]!r}; this trainer was given {sorted(programs)}")
        self._device = _device(device, threads)
        self.layout = Layout.from_json(programs["layout"])
        with _telling():
            self._graph = graph_of_program(programs["evaluate"])
        if dict(self._graph.parameters) != {tensor.name: tensor.shape for tensor in self.layout.tensors}:
            raise LocalError("the layout is not that of the evaluation program; build the task again with `regrow task build`")

    @property
    def has_statistics(self) -> bool:
        """Whether the model has batch normalisation."""
        return bool(self._graph.statistics)

    def examples(self, *, masked: bool) -> Examples:  # noqa: ARG002  # one graph serves both
        """As edge_agent.trainer.Trainer.examples."""
        return self._graph.examples

    def train(
        self, vector: NDArray[np.float32], kept: NDArray[np.bool_] | None, batches: Iterable[Batch], learning_rate: float
    ) -> TrainResult:
        """As edge_agent.trainer.Trainer.train.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program fails.
        """
        return self.train_together([Share(vector, kept, batches, learning_rate)])[0]

    def train_together(self, shares: Sequence[Share]) -> list[TrainResult]:
        """One result for each client, all of them trained at the same time.

        Args:
            shares: at least one; all with equally many batches. Shorter batches are padded with examples of weight 0; a model with batch
                normalisation would notice those, so it is trained one client after the other.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program fails.
        """
        if self._graph.statistics and len(shares) > 1:
            return [self.train_together([share])[0] for share in shares]
        flat = self._vectors([share.vector for share in shares])
        dropped = None if all(share.kept is None for share in shares) else ~self._masks(shares)
        rates = torch.tensor([[share.learning_rate] for share in shares], dtype=torch.float32, device=self._device)
        optimizer = FlatOptimizer(self._graph.step, flat, dropped, rates)
        losses, counts = list[torch.Tensor](), list[list[int]]()
        for batches in _in_step(shares):
            with _telling():
                x, y, weight = self._stacked(batches)
                flat.requires_grad_(True)
                loss = client_losses(self._graph.step, self._outputs(flat, x), y, weight)
                (gradient,) = torch.autograd.grad(loss.sum(), flat)
                flat = optimizer.moved(flat.detach(), gradient)
            losses.append(loss.detach())
            counts.append([len(features) for features, _ in batches])
        if not losses:
            raise LocalError("there are no batches to train on; give at least one")
        examples = np.array(counts)
        totals = (torch.stack(losses).cpu().numpy().astype(np.float64) * examples).sum(0)
        vectors = flat.detach().cpu().numpy()
        return [
            TrainResult(vectors[index].copy(), float(totals[index] / seen), int(seen), len(losses))
            for index, seen in enumerate(examples.sum(0))
        ]

    def evaluate(
        self,
        vector: NDArray[np.float32],
        x: NDArray[Any],
        y: NDArray[Any],
        batch: int = 256,
        *,
        statistics: Statistics | None = None,
    ) -> Score:
        """As edge_agent.trainer.Trainer.evaluate.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program fails.
        """
        return self.evaluate_together([vector], [(x, y)], batch, [statistics or {}])[0]

    def statistics(self, vector: NDArray[np.float32], examples: Iterable[NDArray[Any]]) -> Statistics:
        """As edge_agent.trainer.Trainer.statistics.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program fails.
        """
        if not self._graph.statistics:
            return {}
        parameters = {name: value[0] for name, value in self._parameters(self._vectors([vector])).items()}
        found = average_statistics(self._batch_statistics(parameters, x) for x in examples)
        if not found:
            raise LocalError("there are no batches to compute the statistics of; give at least one")
        return found

    def _batch_statistics(self, parameters: Mapping[str, torch.Tensor], x: NDArray[Any]) -> Statistics:
        replace(self._graph.examples, y_dtype=None).check(x, x)
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad(), _telling():
            self._graph.forward(parameters, torch.from_numpy(x).to(self._device), found=found)
            return {name: tensor.cpu().numpy() for name, tensor in found.items()}

    def evaluate_together(
        self,
        vectors: Sequence[NDArray[np.float32]],
        data: Sequence[Batch],
        batch: int = 256,
        statistics: Sequence[Statistics] | None = None,
    ) -> list[Score]:
        """One score for each client, each on its own data.

        Args:
            vectors: float32 [n] each.
            data: of each client (x, y) as the program takes them, at least one example.
            statistics: of each client's vector; None: the model has no batch normalisation.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program fails.
        """
        if batch < 1:
            raise LocalError(f"batch is {batch}, but evaluation needs at least 1")
        running = self._running([{}] * len(data) if statistics is None else statistics)
        flat = self._vectors(vectors)
        sums = np.zeros((2, len(data)))
        with torch.no_grad(), _telling():
            for start in range(0, max(len(x) for x, _ in data), batch):
                parts = [(x[start : start + batch], y[start : start + batch]) for x, y in data]
                inputs, targets, weight = self._stacked(parts, may_be_empty=start > 0)
                outputs = self._outputs(flat, inputs, running)
                sums += score_sums(self._graph.step, outputs, targets, weight).cpu().numpy()
        return [self._score(sums[0, index], sums[1, index], x, y) for index, (x, y) in enumerate(data)]

    def _score(self, loss: float, found: float, x: NDArray[Any], y: NDArray[Any]) -> Score:
        target = self._graph.examples.target(x, y)
        accuracy = found / target.size if self._graph.step.counts_hits else r_squared(found, target)
        return Score(float(loss / len(x)), float(accuracy), len(x))

    def _outputs(self, flat: torch.Tensor, x: torch.Tensor, running: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """[clients, batch, ...] of [clients, n] and [clients, batch, ...]; running: [clients, channels] each, None in training."""
        parameters = self._parameters(flat)
        if len(flat) == 1:  # plain torch, without the cost of mapping
            alone = None if running is None else {name: value[0] for name, value in running.items()}
            return self._graph.forward({name: value[0] for name, value in parameters.items()}, x[0], alone)[None]
        if running is None:
            outputs: torch.Tensor = torch.func.vmap(self._graph.forward)(parameters, x)
        else:
            outputs = torch.func.vmap(self._graph.forward)(parameters, x, running)
        return outputs

    def _parameters(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of [clients, n], each [clients, *its shape]."""
        pieces = torch.split(flat, [tensor.size for tensor in self.layout.tensors], dim=1)
        named = zip(self.layout.tensors, pieces, strict=True)
        return {tensor.name: piece.reshape(len(flat), *tensor.shape) for tensor, piece in named}

    def _running(self, statistics: Sequence[Statistics]) -> dict[str, torch.Tensor]:
        """The statistics of all clients, [clients, channels] each; LocalError if they are not those of the model."""
        shapes = {name: ("float32", (channels,)) for name, channels in self._graph.statistics.items()}
        for mine in statistics:
            if {name: (array.dtype.name, array.shape) for name, array in mine.items()} != shapes:
                raise LocalError(f"statistics: the model needs {sorted(shapes) or 'none'}, got {sorted(mine) or 'none'}")
        stacked = {name: np.stack([mine[name] for mine in statistics]) for name in shapes}
        return {name: torch.from_numpy(array).to(self._device) for name, array in stacked.items()}

    def _vectors(self, vectors: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        if not vectors:
            raise LocalError("a wave needs at least one client")
        for vector in vectors:
            if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (self.layout.size,):
                raise LocalError(f"vector: expected float32 [{self.layout.size}], got {described(vector)}")
        return torch.from_numpy(np.stack(vectors)).to(self._device)

    def _masks(self, shares: Sequence[Share]) -> torch.Tensor:
        masks = [np.ones(self.layout.size, np.bool_) if share.kept is None else share.kept for share in shares]
        for kept in masks:
            if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_ or kept.shape != (self.layout.size,):
                raise LocalError(f"kept: expected bool [{self.layout.size}], got {described(kept)}")
            if not kept[self.layout.always_kept_coordinates].all():
                raise LocalError("kept leaves out coordinates that belong to every sub-model (layout.always_kept_coordinates)")
        return torch.from_numpy(np.stack(masks)).to(self._device)

    def _stacked(self, batches: Sequence[Batch], *, may_be_empty: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x and the targets, [clients, longest, ...], and the weight of each example, [clients, longest]: 0 for padding."""
        examples = self._graph.examples
        for features, labels in batches:
            examples.check(features, labels, may_be_empty=may_be_empty)
        longest = max(len(features) for features, _ in batches)
        feeds = [examples.padded(features, labels, longest) for features, labels in batches]
        names = ("x", "x" if examples.y_dtype is None else "y", "sample_weight")
        tensors = (torch.from_numpy(np.stack([feed[name] for feed in feeds])).to(self._device) for name in names)
        return next(tensors), next(tensors), next(tensors)


def _in_step(shares: Sequence[Share]) -> Iterator[list[Batch]]:
    """The clients' batches, step by step."""
    iterators = [iter(share.batches) for share in shares]
    while True:
        drawn = [next(batches, None) for batches in iterators]
        here = [batch for batch in drawn if batch is not None]
        if not here:
            return
        if len(here) < len(drawn):
            raise LocalError("the clients of a wave have different numbers of batches; train them apart")
        yield here


def check_cuda() -> None:
    """Refuse where there is no CUDA device.

    Raises:
        LocalError: torch finds none.
    """
    if not torch.cuda.is_available():
        raise LocalError("trainer torch-cuda: torch finds no CUDA device on this machine; use --trainer torch or onnxruntime")


def _device(name: str, threads: int) -> torch.device:
    if threads < 1:
        raise LocalError(f"threads is {threads}, but training needs at least 1")
    if name == "cuda":
        check_cuda()
        # Results are compared with onnxruntime's in float32, so no tensor cores; and the same algorithms in every run.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    else:
        torch.set_num_threads(threads)
    return torch.device(name)
