"""Attacks on a fleet's door, on a real mosquitto."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("cryptography")

from tests.attacks import doors
from tests.attacks.doors import DoorRig, door_rig

pytestmark = pytest.mark.network

rig = door_rig("mosquitto")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("attack", [*doors.BOTH, doors.a_password_at_the_door], ids=lambda attack: attack.__name__)
def test_attack(rig: DoorRig, attack: Callable[[DoorRig], None]) -> None:
    attack(rig)


def test_a_renewed_certificate_of_the_broker_is_shown(rig: DoorRig) -> None:
    doors.a_renewed_certificate_is_shown(rig)
