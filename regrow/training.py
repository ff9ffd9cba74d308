"""From what was fetched to a training job, and from the job's result to an update."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regrow import outgoing, personal, wire
from regrow.fetching import Fetched
from regrow.machine import Train, Trained


def job(number: int, fetched: Fetched, before: outgoing.Outgoing | None = None) -> Train:
    """What the runtime must train, and which levels it must score before. before: the update before, whose personal mask goes on.

    With personal masks the device's level is scored within the mask.
    """
    assignment, manifest = fetched.wanted.assignment, fetched.wanted.manifest
    lengths, own = manifest.lengths, assignment.level
    kept = _personal_mask(fetched, before)
    length = lengths[own] if kept is None else kept.size
    evaluate = {own: length}
    if assignment.evaluate_level is not None and assignment.evaluate_level != own:
        evaluate[assignment.evaluate_level] = lengths[assignment.evaluate_level]
    return Train(
        number=number,
        level=own,
        programs=fetched.programs,
        values=fetched.base,
        coordinates=fetched.coordinates,
        length=length,
        evaluate=dict(sorted(evaluate.items())),
        steps=assignment.steps,
        batch=assignment.batch,
        learning_rate=assignment.learning_rate,
        seed=assignment.seed,
        widths=dict(enumerate(lengths[: own + 1])) if manifest.local == "ordered_dropout" else {},
        kept=kept,
    )


def update(trained: Trained, fetched: Fetched, run: str, last: outgoing.Outgoing | None) -> outgoing.Outgoing:
    """The update that a job has made. last: the device's last one, whose number it follows; in one run debt and mask go on.

    Raises:
        PeerError: training gave a number that is not finite.
    """
    assignment, manifest = fetched.wanted.assignment, fetched.wanted.manifest
    before = last if last is not None and last.run == run else None
    kept = _personal_mask(fetched, before)
    length = manifest.lengths[assignment.level] if kept is None else kept.size
    if kept is not None:
        kept = personal.pruned(trained.values, kept, manifest.always_kept, manifest.lengths[assignment.level])
    return outgoing.make(
        assignment,
        run=run,
        sequence=0 if last is None else last.sequence + 1,
        trained=trained.values,
        base=fetched.base[:length],
        coordinates=fetched.coordinates[:length],
        size=fetched.layout.size,
        always_kept=manifest.always_kept,
        owed=before.owed if before is not None else None,
        examples=trained.examples,
        loss=trained.loss,
        seconds=trained.seconds,
        scores=[wire.Score(*score) for score in trained.scores],
        kept=kept,
    )


def _personal_mask(fetched: Fetched, before: outgoing.Outgoing | None) -> NDArray[np.bool_] | None:
    """bool [n], what this round trains within; None where the task knows no personal masks."""
    manifest, level = fetched.wanted.manifest, fetched.wanted.assignment.level
    if manifest.local != "personal_masks":
        return None
    saved = before.mask if before is not None else b""
    return personal.start(saved, fetched.base, fetched.coordinates, manifest.always_kept, manifest.lengths[level])
