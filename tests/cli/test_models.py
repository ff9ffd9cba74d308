"""`regrow export` and `regrow model check`: what they write and print, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from broker_server.runs import load_task, recover
from broker_server.store import Store
from cli.main import FAILED, MISUSED, main
from cli.models import fresh_folder
from export.models import digits_mlp
from export.task import save_model
from tests.cli.made_runs import make_run
from tests.export.unit_models import batch_norm_net
from tests.testbed.processes import write_digits

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds runs/one, device.npz and test.npz; not to be changed."""
    folder = tmp_path_factory.mktemp("weights")
    make_run(folder)
    write_digits(folder / "test.npz", seed=51, rows=300)
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def run(*words: object) -> str:
        """What a command that fails says on its last line."""
        capsys.readouterr()
        assert main([str(word) for word in words]) in (FAILED, MISUSED)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("regrow: ")]
        assert len(lines) == 1
        assert "Traceback" not in said.err
        return lines[0].removeprefix("regrow: ")

    return run


def export(run: object, out: Path, *words: object) -> dict[str, Any]:
    assert main(["export", str(run), "--out", str(out), "--latency-runs", "2", *map(str, words)]) == 0
    found: dict[str, Any] = json.loads((out / "export.json").read_text())
    return found


# ---- export ----------------------------------------------------------------------------------------------------------------------------


def test_export_of_every_level(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", place / "test.npz", "--calibrate", place / "device.npz")
    found = export("one", tmp_path / "out", "--runs", place / "runs", "--quantize", "none,int8,fp16", *data)
    rows = {row["file"]: row for row in found["models"]}
    assert list(rows) == [f"{name}{form}.onnx" for name in ("density-0.1", "density-0.5", "global") for form in ("", ".int8", ".fp16")]
    assert found["version"] == 1
    assert found["onnxruntime"] == onnxruntime.__version__
    arrays = np.load(place / "test.npz")
    for name, row in rows.items():
        session = onnxruntime.InferenceSession(tmp_path / "out" / name)
        answers = session.run(None, {"x": arrays["x"]})[0].argmax(axis=1)
        assert row["score"] == pytest.approx(float((answers == arrays["y"]).mean()))
        assert row["latency_ms"] > 0
    assert rows["global.onnx"]["score"] > 0.9
    assert [rows[f"density-{d}.onnx"]["nonzero"] for d in ("0.1", "0.5")] == [241, 1205]
    assert rows["density-0.1.onnx"]["zlib_bytes"] < rows["global.onnx"]["zlib_bytes"] / 3
    said = capsys.readouterr().out
    markdown = (tmp_path / "out" / "export.md").read_text()
    for name in rows:
        assert name in said
        assert f"| {name} | " in markdown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*rows, "export.json", "export.md"])


def test_the_global_model_is_the_runs_own(place: Path, tmp_path: Path) -> None:
    export(place / "runs" / "one", tmp_path / "out", "--density", "1")
    ours, theirs = (onnx.load(path) for path in (tmp_path / "out" / "global.onnx", place / "runs" / "one" / "model.onnx"))
    del ours.metadata_props[:]
    assert ours == theirs


def test_without_data_the_accuracy_stays_empty_and_it_says_so(place: Path, tmp_path: Path) -> None:
    found = export(place / "runs" / "one", tmp_path / "out", "--density", "0.5", "--format", "ort")
    assert [(row["file"], row["score"], row["drop"]) for row in found["models"]] == [
        ("density-0.5.ort", None, None),
        ("global.ort", None, None),
    ]
    assert any("no accuracy" in note for note in found["notes"])
    assert any(f"onnxruntime {onnxruntime.__version__}" in note for note in found["notes"])


def test_units_leave_as_smaller_graphs_and_the_runs_own_data_scores_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, method='granularity = "unit"', more='\n[evaluation]\ndata = "test.npz"\n')
    found = export(run, tmp_path / "out")
    counts = [row["parameters"] for row in found["models"]]
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, load_task(run / "task"))
    assert counts == list(ledger.order.lengths)
    sizes = [row["size_bytes"] for row in found["models"]]
    assert sizes == sorted(sizes)
    assert found["models"][-1]["score"] > 0.9
    assert any("200 examples of" in note for note in found["notes"])
    assert not any("hold zeros" in note for note in found["notes"])


def test_what_nobody_has_trained_is_zero_and_it_says_so(tmp_path: Path) -> None:
    found = export(make_run(tmp_path, density=0.5), tmp_path / "out")
    assert [row["nonzero"] for row in found["models"]] == [241, 1205, 1205]
    assert any("no device has trained more than density 0.5" in note for note in found["notes"])


