"""FedMR: hand-computed shuffles, what every shuffle keeps, and whole runs in which each device trains another model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import checkpoint, methods, records, uploads, wire
from regrow.device import Device
from regrow.errors import LocalError, PeerError
from regrow.machine import Record, TrainingFailed
from regrow.order import build_order
from regrow.parameters import Layout, Tensor
from regrow.publication import number_of, slot_of, version_of
from regrow.recombination import recombine, shuffles
from regrow.task import Task
from testbed.memory import COORDINATOR
from tests.regrow.fleet import INITIAL, identity, task, train
from tests.regrow.harness import Tape, begin, check_run, fingerprint, leftovers, replay, replay_with_snapshot, restart_coordinator

THREE = {"d0": 4_000_000.0, "d1": 2_000_000.0, "d2": 400_000.0}


def fedmr(aggregations: int = 5, after: int = 2, devices: int = 3, **sections: dict[str, Any]) -> Task:
    tables = {**methods.named("fedmr"), "stop": {"aggregations": aggregations}, **sections}
    tables["method"] = {**tables["method"], "recombine_after": after}
    return task(**{"fleet": {"min_devices": devices}, **tables})


def apart(name: str, job: Any) -> Any:
    """Every device pulls towards a point of its own, so that no two clients' layers are alike."""
    seconds, result = train(name, job)
    own = np.random.default_rng(ord(name[1])).normal(size=INITIAL.size).astype(np.float32)
    values = job.values[: job.length]
    return seconds, replace(result, values=values + np.float32(0.3) * (own[job.coordinates[: job.length]] - values))


# ---- one shuffle -----------------------------------------------------------------------------------------------------------------------


def test_two_layers_of_three_clients_by_hand() -> None:
    """Flat: a.weight 0 1, a.bias 2, b 3 4; positions: the bias first, then the rest."""
    layout = Layout((Tensor("a.weight", (2,)), Tensor("a.bias", (1,), always_kept=True), Tensor("b", (2,))))
    order = build_order(layout, np.ones(5, np.float32), [1.0], 0)
    assert order.coordinates.tolist() == [2, 0, 1, 3, 4]
    models = [np.array(row, np.float32) for row in ([2, 0, 1, 3, 4], [12, 10, 11, 13, 14], [22, 20, 21, 23, 24])]
    chosen = {"a": np.array([2, 0, 1]), "b": np.array([0, 2, 1])}
    found = recombine(models, layout, order, chosen)
    assert [model.tolist() for model in found] == [[22, 20, 21, 3, 4], [2, 0, 1, 23, 24], [12, 10, 11, 13, 14]]
    assert models[0].tolist() == [2, 0, 1, 3, 4], "what clients sent is left as it was"


