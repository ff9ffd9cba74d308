"""`regrow board`: what a real board can do."""

from __future__ import annotations

import argparse
import json

from edge_agent import board_check
from regrow.errors import UsageError


def check(options: argparse.Namespace) -> int:
    """Measure this board; exit status 1 when it computes wrongly."""
    if not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder}: no such folder")
    report = board_check.check(options.folder, options.minutes, lambda line: print(line, flush=True))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.out} holds the report: send it back with the board's name")
    return 0 if report["parity"]["ok"] else 1
