"""The options of `regrow task new` and `regrow task build`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command


def add_parser(commands: Commands) -> None:
    task = commands.add_parser("task", help="make and check task folders", description="A task is a folder: task.toml and a model.")
    kinds = task.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = add_command(kinds, "new", "cli.gateway:task_new", "make a task folder around a forward ONNX model")
    new.add_argument("folder", type=Path, metavar="TASK", help="folder to make; its name becomes the task's name")
    new.add_argument(
        "--model",
        type=Path,
        required=True,
        help="forward ONNX model: features in, scores or values out, without its loss; or FILE.py:FUNCTION, where the function returns "
        "a torch module and an example input (FILE.py is run); or one that comes with Regrow: leaf_cnn, ...",
    )
    new.add_argument(
        "--loss",
        choices=("cross_entropy", "binary_cross_entropy", "mse", "huber"),
        default="cross_entropy",
        help="what training makes small, cross_entropy for class scores; task.toml has the other [training] keys",
    )
    build = add_command(kinds, "build", "cli.gateway:task_build", "write the programs that devices run", "`serve` does it when needed.")
    build.add_argument("folder", type=Path, metavar="TASK", help="folder with task.toml and its model")
