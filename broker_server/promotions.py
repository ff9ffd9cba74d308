"""What is signed off for use on devices: one folder for each task, below the runs, so that it outlives every run.

    .models/TASK/00000001.json     one file a decision, never changed: who, when, which run and version, which digest
    .models/TASK/DIGEST.onnx       the model; DIGEST.head.NAME what trains its last layer
    .models/TASK/reports/DEVICE    the newest PromotionReport of a device, as it came
    .models/TASK/lock              held by whoever publishes this task's models

A decision is written aside, fsynced and renamed after its files, so it names nothing that is not there. There is nothing to fold: the
newest decision is what holds. Withdrawing is a decision, too.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from broker_server.credentials import write_private
from regrow import wire
from regrow.errors import LocalError, PeerError
from regrow.publication import blob
from regrow.topics import check_name

MODELS = ".models"
_DECISION = re.compile(r"\d{8}\.json")


class HeadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How devices may train the last layer for themselves. programs: names of the files, as in wire.Head."""

    programs: list[str]
    steps: int
    batch: int
    learning_rate: float


class SignOff(msgspec.Struct, frozen=True, kw_only=True):
    """One decision. digest: that of wire.py, hexadecimal, None: no model is to be used."""

    number: int
    action: str
    run: str
    version: int
    digest: str | None
    sha256: str = ""
    bytes: int = 0
    file: str = ""
    who: str = ""
    when: str = ""
    step: str = ""
    withdrawn: list[str] = []
    head: HeadPlan | None = None


