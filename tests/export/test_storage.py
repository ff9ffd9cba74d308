"""Float16 storage: gradients beside those of float32, values beyond float16, what stays exact, and what it saves by the estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from edge_agent import trainer
from edge_agent.trainer import Trainer
from export.memory import most_alive, step_memory
from export.models import reduced_cnn, watch_cnn
from export.programs import build_programs, initial_vector
from export.storage import LARGEST, float16_programs, stored_as_float16
from regrow.local_training import Batch
from regrow.programs import IN_ORDER, offers_float16, stored_as
from regrow.task import Training

TOLERANCE = 2e-3
"""Of a gradient, relative to its norm. Float16 rounds by 5e-4 of a value at most; errors of many values partly cancel."""
WATCH = (6, 100)


def half(program: bytes, **options: Any) -> bytes:
    """With every activation that has a batch axis, however small, stored as float16."""
    stored = stored_as_float16(program, least_bytes=1, **options)
    if stored is None:
        raise ValueError("a shape is not known")
    return stored


def halved(programs: dict[str, bytes], **options: Any) -> dict[str, bytes]:
    return programs | {name: half(programs[name], **options) for name in ("train", "train_masked")}


def batch_of(shape: tuple[int, ...], classes: int, examples: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((examples, *shape)).astype(np.float32), rng.integers(0, classes, examples)


def moved(programs: dict[str, bytes], vector: NDArray[np.float32], batch: Batch, *, masked: bool = False) -> NDArray[np.float32]:
    """What one step of SGD with learning rate 1 adds."""
    made = Trainer(programs)
    kept = None
    if masked:
        kept = np.arange(vector.size) % 3 == 0
        kept[made.layout.always_kept_coordinates] = True
    return made.train(vector, kept, [batch], 1.0).vector - vector


def difference(exact: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))


ZOO_MODELS = ("leaf_cnn", "vgg11", "resnet18_bn", "resnet18_gn", "mobilenet_v2", "ds_cnn", "lstm", "transformer", "autoencoder")


@pytest.mark.parametrize("name", ZOO_MODELS)
def test_gradients_are_those_of_float32_up_to_rounding(name: str) -> None:
    torch = pytest.importorskip("torch")
    from export.from_torch import from_torch
    from export.zoo import ZOO

    model = ZOO[name]
    training = Training(loss="mse", target="input") if model.loss == "mse" else Training()
    forward = from_torch(model.module(model.small, 0), torch.zeros(2, *model.small.shape))
    programs, vector = build_programs(forward, training=training), initial_vector(forward)
    x, y = batch_of(model.small.shape, model.small.classes or 1)
    batch = (x, x if model.loss == "mse" else y)
    stored = halved(programs)
    assert b"half:" in stored["train"]
    for masked in (False, True):
        error = difference(moved(programs, vector, batch, masked=masked), moved(stored, vector, batch, masked=masked))
        assert 0 < error < TOLERANCE, "0 would mean that nothing was stored"


@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        (Training(optimizer="adamw", weight_decay=0.01), 0.1),  # Adam divides by gradients that are almost 0
        (Training(optimizer="nesterov", momentum=0.9, clip_norm=0.5), 3 * TOLERANCE),
        (Training(proximal_mu=0.1), 3 * TOLERANCE),
    ],
    ids=["adamw", "clipped", "proximal"],
)
def test_every_optimizer_keeps_its_meaning(training: Training, tolerance: float) -> None:
    model = watch_cnn(1)
    programs, vector = build_programs(model, training=training), initial_vector(model)
    batches = [batch_of(WATCH, 7, seed=seed) for seed in range(3)]
    exact, rounded = (Trainer(each).train(vector, None, batches, 0.01).vector - vector for each in (programs, halved(programs)))
    assert 0 < difference(exact, rounded) < tolerance


def test_the_order_alone_changes_nothing_but_float32_rounding() -> None:
    model = reduced_cnn(1)
    programs, vector, batch = build_programs(model), initial_vector(model), batch_of((1, 28, 28), 10)
    ordered = stored_as_float16(programs["train"], least_bytes=1 << 50)
    assert ordered is not None
    exact = moved(programs, vector, batch)
    assert difference(exact, moved(programs | {"train": ordered}, vector, batch)) < 1e-6
    assert difference(exact, moved(halved(programs), vector, batch)) > 1e-5, "or the bound above would show nothing"


def test_values_beyond_float16_are_cut_and_not_infinite() -> None:
    model = watch_cnn(1)
    programs, vector = build_programs(model), initial_vector(model)
    x, y = batch_of(WATCH, 7)
    huge = (x * np.float32(1e7), y)
    assert LARGEST < 1e6
    assert np.isfinite(moved(programs, vector, huge)).all()
    assert np.isfinite(moved(halved(programs), vector, huge)).all()
    assert not np.isfinite(moved(halved(programs, saturated=False), vector, huge)).all(), "or cutting would be of no use"


def test_comparisons_are_of_exact_values_and_what_has_no_batch_stays_float32() -> None:
    torch = pytest.importorskip("torch")
    from export.from_torch import from_torch
    from export.zoo import ZOO

    model = ZOO["mobilenet_v2"]
    forward = from_torch(model.module(model.small, 0), torch.zeros(2, *model.small.shape))
    graph = onnx.ModelProto.FromString(half(build_programs(forward)["train"])).graph
    comparing = [node for node in graph.node if node.op_type in ("Equal", "Greater", "Less")]
    assert comparing, "ReLU6"
    assert not any(name.startswith("half:") for node in comparing for name in node.input)
    narrowed = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16]
    names = {node.input[0].removeprefix("half:").removesuffix(":cut") for node in narrowed}
    normalised = {node.input[0] for node in graph.node if node.op_type == "BatchNormalization"}
    assert normalised & names, "what batch normalisation keeps"
    assert not any(name.startswith("batch:") for name in names), "its statistics"
    assert "loss" not in names
    assert len([node for node in graph.node if node.op_type == "Clip" and node.output[0].endswith(":cut")]) < len(narrowed), (
        "ReLU6 is bounded"
    )


def test_only_what_pays_is_published_and_takes_less_by_the_estimate() -> None:
    torch = pytest.importorskip("torch")
    from export.from_torch import from_torch
    from export.zoo import ZOO

    model = ZOO["resnet18_gn"]
    forward = from_torch(model.module(model.small, 0), torch.zeros(2, *model.small.shape))
    programs = build_programs(forward)
    programs |= float16_programs(programs)
    assert {"train~float16", "train_masked~float16"} <= programs.keys()
    memory = step_memory(programs)
    (plain,), (stored,) = memory.levels, memory.float16
    assert stored.trained < 0.75 * plain.trained
    assert stored.fixed + 20 * stored.trained < plain.fixed + 20 * plain.trained
    assert stored.scored == plain.scored, "scoring has nothing to store"
    assert not offers_float16(float16_programs(build_programs(watch_cnn(1)))), "its weights take more than its activations"
    assert step_memory(build_programs(watch_cnn(1))).float16 == []


def test_only_stored_programs_ask_for_their_order() -> None:
    programs = build_programs(watch_cnn(1))
    assert IN_ORDER.encode() not in programs["train"]
    assert IN_ORDER.encode() in half(programs["train"])
    plain, stored = (most_alive(onnx.ModelProto.FromString(each)) for each in (programs["train"], half(programs["train"])))
    assert stored[1] < plain[1]


def test_the_nodes_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frees what it was the last to need; a node that onnxruntime has moved to the end keeps its inputs until then."""
    torch = pytest.importorskip("torch")
    from export.from_torch import from_torch
    from export.zoo import ZOO

    zoo = ZOO["resnet18_gn"]
    forward = from_torch(zoo.module(zoo.small, 0), torch.zeros(2, *zoo.small.shape))
    programs = build_programs(forward)
    model = onnx.ModelProto.FromString(half(programs["train"]))
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    keep = trainer._keep_in_order

    def profiled(options: ort.SessionOptions) -> None:
        keep(options)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")

    monkeypatch.setattr(trainer, "_keep_in_order", profiled)
    made = Trainer(programs | {"train": model.SerializeToString()})
    x = np.random.default_rng(1).standard_normal((2, *zoo.small.shape)).astype(np.float32)
    made.train(initial_vector(forward), None, [(x, np.array([0, 1]))], 0.1)
    del made
    (profile,) = tmp_path.glob("profile*.json")
    ran = [event["name"].removesuffix("_kernel_time") for event in json.loads(profile.read_text()) if event["cat"] == "Node"]
    assert {f"n{number}" for number in range(len(model.graph.node))} <= set(ran)
    early = {node.name for node in model.graph.node if node.op_type in ("Shape", "Size")}  # of a few bytes, taken first of all
    numbers = [int(name[1:]) for name in ran if name.startswith("n") and name not in early]
    assert numbers == sorted(numbers)


def test_training_ends_at_the_same_loss() -> None:
    model = watch_cnn(1)
    programs, vector = build_programs(model), initial_vector(model)
    rng = np.random.default_rng(3)
    patterns = rng.standard_normal((7, *WATCH)).astype(np.float32)
    labels = rng.integers(0, 7, (20, 20))
    batches = [((patterns[y] + rng.standard_normal((20, *WATCH))).astype(np.float32), y) for y in labels]
    x, y = np.concatenate([x for x, _ in batches[-10:]]), np.concatenate([y for _, y in batches[-10:]])
    scores = []
    for each in (programs, stored_as(programs | {"train~float16": half(programs["train"])}, "float16")):
        made = Trainer(each)
        scores.append(made.evaluate(made.train(vector, None, batches, 0.05).vector, x, y).loss)
    assert 0.01 < scores[0] < 0.1 < 1 < Trainer(programs).evaluate(vector, x, y).loss, "it learns"
    assert scores[1] == pytest.approx(scores[0], rel=0.1)
