"""What an assignment says beyond the ledger: the learning rate of the moment and the size of chunks."""

from __future__ import annotations

import msgspec
import pytest

from regrow import wire
from regrow.broadcast import chunk_bytes, learning_rate
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.task import Task
from tests.regrow import fleet


@pytest.mark.parametrize(
    ("stop", "version", "elapsed_s", "expected"),
    [
        ({"aggregations": 100}, 0, 0.0, 0.1),
        ({"aggregations": 100}, 50, 0.0, 0.055),
        ({"aggregations": 100}, 250, 0.0, 0.01),
        ({"seconds": 200.0}, 7, 100.0, 0.055),
        ({"seconds": 200.0, "aggregations": 10}, 10, 100.0, 0.01),
    ],
)
def test_the_rate_falls_linearly_with_what_has_passed(stop: dict[str, float], version: int, elapsed_s: float, expected: float) -> None:
    settings = fleet.task(training={"learning_rate": 0.1, "final_learning_rate": 0.01})
    ledger = Ledger.start(msgspec.convert({**msgspec.to_builtins(settings), "stop": stop}, Task), fleet.LAYOUT, fleet.INITIAL)
    ledger.version, ledger.elapsed_s = version, elapsed_s
    assert learning_rate(ledger) == pytest.approx(expected)


def test_without_a_final_rate_it_stays_and_without_an_end_a_final_rate_is_refused() -> None:
    ledger = Ledger.start(fleet.task(), fleet.LAYOUT, fleet.INITIAL)
    ledger.version = 59
    assert learning_rate(ledger) == ledger.task.training.learning_rate
    with pytest.raises(LocalError, match="final_learning_rate"):
        msgspec.convert({"name": "toy", "training": {"final_learning_rate": 0.01}}, Task)


@pytest.mark.parametrize(("bps", "expected"), [(30e3, wire.MIN_CHUNK_BYTES), (800e3, 100_000), (1e9, wire.MAX_CHUNK_BYTES)])
def test_a_chunk_is_about_a_second_of_the_link(bps: float, expected: int) -> None:
    assert chunk_bytes(bps) == expected
