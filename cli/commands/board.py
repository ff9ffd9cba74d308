"""The options of `regrow board`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, not_negative


def add_parser(commands: Commands) -> None:
    board = add_command(commands, "board", "cli.board:check", "find out what a real board can do")
    kinds = board.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = add_command(
        kinds,
        "check",
        "cli.board:check",
        "measure this board and write one JSON to send back",
        "Golden numbers, step time, peak memory, sensors, speed of the card, and ten minutes of training to see how it holds out when "
        "warm. It needs no network, no root and no other device. Ctrl-C in the warm run ends it with what there is.",
    )
    check.add_argument("--minutes", type=not_negative, default=10.0, metavar="N", help="of the warm run; 0 leaves it out")
    check.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="a folder on the card or disk to measure (default: here)")
    check.add_argument("--out", type=Path, default=Path("board.json"), metavar="FILE", help="the report")