def test_what_export_refuses(fails: Fails, place: Path, tmp_path: Path) -> None:
    run, out = place / "runs" / "one", tmp_path / "out"
    assert "regrow runs" in fails("export", "none", "--runs", place / "runs", "--out", out)
    assert "regrow runs" in fails("export", place / "task", "--out", out)
    assert "no such level, its own are 0.1, 0.5, 1" in fails("export", run, "--density", "0.3", "--out", out)
    for density in ("2", "0", "x", "0.1,,1", "nan"):
        assert "--density" in fails("export", run, "--density", density, "--out", out)
    assert "none, int8, fp16" in fails("export", run, "--quantize", "int3", "--out", out)
    assert "--calibrate" in fails("export", run, "--quantize", "int8", "--out", out)
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 65), np.float32), y=np.zeros(5, np.int64))
    np.savez(tmp_path / "label.npz", x=np.zeros((5, 64), np.float32), y=np.full(5, 10))
    (tmp_path / "text.npz").write_text("no archive")
    for option in ("--data", "--calibrate"):
        for name in ("wide.npz", "text.npz", "none.npz"):
            assert name in fails("export", run, option, tmp_path / name, "--out", out)
    assert "but the task's labels are 0 to 9" in fails("export", run, "--data", tmp_path / "label.npz", "--out", out)
    assert not out.exists(), "what fails leaves nothing"
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("export", run, "--out", tmp_path / "file")


