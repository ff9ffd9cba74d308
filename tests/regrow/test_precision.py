"""How many bits an update gets: by the task, or by what the link can still carry."""

from __future__ import annotations

import pytest

from regrow import records
from regrow.precision import update_dtype
from regrow.restoration import PACE_ROUNDS
from regrow.task import Wire
from tests.regrow.fleet import task
from tests.regrow.harness import begin, check_run


@pytest.mark.parametrize(
    ("density", "int8_round_s", "elapsed_s", "dtype"),
    [
        (0.5, 1.0, 1e6, "int4"),  # coordinates first, however long it has trained
        (1.0, None, 1e6, "int4"),  # nothing was measured yet
        (1.0, 10.0, PACE_ROUNDS * 10.0 - 0.1, "int4"),
        (1.0, 10.0, PACE_ROUNDS * 10.0, "int8"),
    ],
)
def test_bits_come_when_there_are_no_more_coordinates(density: float, int8_round_s: float | None, elapsed_s: float, dtype: str) -> None:
    assert update_dtype(density, int8_round_s, elapsed_s) == dtype


def test_a_dtype_by_name_is_the_only_one() -> None:
    assert Wire(up="float16").dtypes == ("float16",)
    assert Wire().dtypes == ("int4", "int8")


def test_an_automatic_fleet_sends_int4_first_and_int8_on_whole_models_and_a_replay_gives_the_same() -> None:
    settings = task(wire={"up": "auto"}, method={"name": "fedgmr-pace"})
    world = begin(settings)
    world.finish()
    entries = [records.from_record(record) for record in world.log]
    accepted = [entry for entry in entries if isinstance(entry, records.Accepted)]
    assert {entry.dtype for entry in accepted} == {"int4", "int8"}
    top = max(entry.level for entry in accepted)
    assert all(entry.level == top for entry in accepted if entry.dtype == "int8")
    assert accepted[0].dtype == "int4"
    check_run(world, settings)
