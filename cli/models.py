"""`regrow export`: trained models in the forms that devices deploy."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from rich.console import Console

from broker_server.runs import TaskFolder, load_task, recover
from broker_server.store import Store
from cli.deployable import WITHOUT_DATA, Sample, has_statistics, held_out, network
from cli.model_text import export_table, markdown, show
from cli.predict import samples
from export.inference import QUANTIZATIONS, Examples, Exported, Request, latencies_ms, write_forms
from regrow.errors import UsageError
from regrow.ledger import Ledger
from regrow.levels import densities_of
from regrow.local_step import Step, step_of
from regrow.scoring import score_name

MOST_LEVELS_UNASKED = 10
FEW = 64
"""Fewer examples than one batch of statistics has (regrow.local_training)."""
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


def export_run(options: argparse.Namespace) -> int:
    """Write, check and measure the models of a run."""
    say = Console(stderr=True)
    run = find_run(options.run, options.runs)
    forms = _choices(options.quantize, QUANTIZATIONS, "--quantize")
    if "int8" in forms and options.calibrate is None:
        raise UsageError("--quantize int8 needs data to find the range of every activation: give --calibrate FILE.npz, data from a device")
    folder = load_task(run / "task")
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, folder)
    wanted = _levels(options.density, densities_of(folder.task))
    step = step_of(folder.task.training)
    own = held_out(folder)
    data = _data(options, step, None if own is None else Examples(*own))
    request = Request(forms, options.format, data.held_out, data.calibration, step)
    with fresh_folder(options.out) as fresh:
        rows = list(_write(say, fresh, folder, ledger, run.name, wanted, request, data.sample))
        say.print(f"timing {len(rows)} files")
        times = latencies_ms([fresh / row.file for row in rows], options.latency_runs)
        rows = [Exported(**{**asdict(row), "latency_ms": took}) for row, took in zip(rows, times, strict=True)]
        notes = _notes(options, folder, ledger, data, rows)
        about = {"run": str(run), "version": ledger.version, "onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
        summary = {**about, "score": score_name(step), "notes": notes, "models": [asdict(row) for row in rows]}
        (fresh / "export.json").write_text(json.dumps(summary, indent=1) + "\n")
        table = export_table(rows, score_name(step))
        (fresh / "export.md").write_text(f"# Models of {run.name}, version {ledger.version}\n\n{markdown(*table)}\n\n{_list(notes)}\n")
    show(*table)
    print(_list(notes))
    print(f"{options.out} holds them, with export.json and export.md")
    return 0


@dataclass(frozen=True, eq=False)
class _Data:
    """What files are scored with, calibrated with, and what running means and variances come from."""

    held_out: Examples | None
    calibration: Examples | None
    sample: Sample | None
    own: bool
    """Whether the run has data itself."""


def _data(options: argparse.Namespace, step: Step, own: Examples | None) -> _Data:
    """What the options name, and the run's own data `own`."""
    calibration = None if options.calibrate is None else Examples(options.calibrate, *samples(options.calibrate))
    named = None if options.data is None else Examples(options.data, *samples(options.data))
    if named is not None and named.y is None and step.target == "y":
        raise UsageError(f"--data {options.data}: it has no targets to score with; give x and y, or leave --data out")
    first = calibration or own or named
    return _Data(named or own, calibration, None if first is None else Sample(first.name, first.x), own is not None)


def _write(
    say: Console,
    fresh: Path,
    folder: TaskFolder,
    ledger: Ledger,
    run: str,
    levels: Sequence[int],
    request: Request,
    sample: Sample | None,
) -> Iterator[Exported]:
    """Write the files of these levels, one after the other."""
    for level in levels:
        density = densities_of(folder.task)[level]
        name = "global" if density == 1.0 else f"density-{density:g}"
        say.print(f"writing {name}")
        properties = {"regrow.run": run, "regrow.version": str(ledger.version), "regrow.density": f"{density:g}"}
        yield from write_forms(network(folder, ledger, level, sample), fresh / name, density, request, properties)


