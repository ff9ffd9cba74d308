"""Settings from file, environment and flags: which wins, where each is said to come from, and one line for each mistake."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from cli import settings
from cli.main import main, parser
from regrow.errors import LocalError


def resolved(*words: str) -> argparse.Namespace:
    name = words[0]
    return settings.parse(parser(name), name, words, lambda: settings.variables(parser()))


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file where the usual one is: a machine that runs these tests may be a gateway."""
    monkeypatch.setenv("REGROW_CONFIG", str(tmp_path / "usual.toml"))
    (tmp_path / "usual.toml").touch(mode=0o600)


def written(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_the_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, 'task = "tasks/a" # ours\nport = 1\nhost = "::1"\nplain = true\nmetrics_port = 9464\n')
    found = resolved("serve", "--config", file)
    assert (found.task, found.port, found.host, found.plain, found.runs) == (Path("tasks/a"), 1, "::1", True, Path("runs"))
    assert (found.takeover, found.new_run, found.run, found.metrics_port) == (False, False, None, 9464)
    monkeypatch.setenv("REGROW_PORT", "2")
    monkeypatch.setenv("REGROW_PLAIN", "off")
    monkeypatch.setenv("REGROW_HOST", "")  # an empty variable says nothing
    found = resolved("serve", "--config", file)
    assert (found.port, found.host, found.plain) == (2, "::1", False)
    found = resolved("serve", "--config", file, "tasks/b", "--port", "3", "--plain")
    assert (found.task, found.port, found.plain) == (Path("tasks/b"), 3, True)
    monkeypatch.delenv("REGROW_PLAIN")
    assert resolved("serve", "--config", file, "--no-plain").plain is False


def test_an_agent_has_settings_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, 'bundle = "b.json"\nthreads = "auto"\nno_tuning = true\nvalidation = 0.1\nmax_uplink_bps = 2e5\n')
    monkeypatch.setenv("REGROW_DATA", "x.npz")
    found = resolved("agent", "--config", file, "--tuning")
    assert (found.bundle, found.data, found.no_tuning, found.validation) == (Path("b.json"), "x.npz", False, 0.1)
    assert found.threads >= 1
    assert found.max_uplink_bps == 200_000


def test_an_owners_limits_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['hours = "22:00-06:00"', "max_bytes_per_day = 100e6", "battery_floor = 30", "unmetered_only = true", 'metered = "wwan0"']
    file = written(tmp_path, "\n".join(['bundle = "b"', 'data = "d"', *lines, ""]))
    monkeypatch.setenv("REGROW_MAX_TEMPERATURE", "70")
    found = resolved("agent", "--config", file, "--max-joules-per-round", "12.5")
    assert (found.hours, found.max_bytes_per_day, found.battery_floor, found.unmetered_only) == ("22:00-06:00", 10**8, 30.0, True)
    assert (found.max_temperature, found.max_joules_per_round, found.metered) == (70.0, 12.5, "wwan0")
    assert main(["config", "show", "--command", "agent", "--", "--config", file]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^hours +22:00-06:00 +{re.escape(file)}:3$", shown, re.MULTILINE)
    assert "REGROW_MAX_TEMPERATURE" in shown
    assert main(["agent", "--config", written(tmp_path, 'bundle = "b"\ndata = "d"\nmax_bytes_per_day = 1.5\n')]) == 2
    assert "max_bytes_per_day: '1.5' is not a whole number above 0" in capsys.readouterr().err


def test_of_two_that_exclude_each_other_the_later_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, 'bundle = "b"\ndata = "d"\n')
    found = resolved("agent", "--config", file, "--identity", "i")
    assert (found.bundle, found.identity) == (None, Path("i"))
    monkeypatch.setenv("REGROW_IDENTITY", "j")
    found = resolved("agent", "--config", file)
    assert (found.bundle, found.identity) == (None, Path("j"))
    monkeypatch.delenv("REGROW_IDENTITY")
    assert resolved("agent", "--config", file).bundle == Path("b")
    assert main(["agent", "--config", written(tmp_path, 'bundle = "b"\nidentity = "i"\ndata = "d"\n')]) == 2
    assert "exclude each other" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resolved("agent", "--identity", "i", "--bundle", "b", "--data", "d")


def test_a_command_without_config_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_RUNS", "elsewhere")
    assert resolved("runs").runs == Path("runs")


