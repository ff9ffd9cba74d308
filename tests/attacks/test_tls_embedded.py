"""Attacks on a fleet's door, on the embedded broker; it is for the bench, and holds what it promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("cryptography")

from tests.attacks import doors
from tests.attacks.doors import DoorRig, door_rig

rig = door_rig("amqtt")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("attack", doors.BOTH, ids=lambda attack: attack.__name__)
def test_attack(rig: DoorRig, attack: Callable[[DoorRig], None]) -> None:
    attack(rig)


def test_a_renewed_certificate_of_the_broker_is_shown(rig: DoorRig) -> None:
    doors.a_renewed_certificate_is_shown(rig)
