"""`regrow export`: trained models in the forms that devices deploy."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
from rich.console import Console

from broker_server.runs import TaskFolder, load_task, recover
from broker_server.store import Store
from cli.model_text import export_table, markdown, show
from edge_agent.data.sources import open_source
from export.inference import QUANTIZATIONS, Examples, Exported, Request, latencies_ms, level_model, write_forms
from export.task import read_model
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.levels import densities_of

MOST_LEVELS_UNASKED = 10
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


def export_run(options: argparse.Namespace) -> int:
    """Write, check and measure the models of a run."""
    say = Console(stderr=True)
    run = find_run(options.run, options.runs)
    forms = _choices(options.quantize, QUANTIZATIONS, "--quantize")
    if "int8" in forms and options.calibrate is None:
        raise LocalError("--quantize int8 needs data to find the range of every activation: give --calibrate FILE.npz, data from a device")
    folder = load_task(run / "task")
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, folder)
    wanted = _levels(options.density, densities_of(folder.task))
    held_out = _examples(options.data) if options.data else _own_data(folder)
    request = Request(forms, options.format, held_out, _examples(options.calibrate) if options.calibrate else None)
    with fresh_folder(options.out) as fresh:
        rows = list(_write(say, fresh, folder, ledger, run.name, wanted, request))
        say.print(f"timing {len(rows)} files")
        times = latencies_ms([fresh / row.file for row in rows], options.latency_runs)
        rows = [Exported(**{**asdict(row), "latency_ms": took}) for row, took in zip(rows, times, strict=True)]
        notes = _notes(options, folder, ledger, held_out, rows)
        about = {"run": str(run), "version": ledger.version, "onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
        summary = {**about, "notes": notes, "models": [asdict(row) for row in rows]}
        (fresh / "export.json").write_text(json.dumps(summary, indent=1) + "\n")
        table = export_table(rows)
        (fresh / "export.md").write_text(f"# Models of {run.name}, version {ledger.version}\n\n{markdown(*table)}\n\n{_list(notes)}\n")
    show(*table)
    print(_list(notes))
    print(f"{options.out} holds them, with export.json and export.md")
    return 0


def _write(
    say: Console, fresh: Path, folder: TaskFolder, ledger: Ledger, run: str, levels: Sequence[int], request: Request
) -> Iterator[Exported]:
    """Write the files of these levels, one after the other."""
    model, weights, densities = read_model(folder.model_path), ledger.trained_weights, densities_of(folder.task)
    slicing = None if folder.units is None else (folder.layout, folder.units, densities)
    for level in levels:
        density = densities[level]
        name = "global" if density == 1.0 else f"density-{density:g}"
        say.print(f"writing {name}")
        made = level_model(model, weights, ledger.order, level, slicing)
        properties = {"regrow.run": run, "regrow.version": str(ledger.version), "regrow.density": f"{density:g}"}
        yield from write_forms(made, fresh / name, density, request, properties)


def _notes(
    options: argparse.Namespace, folder: TaskFolder, ledger: Ledger, held_out: Examples | None, rows: Sequence[Exported]
) -> list[str]:
    """What must be known to read the table."""
    if held_out is None:
        said = ["no accuracy: the run has no held-out data of its own ([evaluation] in task.toml); give some with --data FILE.npz"]
    else:
        said = [f"accuracy: {len(held_out.y)} examples of {held_out.name}; the drop is that of float32 less the file's own"]
    if any(row.quantize == "int8" for row in rows) and held_out is not None and options.calibrate == options.data:
        said.append("int8 was calibrated on the held-out data itself, which flatters its accuracy: give --calibrate other data")
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
        said.append("fp16 halves the file; a CPU without float16 arithmetic converts back and is not faster")
    return said


def _levels(text: str | None, densities: Sequence[float]) -> list[int]:
    """Which levels are asked for, ascending; the full model is always among them."""
    if text is None:
        return list(range(len(densities))) if len(densities) <= MOST_LEVELS_UNASKED else [len(densities) - 1]
    asked = parse_densities(text)
    unknown = [density for density in asked if not any(abs(density - known) < 1e-9 for known in densities)]
    if unknown:
        has = ", ".join(f"{density:g}" for density in densities)
        raise LocalError(f"--density {unknown[0]:g}: the run has no such level, its own are {has}")
    return [level for level, known in enumerate(densities) if known == 1.0 or any(abs(known - density) < 1e-9 for density in asked)]


def _own_data(folder: TaskFolder) -> Examples | None:
    """The held-out data that a run keeps beside its task.toml, if it has any."""
    if folder.task.evaluation.data is None:
        return None
    named = folder.path / folder.task.evaluation.data
    return _examples(str(named if named.is_file() else folder.path / named.name))


def _examples(spec: str) -> Examples:
    return Examples(spec, *open_source(spec, validation_fraction=0.0).everything())


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
    raise LocalError(
        f"{run}: neither the folder of a run nor the name of one in {runs}; `regrow runs` lists them (simulated runs keep no model)"
    )


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _choices(text: str, known: Sequence[Any], option: str) -> list[Any]:
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise LocalError(f"{option} {name!r}: {', '.join(known)}, or several with commas between")
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
            raise LocalError(f"{option}: {part!r} is not a number from {least:g} to {most:g}; several have commas between")
        numbers.append(number)
    return list(dict.fromkeys(numbers))
