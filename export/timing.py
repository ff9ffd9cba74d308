"""Running models and programs here, on the exporter's machine: sessions as a device makes them, data to run them on, and median times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from regrow.local_step import METADATA, Step

ORT_ERRORS: tuple[type[Exception], ...] = (
    # onnxruntime's own exceptions share no base class; the set differs a little between versions.
    *(kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)
LEAST_ROUNDS = 3
_DTYPES: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def session_of(model: bytes | Path, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU with the agent's settings: one operator at a time, and waiting threads sleep.

    Raises:
        one of ORT_ERRORS: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong comes as an exception; nothing belongs on stderr
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def random_feed(session: ort.InferenceSession, batch: int, parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    """Every input of a program: normal features or the token 0, targets in range, masks, weights and statistics 1, state 0.

    Args:
        parameters: by name; a program that wants a step's anchors gets them too.
    """
    rng = np.random.default_rng(0)
    metadata = session.get_modelmeta().custom_metadata_map
    classes = int(metadata.get("regrow.classes", "1"))
    binary = Step.from_metadata(metadata.get(METADATA)).loss == "binary_cross_entropy"
    feed: dict[str, NDArray[Any]] = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in item.shape]
        name, dtype = item.name, _DTYPES[item.type]
        if name.removeprefix("anchor:") in parameters:
            feed[name] = parameters[name.removeprefix("anchor:")]
        elif name == "y" and dtype is np.int64:
            feed[name] = rng.integers(0, classes, shape)
        elif name == "y" and binary:
            feed[name] = rng.integers(0, 2, shape).astype(np.float32)
        elif name in ("x", "y") and dtype is np.float32:
            feed[name] = rng.standard_normal(shape, np.float32)
        elif name == "learning_rate":
            feed[name] = np.array(0.01, np.float32)
        elif name == "sample_weight" or name.startswith(("mask:", "stat:")):
            feed[name] = np.ones(shape, dtype)
        else:
            feed[name] = np.zeros(shape, dtype)
    return feed


def medians_s(calls: Sequence[Callable[[], object]], rounds: int, most_s: float = float("inf")) -> list[float]:
    """Seconds of each call, the median of as many rounds; one call after the other in every round, so that what else happens on the
    machine meets all of them alike.

    Args:
        rounds: at least 1; one more goes before, and does not count.
        most_s: after so many seconds no further round begins, once there are three.
    """
    took: list[list[float]] = [[] for _ in calls]
    began_s = time.perf_counter()
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and time.perf_counter() - began_s > most_s:
            break
        for call, times in zip(calls, took, strict=True):
            start_s = time.perf_counter()
            call()
            if number:
                times.append(time.perf_counter() - start_s)
    return [statistics.median(times) for times in took]
