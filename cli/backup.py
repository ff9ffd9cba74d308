"""`regrow backup` and `regrow restore`."""

from __future__ import annotations

import argparse

from broker_server.backup import write_backup
from broker_server.restore import restore_backup
from regrow.errors import UsageError


def backup(options: argparse.Namespace) -> int:
    """Write the file."""
    head, contents = write_backup(options.runs, options.file, options.fleet)
    print(f"{options.file}: {_count(head.runs)}, {len(contents.files)} files, {contents.bytes / 1e6:.1f} MB, as of {head.made}")
    print("it holds passwords and keys in plain: only its owner may read it, keep it so")
    return 0


def restore(options: argparse.Namespace) -> int:
    """Put the file's contents in place."""
    if not options.file.is_file():
        raise UsageError(f"{options.file} is not there: name a file that `regrow backup` wrote")
    head, contents, aside = restore_backup(options.file, options.runs, replace=options.replace)
    print(f"{options.runs}: {_count(head.runs)}, {len(contents.files)} files, as of {head.made}")
    if aside is not None:
        print(f"what was there is now {aside}; remove it when nothing is missing")
    print("the gateway that the backup is of must not serve these runs any more: devices follow the restored one")
    return 0


def _count(runs: list[str]) -> str:
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
