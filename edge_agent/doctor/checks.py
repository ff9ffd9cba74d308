"""Runs checks beside each other, each with its own time; whatever a check does, every name that it promised gets its finding."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regrow.errors import RegrowError
from regrow.findings import Finding, bounded

log = logging.getLogger(__name__)
TOTAL_S = 20.0
Tell = Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One or several questions that are asked in a row.

    Args:
        names: of the findings, in the order in which they are shown.
        run: tells each as soon as it is known; what it raises is the finding of those that were not told.
        timeout_s: for all of them.
    """

    names: tuple[str, ...]
    run: Callable[[Tell], None]
    timeout_s: float = 5.0


def run_checks(checks: Sequence[Check], total_s: float = TOTAL_S) -> list[Finding]:
    """The findings of all checks, in their order; it takes `total_s` at most, and raises nothing.

    A check that hangs is left behind on its thread, which ends with the process.
    """
    began_s = time.monotonic()
    running = [_begin(check) for check in checks]
    found: list[Finding] = []
    for check, (thread, told) in zip(checks, running, strict=True):
        limit_s = min(check.timeout_s, total_s)
        thread.join(max(0.0, began_s + limit_s - time.monotonic()))
        said = {finding.check: finding for finding in list(told)}
        silent = Finding("", "unknown", f"no answer in {limit_s:g} s", "try again; if it stays so, look at the check before it")
        found += [said.get(name) or Finding(name, "unknown", silent.said, silent.cure) for name in check.names]
    return found


def _begin(check: Check) -> tuple[threading.Thread, list[Finding]]:
    told: list[Finding] = []

    def run() -> None:
        try:
            check.run(lambda finding: told.append(bounded(finding)))
        except RegrowError as error:
            said, _, cure = str(error).partition("; ")
            told.extend(bounded(Finding(name, "fail", said, cure)) for name in check.names[len(told) :])
        except Exception as error:  # a check that breaks must not take the others' findings with it
            log.debug("%s", check.names, exc_info=True)
            said = f"this check broke: {type(error).__name__}: {error}"
            told.extend(bounded(Finding(name, "unknown", said, "tell the maintainers")) for name in check.names[len(told) :])

    thread = threading.Thread(target=run, name=f"doctor {check.names[0]}", daemon=True)
    thread.start()
    return thread, told
