"""Every command: its help, its one-line errors with exit status 1, and Ctrl-C, which leaves no process behind."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from broker_server.credentials import Credentials
from broker_server.runs import create_run, load_task
from broker_server.store import Store
from cli.gateway import link_of as broker_link
from cli.main import COMMANDS, main, parser
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import records
from regrow.records import to_record
from testbed.watch import obtain
from tests.broker_server.rights import public, read_only
from tests.testbed.processes import Child, Fleet, task_text, until, write_digits

__all__ = ["public"]
Fails = Callable[..., str]


def commands(top: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*words, name))


@pytest.mark.parametrize("words", list(commands(parser())), ids=lambda words: " ".join(words) or "regrow")
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(('regrow', *words))}")


def top_level(top: argparse.ArgumentParser) -> list[str]:
    return [words[0] for words in commands(top) if len(words) == 1]


def test_every_command_is_where_the_table_says() -> None:
    assert top_level(parser()) == list(COMMANDS)
    for name in COMMANDS:
        assert name in top_level(parser(name))


def test_options_are_known_without_any_room() -> None:
    code = "import sys, cli.main; cli.main.parser(); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"cli", "argparse"} <= loaded
    assert not loaded & {"numpy", "msgspec", "onnxruntime", "rich", "edge_agent", "broker_server", "export", "testbed"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["agent"],
        ["demo", "--seconds", "0"],
        ["agent", "--bundle", "b", "--data", "d", "--max-uplink-bps", "nan"],
        ["agent", "--bundle", "b", "--data", "d", "--memory-mb", "1e20"],
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: regrow" in capsys.readouterr().err


# ---- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def run(*words: object) -> str:
        """What a command that fails says, after `regrow: `."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        said = capsys.readouterr().err.strip()
        assert said.startswith("regrow: ")
        assert "\n" not in said
        return said.removeprefix("regrow: ")

    return run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder with its programs; not to be changed."""
    task = tmp_path_factory.mktemp("tasks") / "digits"
    task.mkdir()
    (task / "task.toml").write_text(task_text("digits"))
    save_model(digits_mlp(1), task / "model.onnx")
    build_task(task, task / "model.onnx")
    return task


@pytest.fixture
def task(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "digits"))


@pytest.fixture
def run(task: Path, tmp_path: Path) -> Path:
    return create_run(tmp_path / "runs", load_task(task), "one")


def test_task_new(fails: Fails, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a file, nor FILE.py:FUNCTION, nor one of digits_mlp" in fails(
        "task", "new", tmp_path / "new", "--model", tmp_path / "none.onnx"
    )
    assert not (tmp_path / "new").exists()
    assert "exists already" in fails("task", "new", task, "--model", task / "model.onnx")
    assert "'Not_A_Name'" in fails("task", "new", tmp_path / "Not_A_Name", "--model", task / "model.onnx")
    (tmp_path / "text.onnx").write_text("this is no model")
    assert "cannot read the model" in fails("task", "new", tmp_path / "text", "--model", tmp_path / "text.onnx")
    assert not (tmp_path / "text").exists()  # what is refused leaves nothing behind
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("task", "new", tmp_path / "file", "--model", task / "model.onnx")
    assert main(["task", "new", str(tmp_path / "fine"), "--model", str(task / "model.onnx")]) == 0
    assert "next: regrow serve" in capsys.readouterr().out
    assert main(["task", "build", str(tmp_path / "fine")]) == 0
    assert "2410 parameters" in capsys.readouterr().out


def test_task_build(fails: Fails, task: Path, tmp_path: Path) -> None:
    assert "task.toml" in fails("task", "build", tmp_path / "none")
    (task / "model.onnx").unlink()
    assert "model.onnx" in fails("task", "build", task)
    (task / "task.toml").write_text('name = "digits"\n\n[training]\nlocal_stepz = 3\n')
    assert "task.toml:4:" in fails("task", "build", task)
    (task / "task.toml").write_text("name = \n")
    assert "task.toml" in fails("task", "build", task)
    (task / "task.toml").write_bytes(b"\xff\xfe")
    assert "task.toml" in fails("task", "build", task)


def test_serve_without_what_it_needs(fails: Fails, task: Path, run: Path, tmp_path: Path) -> None:
    runs = ("--runs", run.parent)
    assert "a task is a folder with task.toml" in fails("serve", tmp_path / "none", *runs)
    assert "Not_A_Name" in fails("serve", task, "--run", "Not_A_Name", *runs)
    assert "exists already" in fails("serve", task, "--run", "one", *runs)
    for url in ("nowhere", "mqtt://a:b@host:port", "mqtt://host:1883"):
        assert "expected mqtt://" in fails("serve", task, "--broker", url, *runs)
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("serve", task, "--runs", tmp_path / "file")
    with Store.open(run):
        assert f"in use by process {os.getpid()}" in fails("serve", task, *runs)
        assert f"in use by process {os.getpid()}" in fails("rollback", run)
    (run / "task" / "build" / "train.onnx").unlink()
    assert "train.onnx" in fails("serve", run, *runs)


def test_serve_with_a_broker_that_does_not_answer(fails: Fails, task: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    broker = ("--broker", f"mqtt://me:secret@127.0.0.1:{port}")
    said = fails("serve", task, *broker, "--runs", tmp_path / "runs")
    assert said.startswith(f"--broker: cannot connect to 127.0.0.1:{port}; see that the broker runs")
    assert "secret" not in said
    assert not (tmp_path / "runs").exists()
    again = parser().parse_args(["serve", str(task), *broker])
    assert broker_link(again, tmp_path, resuming=True).user == "me", "a run that is there waits for its broker"


def test_serve_a_finished_run(fails: Fails, run: Path) -> None:
    with Store.open(run) as store:
        store.append([to_record(records.Finished(reason="enough", elapsed_s=1.0))])
    assert "is finished (enough)" in fails("serve", run, "--runs", run.parent)


def test_serve_where_the_port_is_taken(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(task), "--runs", str(tmp_path / "runs"), "--port", str(port), "--broker-kind", "amqtt", "--plain"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"regrow: cannot listen on 127.0.0.1:{port}: Address already in use; stop what listens there")
    assert len(said.splitlines()) == 1


def test_serve_when_its_secrets_are_not_secret(fails: Fails, task: Path, run: Path) -> None:
    Credentials(run.parent / ".gateway")
    (run.parent / ".gateway" / "credentials.json").chmod(0o644)
    assert "can be read by others" in fails("serve", task, "--runs", run.parent)


def test_devices(fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(tmp_path / "runs"))
    assert main(["device", "list", *runs]) == 0
    assert "no devices yet" in capsys.readouterr().out
    assert "device name" in fails("device", "add", "Pi_1", *runs)
    assert "coordinator" in fails("device", "add", "coordinator", *runs)
    assert "no device 'pi'" in fails("device", "remove", "pi", *runs)
    for url in ("nonsense", "192.168.1.10:1883", "http://gateway", "mqtt://"):
        assert "for example mqtt://192.168.1.10:1883" in fails("device", "add", "pi", "--broker", url, *runs)
    assert "leave user and password out" in fails("device", "add", "pi", "--broker", "mqtt://me:secret@gateway", *runs)
    assert main(["device", "list", *runs]) == 0
    assert "no devices yet" in capsys.readouterr().out, "a refused device was let in"
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("device", "add", "pi", "--out", tmp_path / "file", *runs)
    assert "file" in fails("device", "list", "--runs", tmp_path / "file")
    assert main(["device", "add", "pi", "--out", str(tmp_path), *runs]) == 0
    assert main(["device", "list", *runs]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "pi"
    assert main(["device", "remove", "pi", *runs]) == 0
    (tmp_path / "runs" / ".gateway" / "credentials.json").write_text("{")
    assert "does not check out" in fails("device", "list", *runs)


def test_an_agent_without_what_it_needs(fails: Fails, tmp_path: Path) -> None:
    write_digits(tmp_path / "x.npz", seed=1, rows=20)
    bundle, fine, data = tmp_path / "pi.json", {"device": "pi", "broker": "mqtt://127.0.0.1:1", "password": "p"}, tmp_path / "x.npz"
    agent = ("agent", "--state", tmp_path / "state", "--bundle", bundle)
    assert "regrow device add" in fails(*agent, "--data", data)
    for wrong in ("{", "[]", '{"device": "pi"}', json.dumps({**fine, "password": 3}), "\udcff"):
        bundle.write_bytes(wrong.encode(errors="surrogateescape"))
        assert "regrow device add" in fails(*agent, "--data", data)
    bundle.write_text(json.dumps({**fine, "device": "Not A Name"}))
    assert "'Not A Name'" in fails(*agent, "--data", data)
    bundle.write_text(json.dumps({**fine, "broker": "http://x"}))
    assert "mqtt://" in fails(*agent, "--data", data)
    bundle.write_text(json.dumps(fine))
    assert "none of FILE.npz" in fails(*agent, "--data", "something")
    assert "none.npz" in fails(*agent, "--data", tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("this is no archive")
    assert "text.npz" in fails(*agent, "--data", tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([None]), y=np.array([1]))
    assert "objects.npz" in fails(*agent, "--data", tmp_path / "objects.npz")
    with pytest.raises(SystemExit):  # an option that argparse refuses, with the usage
        fails(*agent, "--data", data, "--threads", 0)
    assert "capacity" in fails(*agent, "--data", data, "--capacity", -1)
    assert "validation" in fails(*agent, "--data", data, "--validation", 1.5)
    assert "gap" in fails(*agent, "--data", data, "--gap", -1)
    assert "cannot use the state folder" in fails("agent", "--state", bundle, "--bundle", bundle, "--data", data)


def test_runs_rollback_and_verify(fails: Fails, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs", str(tmp_path / "none")]) == 0
    assert "try `regrow demo`" in capsys.readouterr().out.replace("\n", " ")
    assert main(["runs", "--runs", str(run.parent)]) == 0
    assert "unfinished" in capsys.readouterr().out
    for command in ("rollback", "verify"):
        assert "none" in fails(command, tmp_path / "none")
    assert "no such snapshot" in fails("rollback", run)
    assert "no such snapshot" in fails("rollback", run, "--to", 3)
    assert main(["verify", str(run)]) == 0
    assert "0 receipted updates" in capsys.readouterr().out
    (run / "log.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    assert "log.sqlite" in fails("verify", run)
    assert "log.sqlite" in fails("rollback", run)
    assert "log.sqlite" in fails("serve", run)
    assert main(["runs", "--runs", str(run.parent)]) == 0
    assert "one" in capsys.readouterr().out


def test_runs_that_may_only_be_read(fails: Fails, built: Path, public: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(public / "runs", load_task(built), "one")
    with Store.open(run) as store:
        store.append([to_record(records.Led(term=7))])
    assert main(["runs", "--runs", str(run.parent)]) == 0
    wanted = capsys.readouterr().out
    with read_only(run.parent):
        assert main(["runs", "--runs", str(run.parent)]) == 0
        assert capsys.readouterr().out == wanted
        assert main(["verify", str(run)]) == 0
        for words in (("rollback", run), ("serve", run)):
            assert f"the run folder {run} cannot be written (" in fails(*words)


def test_a_task_folder_inside_a_run_that_is_damaged(fails: Fails, run: Path) -> None:
    (run / "task" / "task.toml").write_text("[")
    assert "task.toml" in fails("verify", run)
    assert "task.toml" in fails("serve", run)


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------------------


def family(child: Child) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(child.pid).children(recursive=True)
    return found


def test_ctrl_c_ends_serve_and_agent_and_leaves_nothing(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("digits")) as fleet:
        serve = fleet.serve()
        fleet.add({"d800": 800.0})
        agent = fleet.device("d800")
        fleet.reach_version(2)
        children = family(serve)
        assert children
        os.kill(agent.pid, signal.SIGINT)
        assert agent.ended() == 0
        os.kill(serve.pid, signal.SIGINT)
        assert serve.ended() == 0
        assert not any(child.is_running() for child in children)
        assert "Ctrl-C again quits at once" in serve.text()
        assert "stopped: the same command goes on where it was" in serve.text()
        for child in (serve, agent):
            assert "Traceback" not in child.text()
        assert fleet.check().updates >= 2


def test_ctrl_c_ends_the_demo_with_its_report(tmp_path: Path) -> None:
    data = tmp_path / "data"
    obtain(data / "watch")
    demo = Child(["demo", "--plain", "--seconds", 600, "--runs", tmp_path / "runs", "--data", data], tmp_path / "demo.log")
    try:
        demo.said(r"version [1-9]")
        children = family(demo)
        assert len([child for child in children if "agent" in child.cmdline()]) == 10
        os.kill(demo.pid, signal.SIGINT)
        assert demo.ended(90) == 130
    finally:
        demo.kill()
    until(lambda: not any(child.is_running() for child in children), "every child has ended")
    said = demo.text().replace("\n", " ")
    assert "interrupted" in said
    assert "holds summary.json" in said
    assert "Traceback" not in demo.text()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    obtain(tmp_path / "watch")
    demo = Child(["demo", "--plain", "--seconds", 600, "--runs", tmp_path / "runs", "--data", tmp_path], tmp_path / "demo.log")
    try:
        demo.said(r"version [1-9]")
        children = family(demo)
        assert len(children) >= 11
    finally:
        demo.kill()
    until(lambda: not any(child.is_running() for child in children), "every child has ended")
