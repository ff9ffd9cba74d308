"""What the coordinator decides: who trains how much, which version, when the order is refreshed, when the run is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from regrow import density, records, restoration, values, wire
from regrow.broadcast import chunk_bytes
from regrow.claim import RESTORED_NUMBER_SHIFT, restores_of
from regrow.ledger import Ledger
from regrow.levels import densities_of, next_order
from regrow.machine import Evaluate, Evaluated, Note
from regrow.member import Device
from regrow.order import importance
from regrow.precision import update_dtype
from regrow.publication import CodedOrder, number_of, version_of
from regrow.restarts import STARTS, STARTS_S, Restarts
from regrow.step_memory import largest_density, least_bytes, needs_bytes
from regrow.task import Task
from regrow.values import WireDtype

SLOW_DOWNLOAD = 4.0

if TYPE_CHECKING:
    from regrow.coordinator import Coordinator

MIN_STEP_S = 1e-6  # whatever a device claims, its speed is a number
MAX_ROUND_S = 28_800.0  # whatever link a device claims, its deadline is at most a day


class Planner:
    """The decisions of one coordinator, each ending in records."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._first_hello_s: float | None = None
        self._declined: dict[str, str] = {}
        self.restarts = Restarts()

    @property
    def _ledger(self) -> Ledger:
        return self._coordinator.ledger

    # ---- who takes part ------------------------------------------------------------------------------------------------------------

    def take_in(self, who: str, hello: wire.Hello, uplink_bps: float) -> None:
        """Queue a new device for its first density, take back one that has started anew, decline one that holds no level."""
        coordinator, known = self._coordinator, self._ledger.devices.get(who)
        anew = known is not None and (known.boot, known.install) != (hello.boot.hex(), hello.install.hex())
        waited_s = self.restarts.waits_s(who, coordinator.now)
        if anew and not self.restarts.counts(who, hello, uplink_bps, coordinator.now):
            if waited_s is None:  # said once, not with every hello
                wait_s = self.restarts.waits_s(who, coordinator.now)
                coordinator.emit(Note("restarting", {"device": who, "starts": STARTS, "within_s": STARTS_S, "wait_s": wait_s}))
            return
        needs = least_bytes(coordinator.memory, self._ledger.task, hello.storage)
        join = records.Joined(
            device=who,
            install=hello.install.hex(),
            boot=hello.boot.hex(),
            uplink_bps=uplink_bps,
            density=0.0,
            step_s=max(hello.step_s, MIN_STEP_S) if hello.step_s else None,
            memory_density=_memory_density(self._ledger.task, needs, hello.memory_bytes),
        )
        if join.memory_density == 0.0 and self._declined.get(who) != join.boot:  # said once, not with every hello
            self._declined[who] = join.boot
            coordinator.emit(Note("declined", {"device": who, **self._least_needs(hello), "memory_bytes": hello.memory_bytes}))
        if known is None:
            if join.memory_density > 0.0 and who not in coordinator.roster.resting:
                coordinator.waiting[who] = join
            else:
                coordinator.waiting.pop(who, None)
            return
        self.restarts.forget(who)
        if anew:
            other_install, other_memory = known.install != join.install, known.memory_density != join.memory_density
            if known.lease is not None and (other_install or other_memory):
                coordinator.release_lease(who, "reinstalled" if other_install else "started with other memory")
            coordinator.commit(join)

    def _least_needs(self, hello: wire.Hello) -> dict[str, int | str]:
        """What the smallest level takes, in every storage that there is, and which of them the device may use."""
        memory, task = self._coordinator.memory, self._ledger.task
        needs: dict[str, int | str] = {"needs_bytes": min(needs_bytes(memory, task))}
        half = {"needs_bytes_float16": min(needs_bytes(memory, task, "float16")), "storage": hello.storage} if memory.float16 else {}
        return needs | half

    def join_due_s(self) -> float | None:
        """When waiting devices get their first density, or None while the fleet is too small."""
        waiting, fleet = self._coordinator.waiting, self._ledger.task.fleet
        if not waiting:
            return None
        if self._first_hello_s is None:
            self._first_hello_s = self._coordinator.now
        if len(waiting) + len(self._ledger.devices) < fleet.min_devices:
            return None
        return self._first_hello_s if self._ledger.devices else self._first_hello_s + fleet.join_s

    def admit(self) -> None:
        """Give every waiting device its class: by its link and its computing relative to all that are here, and by its memory.

        Who started anew too often, and has waited for it, is taken back.
        """
        for late in self.restarts.take(self._coordinator.now):
            self.take_in(*late)
        due = self.join_due_s()
        if due is None or due > self._coordinator.now:
            return
        waiting = self._coordinator.waiting
        method = self._ledger.task.method
        full_bps = method.full_density_bps
        if full_bps is None:
            full_bps = self._coordinator.roster.full_density_bps(join.uplink_bps for join in waiting.values())
        full_speed = None
        if method.granularity == "unit":  # of single weights a step costs as much at every density
            full_speed = self._coordinator.roster.full_density_speed(1.0 / join.step_s for join in waiting.values() if join.step_s)
        ladder = densities_of(self._ledger.task) if method.density == "full" else method.ladder
        for join in waiting.values():
            by_link = density.initial_density(join.uplink_bps, ladder, full_bps)
            by_compute = self._by_compute(join, ladder, full_speed)
            first, bound_by = density.tightest(by_link, by_compute, join.memory_density)
            uncut, uncut_by = density.tightest(by_link, by_compute, 1.0)
            found = {"density": first, "bound_by": bound_by, "uncut_density": uncut, "uncut_by": uncut_by}
            self._coordinator.commit(msgspec.structs.replace(join, **found))
            fields = {"device": join.device, "uplink_bps": join.uplink_bps, "density": first, "bound_by": bound_by}
            self._coordinator.emit(Note("joined", fields))
        waiting.clear()

    def _by_compute(self, join: records.Joined, ladder: Sequence[float], full_speed: float | None) -> float:
        """What the computing of a device allows: everything where a round of the full model is more transfer than training."""
        if not join.step_s or full_speed is None:
            return 1.0
        ledger, order = self._ledger, self._ledger.order
        upload_bytes = ledger.largest_update_bytes(order, len(order.lengths) - 1, ledger.task.wire.dtypes[0])
        if ledger.task.training.local_steps * join.step_s <= 8 * upload_bytes / join.uplink_bps:
            return 1.0
        return density.initial_density(1.0 / join.step_s, ladder, full_speed)

    # ---- aggregation -----------------------------------------------------------------------------------------------------------------

    def aggregate(self) -> None:
        """Make the next version; evaluate and refresh when they are due."""
        ledger, commit = self._ledger, self._coordinator.commit
        elapsed_s = self._coordinator.elapsed_s()
        commit(records.Aggregated(version=ledger.version + 1, elapsed_s=elapsed_s))
        if ledger.version % ledger.task.restoration.every == 0:
            self._evaluate(elapsed_s)
        if self._refresh_pays():
            self._refresh()
        mean = self._coordinator.roster.mean_density()
        fields = {"version": ledger.version, "elapsed_s": elapsed_s, "mean_density": mean, "global_score": ledger.global_score}
        self._coordinator.emit(Note("aggregated", {**fields, "scores": dict(ledger.level_scores)}))

    def _evaluate(self, elapsed_s: float) -> None:
        """Score the levels in use and the whole model: by the devices' reports, or by asking the gateway."""
        ledger = self._ledger
        if ledger.task.evaluation.data is None:
            scores = self._coordinator.roster.scores.means()
            self._restore(elapsed_s, scores, scores[max(scores)] if scores else None)
            return
        order = ledger.order
        levels = {ledger.level_of(value) for value in self._coordinator.roster.densities.counts} | {len(order.lengths) - 1}
        lengths = {level: order.lengths[level] for level in sorted(levels)}
        self._coordinator.emit(Evaluate(ledger.version, ledger.weights, order.coordinates, lengths))

    def take_evaluation(self, evaluated: Evaluated) -> None:
        """Restore by what the gateway has found."""
        ledger = self._ledger
        scores = {ledger.density_of(level): accuracy for level, accuracy in evaluated.accuracies.items()}
        if scores:
            self._restore(self._coordinator.elapsed_s(), scores, scores[max(scores)])

    def _restore(self, elapsed_s: float, scores: dict[float, float], global_score: float | None) -> None:
        ledger, task, before = self._ledger, self._ledger.task, self._raisable()
        rounds = ((who, density.mean_round_s(ledger.devices[who].full_round_s)) for who in before)
        state, after, finished, reasons = restoration.evaluate(
            ledger.restoration,
            restoration_config(task),
            before,
            scores,
            global_score,
            self._progress(elapsed_s),
            elapsed_s=elapsed_s - ledger.began_s,
            full_round_s={who: round_s for who, round_s in rounds if round_s is not None},
            limits=self._limits(before),
        )
        self._note_restored(before, after, state, scores, global_score, reasons, finished=finished)

    def keep_to_plan(self) -> None:
        """Raise everybody at the planned points that have passed: by the clock, whenever the next evaluation is."""
        due_s = self.plan_due_s()
        if due_s is None or due_s > self._coordinator.now:
            return
        ledger, before = self._ledger, self._raisable()
        # The timer says that the point has come, whatever a division makes of it.
        point = restoration.next_point(ledger.restoration, restoration_config(ledger.task))
        progress = max(self._progress(self._coordinator.elapsed_s()), point or 0.0)
        found = restoration.planned(ledger.restoration, restoration_config(ledger.task), before, progress, self._limits(before))
        state, after, reasons = found
        self._note_restored(before, after, state, ledger.level_scores, ledger.global_score, reasons, finished=ledger.trained_out)

    def plan_due_s(self) -> float | None:
        """When the next planned point passes; None without one, or while nobody is there to be raised."""
        ledger, planned_s = self._ledger, self._ledger.task.restoration.planned_s
        if planned_s is None or not ledger.devices:
            return None
        point = restoration.next_point(ledger.restoration, restoration_config(ledger.task))
        if point is None:
            return None
        return self._coordinator.now + point * planned_s - self._coordinator.elapsed_s()

    def _raisable(self) -> dict[str, float]:
        """The densities of whom restoration may raise: nobody without it; who is excluded has left until another start."""
        devices = self._ledger.devices.items() if self._ledger.task.restoration.trigger != "none" else ()
        return {who: device.density for who, device in devices if not self._coordinator.roster.excluded(device)}

    def _limits(self, densities: Iterable[str]) -> dict[str, float]:
        return {who: limit for who in densities if (limit := self._ledger.devices[who].ceiling) < 1.0}

    def _progress(self, elapsed_s: float) -> float:
        planned_s = self._ledger.task.restoration.planned_s
        return elapsed_s / planned_s if planned_s else 0.0

    def _note_restored(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        state: restoration.RestorationState,
        scores: Mapping[float, float],
        global_score: float | None,
        reasons: list[str],
        *,
        finished: bool,
    ) -> None:
        changed = {who: value for who, value in after.items() if value != before[who]}
        self._coordinator.commit(
            records.Restored(
                densities=changed,
                state=msgspec.Raw(msgspec.json.encode(state)),
                scores={str(level): score for level, score in scores.items()},
                global_score=global_score,
                reasons=reasons,
                finished=finished,
            )
        )
        for who, value in changed.items():
            self._coordinator.emit(Note("restored", {"device": who, "density_from": before[who], "density": value}))

    def _refresh_pays(self) -> bool:
        """k_rest aggregations have passed, somebody still trains a part, and the slow class has trained several rounds on this order.

        Who is excluded trains no more rounds, and is not waited for.
        """
        roster = self._coordinator.roster
        lowest = min(roster.eligible.counts, default=1.0)
        if lowest >= 1.0 or self._ledger.since_refresh < self._ledger.task.method.refresh_every:
            return False
        return lowest not in roster.unready.counts

    def _refresh(self) -> None:
        ledger, method = self._ledger, self._ledger.task.method
        order = ledger.order
        scattered = np.zeros_like(ledger.weights)
        if method.importance in ("wg", "g", "w"):
            ranked = importance(method.importance, ledger.weights, ledger.weights - ledger.anchor, ledger.squares)
            scattered[order.coordinates] = ranked
        new = next_order(ledger.task, ledger.layout, ledger.units, scattered, ledger.flat_weights, order.epoch + 1)
        coded = CodedOrder.of(new)
        sizes = [len(level) for level in coded.levels]
        self._coordinator.commit(records.Refreshed(epoch=new.epoch, lengths=list(new.lengths), sizes=sizes), b"".join(coded.levels))
        self._coordinator.emit(Note("refreshed", {"epoch": new.epoch, "version": ledger.version, "bytes": sum(sizes)}))

    # ---- the end ---------------------------------------------------------------------------------------------------------------------

    def finish_reason(self) -> str:
        """Why the run is over, or nothing."""
        ledger, stop = self._ledger, self._ledger.task.stop
        elapsed_s = self._coordinator.elapsed_s()
        if stop.seconds is not None and elapsed_s >= stop.seconds:
            return f"{stop.seconds:g} s have passed"
        if stop.aggregations is not None and ledger.version >= stop.aggregations:
            return f"{ledger.version} aggregations"
        if stop.accuracy is not None and ledger.global_score is not None and ledger.global_score >= stop.accuracy:
            return f"accuracy {ledger.global_score:.4f}"
        if ledger.trained_out and stop == type(stop)():
            return "the full model no longer improves"
        return ""

    def stop_due_s(self) -> float | None:
        """When the planned seconds are over."""
        seconds = self._ledger.task.stop.seconds
        return None if seconds is None else self._coordinator.now + seconds - self._coordinator.elapsed_s()

    def finish(self, reason: str) -> None:
        self._coordinator.commit(records.Finished(reason=reason, elapsed_s=self._coordinator.elapsed_s()))
        self._coordinator.emit(Note("finished", {"reason": reason}))

    # ---- assignments -------------------------------------------------------------------------------------------------------------------

    def assign_idle(self) -> None:
        """Give every live, idle device a sub-model of the newest version that it can have; retire what nobody leases."""
        idle = self._coordinator.roster.idle
        if idle:
            version = self._version_to_hand_out()
            if version is not None:
                on_broker = self._coordinator.broadcast.on_broker()
                older = max((v for v in on_broker if version_of(v) != version_of(version)), key=version_of, default=None)
                untrained = self._untrained(version)
                for who in sorted(idle):
                    self._assign(who, older if older is not None and self._would_pin(who) else next(untrained, version))
        self._retire(self._ledger.published)
        self._coordinator.broadcast.tidy(self._ledger.version)

    def _would_pin(self, who: str) -> bool:
        """Whether this device's long download would hold the last place on the broker, which the newest version needs.

        Slow devices then share an older version that is there anyway, so that the fast ones always get fresh ones.
        """
        if _versions(self._coordinator.broadcast.on_broker()) < self._ledger.task.wire.versions_on_broker:
            return False
        device = self._ledger.devices[who]
        return device.density / device.uplink_bps > SLOW_DOWNLOAD * (self._coordinator.roster.live_transfers.least() or 0.0)

    def _version_to_hand_out(self) -> int | None:
        """The newest version, published now if there is room for it; else the newest that lies on the broker; else none yet."""
        ledger, broadcast = self._ledger, self._coordinator.broadcast
        broadcast.tidy(ledger.version)
        on_broker = broadcast.on_broker()
        if ledger.version in on_broker:
            return ledger.version
        room = _versions(on_broker) < ledger.task.wire.versions_on_broker and _versions(ledger.published) < ledger.task.wire.versions_held
        if ledger.version not in ledger.published and ledger.published and not room:
            return max(on_broker, key=version_of, default=None)
        self._offer(ledger.version)
        return ledger.version

    def _offer(self, number: int) -> None:
        """Publish one model of the newest version; again, if it had left the broker."""
        ledger = self._ledger
        if number not in ledger.published:
            slowest_bps = self._coordinator.roster.uplinks.least() or 0.0
            self._coordinator.commit(records.Published(version=number, chunk_bytes=chunk_bytes(slowest_bps)))
        self._coordinator.broadcast.version(number)

    def _untrained(self, version: int) -> Iterator[int]:
        """Numbers of the newest version's recombined models that no device has in this round, each published when it is asked for.

        Whoever comes when there are none left shares the first.
        """
        ledger = self._ledger
        if version != ledger.version:
            return
        taken = set(self._coordinator.roster.leases.counts)
        taken |= {ledger.buffer[who].version for who in ledger.arrived}
        for number in (number_of(version, slot) for slot in range(len(ledger.recombined))):
            if number not in taken:
                if number not in self._coordinator.broadcast.fetching:
                    self._offer(number)
                yield number

    def _assign(self, who: str, version: int) -> None:
        ledger = self._ledger
        device, order = ledger.devices[who], ledger.published[version].order
        self._keep_to_limit(who, device)
        level = ledger.level_of(self._density_now(who, device))
        every = ledger.task.restoration.full_model_every
        top = len(order.lengths) - 1
        dtype = self._dtype_now(device, ledger.density_of(level))
        asks_full = bool(every) and level < top and device.ceiling >= 1.0 and device.rounds_since_full + 1 >= every
        deadline_s = max(ledger.task.fleet.min_deadline_s, 3 * self._predicted_round_s(who, version, level, dtype))
        self._coordinator.commit(
            records.Assigned(
                device=who,
                number=max(device.number, restores_of(ledger.term) << RESTORED_NUMBER_SHIFT) + 1,
                version=version,
                epoch=order.epoch,
                level=level,
                dtype=dtype,
                deadline_s=deadline_s,
                evaluate_level=top if asks_full else None,
            )
        )
        lease = device.lease
        if lease is not None:
            self._coordinator.broadcast.assignment(who, lease)
            self._coordinator.emit(Note("assigned", {"device": who, "version": version_of(version), "density": ledger.density_of(level)}))

    def _keep_to_limit(self, who: str, device: Device) -> None:
        """What its owner allows becomes a fact with the next assignment. A device that said nothing yet of its limits has the last ones."""
        allowed = self._coordinator.roster.allowed(who)
        if who in self._coordinator.telemetry and allowed != device.limit_density:
            before = device.density
            self._coordinator.commit(records.Limited(device=who, density=allowed))
            self._coordinator.emit(Note("density limited", {"device": who, "density_from": before, "density": device.density}))

    def _density_now(self, who: str, device: Device) -> float:
        """FedGMR: what restoration has come to. PR-FL: the rule on normalised round times, never below restoration's floor."""
        if self._ledger.task.method.density != "relative":
            return device.density
        fastest_s, mean_s = self._coordinator.roster.rounds.least(), density.mean_round_s(device.full_round_s)
        if fastest_s is None or mean_s is None:
            return device.density
        state = self._ledger.restoration
        raised = state.rho_min if state.rho_min > self._ledger.task.method.ladder[0] else 0.0
        wanted = density.relative_density(fastest_s, mean_s, max(state.minimum.get(who, 0.0), raised))
        return min(wanted, device.ceiling)

    def _dtype_now(self, device: Device, trains: float) -> WireDtype:
        """What the task says; by `auto`, more bits when the link has no more coordinates to carry. Rounds are measured with the fewest."""
        dtypes, order = self._ledger.task.wire.dtypes, self._ledger.order
        if len(dtypes) == 1:
            return dtypes[0]
        least, more = (values.encoded_size(dtype, order.size, order.always_kept) for dtype in dtypes)
        mean_s = density.mean_round_s(device.full_round_s)
        longer_s = None if mean_s is None else mean_s + 8 * (more - least) / device.uplink_bps
        trained_s = self._coordinator.elapsed_s() - self._ledger.began_s if self._ledger.version else 0.0
        return update_dtype(trains, longer_s, trained_s)

    def _predicted_round_s(self, who: str, version: int, level: int, dtype: WireDtype) -> float:
        """Download, training and upload at this level; the downlink is taken to be no slower than the measured uplink."""
        ledger = self._ledger
        order = ledger.published[version].order
        length = ledger.reach(order, level)
        sets = ledger.orders[order.epoch].levels
        down = ledger.published[version].offset(length) + sum(map(len, sets if length == order.size else sets[: level + 1]))
        up = ledger.largest_update_bytes(order, level, dtype)
        train_s = ledger.task.training.local_steps * self._coordinator.step_s.get(who, 0.1)
        return min(8 * (down + up) / ledger.devices[who].uplink_bps + train_s, MAX_ROUND_S)

    def _retire(self, versions: Iterable[int]) -> None:
        """Give up every model that nobody leases, except those of the newest version: the next device will ask for one."""
        leased = self._coordinator.roster.leases.counts
        for version in [v for v in versions if v not in leased and version_of(v) != self._ledger.version]:
            chunks = len(self._ledger.published[version].chunks)
            self._coordinator.commit(records.Retired(version=version))
            self._coordinator.broadcast.gone(version, chunks)


def _memory_density(task: Task, needs: Sequence[int], memory_bytes: int | None) -> float:
    """The largest density that the memory holds; a device that says nothing of it is not bound."""
    return 1.0 if memory_bytes is None else largest_density(needs, densities_of(task), memory_bytes)


def _versions(numbers: Iterable[int]) -> int:
    """How many versions these published models are of: the limits of [wire] speak of versions."""
    return len({version_of(number) for number in numbers})


def restoration_config(task: Task) -> restoration.RestorationConfig:
    """Restoration's settings as its own module takes them."""
    settings = task.restoration
    return restoration.RestorationConfig(
        trigger=settings.trigger,
        step=settings.step,
        delta_density=settings.delta_density,
        patience=settings.patience,
        min_delta=settings.min_delta,
        every=settings.every,
        ladder=(1.0,) if task.method.density == "full" else task.method.ladder,
    )
