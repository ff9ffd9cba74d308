"""`regrow doctor`: the checks of a device, of a gateway, or of a device far away, told in lines or as JSON."""

from __future__ import annotations

import argparse
import os
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cli.arguments import GATEWAY_HOME, own_fleet
from cli.version import version
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.doctor.certificates import certificate_check
from edge_agent.doctor.checks import Check, run_checks
from edge_agent.doctor.device import Needs, Subject, device_checks, live_checks, software
from edge_agent.doctor.host import host_checks
from edge_agent.doctor.service import service_checks
from edge_agent.doctor.training import model_fit, training_checks
from edge_agent.identity import Identity, fleet_context
from edge_agent.identity_folder import About, read_about, state_in_use
from edge_agent.sealing import known_s
from regrow.broker_url import parse_broker_url
from regrow.errors import LocalError, UsageError
from regrow.findings import Finding, failed, in_words, to_json
from regrow.levels import densities_of
from regrow.programs import MEMORY, program_file
from regrow.step_memory import memory_of, needs_bytes
from regrow.task import parse_task
from regrow.topics import check_name

GATEWAY_UNIT = "regrow-gateway"


def doctor(options: argparse.Namespace) -> int:
    """Examine, tell, and say with the exit status whether something failed."""
    if options.device is not None:
        findings = _far(options)
    elif options.bundle is not None or options.identity is not None:
        findings = run_checks(device_checks(_subject(options), _needs_of_task(options.task)))
    else:
        findings = run_checks(gateway_checks(options.runs, options.broker or os.environ.get("REGROW_BROKER", "")))
    print(to_json(findings).decode() if options.json else "\n".join(in_words(finding) for finding in findings), flush=True)
    return int(failed(findings))


# ---- a device ----------------------------------------------------------------------------------------------------------------------


def _subject(options: argparse.Namespace) -> Subject:
    if options.identity is not None:
        return _with_identity(options.identity, options.state)
    bundle = read_bundle(options.bundle)
    return subject_of(bundle, options.state or Path(f"regrow-state-{bundle.device}"), None)


def _with_identity(folder: Path, state: Path | None) -> Subject:
    """The device whose identity this is, as far as that can be read."""
    if not folder.is_dir():
        raise UsageError(f"--identity {folder}: there is no such folder; name that of the agent")
    state = state or state_in_use(folder)
    try:
        member = Identity.look(folder)
        member.tls_context()
        bundle = Bundle(member.device, member.broker, None)
        return subject_of(bundle, state or Path(f"regrow-state-{bundle.device}"), member)
    except LocalError:
        return _broken(folder, state)


def _broken(folder: Path, state: Path | None) -> Subject:
    """The same of an identity that no agent could start with; a check of its own says why."""
    try:
        about = read_about(folder)
    except (LocalError, OSError):
        return Subject("", "", None, state or Path("regrow-state"), version(), identity=folder, broken=True)
    state, tls = state or Path(f"regrow-state-{about.device}"), lambda: fleet_context(about.authority, _fleet_clock(folder, about))
    return Subject(about.device, about.broker, None, state, version(), tls, folder, not_before_s=about.since_s, broken=True)


def subject_of(bundle: Bundle, state: Path, member: Identity | None) -> Subject:
    """The device of a bundle, or of an identity."""
    if member is not None:
        folder = member.folder  # keys may change while the agent runs
        tls: Callable[[], ssl.SSLContext] | None = lambda: Identity.look(folder).tls_context(_fleet_clock(folder, member.about))  # noqa: E731
        return Subject(bundle.device, bundle.broker, None, state, version(), tls, folder, not_before_s=member.about.since_s)
    authority = bundle.authority
    tls = None if authority is None else lambda: fleet_context(authority)
    return Subject(bundle.device, bundle.broker, bundle.password, state, version(), tls)


def _fleet_clock(folder: Path, about: About) -> Callable[[], float]:
    """The fleet's time, as the agent takes it when it starts."""
    return lambda: known_s(folder, about.since_s) or time.time()


def examined_by_agent(subject: Subject) -> Callable[[Callable[[], float]], Sequence[Finding]]:
    """What a running agent examines when the gateway asks; see edge_agent.checkup."""
    return lambda gateway_s: run_checks(live_checks(subject, gateway_s))


def _needs_of_task(task: Path | None) -> Needs:
    return {} if task is None else {task.resolve().name: needs_of(task)}


