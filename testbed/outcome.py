"""What a simulated run is specified by and what comes out of it, as values and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from regrow.aggregate import staleness
from regrow.ledger import Ledger
from regrow.publication import version_of
from testbed.journal import Journal

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a simulated run depends on, beside its task folder; `settings` are keys of task.toml, dotted, above the method's.

    The fields of testbed.scenario that came later are left out where they say nothing, so that outcomes written before still read.

    Args:
        slowdown: how many times slower than `step_s` devices are; several are spread over them.
        latency: one-way seconds between a device and the broker, and the mean of an exponential jitter on top.
        steps_trace: folder of recorded step times.
        step_sigma: of the logarithm of a job's jitter.
        step_by_density: (density, time of a step relative to density 1); otherwise granularity "unit" takes the work of the smaller models.
        attend: who is there when, as testbed.conditions.attendances reads it.
        memory: bytes that a training job may take; several are spread over the devices.
    """

    method: str | None = None
    settings: dict[str, Any] = {}
    seed: int = 1
    data: str = "watch"
    data_folder: str | None = None
    split: str = "user"
    clients: int = 10
    links: str = "high"
    outages: tuple[float, float] | None = None
    step_s: float = 0.01
    slowdown: float | tuple[float, ...] = 1.0
    seconds: float = 600.0
    points: int = 60
    validation: float | UnsetType = UNSET
    latency: tuple[float, float] | UnsetType = UNSET
    steps_trace: str | UnsetType = UNSET
    step_sigma: float | UnsetType = UNSET
    step_by_density: tuple[tuple[float, float], ...] | UnsetType = UNSET
    attend: str | UnsetType = UNSET
    memory: tuple[int, ...] | UnsetType = UNSET
    trainer: str = "onnxruntime"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment of virtual time; bytes are MQTT payload, all devices together; accuracy and loss on test data.

    coverage: `minimum_coverage`; older_orders: `older_order_share`; staleness: mean over the updates since the last point, in aggregations;
    compute_s: that all devices have trained so far (0.0 in outcomes of earlier versions).
    """

    time_s: float
    version: int
    accuracy: Share
    loss: float
    bytes_up: int
    bytes_down: int
    updates: int
    mean_density: float
    coverage: float
    older_orders: float = 0.0
    staleness: float = 0.0
    compute_s: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run.

    Args:
        worst_decile: mean over the tenth of devices (at least one) on whose validation data the model is worst.
        inputs_digest: of the files that it read (testbed.inputs); "" where it is not known.
    """

    spec: Spec
    points: Annotated[list[Point], msgspec.Meta(min_length=1)]
    final_accuracy: Share
    validation_accuracy: Share
    worst_decile: Share
    per_class: Annotated[list[Share], msgspec.Meta(min_length=1)]
    updates: dict[str, int]
    densities: dict[str, tuple[float, float]]
    rejected: int
    reason: str
    inputs_digest: str = ""

    @property
    def aggregations(self) -> int:
        """How often updates were aggregated."""
        return self.points[-1].version


def seconds_of(outcome: Outcome) -> list[float]:
    """Each point's virtual time, within the run: the world's clock may stand up to a second after the end when the last one is made."""
    return [min(point.time_s, outcome.spec.seconds) for point in outcome.points]


def remarks(outcome: Outcome) -> list[str]:
    """What a reader of the accuracy has to know beside it: that nothing was trained, or that devices took no part."""
    untrained, joined, clients = why_untrained(outcome), len(outcome.densities), outcome.spec.clients
    if untrained is not None:
        return [untrained]
    if joined == clients:
        return []
    why = "none of the levels fits their --memory-mb, or they" if outcome.spec.memory is not UNSET else "they"
    return [f"{clients - joined} of {clients} devices took no part: {why} never got through to the coordinator"]


def why_untrained(outcome: Outcome) -> str | None:
    """Why nothing was aggregated, with a cure; None where something was."""
    spec, joined = outcome.spec, len(outcome.densities)
    if outcome.aggregations:
        return None
    if not joined:
        why = (
            "no device got through to the coordinator; links are too slow (give rates to --links: its classes are scaled to the model, a "
            "very small one gets hardly any), or --attend or --outages keeps all of them away"
        )
    elif not any(outcome.updates.values()):
        why = (
            f"{joined} of {spec.clients} devices joined and no update arrived: a round (model down, steps, update up), or the wait for "
            "fleet.min_devices, takes longer than the run; take more --seconds, quicker links or fewer steps"
        )
    else:
        why = f"updates that arrived: {sum(outcome.updates.values())}; the method still waited for others: take more --seconds"
    return f"nothing was aggregated, so this is the untrained model: {why}"


def write_outcome(path: Path, outcome: Outcome, journal: Journal | None = None) -> None:
    """Put a finished run in its place at once, and take away the journal that nobody needs any more."""
    write_text(path, outcome_text(outcome))
    if journal is not None:
        journal.delete()


def outcome_text(outcome: Outcome) -> bytes:
    """An outcome's file, the same bytes whoever ran it."""
    return msgspec.json.format(msgspec.json.encode(outcome), indent=1)


def write_text(path: Path, text: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(text)
    temporary.replace(path)


def minimum_coverage(ledger: Ledger) -> float:
    """The share of devices that train the least covered coordinate: min_j |{i: m_i[j] = 1}| / devices, of the convergence analysis."""
    devices = ledger.devices.values()
    return sum(device.density >= 1.0 for device in devices) / len(devices) if devices else 0.0


def older_order_share(ledger: Ledger) -> float:
    """The share of the buffer's weight on values that were trained in the mask of an earlier order, 0..1.

    Each value of each buffered update weighs s(tau). An update that a refresh has re-expressed says where it has values (personal masks say
    so too, and then always); full models have no mask that could be old.
    """
    method = ledger.task.method
    decay = staleness(method.staleness, a=method.staleness_a, b=method.staleness_b)
    older = total = 0.0
    for held in ledger.buffer.values():
        presence = held.update.presence
        kept = held.update.length if presence is None else int(presence.sum())
        weight = decay(ledger.version - version_of(held.version)) * kept
        total += weight
        older += 0.0 if presence is None else weight
    return older / total if total else 0.0