MISTAKES = {
    "prot = 1": "prot is no setting of `regrow serve`: did you mean port?",
    "password = 'x'": "password is no setting of `regrow serve`: secrets have files of their own",
    "zzz = 1": "zzz is no setting of `regrow serve`: there are",
    "takeover = true": "takeover is no setting",
    "config = 'x'": "config is no setting",
    "metrics-port = 1": "did you mean metrics_port?",
    "port = '1'": "without quotes",
    'port = "1883"': "without quotes",
    "port = 1.5": "port: '1.5' is not a port",
    "port = true": "expected a number",
    "host = 1": 'expected "text" in quotes',
    "plain = 1": "expected true or false",
    "plain = 'true'": "expected true or false",
    "metrics_port = 70000": "is not a port",
    "broker_kind = 'nats'": "choose from auto, mosquitto, amqtt",
    "[serve]": "tables have no place here",
    "port = 1 2": "expected one `key = value`",
    "port": "expected one `key = value`",
    "port = 01": "expected one `key = value`",
    "plain = TRUE": "written small",
    "port = 1\nport = 2": "stands in",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_file_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, f"# settings\n\n{text}\n")
    assert main(["serve", "task", "--config", file]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    line = 4 if "\n" in text else 3
    assert said.startswith(f"regrow: {file}:{line}: ")
    assert MISTAKES[text] in said


def test_mistakes_elsewhere_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(words) == 2
        found = capsys.readouterr().err
        assert found.count("\n") == 1
        return found

    assert "regrow serve needs task: " in said("serve")
    assert "regrow agent needs identity or bundle: " in said("agent")
    assert "regrow agent needs data: " in said("agent", "--bundle", "b")
    assert "no such file" in said("serve", "--config", str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"host = '\xe9'")
    assert "latin.toml" in said("serve", "--config", str(tmp_path / "latin.toml"))
    monkeypatch.setenv("REGROW_PRT", "1")
    assert "REGROW_PRT in the environment is no setting: did you mean port?" in said("serve", "t")
    monkeypatch.delenv("REGROW_PRT")
    monkeypatch.setenv("REGROW_OPTIONS", "--plain")  # the units' own
    monkeypatch.setenv("REGROW_THREADS", "2")  # an agent's
    monkeypatch.setenv("REGROW_PORT", "many")
    assert "REGROW_PORT: port: " in said("serve", "t")
    monkeypatch.setenv("REGROW_PLAIN", "perhaps")
    monkeypatch.delenv("REGROW_PORT")
    assert "REGROW_PLAIN=perhaps" in said("serve", "t")


def test_a_password_stays_with_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'task = "t"\nbroker = "mqtt://coordinator:secret@h"\n'
    file = written(tmp_path, text, 0o640)
    assert main(["serve", "--config", file]) == 2
    said = capsys.readouterr().err
    assert "gateway.toml:2: broker holds a password" in said
    assert "secret" not in said
    written(tmp_path, text)
    assert resolved("serve", "--config", file).broker == "mqtt://coordinator:secret@h"
    assert main(["config", "show", "--", "--config", file]) == 0
    assert main(["config", "show", "--json", "--", "--config", file]) == 0
    said = capsys.readouterr().out
    assert "secret" not in said
    assert said.count("mqtt://coordinator:***@h") == 2


def test_config_show_tells_where_each_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "\nport = 1\nplain = true\n")
    monkeypatch.setenv("REGROW_HOST", "::1")
    assert main(["config", "show", "--json", "--", "--config", file, "--runs", "r"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {row["name"]: (row["value"], row["source"]) for row in said["settings"]}
    assert rows["task"] == (None, "needed")
    assert rows["port"] == (1, f"{file}:2")
    assert rows["plain"] == (True, f"{file}:3")
    assert rows["host"] == ("::1", "REGROW_HOST")
    assert rows["runs"] == ("r", "flag")
    assert rows["broker_kind"] == ("auto", "default")
    once = {"run", "new_run", "takeover", "paused", "config", "help", "command"}
    assert rows.keys() == {action.dest for action in settings.command_of(parser("serve"), "serve")._actions} - once
    assert main(["config", "show", "--command", "agent"]) == 0
    assert "REGROW_HOST" not in (text := capsys.readouterr().out)
    assert "threads" in text


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "(default: 1883)" in capsys.readouterr().out


KEYS = st.sampled_from(["task", "port", "host", "plain"])
VALUES = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers(-99999, 99999).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(max_size=8).map(json.dumps),
    st.text(max_size=8).map(lambda text: f"'{text}'"),
    st.text(max_size=8),
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=3))
def test_what_is_taken_is_toml_and_means_the_same(tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]]) -> None:
    file = tmp_path_factory.getbasetemp() / "generated.toml"
    text = "".join(f"{key} = {value} # why\n" for key, value in lines)
    try:
        file.write_text(text, newline="")
    except UnicodeEncodeError:
        return
    try:
        found = resolved("serve", "--config", str(file), "--metrics-port", "0")
    except LocalError:
        return
    for key, value in tomllib.loads(text).items():
        kept = getattr(found, key)
        assert kept == (Path(value) if key == "task" else value)