def needs_of(folder: Path) -> tuple[Sequence[int], Sequence[float]]:
    """(bytes, densities) of every level of a built task; without the gateway's packages, for a device has none.

    Raises:
        LocalError: the folder holds no built task.
    """
    try:
        task = parse_task((folder / "task.toml").read_text(), str(folder / "task.toml"))
        programs = {MEMORY: (folder / "build" / program_file(MEMORY)).read_bytes()}
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"--task {folder}: {error}; `regrow task build` makes what is needed") from error
    return needs_bytes(memory_of(programs, task), task), densities_of(task)


# ---- a device far away -------------------------------------------------------------------------------------------------------------


def _far(options: argparse.Namespace) -> list[Finding]:
    from broker_server.inquiry import ask

    _check_admitted(options.runs, options.device)
    report = ask(options.runs / GATEWAY_HOME, options.device)
    return [*report.findings, model_fit(_needs_of_task(options.task) or _needs_of_runs(options.runs), report.memory_bytes)]


def _check_admitted(runs: Path, device: str) -> None:
    """Say at once what the gateway knows: there is no such device, or it may not connect. One that keeps no list of its own knows nothing.

    Raises:
        LocalError: nobody would answer.
    """
    from broker_server.credentials import Credentials
    from broker_server.fleet.registry import MEMBERS, Registry

    home, fleet = runs / GATEWAY_HOME, own_fleet(runs)
    check_name(device, "device")
    members = Registry(fleet).devices() if (fleet / "fleet.json").exists() else {}
    with_password = Credentials(home).devices() if (home / "credentials.json").exists() else ()
    if device in with_password or not (members or with_password):
        return
    if device not in members:
        raise UsageError(f"no device {device!r} here: `regrow fleet list` and `regrow device list` name those that there are")
    from broker_server.fleet import coordinator_key  # which needs cryptography, as only a fleet does
    from cli.fleet import missed_in_words

    state = members[device].state
    if state == "claimed" and not members[device].may_join:
        raise LocalError(f"{device} has not joined, and its claim has expired: `regrow fleet add {device}` makes another")
    if device in coordinator_key.missed(Registry(fleet).fleet(), members):
        raise LocalError(missed_in_words(device, members[device]))
    if state == "claimed":
        raise LocalError(f"{device} has not joined yet: its claim waits to be used on the device, with `regrow join`")
    if state not in MEMBERS:
        raise LocalError(f"{device} is {state}, so the gateway does not let it in: `regrow fleet add {device}` makes a new claim for it")


def _needs_of_runs(runs: Path) -> Needs:
    """Of the task of every run that is served; what cannot be read is told by another check."""
    from broker_server.doctor import served_runs

    found = {}
    for run in served_runs(runs):
        try:
            found[run.name] = needs_of(run / "task")
        except LocalError:
            continue
    return found


# ---- the gateway -------------------------------------------------------------------------------------------------------------------


def gateway_checks(runs: Path, url: str) -> list[Check]:
    """What is asked on a gateway. url: of an external broker, "" for our own."""
    from broker_server import doctor as gateway

    home = runs / GATEWAY_HOME
    address = parse_broker_url(url) if url else gateway.listener_of(home)
    checks = [Check(("software",), lambda tell: tell(software(version()))), *host_checks(runs)]
    checks.append(Check(("gateway.access",), lambda tell: tell(gateway.access(home, own_fleet(runs)))))
    if address is None:
        silent = Finding(
            "broker.answers", "unknown", "no broker was started here, and none is named", "start `regrow serve`, or name --broker"
        )
        checks.append(Check((silent.check,), lambda tell: tell(silent)))
    else:
        checks.append(Check(("broker.answers",), lambda tell: tell(gateway.answers(address))))
    if url:
        checks.append(Check(("broker.rights",), lambda tell: tell(gateway.rights(url, runs)), gateway.ANSWER_S + 2))
    checks.append(Check(("gateway.runs",), lambda tell: tell(gateway.runs_of(runs)), 10.0))
    checks.append(Check(("gateway.coordinator",), lambda tell: tell(gateway.coordinator(runs)), 10.0))
    checks += fleet_checks(own_fleet(runs)) if own_fleet(runs).is_dir() else []
    return [*checks, *training_checks(), *service_checks(GATEWAY_UNIT)]


def fleet_checks(fleet: Path) -> list[Check]:
    """The dates of a fleet's certificates, and whether its devices believe it. fleet: its folder."""
    from broker_server import doctor as gateway

    renewal = "renew it on the gateway: docs/fleet.md"
    dates = [certificate_check(name, fleet / file, renewal) for name, file in (("tls.authority", "ca.crt"), ("tls.broker", "broker.crt"))]
    return [*dates, Check(("gateway.devices",), lambda tell: tell(gateway.devices(fleet)))]