def test_the_draw_is_the_same_on_every_machine() -> None:
    """A replay with another NumPy must hand out the same models: bits as PCG64 has given them since NumPy 1.17."""
    layout = Layout((Tensor("a.weight", (2,)), Tensor("b.weight", (2,)), Tensor("a.bias", (1,))))
    drawn = {name: order.tolist() for name, order in shuffles(layout, 3, 7, 4).items()}
    assert drawn == {"a": [3, 2, 1, 0], "b": [1, 2, 3, 0]}
    assert drawn != {name: order.tolist() for name, order in shuffles(layout, 3, 8, 4).items()}


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_what_every_shuffle_keeps(clients: int, layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = []
    for number in range(layers):
        tensors += [Tensor(f"l{number}.weight", (int(rng.integers(1, 9)),)), Tensor(f"l{number}.bias", (3,), always_kept=True)]
    layout = Layout(tuple(tensors))
    order = build_order(layout, rng.random(layout.size).astype(np.float32), [1.0], 0)
    models = [rng.standard_normal(layout.size).astype(np.float32) for _ in range(clients)]
    found = recombine(models, layout, order, shuffles(layout, seed, 1, clients))
    for number in range(layers):
        ends = layout.slices[f"l{number}.weight"].start, layout.slices[f"l{number}.bias"].stop
        where = np.flatnonzero((order.coordinates >= ends[0]) & (order.coordinates < ends[1]))
        assert sorted(m[where].tobytes() for m in models) == sorted(m[where].tobytes() for m in found), "a layer is lost, or used twice"
    assert np.allclose(np.mean(found, axis=0), np.mean(models, axis=0), rtol=1e-5, atol=1e-6)
    if clients == 1:
        assert np.array_equal(found[0], models[0])


@given(st.integers(0, 10**9 - 1), st.integers(0, 8_000_000))
def test_numbers_of_models(version: int, slot: int) -> None:
    number = number_of(version, slot)
    assert (version_of(number), slot_of(number)) == (version, slot)
    assert number <= 2**53, "the wire's largest"
    assert number_of(version, 0) == version


# ---- whole runs ------------------------------------------------------------------------------------------------------------------------


def assigned_in(log: list[Record]) -> list[records.Assigned]:
    return [entry for entry in map(records.from_record, log) if isinstance(entry, records.Assigned)]


@pytest.mark.parametrize(("links", "after"), [(THREE, 100), ({"d0": 4e6}, 0)], ids=["before the switch", "one client"])
def test_it_is_federated_averaging_to_the_bit(links: dict[str, float], after: int) -> None:
    shuffled, averaged = fedmr(after=after, devices=len(links)), methods.named("fedavg")
    averaged["method"]["weigh_by_examples"] = False
    plain = task(fleet={"min_devices": len(links)}, stop={"aggregations": 5}, **averaged)
    worlds = [begin(settings, links, apart) for settings in (shuffled, plain)]
    for world in worlds:
        world.finish()
    assert worlds[0].log == worlds[1].log
    assert worlds[0].sent == worlds[1].sent
    assert np.array_equal(worlds[0].coordinator().ledger.weights, worlds[1].coordinator().ledger.weights)


@pytest.mark.parametrize("limits", [{}, {"versions_on_broker": 1, "versions_held": 1}], ids=["default limits", "one version"])
def test_each_recombined_model_is_trained_by_one_device(limits: dict[str, int]) -> None:
    settings = fedmr(wire={"up": "float32", "down": "float32", **limits})
    world = begin(settings, THREE, apart)
    world.finish()
    given = Counter(entry.version for entry in assigned_in(world.log))
    assert given == Counter({**dict.fromkeys((0, 1, 2), 3), **{number_of(version, slot): 1 for version in (3, 4) for slot in range(3)}})
    fetched = [topic.rsplit("/", 1)[1] for _, who, topic, payload in world.sent if who == COORDINATOR and payload and "/manifest/" in topic]
    assert sorted(map(int, fetched)) == sorted(given), "each model leaves the coordinator once"
    assert Counter(fields["version"] for fields in world.notes_of("fetching")) == Counter(dict.fromkeys(range(5), 3))
    version = 0
    for entry in map(records.from_record, world.log):
        version = entry.version if isinstance(entry, records.Aggregated) else version
        assert not isinstance(entry, records.Retired) or version_of(entry.version) < version, "given up while somebody may still ask for it"
    assert {fields["staleness"] for fields in world.notes_of("update")} == {0}
    assert {fields["version"] for fields in world.notes_of("update")} == set(range(5))
    check_run(world, settings)
    assert leftovers(world) == []


def test_what_devices_get_is_what_was_shuffled_and_its_mean_is_the_model() -> None:
    got: list[np.ndarray] = []

    def listen(name: str, job: Any) -> Any:
        got.append(job.values.copy())
        return apart(name, job)

    world = begin(fedmr(aggregations=4, after=2, wire={"up": "float32", "down": "float32"}), THREE, listen)
    world.run(60, stop=lambda: len(got) == 12)
    ledger = world.coordinator().ledger
    assert ledger.version == 3
    assert len(ledger.recombined) == 3
    assert sorted(values.tobytes() for values in got[-3:]) == sorted(model.tobytes() for model in ledger.recombined)
    assert len({values.tobytes() for values in got[-3:]}) == 3
    assert np.allclose(np.mean(ledger.recombined, axis=0), ledger.weights, rtol=1e-5, atol=1e-6)


def live_models(world: Tape) -> list[int]:
    return sorted(int(topic.rsplit("/", 1)[1]) for topic in world.retained if "/manifest/" in topic)


def in_round(world: Tape, version: int) -> None:
    """Until everybody has work of this version."""
    ledger = world.coordinator().ledger
    world.run(600, stop=lambda: ledger.version == version and all(device.lease is not None for device in ledger.devices.values()))
    assert ledger.version == version


def test_whoever_joins_in_mid_round_shares_a_model_and_the_next_round_has_one_more() -> None:
    def slow(name: str, job: Any) -> Any:
        seconds, result = apart(name, job)
        return (5.0 if name == "d2" and job.number == 4 else seconds), result

    settings = fedmr(aggregations=6)
    world = begin(settings, THREE, slow)
    in_round(world, 3)
    world.add("d3", Device(identity("d3"), {}), up_bps=4e6, down_bps=1.6e7)
    world.finish()
    given = [(entry.device, entry.version) for entry in assigned_in(world.log)]
    assert next(number for who, number in given if who == "d3") == 3, "the first model, for all three are taken"
    for version in (4, 5):
        assert {number for _, number in given if version_of(number) == version} == {number_of(version, slot) for slot in range(4)}
    check_run(world, settings)
    assert leftovers(world) == []


def test_a_model_whose_training_failed_goes_out_again() -> None:
    def fails(name: str, job: Any) -> Any:
        return (0.1, TrainingFailed(job.number, "no memory")) if name == "d1" and job.number == 4 else apart(name, job)

    settings = fedmr()
    world = begin(settings, THREE, fails)
    world.finish()
    given = {entry.number: entry.version for entry in assigned_in(world.log) if entry.device == "d1"}
    assert given[4] == given[5] == number_of(3, 1)
    assert given[6] == number_of(4, 1)
    check_run(world, settings)
    assert leftovers(world) == []


@pytest.mark.parametrize("on_broker", [1, 2])
def test_one_device_that_never_delivers_holds_nobody_up(on_broker: int) -> None:
    """Its old model stays leased into later rounds; with one place on the broker the others meanwhile train what is there."""

    def lazy(name: str, job: Any) -> Any:
        seconds, result = apart(name, job)
        return (1e9 if name == "d2" and job.number >= 4 else seconds), result

    settings = fedmr(aggregations=8, fleet={"min_devices": 3, "min_deadline_s": 5.0}, wire={"versions_on_broker": on_broker})
    world = begin(settings, THREE, lazy)
    world.finish()
    assert any(fields["reason"] == "deadline passed" for fields in world.notes_of("released"))
    late = {entry.version for entry in assigned_in(world.log) if entry.device != "d2" and version_of(entry.version) >= 5}
    assert {slot_of(number) for number in late} == ({0, 1} if on_broker > 1 else set()), "two clients, two models, where there is room"
    check_run(world, settings)
    assert leftovers(world) == []


def test_a_broker_that_forgets_everything_is_told_every_model_again() -> None:
    world = begin(fedmr(), THREE, apart)
    in_round(world, 3)
    world.restart_broker()
    world.finish()
    check_run(world, fedmr())
    assert leftovers(world) == []


# ---- durable ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log() -> list[Record]:
    world = begin(fedmr(), THREE, apart)
    world.finish()
    return world.log


def test_a_snapshot_anywhere_and_the_rest_of_the_log_give_the_same_bits(log: list[Record]) -> None:
    whole = fingerprint(replay(log, fedmr()))
    assert whole[1]["recombined.2"] != whole[1]["weights"]
    for at in range(0, len(log) + 1, 3):
        assert fingerprint(replay_with_snapshot(log, fedmr(), at)) == whole, f"snapshot after {at} records"


def test_a_snapshot_without_its_models_is_refused(log: list[Record]) -> None:
    ledger = replay(log, fedmr())
    meta, arrays = checkpoint.dump(ledger)
    del arrays["recombined.1"]
    with pytest.raises(LocalError, match="rollback"):
        checkpoint.load(fedmr(), ledger.layout, meta, arrays)


def test_a_rollback_goes_back_to_one_model(log: list[Record]) -> None:
    ledger = replay(log, fedmr())
    assert len(ledger.recombined) == 3
    ledger.apply(records.RolledBack(version=6, to_version=2), INITIAL.tobytes())
    assert ledger.recombined == []
    ledger.apply(records.Published(version=6, chunk_bytes=16_384))
    assert ledger.published[6].version == 6


def test_a_log_that_publishes_a_model_that_there_is_not_is_refused(log: list[Record]) -> None:
    ledger = replay(log, fedmr())
    with pytest.raises(LocalError, match="out of order"):
        ledger.apply(records.Published(version=number_of(ledger.version, 3), chunk_bytes=16_384))


def boundaries() -> int:
    world = begin(fedmr(), THREE, apart)
    world.finish()
    return world.persists


@pytest.mark.parametrize("number", range(1, boundaries() + 1))
def test_a_crash_at_every_durable_step(number: int) -> None:
    settings = fedmr()
    world = begin(settings, THREE, apart)
    world.crash_at = (number, number % 2 == 0)
    world.run(300, stop=lambda: world.crashed)
    world.run(world.now + 1.0)
    restart_coordinator(world, settings, snapshot_at=number if number % 3 else None)
    world.finish()
    check_run(world, settings)
    assert leftovers(world) == []
    for version in (3, 4):  # whoever is not heard of yet after a restart is not waited for, so a round may be smaller
        slots = {slot_of(entry.version) for entry in assigned_in(world.log) if version_of(entry.version) == version}
        assert slots == set(range(len(slots)))


def test_the_broker_keeps_no_model_that_everybody_has() -> None:
    world = begin(fedmr(), THREE, apart)
    in_round(world, 3)
    world.run(world.now + 1.0, stop=lambda: len(live_models(world)) == 3)
    assert live_models(world) == [number_of(3, slot) for slot in range(3)]
    world.run(600, stop=lambda: live_models(world) == [3])
    assert world.coordinator().ledger.version == 3
    assert set(world.coordinator().ledger.published) == {number_of(3, slot) for slot in range(3)}, "their bases are still needed"
    world.finish()
    assert leftovers(world) == []


def test_an_update_of_a_model_that_is_no_longer_held_is_too_late_and_of_one_that_never_was_a_lie() -> None:
    world = begin(fedmr(), THREE, apart)
    in_round(world, 4)
    ledger = world.coordinator().ledger
    assert {version_of(number) for number in ledger.published} == {4}
    for number, error in ((number_of(3, 1), uploads.TooLateError), (number_of(5, 0), PeerError)):
        head = wire.UpdateHead(1, number, 0, 0, "int8", 1, 1, wire.digest(b"x"))
        with pytest.raises(PeerError) as caught:
            uploads.checked(ledger, "d0", uploads.Assembly(identity("d0").install, 99, 1, 16_384, head, {0: b"x"}), b"x", 1e6)
        assert type(caught.value) is error