def _notes(options: argparse.Namespace, folder: TaskFolder, ledger: Ledger, data: _Data, rows: Sequence[Exported]) -> list[str]:
    """What must be known to read the table."""
    score, held_out = score_name(folder.task.training), data.held_out
    if held_out is None:
        said = [f"no {score}: the run has no held-out data of its own ([evaluation] in task.toml); give some with --data FILE.npz"]
    else:
        said = [f"{score}: {len(held_out.x)} examples of {held_out.name}; the drop is that of float32 less the file's own"]
    if has_statistics(folder):
        said.append(_whose_statistics(data))
    if (count := folder.task.training.train_last) is not None:
        said.append(f"train_last = {count}: densities are of the {folder.layout.size} trained parameters; the others are all there")
    if any(row.quantize == "int8" for row in rows) and held_out is not None and options.calibrate == held_out.name:
        said.append(f"int8 was calibrated on the held-out data itself, which flatters its {score}: give --calibrate other data")
    if left := {op: count for row in rows for op, count in row.left_float32.items()}:
        named = ", ".join(f"{op} ({count} numbers)" for op, count in left.items())
        said.append(f"int8 files hold some weights as float32, which onnxruntime quantizes in no such place: {named}")
    said.append(f"latency: one example, one thread, median of {options.latency_runs}, on this machine; the files took turns")
    if folder.units is None and len(rows) > 1:
        said.append("levels of single weights hold zeros where they have nothing: their size shows when they are packed")
    if not ledger.version:
        said.append("nothing was aggregated in this run, so these are the untrained weights")
    largest = max((device.density for device in ledger.devices.values()), default=1.0)
    if largest < 1.0 and folder.task.method.importance != "rolling":
        said.append(f"no device has trained more than density {largest:g}: what lies above is 0 in the larger models")
    if options.format == "ort":
        said.append(
            f".ort files are those of onnxruntime {onnxruntime.__version__}; another version may refuse them, so keep the ONNX files"
        )
    if any(row.quantize == "fp16" for row in rows):
        said.append("fp16 halves an ONNX file, an .ort file less; a CPU without float16 arithmetic converts back and is not faster")
    return said


def _whose_statistics(data: _Data) -> str:
    if data.sample is None:
        return f"the files have {WITHOUT_DATA}: give --calibrate DATA from a device, or their answers are worth little"
    used, count = data.sample.name, len(data.sample.x)
    said = f"running means and variances of every level: computed with its weights from {used}, whose labels are not looked at"
    if count < FEW:
        said += f"; {count} examples are few for that, give some hundred"
    return f"{said}; those of the run's model.onnx are of its [evaluation] data" if data.calibration is not None and data.own else said


def _levels(text: str | None, densities: Sequence[float]) -> list[int]:
    """Which levels are asked for, ascending; the full model is always among them."""
    if text is None:
        return list(range(len(densities))) if len(densities) <= MOST_LEVELS_UNASKED else [len(densities) - 1]
    asked = parse_densities(text)
    unknown = [density for density in asked if not any(abs(density - known) < 1e-9 for known in densities)]
    if unknown:
        has = ", ".join(f"{density:g}" for density in densities)
        raise UsageError(f"--density {unknown[0]:g}: the run has no such level, its own are {has}")
    return [level for level, known in enumerate(densities) if known == 1.0 or any(abs(known - density) < 1e-9 for density in asked)]


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` at the end; after an error or Ctrl-C nothing of them is left."""
    there = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
            yield Path(name)
            for file in Path(name).iterdir():
                file.replace(out / file.name)
    except BaseException:
        if not there:
            out.rmdir()
        raise


def find_run(run: Path, runs: Path) -> Path:
    """The folder of a run: named itself, or by its id below `runs`.

    Raises:
        LocalError: there is none.
    """
    for folder in (run, runs / run):
        if (folder / "log.sqlite").is_file():
            return folder
    raise UsageError(
        f"{run}: neither the folder of a run nor the name of one in {runs}; `regrow runs` lists them (simulated runs keep no model)"
    )


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _choices(text: str, known: Sequence[Any], option: str) -> list[Any]:
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise UsageError(f"{option} {name!r}: {', '.join(known)}, or several with commas between")
    return chosen


def parse_densities(text: str) -> list[float]:
    return sorted(set(parse_numbers(text, "--density", 1e-6, 1.0)))


def parse_numbers(text: str, option: str, least: float, most: float) -> list[float]:
    """Numbers with commas between; k, M and G behind one are 10^3, 10^6 and 10^9. Batches and links alike keep their order."""
    numbers = []
    for part in text.split(","):
        scale = SUFFIXES.get(part[-1:], 1.0)
        try:
            number = float(part if scale == 1.0 else part[:-1]) * scale
        except ValueError:
            number = float("nan")
        if not least <= number <= most or (option == "--batch" and number != int(number)):
            raise UsageError(f"{option}: {part!r} is not a number from {least:g} to {most:g}; several have commas between")
        numbers.append(number)
    return list(dict.fromkeys(numbers))
