"""`regrow update`: the updater's commands on a device."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_agent.slots import CURRENT, GOOD, NAMES, Slots
from edge_agent.update_files import SUFFIX, Settings, read_journal, read_settings
from edge_agent.updater import Updater
from regrow.errors import RegrowError, UsageError


def update(options: argparse.Namespace) -> int:
    """Apply, check, show or take back releases."""
    settings = read_settings(options.settings)
    bundle: Path | None = options.bundle
    if bundle is not None and options.action not in ("apply", "check"):
        raise UsageError(f"`regrow update {options.action}` takes no bundle")
    if options.action == "status":
        return _status(settings)
    updater = Updater(settings, say=lambda line: print(line, flush=True))
    if options.action == "rollback":
        print(f"{updater.rollback()} runs again")
        return 0
    if options.action == "check":
        return _check(updater, settings, bundle)
    journal = updater.apply(bundle)
    print(f"release {journal.number}: {journal.outcome}" if journal.number else "no release was ever applied")
    return 0


def _check(updater: Updater, settings: Settings, bundle: Path | None) -> int:
    found = [bundle] if bundle is not None else sorted(settings.spool.glob(f"*{SUFFIX}"))
    refused = 0
    for file in found:
        try:
            manifest = updater.check(file)
            print(f"{file}: release {manifest.number}, {manifest.name} {manifest.version}: would be installed")
        except RegrowError as error:
            refused += 1
            print(f"{file}: {error}")
    if not found:
        print(f"no bundle in {settings.spool}")
    return 1 if refused else 0


def _status(settings: Settings) -> int:
    slots, journal = Slots(settings.prefix), read_journal(settings.prefix)
    current, good = slots.linked(CURRENT), slots.linked(GOOD) if (settings.prefix / GOOD).is_symlink() else slots.linked(CURRENT)
    for name in NAMES:
        roles = [role for role, holder in (("current", current), ("good", good)) if holder == name]
        print(f"{settings.prefix / name}: {slots.version(name) or 'empty'} {', '.join(roles)}".rstrip())
    if journal.step:
        print(f"release {journal.number} ({journal.version}): at its step {journal.step}")
    elif journal.number:
        print(f"release {journal.number} ({journal.version}): {journal.outcome}{journal.reason and f', {journal.reason}'}")
    if journal.refused:
        print(f"refused {journal.refused_file}: {journal.refused}")
    return 0
