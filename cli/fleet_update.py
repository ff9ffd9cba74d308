"""`regrow fleet update`: stage a release, widen or halt it, and see how far the devices are."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from broker_server.fleet.authority import Authority
from broker_server.fleet.registry import MEMBERS, Device, Registry, read_seen
from broker_server.fleet.releases import Releases, Staged, Wish, in_words, percentile, required_by
from cli.arguments import own_fleet
from regrow import wire
from regrow.errors import UsageError

NO_UPDATES = "its agent runs without --updates"
COLUMNS = ("device", "stage", "offered", "runs", "board", "Python", "what became of it")


def update(options: argparse.Namespace) -> int:
    """Stage, widen, halt or show."""
    folder: Path = options.fleet or own_fleet(options.runs)
    releases = Releases(Registry(folder))
    if options.status:
        return _status(releases, as_json=options.json)
    if options.halt:
        halted = releases.halt().opened()
        print(f"release {halted.number} ({halted.version}) is offered to nobody any more; devices that are installing it go on")
        return 0
    others = sorted(options.wheels.glob("*.whl")) if options.wheels is not None else []
    if options.wheels is not None and not others:
        raise UsageError(f"--wheels {options.wheels}: no wheel in this folder")
    wish = Wish(
        percent=options.percent,
        boards=tuple(sorted(set(options.board or ()))),
        forced=options.force_downgrade,
        trial_minutes=options.minutes,
        wants="contact" if options.contact_only else "round",
    )
    before, needs = releases.newest(), required_by(options.wheel)
    staged, new = releases.stage(options.wheel, others, wish, Authority(folder).sign_release)
    wider = before is None or staged.percent > before.percent
    _tell(releases, staged, "staged" if new else "widened" if wider else "staged before, and no wider now; `--halt` takes it back")
    lacking = [need for need in needs if need not in {wheel.distribution for wheel in staged.opened().files}]
    if lacking:
        why = "a device installs the wheels of a release and nothing else, so it will fail there and go on with what it runs"
        print(f"warning: this release lacks {', '.join(lacking)}: {why}; --wheels DIR brings what regrow depends on", file=sys.stderr)
    return 0


def _tell(releases: Releases, staged: Staged, what: str) -> None:
    manifest, offered = staged.opened(), releases.offered(staged)
    print(f"release {manifest.number}: {manifest.name} {manifest.version}, {len(manifest.files)} wheels, {what}")
    targets = ", ".join(f"Python {python} on {machine}" for python, machine in manifest.targets)
    print(f"for {targets}; {', '.join(manifest.boards) or 'every board'}; {manifest.min_free_bytes / 1e6:.0f} MB of disk on a device")
    print(f"{staged.percent:g} %: {len(offered)} of {len(releases.registry.devices())} devices: {', '.join(offered) or 'none'}")
    print("`regrow serve` publishes it; see `regrow fleet update --status`")


def _status(releases: Releases, *, as_json: bool) -> int:
    staged, reports = releases.newest(), releases.reports()
    if staged is None:
        print("no release was ever staged: regrow fleet update --wheel FILE")
        return 0
    manifest, offered = staged.opened(), set(releases.offered(staged))
    seen, rows, silent = read_seen(releases.registry.folder), [], False
    for name, device in releases.registry.devices().items():
        report = reports.get(name)
        heard = name in seen
        here = ("", "", "") if report is None else (report.version, report.board, report.python)
        rows.append(
            (
                name,
                percentile(manifest, name),
                name in offered,
                here[0],
                here[1] or device.board,
                here[2],
                _said(name, report, manifest.number, device, heard=heard),
            )
        )
        silent |= report is None and heard and device.state in MEMBERS
    if as_json:
        about = {"release": manifest.number, "version": manifest.version, "percent": staged.percent, "halted": staged.halted}
        print(json.dumps({**about, "devices": [dict(zip(COLUMNS, row, strict=True)) for row in rows]}, indent=1))
        return 0
    state = "halted" if staged.halted else f"offered to {staged.percent:g} %"
    print(f"release {manifest.number}: {manifest.name} {manifest.version}, {state}")
    table = Table(*COLUMNS, pad_edge=False)
    for name, stage, is_offered, *said in rows:
        table.add_row(name, f"{stage:.0f} %", "yes" if is_offered else "no", *(text or "-" for text in said))
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)
    if silent:
        print(f"{NO_UPDATES}: start it with --updates /etc/regrow/update.json there (docs/updates.md says what belongs into that file)")
    return 0


def _said(name: str, report: wire.ReleaseReport | None, number: int, device: Device, *, heard: bool) -> str:
    if report is None and device.state not in MEMBERS:
        expired = f"claim expired: regrow fleet add {name}"
        return device.state if device.state != "claimed" else "has not joined yet" if device.may_join else expired
    if report is None:
        return NO_UPDATES if heard else "never heard of"
    return in_words(report) if report.number == number else f"release {report.number}: {in_words(report)}"
