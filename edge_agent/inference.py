"""A promoted model on the device: scanned, loaded with plain onnxruntime, run and scored.

Like programs, models are untrusted data: the same scan comes first. Initializers that the model also lists as inputs (its last layer) may
be overridden by a feed; that is how a layer that was trained here is used without writing another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.scan import scan_program, vocabulary
from edge_agent.trainer import _ORT_ERRORS
from regrow import wire
from regrow.errors import LocalError, PeerError
from regrow.examples import check_tokens
from regrow.local_step import Step
from regrow.scoring import score_outputs
from regrow.step_memory import SCORED_AT_ONCE

_KINDS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}
_ERRORS: tuple[type[Exception], ...] = (*_ORT_ERRORS, MemoryError)
Head = Mapping[str, NDArray[np.float32]]


class Inference:
    """One model, ready to run.

    Args:
        model: an ONNX file with one float32 or int64 input [batch, ...] and one float32 output [batch, ...].
        threads: for one operator.

    Raises:
        PeerError: it holds what no model of ours does, cannot be loaded, or is not of that form.
    """

    def __init__(self, model: bytes, threads: int = 1) -> None:
        scan_program("model", model)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            self.head = {item.name: tuple(item.shape) for item in self._session.get_overridable_initializers()}
        except _ERRORS as error:
            raise PeerError(f"the model cannot be loaded: {error}") from error
        if len(inputs) != 1 or len(outputs) != 1:
            raise PeerError(f"the model has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")
        self.input, self.output = inputs[0].name, outputs[0].name
        self.input_shape, self.output_shape = list(inputs[0].shape), list(outputs[0].shape)
        for item, kinds in ((inputs[0], tuple(_KINDS)), (outputs[0], ("tensor(float)",))):
            if item.type not in kinds or not item.shape or isinstance(item.shape[0], int):
                wanted = f"{' or '.join(kinds)} [batch, ...] with a dynamic batch"
                raise PeerError(f"{item.name!r} of the model is {item.type} {item.shape}, not {wanted}")
        self.input_kind = _KINDS[inputs[0].type]
        self._tokens = vocabulary("model", model, self.input, {}) if self.input_kind == np.int64 else 0

    def run(self, x: NDArray[Any], head: Head | None = None) -> NDArray[np.float32]:
        """The outputs, float32 [n, ...], of x, [n >= 1, ...], computed some hundred at a time; `head` overrides initializers.

        Raises:
            LocalError: x does not fit the model, or the head does not.
            PeerError: it fails, or gives something else than one finite number array per example.
        """
        shape = self.input_shape[1:]
        fits = x.ndim == len(self.input_shape) and all(not isinstance(a, int) or a == b for a, b in zip(shape, x.shape[1:], strict=True))
        if not fits or not len(x) or x.dtype != self.input_kind:
            raise LocalError(f"the model takes {self.input_kind} {self.input_shape}, the data are {x.dtype} {list(x.shape)}")
        check_tokens(x, self._tokens)
        head = head or {}
        if any(self.head.get(name) != array.shape for name, array in head.items()):
            raise LocalError(f"the head has {sorted(head)}, the model takes {self.head}")
        parts = []
        for start in range(0, len(x), SCORED_AT_ONCE):
            part = x[start : start + SCORED_AT_ONCE]
            try:
                (outputs,) = self._session.run([self.output], {self.input: part, **head})
            except _ERRORS as error:
                raise PeerError(f"the model fails on this device's data: {error}") from error
            if not isinstance(outputs, np.ndarray) or outputs.shape[:1] != part.shape[:1] or not np.isfinite(outputs).all():
                raise PeerError("the model does not give finite numbers for each example")
            parts.append(outputs)
        result: NDArray[np.float32] = np.concatenate(parts)
        return result

    def score(self, x: NDArray[Any], y: NDArray[Any], step: Step, head: Head | None = None) -> wire.ModelScore:
        """Mean loss and accuracy, as regrow.scoring; errors as `run`, and LocalError where outputs and target do not fit."""
        score = score_outputs(self.run(x, head), x, y, step)
        return wire.ModelScore(score.loss, score.accuracy, score.examples)
