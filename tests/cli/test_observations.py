"""Observations from the command line: on by default, off where somebody says so, and stored by one process of a gateway."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from broker_server.credentials import Credentials
from broker_server.field_herald import FieldHerald
from broker_server.observations import Recorder
from cli.gateway import _recording
from cli.main import main
from tests.testbed.processes import Child


@pytest.mark.parametrize("options", [[], ["--no-observations"]])
def test_an_agent_keeps_a_journal_unless_told_not_to(tmp_path: Path, options: list[str]) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 64), np.float32), y=np.zeros(20, np.int64))
    credentials = Credentials(tmp_path / "home")
    credentials.add_device("d1")
    bundle = credentials.write_bundle("d1", "mqtt://127.0.0.1:9", tmp_path)
    words = ["agent", "--bundle", bundle, "--data", tmp_path / "d.npz", "--state", tmp_path / "state", *options]
    agent = Child(words, tmp_path / "agent.log")
    agent.said("looking for work")
    assert agent.stop() == 0
    journal = list((tmp_path / "state").glob("observations/*.rows"))
    assert len(journal) == (0 if options else 1)
    assert (tmp_path / "state" / "observations").exists() is not bool(options)


def test_one_process_stores_and_speaks_and_another_knows_who_keeps_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(no_observations=False, observations_mb=1.0)
    with _recording(options, tmp_path) as first, _recording(options, tmp_path) as second:
        assert [type(companion) for companion in first] == [Recorder, FieldHerald]
        assert [type(companion) for companion in second] == [FieldHerald]
    assert "another process stores the observations of devices" in capsys.readouterr().out
    with _recording(options, tmp_path) as again:
        assert len(again) == 2


def test_a_gateway_that_stores_none_leaves_nothing(tmp_path: Path) -> None:
    with _recording(argparse.Namespace(no_observations=True, observations_mb=1.0), tmp_path) as recording:
        assert recording == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["agent", "--bundle", "b", "--data", "d", "--journal-mb", "0.5"], ["serve", "t", "--observations-mb", "1e12"]]
)
def test_sizes_are_checked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "is not a number from 1 to 1e9" in capsys.readouterr().err