def test_export_that_fails_leaves_an_old_folder_as_it_was(fails: Fails, place: Path, tmp_path: Path) -> None:
    export(place / "runs" / "one", tmp_path / "out", "--density", "1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 65), np.float32), y=np.zeros(5, np.int64))
    assert "wide.npz" in fails("export", place / "runs" / "one", "--data", tmp_path / "wide.npz", "--out", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(out: Path) -> None:
        with fresh_folder(out) as fresh:
            (fresh / "global.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "new")
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_export_of_a_damaged_run(fails: Fails, place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "runs" / "one", tmp_path / "one"))
    (run / "task" / "model.onnx").write_bytes(b"no model")
    assert "cannot read the model" in fails("export", run, "--out", tmp_path / "out")
    (run / "log.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    assert "log.sqlite" in fails("export", run, "--out", tmp_path / "out")


# ---- model check -----------------------------------------------------------------------------------------------------------------------


def check(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The report of a model that can be trained, as JSON."""
    capsys.readouterr()
    assert main(["model", "check", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_check_of_a_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, "watch_cnn", "--batch", "1,20", "--uplink", "250k,1M", "--density", "0.5", "--steps", "1")
    assert (found["trainable"], found["parameters"], found["always_kept"]) == (True, 86_807, 151)
    assert [level["density"] for level in found["levels"]] == [0.5, 1.0]
    full = next(update for update in found["update_s"] if (update["density"], update["dtype"]) == (1.0, "float32"))
    assert full["bytes"] == 4 * 86_807
    assert full["seconds"] == {"250000": 8 * full["bytes"] / 250e3, "1000000": 8 * full["bytes"] / 1e6}
    wanted = {"1", "2"} if len(os.sched_getaffinity(0)) > 1 else {"1"}
    assert all(set(step["seconds"]) == wanted for step in found["steps"])


def test_check_tells_people_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "layers.png"
    assert main(["model", "check", "digits_mlp", "--batch", "1", "--steps", "1", "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "can be trained on a device: 2410 parameters, 42 of them in every sub-model" in said
    for part in ("memory at most", "index sets", "int4", "250 kbit/s", "train_masked"):
        assert part in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_check_of_units(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, "digits_mlp", "--granularity", "unit", "--batch", "1", "--steps", "1")
    assert [step["program"] for step in found["steps"]] == ["train:0", "train:1", "train:2", "train:3", "train"]
    assert [step["parameters"] for step in found["steps"]] == [level["parameters"] for level in found["levels"]]


def test_check_with_the_order_of_a_run(place: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    found = check(capsys, "digits_mlp", "--run", "one", "--runs", place / "runs", "--steps", "0")
    assert [level["density"] for level in found["levels"]] == [0.1, 0.5, 1.0]
    assert "is not the model of" in fails("model", "check", "watch_cnn", "--run", place / "runs" / "one")
    assert "leave --density" in fails("model", "check", "digits_mlp", "--run", place / "runs" / "one", "--density", "1")
    assert "regrow runs" in fails("model", "check", "digits_mlp", "--run", "two", "--runs", place / "runs")


def test_check_of_a_model_that_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = digits_mlp(1)
    for node in model.graph.node:
        node.op_type = "Softsign" if node.op_type == "Relu" else node.op_type
    save_model(model, tmp_path / "softsign.onnx")
    assert main(["model", "check", str(tmp_path / "softsign.onnx")]) == 1
    said = capsys.readouterr().out
    assert "cannot be trained" in said
    assert "cannot train Softsign" in said
    assert "operators that have a gradient rule: A" in said
    assert main(["model", "check", str(tmp_path / "softsign.onnx"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["trainable"], [problem["op"] for problem in found["problems"]]) == (False, ["Softsign"])


def test_check_of_a_training_and_of_a_task(capsys: pytest.CaptureFixture[str], fails: Fails, tmp_path: Path) -> None:
    plain = check(capsys, "digits_mlp", "--batch", "20", "--steps", "1", "--density", "1")
    assert (plain["state"], plain["anchors"], plain["statistics"]) == (0, 0, 0)
    words = ("--optimizer", "adam", "--proximal-mu", "0.1", "--clip-norm", "1")
    adam = check(capsys, "digits_mlp", *words, "--batch", "20", "--steps", "1", "--density", "1")
    assert (adam["state"], adam["anchors"]) == (2 * 2410 + 1, 2410)
    assert adam["training"]["optimizer"] == "adam"
    assert adam["steps"][0]["memory_bytes"] > plain["steps"][0]["memory_bytes"]
    last = check(capsys, "digits_mlp", "--train-last", "1", "--loss", "mse", "--steps", "1", "--batch", "2")
    assert (last["parameters"], last["levels"][-1]["update_bytes"]["float32"]) == (330, 4 * 330)
    (tmp_path / "task.toml").write_text(
        'name = "t"\nmodel = "m.onnx"\n[method]\nladder = [0.25, 1.0]\n[training]\nloss = "huber"\noptimizer = "nesterov"\n'
    )
    save_model(digits_mlp(1), tmp_path / "m.onnx")
    task = check(capsys, "--task", tmp_path, "--steps", "1", "--batch", "2")
    assert (task["model"], task["state"], [level["density"] for level in task["levels"]]) == (str(tmp_path / "m.onnx"), 2410, [0.25, 1.0])
    assert "leave --loss, --train-last out" in fails("model", "check", "--task", tmp_path, "--loss", "mse", "--train-last", "1")
    assert "say which model" in fails("model", "check")
    assert 'set loss = "mse"' in fails("model", "check", "digits_mlp", "--target", "input")
    assert main(["model", "check", "digits_mlp", "--loss", "mse", "--target", "input"]) == 1
    assert '"input" needs a float32 input and an output of its shape' in capsys.readouterr().out


def test_check_of_a_model_with_batch_normalisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(batch_norm_net((1, 8, 8), 10), tmp_path / "model.onnx")
    for granularity in ("weight", "unit"):
        found = check(capsys, tmp_path / "model.onnx", "--granularity", granularity, "--batch", "4", "--steps", "1")
        assert (found["statistics"], found["trainable"]) == (2 * (8 + 8 + 6), True)


def test_check_of_a_torch_module(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    (tmp_path / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 3), torch.zeros(1, 4)\n")
    assert check(capsys, f"{tmp_path / 'net.py'}:make", "--steps", "1", "--batch", "2")["parameters"] == 15
    assert "defines no function 'other'" in fails("model", "check", f"{tmp_path / 'net.py'}:other")


def test_what_check_refuses(fails: Fails, tmp_path: Path) -> None:
    assert "neither a file, nor FILE.py:FUNCTION, nor one of digits_mlp" in fails("model", "check", "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    assert "it is no ONNX file, or only part of one" in fails("model", "check", tmp_path / "text.onnx")
    (tmp_path / "part.onnx").write_bytes(digits_mlp(1).SerializeToString()[:-100])
    assert "cannot read the model" in fails("model", "check", tmp_path / "part.onnx")
    (tmp_path / "empty.onnx").touch()
    assert "it is empty" in fails("model", "check", tmp_path / "empty.onnx")
    (tmp_path / "net.py").write_text("def make(): ...\n")
    assert "net.py:FUNCTION, where the function returns" in fails("model", "check", tmp_path / "net.py")
    for words in (("--batch", "0"), ("--batch", "1.5"), ("--batch", ""), ("--uplink", "0"), ("--uplink", "3X"), ("--density", "1.5")):
        assert words[0] in fails("model", "check", "digits_mlp", *words)
    assert "--steps" in fails("model", "check", "digits_mlp", "--steps", "-1")
    assert "ends in .png" in fails("model", "check", "digits_mlp", "--steps", "0", "--picture", tmp_path / "x.what")
    assert "No such file" in fails("model", "check", "digits_mlp", "--steps", "0", "--picture", tmp_path / "none" / "x.png")
