"""Promoted models on a device without a broker: a dict of retained messages, the real machine, files and onnxruntime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_agent.data.source import DataSource
from edge_agent.models import Models
from edge_agent.promotion import Settled
from edge_agent.state import StateFolder
from export.head import head_programs, open_head
from regrow import topics, wire
from regrow.machine import Connected, Effect, Publish, Received, Subscribe, Unsubscribe
from regrow.publication import PIECE_BYTES, blob
from testbed.memory import matches

TASK = "toy"
PATTERNS = np.random.default_rng(0).random((10, 64), np.float32)


def digits(rows: int = 100, noise: float = 0.3, seed: int = 1) -> DataSource:
    """Noisy patterns, a fifth of them for validation."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, rows)
    source = DataSource(rows)
    source.append((PATTERNS[y] + noise * rng.standard_normal((rows, 64))).astype(np.float32), y)
    return source


def linear(wrong: int = 0, pad: int = 0) -> bytes:
    """A classifier of `digits` that is right but for the first `wrong` classes; `pad` KiB larger than it need be."""
    weights = PATTERNS - 0.5
    bias = -0.5 * (weights * (PATTERNS + 0.5)).sum(axis=1) + np.where(np.arange(10) < wrong, -1000, 0)
    return _gemm(weights, bias.astype(np.float32), pad).SerializeToString()


def _gemm(weights: np.ndarray, bias: np.ndarray, pad: int = 0) -> onnx.ModelProto:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["scores"], transB=1)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", weights.shape[1]), ("scores", 10))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in (("w", weights.astype(np.float32)), ("b", bias))]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if pad:
        model.doc_string = "".join(chr(97 + int(c)) for c in np.random.default_rng(pad).integers(0, 26, 1024 * pad))
    return model


def untrained_head() -> tuple[bytes, dict[str, bytes]]:
    """A model whose only layer knows nothing yet, and what trains that layer."""
    model = _gemm(np.zeros((10, 64), np.float32), np.zeros(10, np.float32))
    return open_head(model).SerializeToString(), head_programs(model)


class Rig:
    """One device. `promote` puts messages on the broker, `live` lets everything happen that follows."""

    def __init__(self, path: Path, source: DataSource | None = None, *, local_head: bool = False, reserve_bytes: int = 0) -> None:
        self.path, self.source = path, digits() if source is None else source
        self.retained: dict[str, bytes] = {}
        self.reports: list[wire.PromotionReport] = []
        self.settled: list[Settled] = []
        self.delivered: list[str] = []
        self.now = 0.0
        self._local_head, self._reserve_bytes = local_head, reserve_bytes
        self._subscribed: set[str] = set()
        self.start()

    def start(self) -> None:
        """A life of the agent begins; the one before is gone without a word."""
        if hasattr(self, "folder"):
            self.folder.close()
        self.folder = StateFolder(self.path)
        self.settled.clear()
        self._subscribed.clear()
        self.models = Models(
            "d1",
            self.folder,
            self.source,
            lambda work: work(),
            self.settled.append,
            local_head=self._local_head,
            reserve_bytes=self._reserve_bytes,
        )

    def promote(
        self, model: bytes | None, number: int, *, withdrawn: Collection[bytes] = (), head: dict[str, bytes] | None = None, step: str = ""
    ) -> wire.Promotion:
        """Publish; returns what was announced."""
        self.retained.clear()
        files = [] if model is None else [("model", model), *(head or {}).items()]
        blobs = [blob(name, data) for name, data in files]
        for found, (_, data) in zip(blobs, files, strict=True):
            for piece, body in enumerate(wire.pieces(data, PIECE_BYTES)):
                self.retained[topics.promoted_file(TASK, found.digest, piece)] = bytes(body)
        promotion = wire.Promotion(
            number=number,
            run="r1",
            version=number,
            model=blobs[0] if blobs else None,
            step=step,
            withdrawn=list(withdrawn),
            head=wire.Head(blobs[1:], 100, 20, 0.5) if head else None,
        )
        self.announce(promotion)
        return promotion

    def announce(self, promotion: wire.Promotion) -> None:
        self.retained[topics.promotion(TASK)] = wire.encode(promotion)

    def live(self) -> wire.PromotionReport | None:
        """Connect, and go on until nothing happens any more; the last thing that was said."""
        self._subscribed.clear()
        said = len(self.reports)
        pending = self.models.step(Connected(), self.now, quiet=True)
        while True:
            pending = self._link(pending)
            while self.settled:
                pending += self.models.settled(self.settled.pop(), self.now)
            pending += self.models.go_on(self.now, quiet=True)
            if not pending and not self.settled:
                return self.reports[-1] if len(self.reports) > said else None

    def _link(self, effects: list[Effect]) -> list[Effect]:
        """What the broker answers to these effects, and what the device does about that."""
        more: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Publish):
                assert effect.topic == topics.promotion_report("d1", TASK)
                self.reports.append(wire.decode(bytes(effect.payload), wire.PromotionReport)[0])
            elif isinstance(effect, Unsubscribe):
                self._subscribed -= set(effect.topics)
            elif isinstance(effect, Subscribe):
                self._subscribed |= set(effect.topics)
                for topic in [found for found in self.retained if any(matches(pattern, found) for pattern in effect.topics)]:
                    self.delivered.append(topic)
                    more += self.models.step(Received(topic, self.retained[topic]), self.now, quiet=True)
        return more
