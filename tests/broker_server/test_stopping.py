"""The first Ctrl-C ends with what is to be done, says how to leave at once, and the second one does."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from broker_server.stopping import stop_at_signals


@pytest.fixture
def stops() -> Iterator[list[str]]:
    """What was asked to stop; the handlers are the test runner's again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    asked: list[str] = []
    stop_at_signals(lambda: asked.append("stop"), "writing the report")
    yield asked
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_says_what_a_second_one_does(stops: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    signal.raise_signal(signal.SIGINT)
    assert stops == ["stop"]
    assert capfd.readouterr().err == "\nwriting the report; Ctrl-C again quits at once\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stops == ["stop"]


def test_sigterm_is_an_orderly_end_however_often_it_comes(stops: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stops == ["stop", "stop"]
    assert capfd.readouterr().err == ""
