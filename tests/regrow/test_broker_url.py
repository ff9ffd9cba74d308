"""One idea of a broker's URL, for bundles, agents and the gateway."""

from __future__ import annotations

import pytest

from regrow.broker_url import BrokerAddress, parse_broker_url
from regrow.errors import LocalError


def test_the_parts_of_a_url() -> None:
    assert parse_broker_url("mqtt://h") == BrokerAddress("h", 1883, False, None, None)
    assert parse_broker_url("mqtts://10.0.0.1") == BrokerAddress("10.0.0.1", 8883, True, None, None)
    assert parse_broker_url("mqtts://u:p%40ss@h:9/") == BrokerAddress("h", 9, True, "u", "p@ss")
    assert parse_broker_url("mqtt://[::1]:9").host == "::1"
    assert parse_broker_url("mqtts://10.0.0.1:9/", of_device=True) == BrokerAddress("10.0.0.1", 9, True)


WRONG = ["", "h", "http://h", "mqtt://", "mqtt://u:secret@h:x", "mqtt://h/path", "mqtt://[::1", "mqtt://a b", "mqtt://h:0", "mqtt://h?x=1"]


@pytest.mark.parametrize("url", [*WRONG, "mqtt://h:65536", "mqtt://h#x", "mqtt://u:sec#ret@h"])
def test_a_wrong_url_is_refused_with_an_example_and_without_repeating_it(url: str) -> None:
    for of_device in (False, True):
        with pytest.raises(LocalError, match=r"expected mqtt://.*; for example mqtt://") as caught:
            parse_broker_url(url, of_device=of_device)
        assert "sec" not in str(caught.value)


@pytest.mark.parametrize("url", ["mqtt://u@h", "mqtt://u:secret@h", "mqtt://:secret@h"])
def test_a_device_keeps_its_password_out_of_the_url(url: str) -> None:
    with pytest.raises(LocalError, match="the device's bundle carries them") as caught:
        parse_broker_url(url, of_device=True)
    assert "secret" not in str(caught.value)
