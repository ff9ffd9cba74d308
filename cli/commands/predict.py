"""The options of `regrow predict`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, count


def add_parser(commands: Commands) -> None:
    predict = add_command(
        commands,
        "predict",
        "cli.predict:predict",
        "run the promoted model that a device has in place",
        "Prints the class of each example, or the numbers of a model without classes, and how good they are where the data say.",
    )
    predict.add_argument("state", type=Path, metavar="STATE_OR_BUNDLE", help="the agent's state folder, or its NAME.json (state beside it)")
    predict.add_argument("--data", required=True, metavar="SOURCE", help="as for `regrow agent`; an .npz needs no y here")
    predict.add_argument("--task", metavar="NAME", help="whose model, where there are several")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write the scores as .npz or .csv instead of printing classes")
    predict.add_argument("--no-head", action="store_true", help="leave out the local head")
    predict.add_argument("--threads", type=count, default=1, metavar="N", help="for one operator")
