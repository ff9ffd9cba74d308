"""How many bits a value of an update gets: `up = "auto"` in [wire].

The next byte of an update buys more as a coordinate than as a bit: at equal bytes, int4 on many coordinates trains better than float32 on
few (`python bench/bits.py`; docs/simulate.md, "Coordinates or bits"). What rounding loses is sent later (error feedback), what is not
trained is never learned. So a device sends int4 while it trains a part of the model; at density 1 there are no more coordinates to buy, and
it gets int8 by the rule of the `pace` trigger: as soon as a round with int8 is short against the time that training has lasted. More bits
than these buy nothing that can be seen: int8 leaves 0.02 % of a delta's square sum to the next update.
"""

from __future__ import annotations

from regrow.restoration import PACE_ROUNDS
from regrow.values import WireDtype

AUTO_DTYPES: tuple[WireDtype, WireDtype] = ("int4", "int8")


def update_dtype(density: float, int8_round_s: float | None, elapsed_s: float) -> WireDtype:
    """What the next update of a device travels as.

    Args:
        density: what it will train, (0, 1].
        int8_round_s: its mean round with a full model and int8, seconds; None before the first.
        elapsed_s: since the first aggregation.
    """
    few, more = AUTO_DTYPES
    if density < 1.0 or int8_round_s is None:
        return few
    return more if PACE_ROUNDS * int8_round_s <= elapsed_s else few
