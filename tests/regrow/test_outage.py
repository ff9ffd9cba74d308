"""An outage is two lines, however often the broker is tried; what a person must do is said again, slowly."""

from __future__ import annotations

from regrow.machine import Disconnected
from regrow.outage import REMIND_S, Outage

NOBODY = Disconnected("cannot connect to 127.0.0.1:1883: Connection refused")
REFUSED = Disconnected("the broker refused 'd1'; check the bundle", needs_help=True)


def test_one_line_when_it_begins_and_one_when_it_ends() -> None:
    outage = Outage()
    assert outage.over(0.0) == "", "the first connection is no end of an outage"
    for begun in (10.0, 500.0):
        said = [outage.lost(Disconnected("connection lost"), begun), *(outage.lost(NOBODY, begun + 0.3 * tried) for tried in range(200))]
        assert [line for line in said if line] == ["connection lost; trying again"]
        assert outage.over(begun + 61.0) == " after 61 s without a connection"


def test_what_needs_help_is_said_at_once_and_again_slowly() -> None:
    outage = Outage()
    assert outage.lost(NOBODY, 0.0)
    said = [bool(outage.lost(REFUSED if now % 2 else NOBODY, float(now))) for now in range(1, 2 * int(REMIND_S))]
    assert [now for now, told in enumerate(said, 1) if told] == [1, 1 + REMIND_S]
