"""The options of `regrow model check`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, count, positive, runs_option


def add_parser(commands: Commands) -> None:
    model = commands.add_parser("model", help="look at a model before there is a task", description="Models, before there is a task.")
    kinds = model.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = add_command(
        kinds,
        "check",
        "cli.model_check:model_check",
        "say whether a device can train a model, and what it costs: memory, time of a step, bytes of an update",
        "Exit status 0 if it can be trained, 1 if not. Steps are really run, on random data, on this machine.",
    )
    file = (
        "forward ONNX model; or FILE.py:FUNCTION, where the function returns a torch module and an example input (FILE.py is run); or one "
        "that comes with Regrow: leaf_cnn, ... (default: that of --task or --run)"
    )
    check.add_argument("file", nargs="?", metavar="FILE", help=file)
    task = "training, levels and granularity of this task folder (default: those of an empty task.toml, and the options below)"
    check.add_argument("--task", type=Path, metavar="TASK", help=task)
    check.add_argument("--loss", choices=("cross_entropy", "binary_cross_entropy", "mse", "huber"), help="default: cross_entropy")
    check.add_argument("--target", choices=("y", "input"), help='what outputs are compared with; "input" for autoencoders (default: y)')
    check.add_argument("--optimizer", choices=("sgd", "momentum", "nesterov", "adam", "adamw"), help="default: sgd")
    check.add_argument("--proximal-mu", type=positive, metavar="X", help="FedProx, which keeps the parameters of the round's beginning")
    check.add_argument("--clip-norm", type=positive, metavar="X", help="bound of the gradient's norm")
    check.add_argument("--train-last", type=count, metavar="K", help="train the last K layers only")
    check.add_argument("--batch", default="1,20,64", metavar="N,...", help="batch sizes")
    check.add_argument("--uplink", default="250k,1M,10M", metavar="R,...", help="uplinks in bit/s")
    check.add_argument("--density", metavar="D,...", help="levels, besides the full model (default: 0.05,0.1,0.2,0.5,1)")
    check.add_argument("--granularity", choices=["weight", "unit"], help="what sub-models are made of (default: weight)")
    check.add_argument("--run", type=Path, metavar="RUN", help="levels as this run orders them now (default: by |w| of the model)")
    runs_option(check)
    check.add_argument("--steps", type=int, default=10, metavar="N", help="steps of which the median is told; 0: run none")
    check.add_argument("--json", action="store_true", help="everything as JSON")
    check.add_argument("--picture", type=Path, metavar="FILE.png", help="draw every layer: its parameters, and what each level keeps")
