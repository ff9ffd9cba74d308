"""A run that was restored from a backup: terms and assignment numbers above all that devices can have heard since."""

from __future__ import annotations

import pytest

from regrow.claim import RESTORED_NUMBER_SHIFT, restores_of, term_above, term_after_restore
from regrow.errors import PeerError
from regrow.ledger import Ledger
from regrow.uploads import TooLateError, _check_given

LARGEST = 2**53  # of a term or a number on the wire
NONCE = 2**31 - 1


def test_a_restored_term_is_above_every_one_that_the_lost_past_can_have_had() -> None:
    term = term_above(0, 5)
    assert restores_of(term) == 0
    lost = term
    for _ in range(2**12 - 2):
        lost = term_above(lost, NONCE)
    restored = term_after_restore(term)
    assert term_above(restored, 0) > restored > lost
    assert restores_of(restored) == restores_of(term_above(restored, NONCE)) == 1
    again = term_after_restore(term_above(restored, NONCE))
    assert restores_of(again) == 2
    for _ in range(500):
        again = term_after_restore(again)
    assert again < LARGEST
    assert restores_of(again) << RESTORED_NUMBER_SHIFT < LARGEST


@pytest.mark.parametrize(("assignment", "newest", "fine"), [(3, 3, True), (2, 3, True), (4, 3, False), (1 << 30, 3, False)])
def test_without_a_restore_what_was_never_given_is_the_devices_fault(assignment: int, newest: int, fine: bool) -> None:
    ledger = Ledger.__new__(Ledger)
    ledger.term = term_above(0, 1)
    if fine:
        _check_given(ledger, assignment, newest)
        return
    with pytest.raises(PeerError, match="was never given") as caught:
        _check_given(ledger, assignment, newest)
    assert not isinstance(caught.value, TooLateError)


@pytest.mark.parametrize(
    ("assignment", "newest", "fine"),
    [
        (3, 3, True),  # as the backup knows it
        (4, 3, False),  # given after the backup, before the device has new work
        (4, (1 << 30) + 1, False),  # the same, later: version numbers may mean other models by now
        ((1 << 30) + 1, (1 << 30) + 2, True),
    ],
)
def test_after_a_restore_the_lost_past_is_too_late_and_nobodys_fault(assignment: int, newest: int, fine: bool) -> None:
    ledger = Ledger.__new__(Ledger)
    ledger.term = term_above(term_after_restore(term_above(0, 1)), 1)
    if fine:
        _check_given(ledger, assignment, newest)
        return
    with pytest.raises(TooLateError, match="restored from a backup"):
        _check_given(ledger, assignment, newest)
