"""Trains and evaluates a model on the device with plain onnxruntime, from programs that came over the network.

Programs are data, and untrusted: before onnxruntime sees one, it is scanned (edge_agent.scan).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from edge_agent.scan import asks_for_order, scan_program, vocabulary
from regrow.errors import LocalError, PeerError
from regrow.examples import Examples, described, r_squared
from regrow.local_step import METADATA, Step
from regrow.local_training import Batch, Score, Statistics, TrainResult, average_statistics
from regrow.parameters import Layout
from regrow.step_memory import SCORED_AT_ONCE

_ORT_ERRORS: tuple[type[Exception], ...] = (
    # onnxruntime's own exceptions share no base class; the set differs a little between versions.
    *(kind for kind in vars(ort_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)


class Trainer:
    """The programs of one task, ready to run; each onnxruntime session is built when it is first needed.

    Args:
        programs: 'layout', and those of 'train', 'train_masked', 'evaluate' and 'statistics' that will be used.
        threads: that onnxruntime may use for one operator.

    Raises:
        PeerError: the layout is malformed.
        LocalError: there is no layout, or threads < 1.
    """

    def __init__(self, programs: Mapping[str, bytes], threads: int = 1) -> None:
        if threads < 1:
            raise LocalError(f"threads is {threads}, but training needs at least 1")
        self._programs = dict(programs)
        self._threads = threads
        self._sessions: dict[str, _Session] = {}
        self.layout = Layout.from_json(self._program("layout"))

    def examples(self, *, masked: bool) -> Examples:
        """What training takes, with masks or without.

        Raises:
            PeerError: the program is malformed.
        """
        return self._session("train_masked" if masked else "train").examples

    def train(
        self,
        vector: NDArray[np.float32],
        kept: NDArray[np.bool_] | None,
        batches: Iterable[Batch],
        learning_rate: float,
    ) -> TrainResult:
        """Parameters after one step of the program's optimizer per batch; what that remembers begins at zero and is forgotten at the end.

        A batch shorter than the longest one so far is padded with examples of weight 0, unless the model has batch normalisation, where
        they would not go unseen.

        Args:
            vector: float32 [n]. Not modified.
            kept: bool [n], the coordinates of the sub-model; the others keep their value exactly. None: all, without masks.
            batches: (x [b, ...], y [b, ...]) as the program takes them, b >= 1; at least one.
            learning_rate: finite.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program is malformed, or fails.
        """
        session = self._session("train" if kept is None else "train_masked")
        parameters = self._views(vector)
        fixed: dict[str, NDArray[Any]] = {"learning_rate": np.array(learning_rate, np.float32)} | self._masks(kept)
        if session.step.proximal_mu:
            fixed |= {f"anchor:{name}": value for name, value in parameters.items()}
        moving: dict[str, NDArray[Any]] = parameters | {name: np.zeros(shape, np.float32) for name, shape in session.state.items()}
        outputs = ["loss", *(f"new:{name}" for name in moving)]
        loss, examples, steps, size = 0.0, 0, 0, 0
        for x, y in batches:
            session.examples.check(x, y)
            # onnxruntime plans its memory per shape, so all steps should have one shape.
            size = max(size, len(x)) if "statistics" not in self._programs else len(x)
            result = session.run(outputs, {**session.examples.padded(x, y, size), **fixed, **moving})
            # onnxruntime returns a NumPy scalar for a tensor without axes, and takes only arrays.
            moving = dict(zip(moving, map(np.asarray, result[1:]), strict=True))
            loss += float(result[0]) * len(x)
            examples += len(x)
            steps += 1
        if not steps:
            raise LocalError("there are no batches to train on; give at least one")
        return TrainResult(self._flat({name: moving[name] for name in parameters}), loss / examples, examples, steps)

    def evaluate(
        self,
        vector: NDArray[np.float32],
        x: NDArray[Any],
        y: NDArray[Any],
        batch: int = SCORED_AT_ONCE,
        *,
        statistics: Statistics | None = None,
    ) -> Score:
        """How good the parameters are on the examples, computed `batch` at a time.

        Args:
            vector: float32 [n].
            x, y: [m, ...] as the program takes them, m >= 1.
            statistics: of this vector, from `statistics`; a model without batch normalisation needs none.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program is malformed, or fails.
        """
        if batch < 1:
            raise LocalError(f"batch is {batch}, but evaluation needs at least 1")
        session = self._session("evaluate")
        parameters = self._views(vector) | session.statistics_feed(statistics or {})
        session.examples.check(x, y)
        loss, found = 0.0, 0.0
        outputs = ["loss_sum", "correct" if session.step.counts_hits else "squared_error"]
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            feed = {"x": x[part]} if session.examples.y_dtype is None else {"x": x[part], "y": y[part]}
            loss_sum, more = session.run(outputs, {**feed, **parameters}, numbers=2)
            loss += float(loss_sum)
            found += float(more)
        target = session.examples.target(x, y)
        accuracy = found / target.size if session.step.counts_hits else r_squared(found, target)
        return Score(loss / len(x), accuracy, len(x))

    def statistics(self, vector: NDArray[np.float32], examples: Iterable[NDArray[Any]]) -> Statistics:
        """Running means and variances of the parameters, averaged over batches; nothing, and no batch taken, for a model without.

        Args:
            vector: float32 [n].
            examples: batches of x as the program takes it, [b, ...], b >= 1, without labels; at least one.

        Raises:
            LocalError: an argument does not fit the program.
            PeerError: the program is malformed, or fails.
        """
        if "statistics" not in self._programs:
            return {}
        session, parameters = self._session("statistics"), self._views(vector)
        found = average_statistics(session.batch_statistics(x, parameters) for x in examples)
        if not found:
            raise LocalError("there are no batches to compute the statistics of; give at least one")
        return found

    def _program(self, name: str) -> bytes:
        if name not in self._programs:
            raise LocalError(f"there is no program {name!r}; this trainer was given {sorted(self._programs)}")
        return self._programs[name]

    def _session(self, name: str) -> _Session:
        if name not in self._sessions:
            self._sessions[name] = _Session(name, self._program(name), self.layout, self._threads)
        return self._sessions[name]

    def _views(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (self.layout.size,):
            raise LocalError(f"vector: expected float32 [{self.layout.size}], got {described(vector)}")
        return self.layout.unflatten(np.ascontiguousarray(vector))

    def _masks(self, kept: NDArray[np.bool_] | None) -> dict[str, NDArray[Any]]:
        if kept is None:
            return {}
        if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_ or kept.shape != (self.layout.size,):
            raise LocalError(f"kept: expected bool [{self.layout.size}], got {described(kept)}")
        if not kept[self.layout.always_kept_coordinates].all():
            raise LocalError("kept leaves out coordinates that belong to every sub-model (layout.always_kept_coordinates)")
        views = self.layout.unflatten(kept.astype(np.float32))
        return {f"mask:{t.name}": views[t.name] for t in self.layout.tensors if not t.always_kept}

    def _flat(self, parameters: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        try:
            return self.layout.flatten(parameters)
        except LocalError as error:
            raise PeerError(f"the training program returned parameters that do not fit the layout: {error}") from error


@cache
def _share_arena() -> bool:
    """Give all sessions of this process one arena that takes memory as it is asked for, not in powers of two; False if it cannot be had."""
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_asked = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    try:
        ort.create_and_register_allocator(place, ort.OrtArenaCfg(as_asked))
    except _ORT_ERRORS:
        return False
    return True


def _keep_in_order(options: ort.SessionOptions) -> None:
    """Run nodes as they stand in the program, and free each value behind its last use."""
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # What an optimizer makes counts as the newest node: it runs last of all, and what it reads is kept until then.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False  # a buffer that waits for the next value of its shape is not free meanwhile
    options.enable_mem_pattern = False  # the block that is planned for all values is larger than what they take one by one


class _Session:
    """One program, scanned, loaded and checked against the layout."""

    def __init__(self, name: str, program: bytes, layout: Layout, threads: int) -> None:
        self._name = name
        scan_program(name, program)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Many agents may share few cores: a waiting thread must sleep, not spin.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what goes wrong comes as an exception; nothing belongs on stderr
        self._sizes = set[int]()
        try:
            if _share_arena():
                options.add_session_config_entry("session.use_env_allocators", "1")
            if asks_for_order(name, program):
                _keep_in_order(options)
            # Without its fallback onnxruntime neither retries a broken program nor prints about it.
            self._session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"], enable_fallback=0)
            inputs = {item.name: (item.type, list(item.shape)) for item in self._session.get_inputs()}
            outputs = {item.name: (item.type, list(item.shape)) for item in self._session.get_outputs()}
            metadata = self._session.get_modelmeta().custom_metadata_map
        except _ORT_ERRORS as error:
            raise PeerError(f"program {name!r} cannot be loaded: {error}") from error
        self.step = self._step_of(metadata)
        self.state = _state_shapes(self.step, layout) if name in ("train", "train_masked") else {}
        self.statistics = _statistics_of(outputs if name == "statistics" else inputs)
        self._check_signature(inputs, set(outputs), layout)
        self.examples = self._examples_of(inputs, metadata, program)

    def _step_of(self, metadata: Mapping[str, str]) -> Step:
        try:
            return Step.from_metadata(metadata.get(METADATA))
        except PeerError as error:
            raise PeerError(f"program {self._name!r}: metadata {error}") from error

    def _check_signature(self, inputs: dict[str, tuple[str, list[Any]]], outputs: set[str], layout: Layout) -> None:
        """Inputs and outputs are exactly those of a program of this step for this layout; PeerError otherwise."""
        expected: dict[str, tuple[str, list[Any]]] = {t.name: ("tensor(float)", list(t.shape)) for t in layout.tensors}
        results = {"loss_sum", "correct" if self.step.counts_hits else "squared_error"}
        statistics: dict[str, tuple[str, list[Any]]] = {f"stat:{name}": ("tensor(float)", [size]) for name, size in self.statistics.items()}
        if self._name == "statistics":
            results = set(statistics)
        elif self._name == "evaluate":
            expected |= statistics
        else:
            results = {"loss", *(f"new:{name}" for name in (*expected, *self.state))}
            anchors = expected if self.step.proximal_mu else {}
            expected = expected | {f"anchor:{name}": form for name, form in anchors.items()}
            expected |= {name: ("tensor(float)", list(shape)) for name, shape in self.state.items()}
            expected |= {"sample_weight": ("tensor(float)", ["batch"]), "learning_rate": ("tensor(float)", [])}
        if self._name == "train_masked":
            expected |= {f"mask:{t.name}": expected[t.name] for t in layout.tensors if not t.always_kept}
        labelled = self._name != "statistics"
        if self.step.classifies and labelled:
            expected["y"] = ("tensor(int64)", ["batch"])
        self._check_data("x", inputs, ("tensor(float)",) if self.step.target == "input" else ("tensor(float)", "tensor(int64)"))
        free = {"x"}
        if not self.step.classifies and self.step.target == "y" and labelled:
            self._check_data("y", inputs, ("tensor(float)",))
            free.add("y")
        for name in (expected.keys() | inputs.keys()) - free:
            if expected.get(name) != inputs.get(name):
                raise PeerError(f"program {self._name!r}: input {name!r} is {inputs.get(name)}, the layout needs {expected.get(name)}")
        if outputs != results:
            raise PeerError(f"program {self._name!r}: its outputs differ from the layout's in {sorted(outputs ^ results)}")

    def _check_data(self, name: str, inputs: dict[str, tuple[str, list[Any]]], kinds: tuple[str, ...]) -> None:
        """The input `name` is one of these kinds, with a dynamic batch and all else fixed; PeerError otherwise."""
        kind, shape = inputs.get(name, ("nothing", []))
        if kind not in kinds or shape[:1] != ["batch"] or not all(isinstance(size, int) for size in shape[1:]):
            raise PeerError(f"program {self._name!r}: input {name!r} is {kind} {shape}, not {' or '.join(kinds)} ['batch', ...]")

    def _examples_of(self, inputs: dict[str, tuple[str, list[Any]]], metadata: Mapping[str, str], program: bytes) -> Examples:
        kind, (_, *x_shape) = inputs["x"]
        x_dtype, tokens = "float32" if kind == "tensor(float)" else "int64", 0
        if x_dtype == "int64":
            rows = {name: shape[0] for name, (_, shape) in inputs.items() if shape and isinstance(shape[0], int)}
            tokens = vocabulary(self._name, program, "x", rows)
        if self._name == "statistics":
            return Examples(x_dtype, tuple(x_shape), None, tokens=tokens)
        if not self.step.classifies:
            if self.step.target == "input":
                return Examples(x_dtype, tuple(x_shape), None)
            return Examples(x_dtype, tuple(x_shape), "float32", tuple(inputs["y"][1][1:]), tokens=tokens)
        classes = metadata.get("regrow.classes", "")
        if not (classes.isascii() and classes.isdigit() and 0 < len(classes) < 10 and int(classes)):
            raise PeerError(f"program {self._name!r}: metadata regrow.classes is {classes!r}, not a number of classes")
        return Examples(x_dtype, tuple(x_shape), "int64", (), int(classes), tokens)

    def statistics_feed(self, statistics: Statistics) -> dict[str, NDArray[Any]]:
        """The inputs of these statistics; LocalError if they are not all that the program needs."""
        shapes = {name: (array.dtype.name, array.shape) for name, array in statistics.items()}
        if shapes != {name: ("float32", (size,)) for name, size in self.statistics.items()}:
            raise LocalError(
                f"statistics: the model needs {sorted(self.statistics) or 'none'}, got {sorted(shapes) or 'none'}; "
                "compute them for these parameters with Trainer.statistics"
            )
        return {f"stat:{name}": np.ascontiguousarray(array) for name, array in statistics.items()}

    def batch_statistics(self, x: NDArray[Any], parameters: dict[str, NDArray[Any]]) -> Statistics:
        """What the program `statistics` says of one batch."""
        self.examples.check(x, x)
        names = list(self.statistics)
        found = dict(zip(names, self.run([f"stat:{name}" for name in names], {"x": x, **parameters}, numbers=0), strict=True))
        if any(np.shape(array) != (self.statistics[name],) for name, array in found.items()):
            raise PeerError("the program 'statistics' returned vectors of other lengths than it declares")
        return found

    def run(self, outputs: list[str], feed: dict[str, NDArray[Any]], numbers: int = 1) -> list[NDArray[Any]]:
        """The outputs, of which the first `numbers` are single numbers."""
        run = ort.RunOptions()
        if len(feed["x"]) not in self._sizes:
            # The first run of a size takes its values one by one, those after it one planned block: what the first took goes back.
            self._sizes.add(len(feed["x"]))
            run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            results = list(self._session.run(outputs, feed, run))
        except _ORT_ERRORS as error:
            raise PeerError(f"program {self._name!r} failed: {error}") from error
        for name, value in zip(outputs[:numbers], results, strict=False):
            if np.shape(value) != () or np.asarray(value).dtype.kind not in "fi":
                raise PeerError(f"program {self._name!r}: output {name!r} is {described(value)}, not one number")
        return results


def _statistics_of(values: Mapping[str, tuple[str, list[Any]]]) -> dict[str, int]:
    """Channels of each running statistic among a program's inputs or outputs; PeerError if it is no vector."""
    found = {name.removeprefix("stat:"): form for name, form in values.items() if name.startswith("stat:")}
    for name, (kind, shape) in found.items():
        if kind != "tensor(float)" or len(shape) != 1 or not isinstance(shape[0], int):
            raise PeerError(f"statistic {name!r} is {kind} {shape}, not tensor(float) of one fixed axis")
    return {name: int(shape[0]) for name, (_, shape) in found.items()}


def _state_shapes(step: Step, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the optimizer remembers from step to step."""
    shapes: dict[str, tuple[int, ...]] = {f"state:{slot}:{t.name}": t.shape for slot in step.slots for t in layout.tensors}
    return shapes | {"state:step": ()} if step.counts_steps else shapes
