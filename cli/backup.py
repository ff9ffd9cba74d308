"""`regrow backup` and `regrow restore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker_server.backup import write_backup
from broker_server.fleet.registry import Registry, State
from broker_server.restore import restore_backup
from cli.arguments import own_fleet
from regrow.errors import UsageError

OUT: tuple[State, ...] = ("revoked", "wiped")


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
    _tell_of_fleet(own_fleet(options.runs), None if aside is None else own_fleet(aside), head.made)
    return 0


def _tell_of_fleet(restored: Path, aside: Path | None, made: str) -> None:
    """Who was put out since may come in again: nobody would notice."""
    if not (restored / "fleet.json").exists():
        return
    print(f"devices that were revoked since {made} may connect again: `regrow fleet revoke NAME` once more, before `regrow serve`")
    print("if the coordinator's key was changed since, devices do not believe this gateway: restore a later backup (docs/fleet.md)")
    if aside is None or not (aside / "fleet.json").exists():
        return
    now, before = Registry(restored).devices(), Registry(aside).devices()
    again = [name for name, device in now.items() if name in before and before[name].state in OUT and device.state not in OUT]
    if again:
        print(f"by what was there before: {', '.join(f'regrow fleet revoke {name}' for name in again)}")


def _count(runs: list[str]) -> str:
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
