"""One rule for the exit status of every command: 0 done, 1 failed at work, 2 wrongly asked for, 130 after Ctrl-C; one line says why."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomllib

from broker_server.runs import create_run, load_task
from cli.main import FAILED, INTERRUPTED, MISUSED, _told, main
from export.models import digits_mlp
from export.task import build_task, save_model
from tests.docs.generate import commands
from tests.testbed.processes import ROOT, task_text, write_digits

# {task}, {run}, {runs}, ... are the things of `things`; each command in its own copy of them.
MISUSES = [
    "nothing",
    "demo --seconds 0",
    "demo --bogus",
    "task",
    "task new {tmp}/new",
    "task new {tmp}/new --model {tmp}/none.onnx",
    "task new {tmp}/new --model {tmp}/none.py:net",
    "task new {task} --model digits_mlp",
    "task new {tmp}/Not_A_Name --model digits_mlp",
    "task build {tmp}/none",
    "task build {bad_task}",
    "serve {tmp}/none --runs {runs}",
    "serve {bad_task} --runs {runs}",
    "serve {task} --runs {runs} --run Not_A_Name",
    "serve {task} --runs {runs} --port 99999",
    "serve {task} --runs {runs} --broker nowhere",
    "serve {run} --new-run",
    "serve {task} --runs {runs} --page 8080",
    "page token --runs {tmp}/none",
    "top --runs {tmp}/none",
    "top --runs {runs} --run none",
    "top --url somewhere",
    "promote {tmp}/none",
    "promote {run} --withdraw --local-head",
    "promote {run} --model {tmp}/none.onnx",
    "device add Not_A_Name --runs {runs}",
    "device add pi --broker nonsense --runs {runs}",
    "device remove pi --runs {runs}",
    "device list --bogus",
    "agent --bundle {tmp}/none.json --data {data}",
    "agent --bundle {bad_bundle} --data {data}",
    "agent --bundle {bundle} --data {data} --validation 2",
    "agent --bundle {bundle} --data {data} --hours soon",
    "agent --bundle {bundle} --data {data} --battery-floor 101",
    "agent --bundle {bundle} --data {data} --max-temperature 500",
    "agent --bundle {bundle} --data {data} --max-bytes-per-day 0.5",
    "agent --bundle {bundle} --data {data} --metered wwan0",
    "agent --bundle {bundle} --data something",
    "agent --bundle {bundle} --data {tmp}/none.npz",
    "agent --bundle {bundle} --data csv:{text}",
    "predict {tmp}/none.json --data {data}",
    "predict {tmp} --data {data}",
    "predict {tmp} --data {data} --out x.txt",
    "field plan {tmp}/none.toml",
    "field plan {tmp}/new.toml --task {task}",
    "field plan {tmp}/new.toml --task {task} --devices Pi",
    "field plan {tmp}/new.toml --task {tmp}/none --devices pi",
    "field plan {tmp}/new.toml --task {task} --devices pi --methods fedbest",
    "field run {tmp}/none.toml --runs {runs}",
    "field run {bad_bundle} --runs {runs}",
    "field report none --runs {runs}",
    "field report none --runs {runs} --data-folder {tmp}",
    "field traces none --runs {runs}",
    "field annotate hello --runs {tmp}/none",
    "runs --bogus",
    "runs show none --runs {runs}",
    "runs compare {run} --runs {runs}",
    "runs export {run} --format xlsx",
    "runs delete none --runs {runs} --yes",
    "rollback {tmp}/none",
    "rollback {run} --to 3",
    "verify {tmp}/none",
    "export {tmp}/none --runs {runs}",
    "export {run} --density 0.33",
    "export {run} --quantize int3",
    "export {run} --data {tmp}/none.npz",
    "model check",
    "model check {tmp}/none.onnx",
    "model check digits_mlp --batch x",
    "simulate {tmp}/none",
    "simulate {bad_task}",
    "simulate {task} --outages soon",
    "simulate {task} --latency fast",
    "simulate {task} --set model=3",
    "compare {task} --methods nothing",
    "compare {task} --methods fedgmr --target 2",
    "backup {tmp}/b --runs {tmp}/none",
    "restore {tmp}/none --runs {tmp}/runs",
    "board check --minutes 0 --folder {tmp}/none",
    "config show --command serve -- --port x",
    "device broker-files --bogus",
    "agent --bundle {bundle} --data {data} --meter volts",
    "agent --bundle {bundle} --data {data} --calibration {tmp}/none",
    "agent --bundle {bundle} --data {data} --power-model {text}",
    "measure power --meter i2c:1",
    "measure power --meter mqtt:home/plug",
    "measure power --hz 1000",
    "measure power --calibration {text}",
    "measure power --calibration {tmp}/none",
    "measure baseline --seconds 10",
    "measure baseline --calibration {text}",
    "measure pulse --bogus",
    "measure align {tmp}/none.csv --pulse-s 1",
    "measure align {text} --pulse-s 0",
    "measure fit --board pi --out {tmp}/model.json --runs {tmp}/none",
    "doctor --device Not_A_Name --runs {runs}",
    "doctor --bundle {tmp}/none.json",
    "measure uplink --bundle {tmp}/none.json",
    "measure uplink --identity {tmp}/none",
    "measure uplink --bundle {bundle} --seconds 0",
    "fleet init Not_A_Name --fleet {tmp}/fleet",
    "fleet add pi --fleet {tmp}/none",
    "fleet drain pi --fleet {tmp}/none",
    "fleet list --fleet {tmp}/none",
    "fleet pause pi --fleet {tmp}/none",
    "fleet resume pi --fleet {tmp}/none",
    "fleet revoke pi --fleet {tmp}/none",
    "fleet rotate pi --fleet {tmp}/none",
    "fleet show pi --fleet {tmp}/none",
    "fleet update --wheel {tmp}/none.whl --fleet {tmp}/none",
    "fleet wipe pi --yes --fleet {tmp}/none",
    "image pi --device pi --claim {tmp}/none --out {tmp}/out",
    "image pi --device pi --os windows --out {tmp}/out",
    "image gateway --fleet-name farm --task {tmp}/none --out {tmp}/out",
    "image generic --device pi --out {tmp}/out",
    "image jetson --device pi --claim {bad_bundle} --out {tmp}/out",
    "image lock --python 2.7",
    "image systems --bogus",
    "image wheels --python 2.7 --out {tmp}/out",
    "image wifi Field --country DE --out {tmp}/none",
    "join {tmp}/none --identity {tmp}/id",
    "update status --settings {tmp}/none",
    "update check --bogus",
]
FAILURES = [
    "task build {no_model}",
    "task new {tmp}/new --model {text}",
    "serve {task} --runs {runs} --port {busy} --broker-kind amqtt",
    "top --url http://127.0.0.1:1 --once",
    "promote {run} --port {busy} --broker-kind amqtt --by me",
    "promote {run} --model {text}",
    "device list --runs {text}",
    "agent --bundle {bundle} --data {text_npz}",
    "agent --bundle {bundle} --data {data} --state {text}",
    "agent --bundle {bundle} --data {data} --state {tmp}/state --max-joules-per-round 5",
    "verify {damaged}",
    "runs show {damaged}",
    "runs export {damaged}",
    "rollback {damaged}",
    "export {damaged}",
    "export {run} --data {text_npz}",
    "model check {text}",
    "measure power --meter none --seconds 2",
    "measure align {text} --pulse-s 1",
    "simulate {task} --data npz --data-folder {tmp}",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that commands are given; not to be changed."""
    home = tmp_path_factory.mktemp("things")
    task = home / "digits"
    task.mkdir()
    (task / "task.toml").write_text(task_text("digits"))
    save_model(digits_mlp(1), task / "model.onnx")
    build_task(task, task / "model.onnx")
    run = create_run(home / "runs", load_task(task), "one")
    shutil.copytree(run, home / "runs" / "damaged")
    (home / "runs" / "damaged" / "log.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    shutil.copytree(task, home / "no-model")
    (home / "no-model" / "model.onnx").unlink()
    (home / "bad").mkdir()
    (home / "bad" / "task.toml").write_text('name = "digits"\n\n[training]\nlocal_stepz = 3\n')
    (home / "text").write_text("this is no model")
    (home / "text.npz").write_text("this is no archive")
    (home / "bad.json").write_text("[]")
    (home / "pi.json").write_text(json.dumps({"device": "pi", "broker": "mqtt://127.0.0.1:1", "password": "p"}))
    write_digits(home / "data.npz", seed=1, rows=20)
    return home


@pytest.fixture
def things(built: Path, tmp_path: Path) -> Mapping[str, Any]:
    home = Path(shutil.copytree(built, tmp_path / "things"))
    (tmp_path / "tmp").mkdir()
    names = {"task": "digits", "bad_task": "bad", "no_model": "no-model", "run": "runs/one", "damaged": "runs/damaged", "runs": "runs"}
    names |= {"text": "text", "text_npz": "text.npz", "bad_bundle": "bad.json", "bundle": "pi.json", "data": "data.npz"}
    return {"tmp": tmp_path / "tmp", **{name: home / place for name, place in names.items()}}


def status(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:  # argparse's
        return int(ended.code or 0)


@pytest.mark.parametrize("line", MISUSES)
def test_what_is_wrongly_asked_for_is_2(
    line: str, things: Mapping[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things["tmp"])
    assert status(line.format(**things).split()) == MISUSED
    said = capsys.readouterr().err
    assert said.startswith(("regrow: ", "usage: regrow"))
    assert said.startswith("usage") or len(said.splitlines()) == 1


@pytest.mark.parametrize("line", FAILURES)
def test_what_fails_at_work_is_1(
    line: str, things: Mapping[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things["tmp"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert status(line.format(**things, busy=taken.getsockname()[1]).split()) == FAILED
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("regrow: ")]
    assert len(said) == 1


def test_every_command_is_tried() -> None:
    names = {name for name, parser in commands() if parser._subparsers is None}
    assert not {name for name in names if not any(f"regrow {line} ".startswith(f"{name} ") for line in MISUSES)}


def test_a_package_that_is_missing_is_named_with_an_extra_that_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for need in extras[extra]:
            within = re.match(r"regrow\[(.*)\]", need)
            found |= set().union(*map(packages, within[1].split(","))) if within else {re.split(r"[^A-Za-z0-9-]", need)[0]}
        return found

    for package in set().union(*map(packages, extras.keys() - {"dev"})):
        assert _told(ModuleNotFoundError(name=f"{package.replace('-', '_')}.inner")) == FAILED
        named = re.search(r"pip install 'regrow\[(.*)\]'\n", capsys.readouterr().err)
        assert named is not None
        assert package in packages(named[1])


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------------------------

AT_AN_IMPORT = """
import signal, sys
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == {wanted!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, AtImport())
from cli.main import main
sys.exit(main({words!r}))
"""


def ended(code: str, folder: Path) -> tuple[int, str]:
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("wanted", ["argparse", "logging", "cli.commands.model", "cli.model_check", "numpy", "onnxruntime", "rich", "onnx"])
def test_ctrl_c_in_the_middle_of_an_import_is_one_line(wanted: str, tmp_path: Path) -> None:
    words = ["model", "check", "digits_mlp", "--steps", "0"]
    assert ended(AT_AN_IMPORT.format(wanted=wanted, words=words), tmp_path) == (INTERRUPTED, "regrow: interrupted\n")


NETS = """
import signal
import torch

class Pressed(torch.nn.Linear):
    def forward(self, x):
        signal.raise_signal(signal.SIGINT)
        return super().forward(x)

class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def while_it_is_traced():
    return Pressed(4, 2), torch.zeros(1, 4)

def where_nothing_can_be_raised():
    Late()
    return torch.nn.Linear(4, 2), torch.zeros(1, 4)
"""


@pytest.mark.parametrize("function", ["while_it_is_traced", "where_nothing_can_be_raised"])
def test_ctrl_c_that_others_swallow_counts_all_the_same(function: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "nets.py").write_text(NETS)
    words = ["task", "new", "task", "--model", f"nets.py:{function}"]
    code = f"import sys\nfrom cli.main import main\nsys.exit(main({words!r}))"
    assert ended(code, tmp_path) == (INTERRUPTED, "regrow: interrupted\n")
    assert not (tmp_path / "task").exists()


TWICE = """
import atexit, signal, sys
from cli.main import main
class AtTheVeryEnd:
    def __del__(self, raise_signal=signal.raise_signal, number=signal.SIGINT):
        raise_signal(number)
sys.at_the_very_end = AtTheVeryEnd()
atexit.register(signal.raise_signal, signal.SIGINT)
{first}
sys.exit(main({words!r}))
"""
SWALLOWED = """
import cli.models, contextlib
def listed(_):
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return 0
import cli.runs
cli.runs.runs = listed
"""


@pytest.mark.parametrize("first", [AT_AN_IMPORT.partition("from cli")[0].format(wanted="cli.runs"), SWALLOWED])
def test_a_second_ctrl_c_while_the_first_ends_the_command_changes_nothing(first: str, tmp_path: Path) -> None:
    status, said = ended(TWICE.format(first=first, words=["runs", "--runs", "none"]), tmp_path)
    assert (status, said) in ((INTERRUPTED, ""), (INTERRUPTED, "regrow: interrupted\n"))


def test_in_a_process_that_heeds_ctrl_c_itself_it_stays_so(capsys: pytest.CaptureFixture[str]) -> None:
    import signal

    def own(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, own)
    try:
        assert main(["runs", "--runs", "none"]) == 0
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert "no runs" in capsys.readouterr().out