class Promotions:
    """The decisions of one task, which any process may read. Deciding takes no lock: two people must not do so at the same moment."""

    def __init__(self, runs: Path, task: str) -> None:
        self.path = runs / MODELS / task
        self.task = task

    # ---- decisions -----------------------------------------------------------------------------------------------------------------

    def history(self) -> list[SignOff]:
        """Every decision, oldest first.

        Raises:
            LocalError: one does not check out.
        """
        files = sorted(file for file in self.path.iterdir() if _DECISION.fullmatch(file.name)) if self.path.is_dir() else []
        decisions = []
        for file in files:
            try:
                decisions.append(msgspec.json.decode(file.read_bytes(), type=SignOff))
            except (OSError, msgspec.DecodeError) as error:
                raise LocalError(f"{file} does not check out: {error}; restore it from a backup, or remove it and promote again") from error
        return decisions

    def newest_number(self) -> int:
        """0 without any; much cheaper than `history`."""
        names = (file.name for file in self.path.iterdir()) if self.path.is_dir() else ()
        return max((int(name[:8]) for name in names if _DECISION.fullmatch(name)), default=0)

    def sign_off(
        self,
        model: bytes,
        *,
        run: str,
        version: int,
        who: str,
        file: str,
        step: str = "",
        head: Mapping[str, bytes] | None = None,
        plan: HeadPlan | None = None,
    ) -> SignOff:
        """Record that devices shall use this model; durable when it returns. The same model as the newest: that decision, unchanged.

        Args:
            model: the file.
            run: where it comes from; version: of its global model.
            who: signs off.
            file: its name, for people.
            step: what devices score it by, as in wire.Promotion.
            head: the programs of the plan, by name.

        Raises:
            LocalError: it is too large for devices.
            OSError: the folder cannot be written.
        """
        if not 0 < len(model) <= wire.MAX_MODEL_BYTES:
            raise LocalError(f"{file} has {len(model)} bytes; devices take 1 to {wire.MAX_MODEL_BYTES}: quantize or prune it")
        digest, history = wire.digest(model).hex(), self.history()
        before = history[-1] if history else None
        if before is not None and before.digest == digest and (before.head is None) == (plan is None):
            return before
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self.path / f"{digest}.onnx", model)
        for name, data in (head or {}).items():
            write_private(self.path / f"{digest}.head.{name}", data)
        return self._write(
            SignOff(
                number=1 + (before.number if before is not None else 0),
                action="promoted",
                run=run,
                version=version,
                digest=digest,
                sha256=hashlib.sha256(model).hexdigest(),
                bytes=len(model),
                file=file,
                who=who,
                when=_now(),
                step=step,
                withdrawn=[] if before is None else [old for old in before.withdrawn if old != digest],
                head=plan,
            )
        )

    def withdraw(self, who: str) -> SignOff:
        """Take the newest model back, for the one before it that was never withdrawn; without one, for none.

        Raises:
            LocalError: there is nothing to withdraw.
        """
        history = self.history()
        bad = history[-1] if history else None
        if bad is None or (digest := bad.digest) is None:
            raise LocalError(f"no model of task {self.task!r} is promoted, so there is none to withdraw")
        withdrawn = [*(old for old in bad.withdrawn if old != digest), digest][-wire.MAX_WITHDRAWN :]
        good = next((old for old in reversed(history) if old.digest is not None and old.digest not in withdrawn), None)
        number, when = bad.number + 1, _now()
        if good is None:
            return self._write(
                SignOff(
                    number=number,
                    action="withdrawn",
                    run=bad.run,
                    version=bad.version,
                    digest=None,
                    who=who,
                    when=when,
                    withdrawn=withdrawn,
                )
            )
        fields = {"number": number, "action": "withdrawn", "who": who, "when": when, "withdrawn": withdrawn}
        return self._write(msgspec.structs.replace(good, **fields))

    def _write(self, decision: SignOff) -> SignOff:
        write_private(self.path / f"{decision.number:08d}.json", msgspec.json.format(msgspec.json.encode(decision), indent=1) + b"\n")
        return decision

    # ---- what travels --------------------------------------------------------------------------------------------------------------

    def files(self, decision: SignOff) -> dict[bytes, bytes]:
        """Digest -> bytes of every file that a decision names.

        Raises:
            LocalError: one is missing or damaged.
        """
        return {found.digest: data for found, data in self._blobs(decision)}

    def announcement(self, decision: SignOff) -> wire.Promotion:
        """What devices hear of a decision. Raises LocalError as `files`."""
        blobs = [found for found, _ in self._blobs(decision)]
        plan = decision.head
        return wire.Promotion(
            number=decision.number,
            run=check_name(decision.run, "run"),
            version=decision.version,
            model=blobs[0] if blobs else None,
            step=decision.step,
            withdrawn=[bytes.fromhex(digest) for digest in decision.withdrawn],
            head=wire.Head(blobs[1:], plan.steps, plan.batch, plan.learning_rate) if plan is not None and blobs else None,
        )

    def _blobs(self, decision: SignOff) -> list[tuple[wire.Blob, bytes]]:
        if decision.digest is None:
            return []
        names = {"model": f"{decision.digest}.onnx"}
        names |= {name: f"{decision.digest}.head.{name}" for name in (decision.head.programs if decision.head is not None else ())}
        found = []
        for name, file in names.items():
            try:
                data = (self.path / file).read_bytes()
            except OSError as error:
                raise LocalError(f"{self.path / file}: {error.strerror or error}; promote the model again") from error
            found.append((blob(name, data), data))
        if hashlib.sha256(found[0][1]).hexdigest() != decision.sha256:
            raise LocalError(f"{self.path / names['model']} is not the file that was signed off: promote the model again")
        return found

    # ---- what devices said ---------------------------------------------------------------------------------------------------------

    def note_report(self, device: str, report: wire.PromotionReport) -> None:
        """Keep the newest word of a device. Not durable: a device says it again whenever it hears the announcement."""
        folder = self.path / "reports"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = folder / f".{device}"
        aside.write_bytes(wire.encode(report))
        aside.replace(folder / device)

    def reports(self) -> dict[str, wire.PromotionReport]:
        """The newest word of every device, by name; what does not check out is left out."""
        folder, found = self.path / "reports", {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not file.name.startswith("."):
                with suppress(OSError, PeerError):
                    found[file.name] = wire.decode(file.read_bytes(), wire.PromotionReport)[0]
        return found

    def lock(self) -> IO[str] | None:
        """The right to publish this task's models, until it is closed or the process ends; None while another process has it."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock


def use_of(run: Path, task: str) -> str:
    """How a run's model is in use, for a list: "3: 4 of 5", when 4 devices of 5 that answered have promotion 3; "" without one."""
    promotions = Promotions(run.parent, task)
    try:
        history = promotions.history()
    except LocalError:
        return "unreadable"
    if not history or history[-1].run != run.name or history[-1].digest is None:
        return ""
    answers = [report for report in promotions.reports().values() if report.number == history[-1].number]
    return f"{history[-1].number}: {sum(report.outcome == 'placed' for report in answers)} of {len(answers)}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def in_words(report: wire.PromotionReport) -> str:
    """placed; score 0.931, loss 0.210 on 40 examples; ... The score is what the task's loss is scored by (regrow.scoring)."""
    said = [report.outcome]
    if report.new is not None:
        said.append(f"score {report.new.accuracy:.3f}, loss {report.new.loss:.3f} on {report.new.examples} examples")
    if report.tuned is not None:
        said.append(f"with a local head {report.tuned.accuracy:.3f}")
    if report.old is not None:
        said.append(f"in place before {report.old.accuracy:.3f}, loss {report.old.loss:.3f}")
    if report.reason:
        said.append(report.reason)
    return "; ".join(said)
