"""From what was fetched to a training job, and from the job's result to an update."""

from __future__ import annotations

from regrow import outgoing, wire
from regrow.fetching import Fetched
from regrow.machine import Train, Trained


def job(number: int, fetched: Fetched) -> Train:
    """What the runtime must train, and which levels it must score before."""
    assignment, lengths = fetched.wanted.assignment, fetched.wanted.manifest.lengths
    levels = {assignment.level} | ({assignment.evaluate_level} if assignment.evaluate_level is not None else set())
    return Train(
        number=number,
        level=assignment.level,
        programs=fetched.programs,
        values=fetched.base,
        coordinates=fetched.coordinates,
        length=lengths[assignment.level],
        evaluate={level: lengths[level] for level in sorted(levels)},
        steps=assignment.steps,
        batch=assignment.batch,
        learning_rate=assignment.learning_rate,
        seed=assignment.seed,
    )


def update(trained: Trained, fetched: Fetched, run: str, sequence: int, before: outgoing.Outgoing | None) -> outgoing.Outgoing:
    """The update that a job has made. before: the one before it, whose rounding is still owed.

    Raises:
        PeerError: training gave a number that is not finite.
    """
    assignment, manifest = fetched.wanted.assignment, fetched.wanted.manifest
    length = manifest.lengths[assignment.level]
    return outgoing.make(
        assignment,
        run=run,
        sequence=sequence,
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
    )
