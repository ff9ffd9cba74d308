"""Personal masks: pruning and regrowing by hand, the payload and its refusals, and a mask that outlives every reboot."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow import methods, outgoing, personal, records, uploads, values, wire
from regrow.errors import PeerError
from regrow.ledger import Ledger
from regrow.machine import Train
from regrow.parameters import Layout, Tensor
from regrow.values import WireDtype
from tests.golden.examples import EXAMPLES, INSTALL
from tests.regrow.fleet import INITIAL, LAYOUT, TARGET, task, train
from tests.regrow.harness import Tape, begin, check_run

COMMON = settings(max_examples=40)
DTYPES: tuple[WireDtype, ...] = ("float32", "float16", "int8")
FIVE = Layout((Tensor("w", (5,)), Tensor("b", (1,), always_kept=True)))


def floats(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def mask(text: str) -> Any:
    return np.array([letter == "1" for letter in text])


# ---- the rule, by hand ---------------------------------------------------------------------------------------------------------------


def test_the_smallest_fifth_of_what_is_above_the_target_goes() -> None:
    # Position 0 is always kept. Nine are kept, the target is 3: six are above it, ceil(6 / 5) = 2 go, the smallest |w| of 1 to 9.
    trained = floats(0.0, 0.5, -0.1, 0.4, 9.0, -0.2, 0.3, 0.7, 0.05, -0.6)
    kept = mask("1111111101")
    assert personal.pruned(trained, kept, 1, 3).tolist() == mask("1101101101").tolist()
    assert kept.tolist() == mask("1111111101").tolist(), "the mask that was trained is not modified"


def test_rounds_prune_down_to_the_target_and_no_further() -> None:
    trained = np.arange(20, dtype=np.float32)
    kept, counts = np.ones(20, np.bool_), []
    for _ in range(20):
        kept = personal.pruned(trained, kept, 2, 5)
        counts.append(int(kept.sum()))
    # 20 - 3 - 3 - 2 - 2 - 1 ...: ceil of a fifth of 15, 12, 9, 7, 5, 4, 3, 2, 1.
    assert counts == [17, 14, 12, 10, 9, 8, 7, 6, 5, *[5] * 11]
    assert np.flatnonzero(kept).tolist() == [0, 1, 17, 18, 19]


def test_a_new_device_keeps_everything_and_a_raised_level_brings_the_largest_back() -> None:
    coordinates = np.array([5, 3, 0, 1, 2, 4], np.uint32)  # positions 0..5; coordinate 5 is the always-kept one
    base = floats(7.0, 0.1, -0.5, 0.2, 0.9, -0.3)
    assert personal.start(b"", base, coordinates, 1, 3).all()
    saved = personal.to_flat(mask("110010"), coordinates)  # coordinates 5, 3 and 2
    assert saved == bytes([0b00110100])
    assert personal.start(saved, base, coordinates, 1, 3).tolist() == mask("110010").tolist()
    # Two more: of positions 2, 3 and 5 the global model has 2 and 5 largest.
    assert personal.start(saved, base, coordinates, 1, 5).tolist() == mask("111011").tolist()
    assert personal.start(saved + b"\0", base, coordinates, 1, 3).all(), "a mask of another model is none"


def test_the_mask_stays_with_its_weights_when_the_order_changes() -> None:
    generator = np.random.default_rng(3)
    old, new = (generator.permutation(100).astype(np.uint32) for _ in range(2))
    kept = generator.random(100) < 0.4
    again = personal.start(personal.to_flat(kept, old), np.zeros(100, np.float32), new, 0, 0)
    assert set(new[again]) == set(old[kept])


# ---- the mean over those that keep a weight, by hand -----------------------------------------------------------------------------------


def settings_of(up: WireDtype = "float32", **method: Any) -> Any:
    chosen = {"name": "subfedavg", "ladder": (0.5, 1.0), **method}
    return task(method=chosen, wire={"up": up, "down": "float32"}, fleet={"min_devices": 1})


def five(up: WireDtype = "float32") -> Ledger:
    """Two devices of level 0 (the bias and two weights) with leases on version 0: bias 1, weights 5, 4, 3, 2, 1."""
    ledger = Ledger.start(settings_of(up), FIVE, floats(5, 4, 3, 2, 1, 1))
    ledger.apply(records.Published(version=0, chunk_bytes=wire.MIN_CHUNK_BYTES))
    for name in ("d0", "d1"):
        ledger.apply(records.Joined(device=name, install=INSTALL.hex(), uplink_bps=1e6, density=0.5))
        ledger.apply(records.Assigned(device=name, number=1, version=0, epoch=0, level=0, dtype=up, deadline_s=30.0))
    return ledger


def accept(ledger: Ledger, device: str, payload: bytes, **fields: Any) -> records.Accepted:
    up = ledger.task.wire.up
    known: dict[str, Any] = {"assignment": 1, "version": 0, "epoch": 0, "level": 0, "dtype": up, "examples": 5}
    head = wire.UpdateHead(**{**known, "size": len(payload), "digest": wire.digest(payload), **fields})
    entry = uploads.checked(ledger, device, uploads.Assembly(INSTALL, 0, 1, wire.MAX_CHUNK_BYTES, head, {0: payload}), payload, 1e6)
    ledger.apply(entry, payload)
    return entry


def test_each_weight_is_the_mean_over_the_devices_that_keep_it() -> None:
    ledger = five()
    assert ledger.order.lengths == (3, 6)
    assert ledger.weights.tolist() == [1, 5, 4, 3, 2, 1], "position order: the bias, then by falling |w|"
    one = personal.bitmap(mask("110110")) + floats(2, 6, 0, 4).tobytes()  # a kept 0.0 counts
    other = personal.bitmap(mask("101110")) + floats(4, 8, 2, 5).tobytes()
    assert accept(ledger, "d0", one).norm == pytest.approx((1 + 1 + 9 + 4) ** 0.5)
    accept(ledger, "d1", other)
    ledger.apply(records.Aggregated(version=1, elapsed_s=1.0))
    assert ledger.weights.tolist() == [3, 6, 8, 1, 4.5, 1], "what nobody keeps stays as it was"


def test_a_delta_is_added_to_the_kept_positions_of_the_base() -> None:
    ledger = five("int8")
    kept = mask("110010")
    payload = personal.bitmap(kept) + values.encode(floats(0.5, 1.27, -1.27), "int8", 1)
    accept(ledger, "d0", payload)
    held = ledger.buffer["d0"].update
    assert held.presence is not None
    assert held.presence.tolist() == kept.tolist()
    np.testing.assert_allclose(held.values, floats(1.5, 6.27, 0, 0, 0.73, 0), atol=2e-3)


def test_who_keeps_everything_is_averaged_like_a_whole_prefix() -> None:
    ledger = five()
    accept(ledger, "d0", personal.bitmap(np.ones(6, np.bool_)) + floats(1, 2, 3, 4, 5, 6).tobytes())
    assert ledger.buffer["d0"].update.presence is None


# ---- payloads --------------------------------------------------------------------------------------------------------------------------


def made(dtype: WireDtype, kept: Any, trained: Any, base: Any, owed: Any = None, always_kept: int = 3) -> outgoing.Outgoing:
    message = EXAMPLES["assignment"][0]
    assert isinstance(message, wire.Assignment)
    return outgoing.make(
        msgspec.structs.replace(message, dtype=dtype), run="r1", sequence=0, trained=trained, base=base,
        coordinates=np.arange(trained.size, dtype=np.uint32), size=trained.size, always_kept=always_kept, owed=owed,
        examples=1, loss=0.0, seconds=0.0, scores=[], kept=kept,
    )  # fmt: skip


@COMMON
@given(st.integers(0, 1000), st.integers(3, 700), st.sampled_from(DTYPES))
def test_the_payload_gives_the_kept_values_back_and_the_mask_outlives_a_reboot(seed: int, n: int, dtype: WireDtype) -> None:
    generator = np.random.default_rng(seed)
    kept = generator.random(n) < generator.random()
    kept[:3] = True
    base, trained = (generator.normal(size=n).astype(np.float32) for _ in range(2))
    sent = made(dtype, kept, trained, base)
    assert len(sent.payload) == personal.bitmap_bytes(n) + values.encoded_size(dtype, int(kept.sum()), 3)
    mask_again, rest = personal.split(sent.payload, n, 3, 3)
    assert mask_again.tolist() == kept.tolist()
    decoded = values.decode(rest, dtype, int(kept.sum()), 3)
    got = decoded + base[kept] if dtype == "int8" else decoded
    np.testing.assert_allclose(got, trained[kept], atol=0.05)
    if sent.owed is not None:
        assert not sent.owed[~kept].any(), "what is not sent is not owed either"
    again = outgoing.from_bytes(sent.to_bytes(), None)
    assert again.mask == sent.mask == personal.to_flat(kept, np.arange(n, dtype=np.uint32))
    assert again.rejected().mask == sent.mask
    assert personal.start(again.mask, base, np.arange(n, dtype=np.uint32), 3, 3).tolist() == kept.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_nothing_pruned_the_values_are_those_of_plain_training(dtype: WireDtype) -> None:
    generator = np.random.default_rng(1)
    base, trained = (generator.normal(size=600).astype(np.float32) for _ in range(2))
    whole = made(dtype, np.ones(600, np.bool_), trained, base)
    plain = made(dtype, None, trained, base)
    assert whole.payload == b"\xff" * 75 + plain.payload
    assert plain.mask == b""


N = FIVE.size
HOSTILE = {
    "nothing": (b"", "the bitmap of 6 positions alone has 1"),
    "padding": (bytes([0b11100001]) + bytes(12), "padding"),
    "without the always-kept": (bytes([0b01110000]) + bytes(12), "position 0 is left out"),
    "too few": (bytes([0b11000000]) + bytes(8), "keeps 2 positions, its level has 3"),
    "too short": (bytes([0b11100000]) + bytes(11), "11 bytes, 3 values as float32 take 12"),
    "too long": (bytes([0b11100000]) + bytes(13), "13 bytes, 3 values as float32 take 12"),
    "no mask at all": (bytes(4 * N), "position 0 is left out"),
    "not a number": (bytes([0b11100000]) + floats(1, np.nan, 1).tobytes(), "not finite"),
    "a huge step": (bytes([0b11100000]) + floats(1, 1e9, 1).tobytes(), "norm"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_payload_that_no_honest_device_sends_is_refused(name: str) -> None:
    payload, why = HOSTILE[name]
    ledger = five()
    with pytest.raises(PeerError, match=why) as caught:
        accept(ledger, "d0", payload)
    assert not isinstance(caught.value, uploads.TooLateError)
    assert not ledger.buffer


@COMMON
@given(st.binary(max_size=40))
def test_any_bytes_are_an_update_or_a_peer_error(payload: bytes) -> None:
    ledger = five("int8")
    try:
        accept(ledger, "d0", payload)
    except PeerError:
        assert not ledger.buffer


def test_the_quota_is_the_largest_mask_with_all_its_values() -> None:
    assert uploads.quota_bytes(five()) == 1 + 4 * N
    plain = Ledger.start(task(), LAYOUT, INITIAL)
    assert uploads.quota_bytes(plain) == 4 * LAYOUT.size


def test_the_norm_bound_does_not_depend_on_levels_whose_masks_begin_full() -> None:
    ledger = five()
    ledger.norms = {1: [1.0, 2.0, 3.0]}
    assert uploads.norm_bound(ledger, 0, 1.0) == 2.0 * ledger.task.fleet.norm_bound


# ---- whole runs ------------------------------------------------------------------------------------------------------------------------


def watched(seen: list[Train]) -> Any:
    def look(name: str, job: Train) -> Any:
        if name == "d1":
            seen.append(job)
        return train(name, job)

    return look


def counts(seen: list[Train]) -> list[int]:
    return [int(np.count_nonzero(job.kept)) for job in seen if job.kept is not None]


PAIR = {"d0": 4e6, "d1": 4e5}
RUN = task(**{**methods.named("subfedavg"), "fleet": {"min_devices": 2}, "stop": {"aggregations": 20}})


def started(seen: list[Train]) -> Tape:
    return begin(RUN, PAIR, trainer=watched(seen))


def test_a_device_fetches_everything_and_prunes_towards_its_level() -> None:
    seen: list[Train] = []
    world = started(seen)
    world.finish()
    lengths = world.coordinator().ledger.order.lengths
    device = world.coordinator().ledger.devices["d1"]
    target = lengths[world.coordinator().ledger.level_of(device.density)]
    found = counts(seen)
    assert found[0] == LAYOUT.size
    assert all(later == now - -(-(now - target) // 5) for now, later in pairwise(found))
    assert found[-1] < LAYOUT.size // 20 + target
    assert all(job.values.size == job.length == LAYOUT.size for job in seen)
    assert all(seen[0].level in job.evaluate and set(job.evaluate.values()) == {LAYOUT.size} for job in seen)
    check_run(world, RUN)


@pytest.mark.parametrize("die_at_s", [6.0, 9.5, 13.1])
def test_a_device_restarted_between_rounds_keeps_its_mask(die_at_s: float) -> None:
    seen: list[Train] = []
    world = started(seen)
    world.run(die_at_s)
    before = len(counts(seen))
    assert before >= 2
    world.reboot("d1", uplink_bps=PAIR["d1"])
    world.finish()
    found = counts(seen)
    assert len(found) > before
    steps = [(now, later) for now, later in pairwise(found) if now != later]  # a killed job is trained again
    target = world.coordinator().ledger.order.lengths[seen[0].level]
    assert all(later == now - -(-(now - target) // 5) for now, later in steps)
    masks = [set(job.coordinates[job.kept]) for job in seen if job.kept is not None]
    assert all(later <= now for now, later in pairwise(masks)), "what was pruned has come back"
    check_run(world, RUN)


def test_the_devices_come_near_what_they_all_look_for() -> None:
    """Masks differ, and yet the shared model learns: on what anybody keeps it ends at the target."""
    world = begin(RUN, PAIR)
    world.finish()
    ledger = world.coordinator().ledger
    kept = np.zeros(LAYOUT.size, np.bool_)
    for held in ledger.buffer.values():
        presence = held.update.presence
        kept[ledger.order.coordinates[: held.update.length]] |= True if presence is None else presence
    error = np.abs(ledger.flat_weights - TARGET)[kept]
    assert error.max() < 0.05
    assert kept.any()
