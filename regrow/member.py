"""What the ledger knows of one device: its link, its density, its lease, and what became of its updates."""

from __future__ import annotations

from dataclasses import dataclass, field

from regrow import values
from regrow.density import Bound
from regrow.wire import Score


@dataclass(frozen=True, slots=True)
class Lease:
    """`version`: the number of the published model, as in records.Assigned."""

    number: int
    version: int
    epoch: int
    level: int
    deadline_s: float
    evaluate_level: int | None = None
    dtype: values.WireDtype | None = None


@dataclass(slots=True)
class Device:
    """What is known of one device, see records.Joined. `last_*` answer a repeated update.

    Rejections in a row lead to exclusion, and so does `declined`, until another boot. `uncut_density` is the density that it would have
    with any memory and without limits of its owner (`limit_density`): another start may find more memory, and limits come and go.
    """

    install: str
    uplink_bps: float
    density: float
    number: int = 0
    lease: Lease | None = None
    last_sequence: int = -1
    last_accepted: bool = False
    last_reason: str = ""
    last_blamed: bool = False
    updates: int = 0
    rejections: int = 0
    declined: bool = False
    rounds_in_epoch: int = 0
    rounds_since_full: int = 0
    first_density: float = 0.0
    step_s: float | None = None
    memory_density: float = 1.0
    limit_density: float = 1.0
    bound_by: Bound = "link"
    uncut_density: float = 0.0
    uncut_by: Bound = "link"
    full_round_s: list[float] = field(default_factory=list)
    reports: dict[int, Score] = field(default_factory=dict)
    boot: str = ""

    def __post_init__(self) -> None:
        self.uncut_density = self.uncut_density or self.density  # logs and snapshots of before do not know it

    @property
    def ceiling(self) -> float:
        """The largest density that memory and owner allow."""
        return min(self.memory_density, self.limit_density)

    def set_density(self, density: float) -> None:
        """It was raised, or round times have decided; what memory and limits have cut off is still to come."""
        cut = density >= self.ceiling
        self.density, self.uncut_density = density, max(density, self.uncut_density) if cut else density

    def cut_to_ceiling(self) -> None:
        """Another start may have other memory, and limits change. Memory that holds no level leaves the density: it gets no work."""
        if self.memory_density > 0.0:
            self.density = min(self.uncut_density, self.ceiling)
        self.bound_by = "memory" if self.memory_density < self.uncut_density else self.uncut_by
