"""The options of `regrow promote`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, broker_options


def add_parser(commands: Commands) -> None:
    promote = add_command(
        commands,
        "promote",
        "cli.promote:promote",
        "sign off a model for use on the devices",
        "A device takes it only if it is not worse on the device's own validation data than the one that is there. While `serve` runs for "
        "the task it publishes the model; otherwise this command does, until every device of the run has answered.",
    )
    promote.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    own = "another ONNX file (int8, say) with the same input and output (default: the run's global model, as in model.onnx)"
    promote.add_argument("--model", type=Path, metavar="FILE", help=own)
    promote.add_argument("--withdraw", action="store_true", help="take the newest model back: devices return to the one before it")
    head = "also publish what devices started with --local-head train their last layer with"
    promote.add_argument("--local-head", action="store_true", help=head)
    promote.add_argument("--by", metavar="NAME", help="who signs off (default: user@host)")
    promote.add_argument("--stay", action="store_true", help="go on when all devices of the run have answered, for others, until Ctrl-C")
    promote.add_argument("--no-wait", action="store_true", help="only sign off; a running or later `serve` publishes it")
    broker_options(promote)
