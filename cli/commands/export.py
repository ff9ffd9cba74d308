"""The options of `regrow export`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, count, runs_option


def add_parser(commands: Commands) -> None:
    export = add_command(
        commands,
        "export",
        "cli.models:export_run",
        "write a run's models for use on devices: of every level, as ONNX or .ort, float32, int8 or fp16",
        "Each file is checked, run and measured; export.json and export.md in the same folder hold the table. Reads the run only.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run, or its name in --runs")
    runs_option(export)
    density = "levels of the run, besides the full model (default: all, where there are at most 10)"
    export.add_argument("--density", metavar="D,...", help=density)
    formats = "onnx, or ort: onnxruntime's own, which its small builds read and other versions of it may refuse"
    export.add_argument("--format", choices=["onnx", "ort"], default="onnx", help=formats)
    export.add_argument("--quantize", default="none", metavar="Q,...", help="none (float32), int8, fp16, or several")
    data = "held-out data for the score, as of `regrow agent` (default: that of the run's [evaluation])"
    export.add_argument("--data", metavar="SOURCE", help=data)
    calibrate = (
        "data from a device, labels are not looked at: for int8 (512 examples), and for the running means and variances of batch "
        "normalisation (default for these: the run's [evaluation] data, or else --data)"
    )
    export.add_argument("--calibrate", metavar="SOURCE", help=calibrate)
    export.add_argument("--latency-runs", type=count, default=50, metavar="N", help="runs of which the median is the latency")
    export.add_argument("--out", type=Path, default=Path("exported"), metavar="DIR", help="where to write; files of the same name go")
